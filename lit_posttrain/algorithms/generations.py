"""Completions of held-out prompts during an evaluation: shown as text, and what KL is estimated on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lit_posttrain.algorithms.samples import code_block
from lit_posttrain.batching import pad_sequences
from lit_posttrain.rollout.collect import generate
from lit_posttrain.rollout.engine import RolloutEngine, SamplingParams
from lit_posttrain.types import Completion, Example, Prompt, Sequences


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """Completions that each evaluation samples; the same prompts meet the same random numbers at every one.

    Args:
        prompts: How many held-out prompts are answered, the first ones; 0 for none.
        max_new_tokens: Answers are cut after this many tokens.
        temperature: Sampling temperature; 0 takes the likeliest token.
        shown: How many of the answers are shown as text in TensorBoard.
    """

    prompts: int = 8
    max_new_tokens: int = 128
    temperature: float = 1.0
    shown: int = 8

    def __post_init__(self):
        """Check the ranges."""
        for name in ("prompts", "shown"):
            if getattr(self, name) < 0:
                raise ValueError(f"model.init_args.generations.{name}: must not be negative, is {getattr(self, name)}")
        self.sampling()

    def sampling(self) -> SamplingParams:
        """As engines read it."""
        return SamplingParams(max_new_tokens=self.max_new_tokens, temperature=self.temperature)


def as_prompts(examples: Sequence[Example], first: int = 0) -> list[Prompt]:
    """Examples as prompts that engines and rewards know; their ids count from ``first``."""
    return [
        Prompt(first + i, "", "", example.prompt, "", None, {"origin": example.origin})
        for i, example in enumerate(examples)
    ]


def answer(
    engine: RolloutEngine, examples: Sequence[Example], config: GenerationConfig, seed: int, tick: Callable[[int], None]
) -> list[Completion]:
    """One completion of each prompt. Under sharding every rank calls it, perhaps with no examples."""
    return generate(engine, as_prompts(examples), 1, config.sampling(), seed, "generations", 0, tick)


def as_sequences(examples: Sequence[Example], completions: Sequence[Completion]) -> tuple[Sequences, Tensor]:
    """Prompts with their sampled answers, and the mask of the answers."""
    sequences = pad_sequences([e.prompt for e in examples], [c.token_ids for c in completions])
    mask = sequences.completion_mask() if len(examples) else torch.zeros(0, 0, dtype=torch.bool)
    return sequences, mask


def as_text(tokenizer: Any, examples: Sequence[Example], completions: Sequence[Completion]) -> str:
    """Prompts and answers as markdown."""
    parts = []
    for example, completion in zip(examples, completions, strict=True):
        cut = "" if completion.stop_reason == "stop" else " (cut at the limit)"
        prompt, text = (tokenizer.decode(ids) for ids in (example.prompt, completion.token_ids))
        parts += [f"**prompt**\n\n{code_block(prompt)}", f"**answer**{cut}\n\n{code_block(text)}", "---"]
    return "\n\n".join(parts)
