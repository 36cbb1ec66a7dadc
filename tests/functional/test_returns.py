"""Token rewards, GAE, value loss and KL control against numbers worked out by hand and against their definitions."""

import math

import pytest
import torch
from torch import Tensor

from lit_posttrain.functional.masked import masked_whiten
from lit_posttrain.functional.returns import (
    adapted_coef,
    clipped_value_loss,
    ended_scores,
    generalised_advantages,
    token_rewards,
)

MASK = torch.tensor([[False, True, True, True, False], [True, True, False, False, False], [False] * 5])


def rows(*values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.trap(9)
def test_the_score_stands_on_the_last_response_token() -> None:
    log_probs, ref = rows([9, -1, -2, -0.5, 7]), rows([3, -1.5, -1, -0.5, -8])
    got = token_rewards(rows([2.0])[0], log_probs, ref, MASK[:1], 0.1)
    torch.testing.assert_close(got, rows([0, -0.05, 0.1, 2.0, 0]))


def test_without_a_reference_or_coefficient_only_the_score_is_left() -> None:
    log_probs = random(3, 5)
    expected = torch.zeros(3, 5, dtype=torch.float64)
    expected[0, 3], expected[1, 1] = 2.0, -1.0
    scores = rows([2.0, -1.0, 5.0])[0]
    for ref, coef in ((None, 0.3), (log_probs + 1, 0.0)):
        torch.testing.assert_close(token_rewards(scores, log_probs, ref, MASK, coef), expected)


@pytest.mark.trap(26)
def test_rewards_carry_no_gradient() -> None:
    log_probs = random(3, 5).requires_grad_()
    got = token_rewards(random(3).requires_grad_(), log_probs, log_probs + 1, MASK, 0.3)
    assert not got.requires_grad


def test_garbage_outside_the_mask_changes_nothing() -> None:
    log_probs, ref = random(3, 5), random(3, 5).roll(1)
    broken = [x.where(MASK, math.nan) for x in (log_probs, ref)]
    expected = token_rewards(random(3), log_probs, ref, MASK, 0.3)
    got = token_rewards(random(3), *broken, MASK, 0.3)
    torch.testing.assert_close(got, expected)
    values = random(3, 5)
    for a, b in zip(
        generalised_advantages(got, values.where(MASK, math.nan), MASK, 1.0, 0.9),
        generalised_advantages(expected, values, MASK, 1.0, 0.9),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
        assert (a[~MASK] == 0).all()


def test_gae_by_hand() -> None:
    # delta = (.1, .1, .3); A_3 = .3, A_2 = .1 + .95 * .3, A_1 = .1 + .95 * .385
    got = generalised_advantages(rows([9, 0, 0, 1, 9]), rows([9, 0.5, 0.6, 0.7, 9]), MASK[:1], 1.0, 0.95)
    torch.testing.assert_close(got.advantages, rows([0, 0.46575, 0.385, 0.3, 0]))
    torch.testing.assert_close(got.returns, rows([0, 0.96575, 0.985, 1.0, 0]))


@pytest.mark.trap(23)
def test_lambda_1_returns_are_the_reward_to_go_for_any_values() -> None:
    rewards = random(3, 5)
    for gamma in (1.0, 0.9):
        got = generalised_advantages(rewards, random(3, 5) * 7, MASK, gamma, 1.0).returns
        expected = torch.zeros_like(rewards)
        for b in range(3):
            inside = MASK[b].nonzero()[:, 0].tolist()
            for t in inside:
                expected[b, t] = sum(gamma ** (u - t) * float(rewards[b, u]) for u in inside if u >= t)
        torch.testing.assert_close(got, expected)


@pytest.mark.trap(24)
def test_lambda_0_is_one_step_and_nothing_follows_the_last_token() -> None:
    rewards, values = random(3, 5), random(3, 5).roll(2)
    got = generalised_advantages(rewards, values, MASK, 0.9, 0.0).advantages
    for b in range(3):
        inside = MASK[b].nonzero()[:, 0].tolist()
        for t in inside:
            following = float(values[b, t + 1]) if t + 1 in inside else 0.0
            assert float(got[b, t]) == pytest.approx(float(rewards[b, t]) + 0.9 * following - float(values[b, t]))


def test_padding_changes_nothing() -> None:
    rewards, values = random(3, 5), random(3, 5).roll(2)
    wide = [torch.nn.functional.pad(x, (2, 3), value=v) for x, v in ((rewards, 5.0), (values, -4.0), (MASK, False))]
    narrow = generalised_advantages(rewards, values, MASK, 1.0, 0.95)
    for a, b in zip(generalised_advantages(*wide, 1.0, 0.95), narrow, strict=True):
        torch.testing.assert_close(a[:, 2:7], b)
        assert (a[:, :2] == 0).all()
        assert (a[:, 7:] == 0).all()


def test_advantages_and_returns_carry_no_gradient() -> None:
    values = random(3, 5).requires_grad_()
    assert not any(x.requires_grad for x in generalised_advantages(random(3, 5), values, MASK, 1.0, 0.95))


@pytest.mark.parametrize(
    ("value", "returned", "expected", "slope"), [(1.0, 0.6, 0.08, 0.4), (0.9, 2.0, 0.845, 0.0), (0.6, 1.0, 0.08, -0.4)]
)
def test_value_loss_by_hand(value: float, returned: float, expected: float, slope: float) -> None:
    values = rows([value]).requires_grad_()
    got = clipped_value_loss(values, rows([0.5]), rows([returned]), 0.2)
    assert float(got.per_token.detach()) == pytest.approx(expected)
    (gradient,) = torch.autograd.grad(got.per_token.sum(), values)
    assert float(gradient) == pytest.approx(slope)
    assert bool(got.clipped) == (slope == 0.0)


def test_an_unclipped_value_loss_is_half_the_square() -> None:
    values, returns = random(3, 5), random(3, 5).roll(1)
    expected = 0.5 * (values - returns) ** 2
    for clip in (None, math.inf):
        torch.testing.assert_close(clipped_value_loss(values, values + 9, returns, clip).per_token, expected)


@pytest.mark.trap(42)
@pytest.mark.parametrize(("kl", "expected"), [(12.0, 0.151536), (6.6, 0.150768), (0.0, 0.148464), (6.0, 0.15)])
def test_adaptive_coefficient(kl: float, expected: float) -> None:
    assert adapted_coef(0.15, kl, 6.0, 1e4, 512) == pytest.approx(expected, abs=1e-9)


@pytest.mark.trap(34)
def test_a_kl_that_is_not_a_number_leaves_the_coefficient() -> None:
    assert adapted_coef(0.1, math.nan, 6.0, 10_000.0, 256) == 0.1


def test_scores_of_answers_that_did_not_end() -> None:
    scores, ended = rows([2.0, 3.0])[0], torch.tensor([True, False])
    assert ended_scores(scores, ended, -1.0, 0.0).tolist() == [2.0, -1.0]
    assert ended_scores(scores, ended, None, 0.5).tolist() == [2.0, 2.5]
    assert ended_scores(scores, ended, None, 0.0).tolist() == [2.0, 3.0]
    assert ended_scores(scores, ended, 0.0, 0.0).tolist() == [2.0, 0.0]


@pytest.mark.trap(22)
def test_whitened_rewards_keep_their_mean() -> None:
    # "The N Implementation Details of RLHF with PPO" prints these.
    x = rows([1.2, 1.3, 1.4], [1.5, 1.6, 1.7], [1.8, 1.9, 2.0])
    expected = rows([0.0508074, 0.4381051, 0.8254035], [1.2127019, 1.6, 1.9872988], [2.3745968, 2.7618952, 3.1491938])
    got = masked_whiten(x, torch.ones_like(x, dtype=torch.bool), shift_mean=False)
    torch.testing.assert_close(got, expected, atol=2e-6, rtol=0)
