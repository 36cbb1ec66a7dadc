"""Arithmetic tasks for :class:`~lit_posttrain.data.tasks.PythonTask`, small enough for a tiny model on a CPU."""

import random
from typing import Any


def largest_number(rng: random.Random, count: int = 5, maximum: int = 99) -> dict[str, Any]:
    """Ask for the largest: ``What is the largest of 12, 55, 7, 90 and 31?``.

    Args:
        rng: Source of the numbers.
        count: How many different numbers, at least 2.
        maximum: The numbers are drawn from 1 to this.

    Raises:
        ValueError: There are not ``count`` different numbers.
    """
    numbers = _different(rng, count, 1, maximum)
    return {"question": f"What is the largest of {_listed(numbers)}?", "answer": str(max(numbers))}


def sort_numbers(rng: random.Random, count: int = 3, maximum: int = 99) -> dict[str, Any]:
    """Ask for an order: ``Sort 31, 7 and 55 from smallest to largest.``, answered ``7, 31, 55``.

    Args:
        rng: Source of the numbers.
        count: How many different numbers, at least 2.
        maximum: The numbers are drawn from 1 to this.

    Raises:
        ValueError: There are not ``count`` different numbers.
    """
    numbers = _different(rng, count, 1, maximum)
    answer = ", ".join(map(str, sorted(numbers)))
    return {"question": f"Sort {_listed(numbers)} from smallest to largest.", "answer": answer}


def addition(rng: random.Random, digits: int = 2, terms: int = 2) -> dict[str, Any]:
    """Ask for a sum: ``What is 12 + 55?``.

    Args:
        rng: Source of the numbers.
        digits: Digits of every number, at least 1.
        terms: How many different numbers, at least 2.

    Raises:
        ValueError: There are not ``terms`` different numbers.
    """
    if digits < 1:
        raise ValueError(f"digits: must be at least 1, got {digits}")
    numbers = _different(rng, terms, 10 ** (digits - 1), 10**digits - 1)
    return {"question": f"What is {' + '.join(map(str, numbers))}?", "answer": str(sum(numbers))}


def _different(rng: random.Random, count: int, low: int, high: int) -> list[int]:
    if not 2 <= count <= high - low + 1:
        raise ValueError(f"cannot draw {count} different numbers from {low} to {high}; at least 2 are needed")
    return rng.sample(range(low, high + 1), count)


def _listed(numbers: list[int]) -> str:
    return f"{', '.join(map(str, numbers[:-1]))} and {numbers[-1]}"
