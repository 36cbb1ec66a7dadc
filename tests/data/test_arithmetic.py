import random
import re
from collections.abc import Callable
from typing import Any

import pytest

from lit_posttrain.data.arithmetic import addition, largest_number, sort_numbers


def numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


@pytest.mark.parametrize("seed", range(50))
def test_the_answers_are_right(seed: int) -> None:
    rng = random.Random(seed)
    row = largest_number(rng, count=4, maximum=9)
    assert re.fullmatch(r"What is the largest of \d, \d, \d and \d\?", row["question"])
    assert [int(row["answer"])] == sorted(numbers(row["question"]))[-1:]
    row = sort_numbers(rng)
    assert re.fullmatch(r"Sort \d+, \d+ and \d+ from smallest to largest\.", row["question"])
    assert numbers(row["answer"]) == sorted(numbers(row["question"]))
    assert re.fullmatch(r"\d+, \d+, \d+", row["answer"])
    row = addition(rng, digits=3, terms=3)
    assert re.fullmatch(r"What is \d{3} \+ \d{3} \+ \d{3}\?", row["question"])
    assert int(row["answer"]) == sum(numbers(row["question"]))


@pytest.mark.parametrize("function", [largest_number, sort_numbers])
def test_numbers_are_different_and_reach_both_ends(function: Callable[..., dict[str, Any]]) -> None:
    rng = random.Random(0)
    rows = [numbers(function(rng, count=3, maximum=5)["question"]) for _ in range(200)]
    assert all(len(set(row)) == 3 for row in rows)
    assert {n for row in rows for n in row} == {1, 2, 3, 4, 5}
    assert sorted(numbers(function(rng, count=5, maximum=5)["question"])) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (largest_number, {"count": 6, "maximum": 5}),
        (sort_numbers, {"count": 1}),
        (addition, {"digits": 1, "terms": 10}),
        (addition, {"digits": 0}),
    ],
)
def test_what_cannot_be_drawn(function: Callable[..., dict[str, Any]], arguments: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"different numbers|digits: must be at least 1"):
        function(random.Random(0), **arguments)
