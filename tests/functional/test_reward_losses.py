"""Losses of scalar heads, and the pairs that they are given."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from lit_posttrain.functional.preference_losses import pair_indices
from lit_posttrain.functional.reward_losses import binary_loss, bradley_terry


def float64(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def ranked(scores: Tensor, preference: Tensor, group: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Loss of every pair, and the group it comes from."""
    group = torch.zeros(len(scores), dtype=torch.long) if group is None else group
    winners, losers = pair_indices(preference, group)
    return bradley_terry(scores[winners], scores[losers]), group[winners]


def mean_of_groups(loss: Tensor, group: Tensor) -> Tensor:
    return torch.stack([loss[group == g].mean() for g in group.unique()]).mean()


def test_ranking_of_three() -> None:
    scores = float64([2, 1, 0]).requires_grad_()
    loss, _ = ranked(scores, torch.tensor([3.0, 2.0, 1.0]))
    assert loss.tolist() == pytest.approx([softplus(-1), softplus(-2), softplus(-1)])
    loss.mean().backward()
    assert loss.mean().item() == pytest.approx(0.2511504620, abs=1e-9)
    assert scores.grad is not None
    assert scores.grad.tolist() == pytest.approx([-0.129381, 0, 0.129381], abs=1e-6)


@pytest.mark.parametrize("k", [2, 4, 9])
def test_equal_scores_cost_a_coin_toss(k: int) -> None:
    loss, _ = ranked(torch.full((k,), 1.7), torch.arange(float(k)))
    assert len(loss) == k * (k - 1) / 2
    assert loss.tolist() == pytest.approx([math.log(2)] * len(loss))


def test_only_differences_of_scores_count() -> None:
    scores = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    preference = torch.arange(6.0)
    loss, _ = ranked(scores, preference)
    torch.testing.assert_close(ranked(scores + 5, preference)[0], loss)
    (gradient,) = torch.autograd.grad(loss.mean(), scores)
    assert gradient.sum().item() == pytest.approx(0, abs=1e-12)


def test_turning_a_pair_round_costs_its_gap() -> None:
    a, b = float64([0.3, -2, 5]), float64([1, -1, -7])
    torch.testing.assert_close(bradley_terry(b, a) - bradley_terry(a, b), a - b)


@pytest.mark.trap(32)
def test_each_prompt_weighs_the_same() -> None:
    """Of rankings of 4 and of 9: half each, so 1/12 and 1/72 a pair."""
    group = torch.tensor([0] * 4 + [1] * 9)
    scores = torch.randn(13, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    loss, of = ranked(scores, torch.randperm(13).double(), group)
    assert (of == 0).sum() == 6
    assert (of == 1).sum() == 36
    torch.testing.assert_close(mean_of_groups(loss, of), (loss[:6].sum() / 12 + loss[6:].sum() / 72))


def test_pairs_against_a_loop() -> None:
    g = torch.Generator().manual_seed(2)
    for _ in range(20):
        preference = torch.randint(0, 4, (9,), generator=g).float()
        group = torch.randint(0, 3, (9,), generator=g)
        expected = [
            (i, j)
            for i, j in itertools.product(range(9), repeat=2)
            if group[i] == group[j] and preference[i] > preference[j]
        ]
        winners, losers = pair_indices(preference, group)
        assert list(zip(winners.tolist(), losers.tolist(), strict=True)) == expected


@pytest.mark.trap(32)
def test_ties_give_no_pair() -> None:
    winners, losers = pair_indices(torch.tensor([1.0, 1.0, 0.0]), torch.zeros(3, dtype=torch.long))
    assert (winners.tolist(), losers.tolist()) == ([0, 1], [2, 2])
    winners, losers = pair_indices(torch.ones(5), torch.zeros(5, dtype=torch.long))
    assert winners.numel() == losers.numel() == 0


def test_rows_of_different_groups_are_never_compared() -> None:
    winners, _ = pair_indices(torch.arange(4.0), torch.arange(4))
    assert winners.numel() == 0
    winners, losers = pair_indices(torch.tensor([0.0, 5.0, 1.0, 4.0]), torch.tensor([7, 3, 7, 3]))
    assert (winners.tolist(), losers.tolist()) == ([1, 2], [3, 0])


def test_a_margin_moves_the_gap_that_is_asked_for() -> None:
    loss = bradley_terry(float64([2, 2, 2]), float64([1, 1, 1]), float64([0, 1, 3]))
    assert loss.tolist() == pytest.approx([softplus(-1), math.log(2), softplus(2)])


def test_binary_loss_is_the_cross_entropy() -> None:
    logits = float64([2, 2, -1, 0.5]).requires_grad_()
    labels = [1.0, 0.0, 0.0, 1.0]
    loss = binary_loss(logits, float64(labels))
    assert loss.tolist() == pytest.approx([softplus(-2), softplus(2), softplus(-1), softplus(-0.5)])
    loss.sum().backward()
    assert logits.grad is not None
    assert logits.grad.tolist() == pytest.approx([sigma(r) - y for r, y in zip([2, 2, -1, 0.5], labels, strict=True)])


def test_gradients_are_those_of_finite_differences() -> None:
    a, b, margins = (torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(3))
    assert torch.autograd.gradcheck(bradley_terry, (a, b))
    assert torch.autograd.gradcheck(bradley_terry, (a, b, margins))
    labels = float64([0, 1, 1, 0, 1])
    assert torch.autograd.gradcheck(lambda x: binary_loss(x, labels), (a,))


@pytest.mark.parametrize("gap", [1e4, -1e4])
def test_far_apart_scores_stay_finite(gap: float) -> None:
    scores = torch.tensor([gap], requires_grad=True)
    loss = bradley_terry(scores, torch.zeros(1)) + binary_loss(scores, torch.ones(1))
    loss.sum().backward()
    assert loss.item() == (0 if gap > 0 else 2e4)
    assert scores.grad is not None
    assert scores.grad.item() == (0 if gap > 0 else -2)


def test_nothing_sums_to_a_zero_with_a_graph() -> None:
    scores = torch.ones(3, requires_grad=True)
    loss, _ = ranked(scores, torch.ones(3))
    total = loss.sum() + binary_loss(scores[:0], torch.zeros(0)).sum()
    assert total.item() == 0
    total.backward()
    assert scores.grad is not None
    assert scores.grad.eq(0).all()
