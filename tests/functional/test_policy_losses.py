import math

import pytest
import torch
from torch import Tensor

from lit_posttrain.functional.policy_losses import ClippedLoss, RatioLevel, clipped_policy_loss

LEVELS: list[RatioLevel] = ["token", "sequence", "sequence_product"]
MASK = torch.tensor([[1, 1, 0], [1, 1, 1]]).bool()
LOG_PROBS = torch.tensor([[-1, -0.5, 0], [-2, -0.3, -1.2]], dtype=torch.float64)
LOG_RATIO = torch.tensor([[0.3, -0.1, 0], [0.5, -0.4, 0.05]], dtype=torch.float64)
ADVANTAGES = torch.tensor([[1.0] * 3, [-1.0] * 3], dtype=torch.float64)


def evaluate(level: RatioLevel, low: float, high: float, advantages: Tensor = ADVANTAGES) -> tuple[ClippedLoss, Tensor]:
    log_probs = LOG_PROBS.clone().requires_grad_()
    out = clipped_policy_loss(log_probs, LOG_PROBS - LOG_RATIO, advantages, MASK, level, low, high)
    out.per_token.where(MASK, 0.0).sum().backward()
    assert log_probs.grad is not None
    return out, log_probs.grad


def one(rho: float, advantage: float, low: float, high: float) -> float:
    """d objective / d log pi of a single token."""
    log_probs = torch.tensor([[math.log(rho)]], dtype=torch.float64, requires_grad=True)
    zero, yes = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.bool)
    out = clipped_policy_loss(log_probs, zero, zero + advantage, yes, "token", low, high)
    out.per_token.sum().backward()
    assert log_probs.grad is not None
    return -log_probs.grad.item()


@pytest.mark.parametrize(
    ("rho", "advantage", "expected"),
    [
        *[(0.5, 1, 0.5), (0.8, 1, 0.8), (1, 1, 1), (1.19999, 1, 1.19999), (1.5, 1, 0)],
        *[(0.5, -1, 0), (0.80001, -1, -0.80001), (1, -1, -1), (1.5, -1, -1.5)],
    ],
)
def test_clip_gradients(rho: float, advantage: float, expected: float) -> None:
    assert one(rho, advantage, 0.2, 0.2) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("rho", "advantage", "expected"), [(1.25, 1, 1.25), (1.3, 1, 0), (0.85, -1, -0.85), (0.75, -1, 0)]
)
def test_each_bound_has_its_own_width(rho: float, advantage: float, expected: float) -> None:
    """The "clip higher" of DAPO (2503.14476): 0.2 below and 0.28 above; with the two swapped 1.25 would be clipped."""
    assert one(rho, advantage, 0.2, 0.28) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("rho", "advantage", "expected"), [(12, 1, 0), (10.9, 1, 10.9), (1e-6, -1, -1e-6), (12, -1, -12), (0.01, 1, 0.01)]
)
def test_a_clip_of_ten_binds_only_above(rho: float, advantage: float, expected: float) -> None:
    assert one(rho, advantage, 10.0, 10.0) == pytest.approx(expected, abs=1e-9)


def test_ratio_levels_and_their_gradients() -> None:
    _, token = evaluate("token", 9.0, 9.0)
    torch.testing.assert_close(token[1], torch.tensor([0.5, -0.4, 0.05], dtype=torch.float64).exp())
    out, sequence = evaluate("sequence", 9.0, 9.0)
    assert out.ratio[1].tolist() == pytest.approx([math.exp(0.15 / 3)] * 3)
    assert sequence[1].tolist() == pytest.approx([math.exp(0.05)] * 3)  # three tokens, each a third of the mean
    out, product = evaluate("sequence_product", 9.0, 9.0)
    assert out.ratio[0, :2].tolist() == pytest.approx([math.exp(0.2)] * 2)
    assert product[1].tolist() == pytest.approx([3 * math.exp(0.15)] * 3)


@pytest.mark.parametrize("level", LEVELS)
def test_flags_mark_exactly_the_tokens_without_gradient(level: RatioLevel) -> None:
    for low, high in ((0.03, 0.04), (0.2, 0.2), (0.1, 0.6), (5.0, 5.0)):
        out, grad = evaluate(level, low, high)
        clipped = out.clipped_low | out.clipped_high
        assert torch.equal(clipped[MASK], grad[MASK] == 0)
        assert not clipped[~MASK].any()
        assert not out.clipped_low[0].any()  # needs a negative advantage
        assert not out.clipped_high[1].any()


@pytest.mark.parametrize("level", LEVELS)
def test_on_policy_ratio_is_exactly_one(level: RatioLevel) -> None:
    log_probs = (torch.randn(4, 9) * 10).requires_grad_()
    mask = torch.arange(9) < torch.tensor([9, 4, 1, 0])[:, None]
    out = clipped_policy_loss(log_probs, log_probs.detach(), torch.ones(4, 9), mask, level, 1e-4, 1e-4)
    assert out.ratio.eq(1).all()
    assert not (out.clipped_low | out.clipped_high).any()
    out.per_token.where(mask, 0.0).sum().backward()
    assert log_probs.grad is not None
    times = mask.sum(1, keepdim=True) if level == "sequence_product" else 1
    torch.testing.assert_close(log_probs.grad, -(times * mask).float())


@pytest.mark.trap(26)
@pytest.mark.parametrize("level", LEVELS)
def test_old_log_probs_and_advantages_get_no_gradient(level: RatioLevel) -> None:
    log_probs, old, advantages = (torch.randn(2, 3, requires_grad=True) for _ in range(3))
    clipped_policy_loss(log_probs, old, advantages, MASK, level, 0.2, 0.2).per_token.sum().backward()
    assert old.grad is None
    assert advantages.grad is None
    assert log_probs.grad is not None


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("level", LEVELS)
def test_garbage_in_padding_changes_nothing(level: RatioLevel, garbage: float) -> None:
    clean, clean_grad = evaluate(level, 0.2, 0.2)
    log_probs = LOG_PROBS.where(MASK, garbage).requires_grad_()
    old, advantages = (LOG_PROBS - LOG_RATIO).where(MASK, -garbage), ADVANTAGES.where(MASK, garbage)
    out = clipped_policy_loss(log_probs, old, advantages, MASK, level, 0.2, 0.2)
    out.per_token.where(MASK, 0.0).sum().backward()
    assert log_probs.grad is not None
    assert torch.equal(log_probs.grad, clean_grad)
    assert torch.equal(out.per_token, clean.per_token)
    assert torch.equal(out.ratio, clean.ratio)


@pytest.mark.parametrize("advantage", [1.0, 0.0, -1.0])
def test_an_overflowing_product_of_ratios_leaves_no_nan(advantage: float) -> None:
    log_probs = torch.full((1, 400), -0.1, requires_grad=True)
    old, yes = torch.full((1, 400), -0.6), torch.ones(1, 400, dtype=torch.bool)  # e^200 in float32
    out = clipped_policy_loss(log_probs, old, torch.full((1, 400), advantage), yes, "sequence_product", 0.2, 0.2)
    out.per_token.sum().backward()
    assert log_probs.grad is not None
    assert log_probs.grad.isfinite().all()
    assert out.per_token.isfinite().all()
