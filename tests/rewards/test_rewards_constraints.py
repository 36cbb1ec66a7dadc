"""Length shaping against values computed by hand."""

import pytest

from lit_posttrain.rewards import LengthPenalty, OverlongPenalty
from lit_posttrain.types import Sample


def score(function, length):
    return function([Sample("p", "c", [1] * length, "stop", None, {})])[0].score


@pytest.mark.parametrize(
    ("length", "expected"), [(0, 0), (16, 0), (17, -0.25), (18, -0.5), (20, -1), (21, -1), (99, -1)]
)
def test_overlong_gold(length, expected):
    assert score(OverlongPenalty(max_length=20, cache=4), length) == expected


@pytest.mark.parametrize("cache", [0, -1, 21])
def test_overlong_range(cache):
    with pytest.raises(ValueError, match="cache"):
        OverlongPenalty(max_length=20, cache=cache)


@pytest.mark.parametrize(
    ("side", "length", "expected"),
    [("above", 10, 0), ("above", 12, -0.5), ("above", 8, 0), ("above", 99, -2), ("below", 8, -0.5), ("below", 12, 0),
     ("below", 0, -2), ("both", 8, -0.5), ("both", 12, -0.5), ("both", 10, 0)],
)  # fmt: skip
def test_length_penalty(side, length, expected):
    assert score(LengthPenalty(target=10, side=side, per_token=0.25, maximum=2.0), length) == expected


@pytest.mark.parametrize("wrong", [{"target": -1}, {"target": 1, "per_token": 0.0}, {"target": 1, "maximum": -1.0}])
def test_length_penalty_range(wrong):
    with pytest.raises(ValueError, match="LengthPenalty"):
        LengthPenalty(**wrong)
