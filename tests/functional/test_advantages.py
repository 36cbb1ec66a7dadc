import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lit_posttrain.functional.advantages import Baseline, Scale, group_advantages

BASELINES: list[Baseline] = ["group_mean", "leave_one_out", "none"]
SCALES: list[Scale] = ["group_std", "group_sample_std", "none"]


def advantages(
    rewards: list[float],
    baseline: Baseline = "group_mean",
    scale: Scale = "none",
    valid: list[bool] | None = None,
    size: int | None = None,
    eps: float = 0.0,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    flags = torch.tensor([True] * len(rewards) if valid is None else valid)
    return group_advantages(torch.tensor(rewards, dtype=dtype), flags, size or len(rewards), baseline, scale, eps)


def by_loops(rewards: list[float], baseline: str, scale: str, eps: float) -> list[float]:
    """One group of valid rewards, from the textbook."""
    if baseline == scale == "none":
        return rewards
    if len(rewards) < 2 or max(rewards) == min(rewards):
        return [0.0] * len(rewards)
    out = []
    for i, r in enumerate(rewards):
        others = rewards[:i] + rewards[i + 1 :]
        a = r - {"group_mean": statistics.mean(rewards), "leave_one_out": statistics.mean(others), "none": 0}[baseline]
        std = {"group_std": statistics.pstdev, "group_sample_std": statistics.stdev}.get(scale)
        out.append(a / (std(rewards) + eps) if std else a)
    return out


@pytest.mark.trap(21)
@pytest.mark.parametrize(
    ("rewards", "baseline", "scale", "expected"),
    [
        ([1, 0, 0, 0], "group_mean", "group_std", [1.7320508, *[-0.5773503] * 3]),
        ([1, 0, 0, 0], "group_mean", "group_sample_std", [1.5, *[-0.5] * 3]),
        ([1, 1, 0, 0], "group_mean", "group_std", [1, 1, -1, -1]),
        ([1, 1, 0, 0], "group_mean", "group_sample_std", [0.8660254, 0.8660254, -0.8660254, -0.8660254]),
        ([1, 0, 0, 0.5], "leave_one_out", "none", [0.8333333, -0.5, -0.5, 0.1666667]),
        ([1, 0, 0, 0], "group_mean", "none", [0.75, *[-0.25] * 3]),
        ([2, 3], "none", "none", [2, 3]),
    ],
)
def test_gold(rewards: list[float], baseline: Baseline, scale: Scale, expected: list[float]) -> None:
    torch.testing.assert_close(
        advantages(rewards, baseline, scale), torch.tensor(expected, dtype=torch.float64), atol=1e-7, rtol=0
    )


@pytest.mark.trap(19)
@settings(max_examples=150, deadline=None)
@given(
    data=st.lists(st.tuples(st.sampled_from([0.0, 0.1, 0.7, 1.0, -2.5]), st.booleans()), min_size=4, max_size=4),
    baseline=st.sampled_from(BASELINES),
    scale=st.sampled_from(SCALES),
    eps=st.sampled_from([0.0, 1e-4]),
)
def test_equals_the_textbook_with_invalid_rewards_left_out(
    data: list[tuple[float, bool]], baseline: Baseline, scale: Scale, eps: float
) -> None:
    valid = [v for _, v in data]
    known = iter(by_loops([r for r, v in data if v], baseline, scale, eps))
    want = [next(known) if v else 0.0 for v in valid]
    got = advantages([r if v else math.nan for r, v in data], baseline, scale, valid, eps=eps)
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), atol=1e-9, rtol=0)


@pytest.mark.trap(18)
@pytest.mark.parametrize("value", [0.7, 0.3, 0.1, 1 / 3, 1e-30, 12345.678])
@pytest.mark.parametrize("eps", [0.0, 1e-8, 1e-4])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("baseline", ["group_mean", "leave_one_out"])
def test_equal_rewards_are_exactly_zero_in_float32(value: float, eps: float, scale: Scale, baseline: Baseline) -> None:
    got = advantages([value] * 8, baseline, scale, eps=eps, dtype=torch.float32)
    assert got.tolist() == [0.0] * 8


@pytest.mark.trap(18)
def test_equal_valid_rewards_are_zero_beside_a_different_invalid_one() -> None:
    got = advantages([0.7, 0.7, 0.7, 5.0], "group_mean", "group_std", [True, True, True, False], dtype=torch.float32)
    assert got.tolist() == [0.0] * 4


@pytest.mark.trap(21)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("baseline", ["group_mean", "leave_one_out"])
def test_fewer_than_two_valid_members_give_zero_not_nan(baseline: Baseline, scale: Scale) -> None:
    assert advantages([1.0, 2.0, 3.0], baseline, scale, [False, True, False]).tolist() == [0.0] * 3
    assert advantages([1.0, 2.0], baseline, scale, [False, False]).tolist() == [0.0] * 2
    assert advantages([5.0, 7.0], baseline, scale, size=1).tolist() == [0.0] * 2


@pytest.mark.trap(20)
def test_groups_are_separate_even_with_equal_prompts_in_the_batch() -> None:
    a, b = [1.0, 0.0, 0.0, 2.0], [10.0, 30.0, 20.0, 20.0]
    both = advantages(a + b, "group_mean", "group_std", size=4)
    assert torch.equal(both[:4], advantages(a, "group_mean", "group_std"))
    assert torch.equal(both[4:], advantages(b, "group_mean", "group_std"))


@pytest.mark.trap(20)
@pytest.mark.parametrize(("rows", "size"), [(7, 4), (3, 4), (4, 0)])
def test_broken_groups_are_refused(rows: int, size: int) -> None:
    with pytest.raises(ValueError, match="group_size"):
        group_advantages(torch.zeros(rows), torch.ones(rows, dtype=torch.bool), size, "group_mean", "none")


@pytest.mark.trap(19)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_valid_reward_must_be_a_number(bad: float) -> None:
    with pytest.raises(ValueError, match="nan or infinite"):
        advantages([1.0, bad])


@settings(deadline=None)
@given(
    rewards=st.lists(st.integers(-5, 5), min_size=6, max_size=6),
    a=st.floats(0.1, 10),
    b=st.floats(-10, 10),
)
def test_affine_rewards(rewards: list[int], a: float, b: float) -> None:
    moved = [a * r + b for r in rewards]
    plain = [float(r) for r in rewards]
    torch.testing.assert_close(advantages(moved), a * advantages(plain), atol=1e-8, rtol=0)
    if len(set(rewards)) > 1:
        scaled = advantages(plain, scale="group_std")
        torch.testing.assert_close(advantages(moved, scale="group_std"), scaled, atol=1e-8, rtol=0)
    assert abs(advantages(moved).sum().item()) < 1e-9


@settings(deadline=None)
@given(
    rewards=st.lists(st.floats(-5, 5), min_size=5, max_size=5),
    order=st.permutations(range(5)),
    baseline=st.sampled_from(BASELINES),
)
def test_members_may_stand_in_any_order(rewards: list[float], order: list[int], baseline: Baseline) -> None:
    straight = advantages(rewards, baseline)
    torch.testing.assert_close(advantages([rewards[i] for i in order], baseline), straight[order], atol=1e-9, rtol=0)


def test_leave_one_out_is_the_group_mean_scaled() -> None:
    rewards = [1.0, 4.0, 2.0, 2.0, 0.5]
    torch.testing.assert_close(advantages(rewards, "leave_one_out"), 5 / 4 * advantages(rewards))


def test_small_differences_on_large_rewards_survive_float32() -> None:
    rewards = torch.tensor([10000.0, 10000.001953125], dtype=torch.float32)
    got = group_advantages(rewards, torch.tensor([True, True]), 2, "group_mean", "group_std")
    assert got.tolist() == pytest.approx([-1, 1], abs=1e-6)
    assert got.dtype == torch.float32


@pytest.mark.trap(26)
def test_no_gradient_flows_to_rewards() -> None:
    rewards = torch.tensor([1.0, 2.0], requires_grad=True)
    assert not group_advantages(rewards, torch.tensor([True, True]), 2, "group_mean", "none").requires_grad


@pytest.mark.parity
def test_matches_trl_standard_deviation_and_epsilon() -> None:
    nanstd = pytest.importorskip("trl.trainer.utils").nanstd
    rewards = torch.tensor([[0.3, 0.9, math.nan, 0.1], [1.0, 0.0, 0.0, 0.2]])
    theirs = (rewards - rewards.nanmean(1, keepdim=True)) / (nanstd(rewards, dim=1)[:, None] + 1e-4)
    ours = group_advantages(rewards.flatten(), rewards.isfinite().flatten(), 4, "group_mean", "group_sample_std", 1e-4)
    torch.testing.assert_close(ours, theirs.nan_to_num(0.0).flatten())
