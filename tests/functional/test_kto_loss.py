"""KTO against its closed form, a worked pair and finite differences."""

import math

import pytest
import torch
from torch import Tensor

from lit_posttrain.functional.preference_losses import kto_loss

RATIOS, DESIRABLE = [1.0, -0.5, 0.25, -2.0], [True, False, False, True]


def float64(values: float | list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_kto_in_closed_form() -> None:
    """lambda_D (1 - sigma(beta (c - z))), lambda_U (1 - sigma(beta (z - c))) and their derivatives."""
    beta, z, good, bad = 0.4, 0.3, 1.5, 0.75
    ratios = float64(RATIOS).requires_grad_()
    loss = kto_loss(ratios, torch.tensor(DESIRABLE), float64(z), beta, good, bad)
    loss.sum().backward()
    assert ratios.grad is not None
    for i, (c, desirable) in enumerate(zip(RATIOS, DESIRABLE, strict=True)):
        s = sigma(beta * (c - z))
        assert loss[i].item() == pytest.approx(good * (1 - s) if desirable else bad * s)
        slope = beta * s * (1 - s)
        assert ratios.grad[i].item() == pytest.approx(-good * slope if desirable else bad * slope)


def test_kto_of_the_worked_pair() -> None:
    ratios = float64([1, -0.5]).requires_grad_()
    loss = kto_loss(ratios, torch.tensor([True, False]), float64(0.3), 0.1, 1.0, 1.0).sum()
    loss.backward()
    assert loss.item() == pytest.approx(0.9625178022, abs=1e-9)
    assert ratios.grad is not None
    assert ratios.grad.tolist() == pytest.approx([-0.0249694, 0.0249600426], abs=1e-7)


def test_kto_at_the_reference_point_is_half_the_weight() -> None:
    loss = kto_loss(float64([0.3] * 4), torch.tensor(DESIRABLE), float64(0.3), 5.0, 1.5, 0.8)
    assert loss.tolist() == pytest.approx([0.75, 0.4, 0.4, 0.75])


def test_the_reference_point_of_kto_gets_no_gradient() -> None:
    ratios, z = float64(RATIOS).requires_grad_(), float64(0.3).requires_grad_()
    kto_loss(ratios, torch.tensor(DESIRABLE), z, 0.4, 1.0, 1.0).sum().backward()
    assert z.grad is None


def test_gradient_of_kto_is_that_of_finite_differences() -> None:
    ratios = float64(RATIOS).requires_grad_()
    labels = torch.tensor(DESIRABLE)
    assert torch.autograd.gradcheck(lambda c: kto_loss(c, labels, float64(0.3), 0.7, 1.3, 0.6), (ratios,))


def test_kto_of_nothing_is_a_zero_with_a_graph() -> None:
    parameter = torch.ones(3, requires_grad=True)
    loss = kto_loss(parameter[:0], torch.zeros(0, dtype=torch.bool), torch.tensor(0.0), 0.1, 1.0, 1.0)
    loss.sum().backward()
    assert loss.shape == (0,)
    assert parameter.grad is not None
    assert parameter.grad.eq(0).all()
