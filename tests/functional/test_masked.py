import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lit_posttrain.functional.masked import (
    Aggregation,
    Totals,
    aggregate,
    masked_mean,
    masked_variance,
    masked_whiten,
)

MODES: list[Aggregation] = ["sequence_mean", "token_mean", "constant"]
GARBAGE = [math.nan, math.inf, -math.inf, 1e30]


def ragged(seed: int, b: int = 6, t: int = 7) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, t + 1, (b,), generator=g)
    return torch.randn(b, t, dtype=torch.float64, generator=g), torch.arange(t) < lengths[:, None]


def totals_of(mask: Tensor) -> Totals:
    return Totals(float(mask.any(1).sum()), float(mask.sum()))


def by_loops(x: Tensor, mask: Tensor, mode: str, length: int) -> float:
    rows = [[v for v, m in zip(r, k, strict=True) if m] for r, k in zip(x.tolist(), mask.tolist(), strict=True)]
    rows = [r for r in rows if r]
    if not rows:
        return 0.0
    if mode == "sequence_mean":
        return sum(sum(r) / len(r) for r in rows) / len(rows)
    if mode == "token_mean":
        return sum(map(sum, rows)) / sum(map(len, rows))
    return sum(map(sum, rows)) / (len(rows) * length)


@pytest.mark.parametrize(
    ("mode", "expected"), [("sequence_mean", (2 + 5) / 2), ("token_mean", (2 + 15) / 4), ("constant", (2 + 15) / 20)]
)
def test_lengths_one_and_three(mode: Aggregation, expected: float) -> None:
    mask = torch.tensor([[1, 0, 0], [1, 1, 1]]).bool()
    x = torch.tensor([[2.0, 9, 9], [5, 5, 5]])
    assert aggregate(x, mask, mode, Totals(2, 4), 10).item() == pytest.approx(expected)


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_aggregate_equals_loops(mode: Aggregation, seed: int) -> None:
    x, mask = ragged(seed)
    assert aggregate(x, mask, mode, totals_of(mask), 9).item() == pytest.approx(by_loops(x, mask, mode, 9), abs=1e-12)


@pytest.mark.trap(15)
@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), cuts=st.sets(st.integers(1, 5)))
def test_shares_of_any_split_add_up(mode: Aggregation, seed: int, cuts: set[int]) -> None:
    x, mask = ragged(seed)
    totals = totals_of(mask)
    edges = [0, *sorted(cuts), 6]
    parts = [aggregate(x[a:b], mask[a:b], mode, totals, 9) for a, b in itertools.pairwise(edges)]
    assert sum(parts).item() == pytest.approx(by_loops(x, mask, mode, 9), abs=1e-12)


@pytest.mark.trap(16)
@pytest.mark.parametrize("mode", MODES)
def test_padding_width_and_row_order_change_nothing(mode: Aggregation) -> None:
    x, mask = ragged(1)
    want = aggregate(x, mask, mode, totals_of(mask), 9).item()
    wide_x = torch.cat([x, torch.full((6, 5), math.nan, dtype=x.dtype)], 1)
    wide_mask = torch.cat([mask, torch.zeros(6, 5, dtype=torch.bool)], 1)
    assert aggregate(wide_x, wide_mask, mode, totals_of(mask), 9).item() == want
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    assert aggregate(x[order], mask[order], mode, totals_of(mask), 9).item() == pytest.approx(want, abs=1e-14)


@pytest.mark.trap(17)
@pytest.mark.parametrize("mode", MODES)
def test_a_row_masked_out_leaves_numerator_and_denominator(mode: Aggregation) -> None:
    x, mask = ragged(3)
    mask[:, 0] = True
    without = mask.clone()
    without[2] = False
    rest = torch.tensor([0, 1, 3, 4, 5])
    got = aggregate(x, without, mode, totals_of(without), 9).item()
    assert got == pytest.approx(by_loops(x[rest], mask[rest], mode, 9), abs=1e-12)
    assert got != pytest.approx(by_loops(x, mask, mode, 9), abs=1e-3)


@pytest.mark.trap(17)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("totals", [Totals(0, 0), Totals(5, 20)])
def test_nothing_counted_is_a_zero_with_a_graph(mode: Aggregation, totals: Totals) -> None:
    x = torch.full((2, 3), math.nan, requires_grad=True)
    loss = aggregate(x, torch.zeros(2, 3, dtype=torch.bool), mode, totals, 4)
    loss.backward()
    assert loss.item() == 0
    assert x.grad is not None
    assert x.grad.eq(0).all()


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("mode", MODES)
def test_garbage_changes_neither_value_nor_gradient(mode: Aggregation, garbage: float) -> None:
    x, mask = ragged(5)
    clean = x.where(mask, 0.0).requires_grad_()
    dirty = x.where(mask, garbage).requires_grad_()
    losses = [aggregate(z, mask, mode, totals_of(mask), 9) for z in (clean, dirty)]
    for loss in losses:
        loss.backward()
    assert losses[0].item() == losses[1].item()
    assert clean.grad is not None
    assert dirty.grad is not None
    assert torch.equal(clean.grad, dirty.grad)


@pytest.mark.parametrize("length", [None, 0])
def test_constant_needs_a_length(length: int | None) -> None:
    with pytest.raises(ValueError, match="constant_length"):
        aggregate(torch.ones(1, 1), torch.ones(1, 1, dtype=torch.bool), "constant", Totals(1, 1), length)


@pytest.mark.trap(22)
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), ddof=st.sampled_from([0, 1]), garbage=st.sampled_from(GARBAGE))
def test_mean_and_variance_are_those_of_the_packed_values(seed: int, ddof: int, garbage: float) -> None:
    x, mask = ragged(seed)
    mask[0, :2] = True
    packed = x[mask].numpy()
    dirty = x.where(mask, garbage)
    assert masked_mean(dirty, mask).item() == pytest.approx(packed.mean(), abs=1e-12)
    assert masked_variance(dirty, mask, ddof).item() == pytest.approx(np.var(packed, ddof=ddof), abs=1e-12)


@pytest.mark.trap(22)
@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening_with_a_mask_is_whitening_the_packed_values(shift_mean: bool) -> None:
    x, mask = ragged(8)
    packed = x[mask].numpy()
    want = (packed - packed.mean()) / np.sqrt(packed.var() + 1e-8) + (0 if shift_mean else packed.mean())
    got = masked_whiten(x.where(mask, math.nan), mask, shift_mean)
    np.testing.assert_allclose(got[mask].numpy(), want, atol=1e-12)
    assert got[~mask].eq(0).all()


def test_published_whitening_example() -> None:
    # "The N Implementation Details of RLHF with PPO" prints these.
    x = torch.tensor([[1.2, 1.3, 1.4], [1.5, 1.6, 1.7], [1.8, 1.9, 2.0]], dtype=torch.float64)
    want = [[0.0508074, 0.4381051, 0.8254035], [1.2127019, 1.6, 1.9872988], [2.3745968, 2.7618952, 3.1491938]]
    got = masked_whiten(x, torch.ones(3, 3, dtype=torch.bool), shift_mean=False)
    np.testing.assert_allclose(got.numpy(), want, atol=2e-6)


def test_nothing_counted_has_no_moments() -> None:
    x, mask = torch.full((2, 2), math.nan), torch.zeros(2, 2, dtype=torch.bool)
    assert masked_mean(x, mask).item() == masked_variance(x, mask, 1).item() == 0
    assert masked_whiten(x, mask).eq(0).all()


def test_equal_values_whiten_to_zero() -> None:
    """Without eps inside the root this is 0 * inf."""
    assert masked_whiten(torch.full((2, 3), 0.7), torch.ones(2, 3, dtype=torch.bool)).abs().max() < 1e-2
    assert masked_whiten(torch.full((2, 3), 2.0), torch.ones(2, 3, dtype=torch.bool)).eq(0).all()
