"""Randomness as a function of (seed, purpose, counters), never of history: a resume needs counters, not states."""

import hashlib
import os

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lit_posttrain.types import SamplingKey


def key(seed: int, purpose: str, *counters: int) -> int:
    """A 63-bit key that differs whenever any of its arguments does."""
    text = "\x1f".join((str(seed), purpose, *map(str, counters)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, purpose: str, *counters: int) -> torch.Generator:
    """A CPU generator for this purpose and these counters alone."""
    return torch.Generator().manual_seed(key(seed, purpose, *counters))


def permutation(n: int, seed: int, purpose: str, *counters: int) -> Int[Tensor, " n"]:
    """A random order of ``range(n)``."""
    return torch.randperm(n, generator=generator(seed, purpose, *counters))


def uniforms(sampling_key: SamplingKey, n: int) -> Float[Tensor, " n"]:
    """The first ``n`` uniforms in [0, 1) of one completion, float64; a longer call begins with a shorter one's."""
    bits = np.random.Philox(key=key(*_flat(sampling_key)))
    return torch.from_numpy(np.random.Generator(bits).random(n))


def _flat(k: SamplingKey) -> tuple[int, str, int, int, int]:
    return k.seed, k.purpose, k.iteration, k.prompt_id, k.sample


def run_seed() -> int:
    """The run's seed as Lightning's ``seed_everything`` recorded it.

    Raises:
        ValueError: No seed was set.
    """
    seed = os.environ.get("PL_GLOBAL_SEED")
    if seed is None:
        raise ValueError(
            "seed_everything: set it to an integer in the YAML; every random choice of a run derives from it"
        )
    return int(seed)


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch's, numpy's and Python's global generators for one step, for code that draws from them (dropout)."""
    import random

    value = key(seed, "step", step, rank)
    torch.manual_seed(value)
    np.random.seed(value % 2**32)
    random.seed(value)
