"""From prompts to a judged rollout: the rows that are trained on, with what is known of each."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lit_posttrain import randomness
from lit_posttrain.batching import pad_sequences
from lit_posttrain.rewards.base import Judgement
from lit_posttrain.rollout.engine import RolloutEngine, SamplingParams
from lit_posttrain.rollout.stops import EXACT_TEXT
from lit_posttrain.sharding import world_size
from lit_posttrain.types import Completion, Prompt, Sample, SamplingKey, Sequences


class Rollout(NamedTuple):
    """One iteration's samples on this rank. Rows ``i * g .. (i + 1) * g`` answer prompt ``i``.

    Attributes:
        prompts: The prompts.
        completions: What the engine returned, one a row.
        samples: The same as reward functions saw it.
        judgement: Their verdicts.
        sequences: Padded rows.
        mask: Scored completion tokens of valid rows.
        engine_log_probs: The engine's own log-probs, 0 outside completions.
        rows: Number of each row within the iteration's batch over all ranks.
    """

    prompts: list[Prompt]
    completions: list[Completion]
    samples: list[Sample]
    judgement: Judgement
    sequences: Sequences
    mask: Bool[Tensor, "b t"]
    engine_log_probs: Float[Tensor, "b t"]
    rows: list[int]


def generate(
    engine: RolloutEngine,
    prompts: Sequence[Prompt],
    samples: int,
    sampling: SamplingParams,
    seed: int,
    purpose: str,
    iteration: int,
    tick: Callable[[int], None],
) -> list[Completion]:
    """``samples`` completions of each prompt, those of one prompt next to each other."""
    keys = [SamplingKey(seed, purpose, iteration, p.id, i) for p in prompts for i in range(samples)]
    ids = [p.token_ids for p in prompts for _ in range(samples)]
    return engine.generate(ids, sampling, keys, tick)


def to_samples(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    completions: Sequence[Completion],
    stop_token_ids: Sequence[int],
) -> list[Sample]:
    """What reward functions see: the text without its final stop token, the template's prefill in front.

    Special tokens inside the text stay visible, so that a missing or repeated end token cannot hide.
    """
    each = len(completions) // max(len(prompts), 1)
    result = []
    for i, completion in enumerate(completions):
        prompt, ids = prompts[i // each], completion.token_ids
        ended = completion.stop_reason == "stop" and ids[-1] in stop_token_ids
        text = str(tokenizer.decode(ids[:-1] if ended else ids, **EXACT_TEXT))
        result.append(
            Sample(
                prompt=prompt.prompt,
                completion=prompt.prefill + text,
                token_ids=ids,
                stop_reason=completion.stop_reason,
                answer=prompt.answer,
                columns=prompt.columns,
            )
        )
    return result


def assemble(
    prompts: list[Prompt],
    positions: Sequence[int],
    completions: list[Completion],
    samples: list[Sample],
    judgement: Judgement,
) -> Rollout:
    """Rows, masks and log-probs of judged completions. A sample without a valid verdict counts nowhere."""
    each = len(completions) // len(prompts)
    sequences = pad_sequences(
        [prompts[i // each].token_ids for i in range(len(completions))], [c.token_ids for c in completions]
    )
    log_probs = torch.zeros(sequences.ids.shape[0], sequences.ids.shape[1] - 1)
    for row, completion in enumerate(completions):
        first = len(prompts[row // each].token_ids) - 1
        log_probs[row, first : first + len(completion.log_probs)] = torch.tensor(completion.log_probs)
    return Rollout(
        prompts=prompts,
        completions=completions,
        samples=samples,
        judgement=judgement,
        sequences=sequences,
        mask=sequences.completion_mask() & judgement.valid[:, None],
        engine_log_probs=log_probs,
        rows=[position * each + i for position in positions for i in range(each)],
    )


def minibatch_rows(rollout: Rollout, iteration: int, epoch: int, number: int, of: int) -> Int[Tensor, " n"]:
    """This rank's rows of a random share of the whole batch, the same whatever the world size."""
    if of == 1:
        return torch.arange(len(rollout.rows))
    total = len(rollout.rows) * world_size()
    order = randomness.permutation(total, randomness.run_seed(), "minibatches", iteration, epoch)
    chosen = set(order.view(of, -1)[number].tolist())
    return torch.tensor([i for i, row in enumerate(rollout.rows) if row in chosen], dtype=torch.long)
