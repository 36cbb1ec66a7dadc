"""The seam between algorithms and whatever generates: tokens in, tokens out, never text."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from lit_posttrain.batching import pad_sequences
from lit_posttrain.policy import Policy
from lit_posttrain.types import Completion, SamplingKey, Sequences


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How completions are drawn.

    Top-p, top-k, min-p and repetition penalties are not offered: they change the policy that samples into another
    than the one that is scored.

    Args:
        max_new_tokens: Completions are cut after this many tokens.
        temperature: Logits are divided by it, at rollout and in every log-probability alike.
        stop_token_ids: Ids that end a completion; the model's own end tokens by default.
        stop_strings: Texts that end a completion; they stay part of it.
    """

    max_new_tokens: int
    temperature: float = 1.0
    stop_token_ids: list[int] | None = None
    stop_strings: list[str] = field(default_factory=list)

    def __post_init__(self):
        """Check the ranges."""
        if self.max_new_tokens < 1:
            raise ValueError(f"sampling.max_new_tokens: must be at least 1, is {self.max_new_tokens}")
        if self.temperature < 0:
            raise ValueError(f"sampling.temperature: must not be negative, is {self.temperature}")
        if any(not s for s in self.stop_strings):
            raise ValueError("sampling.stop_strings: an empty string would stop every completion at once; remove it")

    def stop_ids(self, of_model: list[int]) -> list[int]:
        """Ids that end a completion: those given here, else ``of_model``."""
        return of_model if self.stop_token_ids is None else self.stop_token_ids


class RolloutEngine(ABC):
    """Generates completions with the policy's weights of the last ``sync``."""

    @abstractmethod
    def sync(self, policy: Policy) -> None:
        """Take over the policy's present weights. Under sharding a collective that every rank enters."""

    @abstractmethod
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        keys: Sequence[SamplingKey],
        tick: Callable[[int], None] | None = None,
    ) -> list[Completion]:
        """One completion for each (prompt, key), in their order.

        The same prompt, key and weights give the same tokens (fp32) whatever else is in the batch.

        Args:
            prompts: Token ids of each prompt; samples of one prompt repeat it.
            sampling: Temperature, limits and stops.
            keys: Name the uniforms of each completion.
            tick: Called after each token with the number of completions that finished at it; may raise to abort.
        """

    @abstractmethod
    def bind(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Give the engine the tokenizer, which it needs for stop strings alone."""

    def rest(self) -> None:
        """Free memory that only generating needs; ``sync`` comes before the next ``generate``."""
        return None

    def close(self) -> None:
        """Release what the engine holds."""
        return None


def tried(engine: RolloutEngine, policy: Policy) -> tuple[Sequences, list[Completion]]:
    """What an engine makes of a small example of the policy it follows: rows and completions.

    Raises:
        FloatingPointError: The policy's weights are not finite.
        ValueError: The engine, or the architecture's own code, trips over it.
    """
    size = policy.hf_config.get_text_config().vocab_size
    prompts = [[i % size for i in ids] for ids in ((5, 6, 7), (5, 6, 7), (8, 9))]
    keys = [SamplingKey(0, "rollout self-test", 0, 0, i) for i in range(3)]
    try:
        drawn = engine.generate(prompts, SamplingParams(max_new_tokens=3, stop_token_ids=[]), keys)
    except FloatingPointError:
        raise
    except Exception as error:  # the architecture's own code may trip over anything
        raise ValueError(str(error)) from error
    return pad_sequences(prompts, [c.token_ids for c in drawn]), drawn
