"""PPO's expected gradient on the enumerable language model: exact at lambda 1 for any values, else only for V^pi."""

import pytest
import torch
from oracles import tabular
from tabular_policy import LENGTHS, MASK, REWARDS, STATES, TOKENS
from torch import Tensor

from lit_posttrain.functional.policy_losses import clipped_policy_loss
from lit_posttrain.functional.returns import generalised_advantages, token_rewards

BETA = 0.5


def log_probs_of(theta: Tensor) -> Tensor:
    return theta.log_softmax(-1)[STATES, TOKENS].where(MASK, 0.0)


def theta_and_reference() -> tuple[Tensor, Tensor]:
    reference = torch.as_tensor(tabular.THETA_REF, dtype=torch.float64)
    noise = torch.randn(reference.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return (reference + 0.7 * noise).requires_grad_(), reference


def exact_gradient(theta: Tensor, reference: Tensor) -> Tensor:
    """Of J = sum_y pi(y) (r(y) - beta log pi(y) / pi_ref(y)), by autograd through the whole sum."""
    own, ref = log_probs_of(theta).sum(-1), log_probs_of(reference).sum(-1)
    (gradient,) = torch.autograd.grad((own.exp() * (REWARDS - BETA * (own - ref))).sum(), theta)
    return gradient


def expected_ppo_gradient(theta: Tensor, reference: Tensor, values: Tensor, lam: float) -> Tensor:
    own = log_probs_of(theta)
    rewards = token_rewards(REWARDS, own.detach(), log_probs_of(reference), MASK, BETA)
    credit = generalised_advantages(rewards, values, MASK, 1.0, lam).advantages
    terms = clipped_policy_loss(own, own.detach(), credit, MASK, "token", 0.2, 0.2).per_token.sum(-1)
    probability = own.detach().sum(-1).exp()
    (gradient,) = torch.autograd.grad(-(probability * terms).sum(), theta)
    return gradient


def values_of_the_policy(theta: Tensor, reference: Tensor) -> Tensor:
    """V^pi of each state: the mean of what follows, over all answers that pass through it."""
    own, ref = log_probs_of(theta).detach(), log_probs_of(reference)
    to_go = (-BETA * (own - ref)).flip(-1).cumsum(-1).flip(-1) + REWARDS[:, None]
    probability = own.sum(-1).exp()[:, None].expand_as(own)
    mass, total = torch.zeros(7, dtype=torch.float64), torch.zeros(7, dtype=torch.float64)
    mass.index_add_(0, STATES[MASK], probability[MASK])
    total.index_add_(0, STATES[MASK], (probability * to_go)[MASK])
    return (total / mass)[STATES].where(MASK, 0.0)


def random_values() -> Tensor:
    table = torch.randn(7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return table[STATES] * 2


def test_lambda_1_is_exact_for_any_values() -> None:
    theta, reference = theta_and_reference()
    got = expected_ppo_gradient(theta, reference, random_values(), 1.0)
    torch.testing.assert_close(got, exact_gradient(theta, reference), atol=1e-12, rtol=0)
    assert got.abs().max() > 0.1


@pytest.mark.trap(24)
def test_lambda_below_1_is_exact_only_for_the_policys_own_values() -> None:
    theta, reference = theta_and_reference()
    exact = exact_gradient(theta, reference)
    own = expected_ppo_gradient(theta, reference, values_of_the_policy(theta, reference), 0.95)
    torch.testing.assert_close(own, exact, atol=1e-12, rtol=0)
    assert (expected_ppo_gradient(theta, reference, random_values(), 0.95) - exact).abs().max() > 1e-3


def test_ascent_reaches_the_optimum() -> None:
    """pi_ref exp(r / beta) / Z, where the shaped reward of every answer is 1.108014."""
    theta, reference = theta_and_reference()
    with torch.no_grad():
        for _ in range(3000):
            with torch.enable_grad():
                step = expected_ppo_gradient(theta, reference, values_of_the_policy(theta, reference), 0.95)
            theta += 2.0 * step
    own, ref = log_probs_of(theta).sum(-1), log_probs_of(reference).sum(-1)
    shaped = REWARDS - BETA * (own - ref)
    assert float((own.exp() * shaped).sum().detach()) == pytest.approx(1.108014, abs=1e-5)
    torch.testing.assert_close(shaped.detach(), torch.full_like(shaped, 1.108014).detach(), atol=1e-2, rtol=0)
    assert len(LENGTHS) == 15
