"""Where each loss ends on the tabular model, every pair of its 15 answers weighed by how often it is preferred so.

Optimised in float64 through the production loss; the answers are the oracle's or follow from its probabilities.
"""

import math
from typing import Any

import pytest
import tabular_policy
import torch
from oracles import tabular
from torch import Tensor

from lit_posttrain.functional.preference_losses import LossType, PairLossOptions, PairTerms, pair_loss

N = len(tabular.ANSWERS)
WINNERS, LOSERS = (1 - torch.eye(N)).nonzero(as_tuple=True)
REFERENCE = tabular_policy.answer_log_probs(tabular_policy.THETA_REF)
LENGTHS = tabular_policy.LENGTHS.double()
RATES = torch.sigmoid(tabular_policy.REWARDS[:, None] - tabular_policy.REWARDS)  # i is preferred to j: Bradley-Terry
BETA = tabular.BETA
BT_ENTROPY = 0.568362
UNIFORM = torch.full((N, N), 2 / (N * (N - 1)), dtype=torch.float64)
BY_REFERENCE = REFERENCE.exp() * REFERENCE.exp()[:, None]


def optimise(
    kind: LossType, rates: Tensor = RATES, weights: Tensor = UNIFORM, **changes: Any
) -> tuple[Tensor, Tensor, float]:
    """Table, log pi / pi_ref of the answers, and loss, at the minimum of the population loss."""
    changes = {"beta": BETA} | changes
    options = PairLossOptions(**changes)
    theta = tabular_policy.THETA_REF.clone().requires_grad_()
    weight = (weights * rates)[WINNERS, LOSERS]
    precise: Any = {"tolerance_grad": 1e-12, "tolerance_change": 0.0, "line_search_fn": "strong_wolfe"}
    solver = torch.optim.LBFGS([theta], max_iter=2000, history_size=30, **precise)

    def closure() -> Tensor:
        solver.zero_grad()
        now = tabular_policy.answer_log_probs(theta)
        terms = PairTerms(
            *(now[WINNERS], now[LOSERS], REFERENCE[WINNERS], REFERENCE[LOSERS], LENGTHS[WINNERS], LENGTHS[LOSERS])
        )
        loss = (weight * pair_loss(terms, kind, options)).sum()
        loss.backward()
        return loss

    solver.step(closure)  # type: ignore[arg-type]
    loss = closure().item()
    assert theta.grad is not None
    assert theta.grad.abs().max() < 1e-8  # it did converge
    theta = theta.detach()
    return theta, tabular_policy.answer_log_probs(theta) - REFERENCE, loss


def centred(x: Tensor) -> Tensor:
    return x - x.mean()


def kl_to_optimum(theta: Tensor) -> float:
    best = tabular_policy.answer_log_probs(torch.from_numpy(tabular.optimal_table(BETA)))
    now = tabular_policy.answer_log_probs(theta)
    return (now.exp() * (now - best)).sum().item()


@pytest.mark.parametrize("weights", [UNIFORM, BY_REFERENCE], ids=["uniform", "sampled"])
def test_dpo_finds_the_optimum_of_the_regularised_reward(weights: Tensor) -> None:
    """pi* = pi_ref exp(r / beta) / Z (2305.18290 Eq. 4)."""
    theta, _, loss = optimise("sigmoid", weights=weights)
    assert kl_to_optimum(theta) < 1e-12
    assert tabular.regularised_reward(theta.numpy()) == pytest.approx(1.108014, abs=1e-6)
    if weights is UNIFORM:
        assert loss == pytest.approx(BT_ENTROPY, abs=1e-6)


def flipped(rate: float) -> Tensor:
    return (1 - rate) * RATES + rate * RATES.T


def test_robust_sees_through_flipped_labels() -> None:
    theta, _, _ = optimise("robust", flipped(0.1), label_smoothing=0.1)
    assert kl_to_optimum(theta) < 1e-12


def test_plain_dpo_does_not() -> None:
    theta, _, _ = optimise("sigmoid", flipped(0.1))
    assert kl_to_optimum(theta) > 1e-2


def test_cdpo_on_clean_labels_is_too_timid() -> None:
    theta, _, _ = optimise("sigmoid", label_smoothing=0.1)
    assert tabular.regularised_reward(theta.numpy()) == pytest.approx(1.068043, abs=1e-6)
    assert tabular.expected_reward(theta.numpy()) == pytest.approx(1.427991, abs=1e-6)


@pytest.mark.trap(29)
@pytest.mark.parametrize("average", [False, True])
def test_ipo_regresses_on_the_share_of_wins(average: bool) -> None:
    """Of n items uniformly paired: sum_j (2 p_ij - 1) / (2 beta n), by answer or by its token."""
    _, ratio, _ = optimise("ipo", ipo_average=average)
    expected = (2 * RATES - 1).sum(1) / (2 * BETA * N)
    torch.testing.assert_close(centred(ratio / LENGTHS if average else ratio), expected, rtol=1e-6, atol=1e-8)


def test_sigmoid_norm_puts_the_reward_in_each_token() -> None:
    _, ratio, loss = optimise("sigmoid_norm")
    torch.testing.assert_close(centred(ratio / LENGTHS), centred(tabular_policy.REWARDS / BETA), rtol=1e-5, atol=1e-7)
    assert loss == pytest.approx(BT_ENTROPY, abs=1e-6)


@pytest.mark.parametrize("divergence", ["forward_kl", "js_divergence", "alpha_divergence"])
def test_divergences_put_their_slope_at_the_reward(divergence: str) -> None:
    """2309.16240 Eq. 7: f'(pi / pi_ref) = r / beta + a constant."""
    _, ratio, loss = optimise("sigmoid", f_divergence=divergence, alpha=0.5)
    u = ratio.exp()
    slope = {
        "forward_kl": 1 - 1 / u,
        "js_divergence": (2 * u / (1 + u)).log(),
        "alpha_divergence": (1 - u.pow(-0.5)) / 0.5,
    }[divergence]
    torch.testing.assert_close(centred(slope), centred(tabular_policy.REWARDS / BETA), rtol=1e-5, atol=1e-6)
    assert loss == pytest.approx(BT_ENTROPY, abs=1e-6)


def slope_at(kind: LossType, h: float, chance: float = 1.0, **changes: Any) -> float:
    """Derivative by h of the expected loss of one pair, preferred so with this chance."""
    leaf, zero, one = (
        torch.tensor([h], dtype=torch.float64, requires_grad=True),
        torch.zeros(1).double(),
        torch.ones(1).double(),
    )
    options = PairLossOptions(**changes)
    right = pair_loss(PairTerms(leaf, zero, zero, zero, one, one), kind, options)
    wrong = pair_loss(PairTerms(zero, leaf, zero, zero, one, one), kind, options)
    (gradient,) = torch.autograd.grad((chance * right + (1 - chance) * wrong).sum(), leaf)
    return gradient.item()


@pytest.mark.parametrize("smoothing", [0.1, 0.3])
@pytest.mark.parametrize("kind", ["sigmoid", "exo_pair"])
def test_smoothed_losses_stop_at_the_odds_of_their_labels(kind: LossType, smoothing: float) -> None:
    best = math.log((1 - smoothing) / smoothing) / 0.4
    options = {"beta": 0.4, "label_smoothing": smoothing}
    assert slope_at(kind, best, **options) == pytest.approx(0, abs=1e-12)
    assert slope_at(kind, best - 0.1, **options) < 0 < slope_at(kind, best + 0.1, **options)


@pytest.mark.parametrize("chance", [0.5, 0.7, 1.0])
def test_ipo_stops_at_a_margin_in_proportion_to_the_preference(chance: float) -> None:
    assert slope_at("ipo", (chance - 0.5) / 0.4, chance, beta=0.4) == pytest.approx(0, abs=1e-12)


def test_robust_stops_at_the_odds_of_the_true_preference() -> None:
    noisy = 0.8 * 0.7 + 0.2 * 0.3  # of a preference of 0.7 whose labels are flipped in a fifth of cases
    options = {"beta": 0.4, "label_smoothing": 0.2}
    assert slope_at("robust", math.log(0.7 / 0.3) / 0.4, noisy, **options) == pytest.approx(0, abs=1e-12)
