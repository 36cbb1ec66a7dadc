import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lit_posttrain.functional.kl import KLEstimator, kl_estimate

P = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
Q = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
GRAD_KL = torch.tensor([0.320702, -0.082466, -0.238236], dtype=torch.float64)  # of KL(P || Q) by the logits of P


def logits_and_log_probs() -> tuple[Tensor, Tensor]:
    logits = P.log().requires_grad_()
    return logits, logits.log_softmax(-1)


def expected(values: Tensor) -> float:
    return (P * values).sum().item()


@pytest.mark.parametrize(("estimator", "mean"), [("k1", 0.2748872196), ("k2", 0.2938560469), ("k3", 0.2748872196)])
def test_expectations_on_policy(estimator: KLEstimator, mean: float) -> None:
    assert expected(kl_estimate(P.log(), Q.log(), estimator)) == pytest.approx(mean, abs=1e-9)


def test_k3_values() -> None:
    want = torch.tensor([0.316291, 0.0, 0.583709], dtype=torch.float64)
    torch.testing.assert_close(kl_estimate(P.log(), Q.log(), "k3"), want, atol=1e-6, rtol=0)


@pytest.mark.trap(25)
@pytest.mark.parametrize(
    ("estimator", "gradient"),
    [("k1", torch.zeros(3, dtype=torch.float64)), ("k2", GRAD_KL), ("k3", P - Q)],
)
def test_expected_gradient_inside_a_loss(estimator: KLEstimator, gradient: Tensor) -> None:
    logits, log_probs = logits_and_log_probs()
    (P * kl_estimate(log_probs, Q.log(), estimator)).sum().backward()  # the sampling weights P are constants
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, gradient, atol=1e-6, rtol=0)


@pytest.mark.trap(25)
def test_k1_in_the_reward_and_weighted_k3_give_the_true_gradient() -> None:
    logits, log_probs = logits_and_log_probs()
    (P * kl_estimate(log_probs, Q.log(), "k1").detach() * log_probs).sum().backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, GRAD_KL, atol=1e-6, rtol=0)

    logits, log_probs = logits_and_log_probs()
    ratio = (log_probs - log_probs.detach()).exp()
    (P * ratio * kl_estimate(log_probs, Q.log(), "k3")).sum().backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, GRAD_KL, atol=1e-6, rtol=0)


@given(st.floats(-20, 20), st.floats(-20, 20))
def test_closed_forms(a: float, b: float) -> None:
    x, y = torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)
    assert kl_estimate(x, y, "k1").item() == a - b
    assert kl_estimate(x, y, "k2").item() == pytest.approx((a - b) ** 2 / 2)
    k3 = kl_estimate(x, y, "k3").item()
    assert k3 == pytest.approx(math.exp(b - a) - (b - a) - 1, rel=1e-9, abs=1e-13)
    assert k3 >= 0
    assert kl_estimate(x, x, "k3").item() == 0


@pytest.mark.trap(25)
def test_k3_is_not_clamped() -> None:
    log_probs = torch.tensor([-30.0], requires_grad=True)
    kl_estimate(log_probs, torch.tensor([-5.0]), "k3").sum().backward()
    assert log_probs.grad is not None
    assert log_probs.grad.item() == pytest.approx(1 - math.exp(25), rel=1e-5)


def test_k3_keeps_its_digits_in_float32_where_the_policies_agree() -> None:
    d = 2e-4
    got = kl_estimate(torch.tensor(d), torch.tensor(0.0), "k3").item()
    assert got == pytest.approx(d * d / 2, rel=1e-2)


@pytest.mark.trap(26)
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_reference_gets_no_gradient(estimator: KLEstimator) -> None:
    log_probs, ref = torch.randn(4, requires_grad=True), torch.randn(4, requires_grad=True)
    kl_estimate(log_probs, ref, estimator).sum().backward()
    assert ref.grad is None
    assert log_probs.grad is not None
