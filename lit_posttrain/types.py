"""The tensors and records that pass between layers. Dims: ``b`` rows, ``s`` tokens, ``t = s - 1`` scored positions.

Everything that crosses a DataLoader is a NamedTuple: Lightning moves those between devices, and refuses
frozen dataclasses.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from lit_posttrain.functional.masked import Totals

StopReason = Literal["stop", "length"]
VerdictStatus = Literal["scored", "invalid", "not_applicable"]


class Sequences(NamedTuple):
    """Right-padded rows ``[prompt | completion | padding]``; every mask is built from lengths, never from token ids.

    Attributes:
        ids: Token ids; what stands in the padding is irrelevant.
        prompt_lengths: Tokens of the prompt, at least 1.
        lengths: Tokens of prompt and completion together.
    """

    ids: Int[Tensor, "b s"]
    prompt_lengths: Int[Tensor, " b"]
    lengths: Int[Tensor, " b"]

    def attention_mask(self) -> Bool[Tensor, "b s"]:
        """True at real tokens."""
        return torch.arange(self.ids.shape[1], device=self.ids.device) < self.lengths[:, None]

    def completion_mask(self) -> Bool[Tensor, "b t"]:
        """True at position *i* where token *i + 1* belongs to the completion (its end token included)."""
        scored = torch.arange(1, self.ids.shape[1], device=self.ids.device)
        return (scored >= self.prompt_lengths[:, None]) & (scored < self.lengths[:, None])


class MicroBatch(NamedTuple):
    """Rows that go through the network together.

    Attributes:
        sequences: The rows, trimmed to the longest of them.
        mask: Which scored positions count in the loss (a subset of ``sequences.completion_mask()``).
        columns: Per-token tensors ``[b, t]`` and per-row tensors ``[b]`` by name (``advantages``,
            ``old_log_probs``, ``ref_log_probs``, ...), rows in the order of ``sequences``.
        rows: Index of each row in the batch that was split.
    """

    sequences: Sequences
    mask: Bool[Tensor, "b t"]
    columns: dict[str, Tensor]
    rows: Int[Tensor, " b"]


class Example(NamedTuple):
    """A prompt and its completions, tokenised: what a preference, a demonstration or a judged chain of steps becomes.

    Attributes:
        prompt: Tokens that every completion is conditioned on, at least one.
        completions: Tokens of each completion, its end token included.
        masks: Which of them count in the loss.
        columns: By name, one number a completion (``label``, ``preference``, ...) or one a completion token
            (``step_labels``).
        origin: Where it stands, for messages.
        messages: The prompt as a conversation, where it is one: for judges that read text.
    """

    prompt: list[int]
    completions: list[list[int]]
    masks: list[list[bool]]
    columns: dict[str, list[float] | list[list[float]]]
    origin: str
    messages: list[dict[str, str]] | None = None


class ExampleBatch(NamedTuple):
    """This rank's examples of one optimizer step; the rows of an example follow one another, in its own order.

    Attributes:
        sequences: One row a completion.
        mask: Scored positions that count.
        columns: Per-row ``[b]`` and per-token ``[b, t]`` tensors; ``group`` is the number of a row's example in the
            batch, ``row`` the number of the row among all completions of the split.
    """

    sequences: Sequences
    mask: Bool[Tensor, "b t"]
    columns: dict[str, Tensor]


class Prompt(NamedTuple):
    """One verifiable question, rendered and tokenised.

    Attributes:
        id: Stable number of the prompt within its source; keys the randomness of its samples.
        question: The bare question, whose hash decides between train and held-out.
        prompt: What reward functions receive: the rendered text, or the message list of a chat prompt.
        token_ids: What the model is conditioned on.
        prefill: Text that the template already wrote of the answer (``<think>``, say); rewards see it re-attached.
        answer: The gold answer as text, or None.
        columns: Every column of the dataset row, handed on to reward functions.
    """

    id: int
    question: str
    prompt: str | list[dict[str, str]]
    token_ids: list[int]
    prefill: str
    answer: str | None
    columns: dict[str, Any]


class PromptBatch(NamedTuple):
    """This rank's prompts of one iteration.

    Attributes:
        prompts: The prompts, in order.
        positions: Position of each within the whole iteration's batch over all ranks.
    """

    prompts: list[Prompt]
    positions: list[int]


class SamplingKey(NamedTuple):
    """Names the uniforms of one completion: layout, batch composition and world size play no part."""

    seed: int
    purpose: str
    iteration: int
    prompt_id: int
    sample: int


class Completion(NamedTuple):
    """What an engine returns for one (prompt, key).

    Attributes:
        token_ids: Sampled tokens, the stop token included.
        log_probs: Log-probability of each at the sampling temperature over the full vocabulary.
        stop_reason: ``stop`` (a stop token or stop string) or ``length`` (cut at the limit).
        weight_version: ``sync`` calls the engine had seen.
    """

    token_ids: list[int]
    log_probs: list[float]
    stop_reason: StopReason
    weight_version: int


class Sample(NamedTuple):
    """One completion as reward functions see it.

    Attributes:
        prompt: Text or messages, as in ``Prompt.prompt``.
        completion: Decoded text with the template's prefill in front and without the final stop token.
        token_ids: The sampled ids, untouched.
        stop_reason: ``stop`` or ``length``.
        answer: Gold answer as text, or None.
        columns: Every dataset column of the prompt.
    """

    prompt: str | list[dict[str, str]]
    completion: str
    token_ids: list[int]
    stop_reason: StopReason
    answer: str | None
    columns: dict[str, Any]


class Verdict(NamedTuple):
    """A reward function's word on one sample.

    Attributes:
        score: The raw score before weighting; 0.0 where ``status`` is not ``scored``.
        status: ``scored``; ``invalid`` when the infrastructure failed (the sample leaves mean, std and loss);
            ``not_applicable`` when the function does not judge this sample.
        reason: Why an answer scored as it did, or why there is no score; counted in the logs.
    """

    score: float
    status: VerdictStatus = "scored"
    reason: str = ""


class Loss(NamedTuple):
    """One micro-batch's share of the step's loss.

    Attributes:
        loss: Scalar with gradient; shares add up over micro-batches and ranks.
        metrics: Detached scalars that add up likewise.
        extremes: Detached scalars of which the largest counts.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    extremes: dict[str, Tensor]


class Stream(NamedTuple):
    """Micro-batches that an optimizer step goes through with one loss; the gradients of all its streams add up.

    Attributes:
        name: In logs.
        micro_batches: This rank's share.
        totals: Counts of the whole step over all ranks, known before the first backward.
        loss: Called on each micro-batch with ``totals``.
        idle_columns: What columns an idle micro-batch needs.
        done: Called behind the last micro-batch, before the next stream begins; may be collective.
    """

    name: str
    micro_batches: Sequence[MicroBatch]
    totals: Totals
    loss: Callable[[MicroBatch, Totals], Loss]
    idle_columns: dict[str, Tensor]
    done: Callable[[], None] | None = None


class StepResult(NamedTuple):
    """What one optimizer step did, reduced over micro-batches and ranks.

    Attributes:
        metrics: Means over the step's tokens or sequences, ``loss`` among them.
        extremes: Largest values.
        grad_norm: Norm before clipping, over all parameter groups.
        applied: False where the gradient was not finite and the step was left out.
    """

    metrics: dict[str, float]
    extremes: dict[str, float]
    grad_norm: float
    applied: bool
