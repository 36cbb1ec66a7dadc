"""One seed a core, each with one thread, so that an experiment's figures do not depend on the number of cores."""

import multiprocessing
import os
from collections.abc import Callable
from typing import Any

import torch

Seed = Callable[[int, bool], dict[str, Any]]


def single(one: Seed, seed: int, quick: bool) -> dict[str, Any]:
    """A seed's figures, with one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return one(seed, quick)
    finally:
        torch.set_num_threads(threads)


def one_a_core(one: Seed, seeds: list[int], quick: bool) -> list[dict[str, Any]]:
    """The figures of every seed.

    Args:
        one: A module's function that gives a seed's figures.
        seeds: Which.
        quick: Handed on.
    """
    if len(seeds) == 1:
        return [single(one, seeds[0], quick)]
    with multiprocessing.get_context("spawn").Pool(min(len(seeds), os.cpu_count() or 1)) as pool:
        return pool.starmap(single, [(one, seed, quick) for seed in seeds], chunksize=1)
