import dataclasses
import math
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import jsonargparse
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lit_posttrain.functional.masked import Aggregation, Totals
from lit_posttrain.functional.policy_losses import RatioLevel
from lit_posttrain.objective import AdvantageConfig, KLConfig, Objective, PolicyLoss, RatioConfig

MODES: list[Aggregation] = ["sequence_mean", "token_mean", "constant"]
LEVELS: list[RatioLevel] = ["token", "sequence", "sequence_product"]


def objective(
    level: RatioLevel = "token",
    low: float = 0.2,
    high: float = 0.2,
    aggregation: Aggregation = "sequence_mean",
    coef: float = 0.0,
    length: int | None = None,
    **kl: Any,
) -> Objective:
    return Objective(
        advantage=AdvantageConfig(baseline="group_mean", scale="group_std"),
        ratio=RatioConfig(level=level, clip_low=low, clip_high=high),
        kl=KLConfig(**{"estimator": "k3", "placement": "loss", **kl}, coef=coef),
        aggregation=aggregation,
        constant_length=length,
    )


class Batch:
    """Everything that ``policy_loss`` takes, float64."""

    def __init__(
        self, log_probs: Tensor, log_ratio: Tensor, difference: Tensor, advantages: Tensor, mask: Tensor
    ) -> None:
        self.log_probs = log_probs
        self.old, self.ref = log_probs - log_ratio, log_probs - difference
        self.advantages, self.mask = advantages, mask

    @property
    def totals(self) -> Totals:
        return Totals(float(self.mask.any(1).sum()), float(self.mask.sum()))

    def loss(self, o: Objective, totals: Totals | None = None, rows: Any = slice(None)) -> tuple[PolicyLoss, Tensor]:
        leaf = self.log_probs[rows].clone().requires_grad_()
        rest = (self.old[rows], self.ref[rows], self.advantages[rows], self.mask[rows])
        out = o.policy_loss(leaf, *rest, totals or self.totals, 10)
        out.loss.backward()
        assert leaf.grad is not None
        return out, leaf.grad


def two_rows() -> Batch:
    """Two answers of 2 and 3 tokens."""

    def rows(a: list[float], b: list[float]) -> Tensor:
        return torch.tensor([[*a, math.nan], b], dtype=torch.float64)

    return Batch(
        rows([-1, -0.5], [-2, -0.3, -1.2]),
        rows([0.3, -0.1], [0.5, -0.4, 0.05]),
        rows([0.1, 0.2], [-0.1, 0, 0.3]),
        torch.tensor([[1.0] * 3, [-1.0] * 3], dtype=torch.float64),
        torch.tensor([[1, 1, 0], [1, 1, 1]]).bool(),
    )


def ragged(seed: int, b: int = 6, t: int = 5) -> Batch:
    g = torch.Generator().manual_seed(seed)
    noise = [torch.randn(b, t, generator=g, dtype=torch.float64) * scale for scale in (1, 0.3, 0.5)]
    mask = torch.arange(t) < torch.randint(0, t + 1, (b, 1), generator=g)
    return Batch(*noise, torch.randn(b, 1, generator=g, dtype=torch.float64).expand(b, t), mask)


GOLD = {
    "clip": (objective(), 0.0571227067, [0, -0.22620935, 0.27478688, 0, 0.17521185]),
    "clip + .04 k3": (
        objective(coef=0.04),
        0.0576649826,
        [0.00095163, -0.22439666, 0.27408574, 0, 0.17693973],
    ),
    "DAPO": (
        objective(high=0.28, aggregation="token_mean"),
        0.2630309898,
        [0, -0.18096748, 0.32974425, 0, 0.21025422],
    ),
    "Dr. GRPO": (
        objective(aggregation="constant", length=4),
        0.1743943686,
        [0, -0.11310468, 0.20609016, 0, 0.13140889],
    ),
    "GSPO": (objective("sequence", 0.03, 0.04), 0.0056355482, [0, 0, *[0.17521185] * 3]),
    "product of ratios": (objective("sequence_product"), -0.0190828786, [0, 0, *[0.58091712] * 3]),
}


@pytest.mark.parametrize("name", GOLD)
def test_gold(name: str) -> None:
    o, loss, gradient = GOLD[name]
    batch = two_rows()
    out, grad = batch.loss(o)
    assert out.loss.item() == pytest.approx(loss, abs=1e-9)
    assert grad[batch.mask].tolist() == pytest.approx(gradient, abs=1e-8)


def test_metrics() -> None:
    out, _ = two_rows().loss(objective(coef=0.04))
    k3 = [math.exp(-d) + d - 1 for d in (0.1, 0.2, -0.1, 0, 0.3)]
    want = {"policy_loss": 0.0571227067, "kl": sum(k3) / 5}
    want |= {"clip_ratio/low_mean": 0.2, "clip_ratio/high_mean": 0.2, "clip_ratio/region_mean": 0.4}
    assert {k: v.item() for k, v in out.metrics.items()} == pytest.approx(want, abs=1e-7)
    assert not any(v.requires_grad for v in out.metrics.values())


@pytest.mark.trap(15)
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    mode=st.sampled_from(MODES),
    level=st.sampled_from(LEVELS),
    cuts=st.sets(st.integers(1, 5)),
    order=st.permutations(range(6)),
)
def test_no_split_and_no_order_changes_loss_gradient_or_metrics(
    seed: int, mode: Aggregation, level: RatioLevel, cuts: set[int], order: list[int]
) -> None:
    batch, o = ragged(seed), objective(level, aggregation=mode, coef=0.1)
    whole, grad = batch.loss(o)
    edges = [0, *sorted(cuts), 6]
    loss, metrics = torch.zeros((), dtype=torch.float64), defaultdict(float)
    for i in range(len(edges) - 1):
        rows = torch.tensor(order[edges[i] : edges[i + 1]])
        part, part_grad = batch.loss(o, batch.totals, rows)
        loss += part.loss.detach()
        torch.testing.assert_close(part_grad, grad[rows], atol=1e-12, rtol=0)
        for name, value in part.metrics.items():
            metrics[name] += value.item()
    assert loss.item() == pytest.approx(whole.loss.item(), abs=1e-12)
    assert metrics == pytest.approx({k: v.item() for k, v in whole.metrics.items()}, abs=1e-6)


@pytest.mark.trap(16)
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("level", LEVELS)
def test_padding_may_be_wide_and_hold_anything(level: RatioLevel, mode: Aggregation, garbage: float) -> None:
    batch, o = ragged(11), objective(level, aggregation=mode, coef=0.1)
    want, grad = batch.loss(o)
    wide = ragged(11)
    wide.mask = torch.cat([batch.mask, torch.zeros(6, 3, dtype=torch.bool)], 1)
    for name, sign in (("log_probs", 1), ("old", -1), ("ref", -1), ("advantages", 1)):
        value = torch.cat([getattr(batch, name), torch.zeros(6, 3, dtype=torch.float64)], 1)
        setattr(wide, name, value.where(wide.mask, sign * garbage))
    got, wide_grad = wide.loss(o)
    assert got.loss.item() == pytest.approx(want.loss.item(), abs=1e-14)
    torch.testing.assert_close(wide_grad[:, :5], grad, atol=1e-14, rtol=0)
    assert wide_grad[~wide.mask].eq(0).all()
    assert all(v.isfinite() for v in got.metrics.values())


@pytest.mark.trap(17)
@pytest.mark.parametrize("mode", MODES)
def test_a_batch_with_nothing_to_learn_from_is_zero_not_nan(mode: Aggregation) -> None:
    batch = ragged(1)
    batch.mask = torch.zeros_like(batch.mask)
    out, grad = batch.loss(objective(aggregation=mode, coef=0.1))
    assert out.loss.item() == 0
    assert grad.eq(0).all()
    assert all(v.item() == 0 for v in out.metrics.values())


@pytest.mark.trap(11)
@pytest.mark.parametrize("level", LEVELS)
def test_first_update_is_the_policy_gradient_at_value_zero(level: RatioLevel) -> None:
    batch = ragged(2)
    batch.mask = torch.arange(5) < torch.tensor([[5], [1], [3], [2], [4], [5]])
    batch.old = batch.log_probs
    a = objective().advantages(torch.tensor([1.0, 0, 0, 1, 1, 0.5]).double(), torch.ones(6, dtype=torch.bool), 6)
    batch.advantages = a[:, None].expand(6, 5)
    out, grad = batch.loss(objective(level, 1e-6, 1e-6))
    assert out.loss.item() == pytest.approx(0, abs=1e-12)  # learning must never be judged by this value
    assert out.metrics["clip_ratio/region_mean"].item() == 0
    lengths = batch.mask.sum(1, keepdim=True)
    times = lengths if level == "sequence_product" else 1
    torch.testing.assert_close(grad, -batch.advantages * batch.mask * times / lengths / 6, atol=1e-14, rtol=0)


def test_coefficient_zero_computes_no_kl() -> None:
    batch, o = two_rows(), objective()
    batch.ref = torch.full_like(batch.ref, math.nan)
    out, _ = batch.loss(o)
    assert out.loss.isfinite()
    assert "kl" not in out.metrics
    assert not o.needs_reference
    assert objective(coef=0.1).needs_reference
    mask = batch.mask
    o.policy_loss(batch.log_probs, batch.old, None, batch.advantages, mask, batch.totals)


@pytest.mark.parametrize(
    ("estimator", "kl"), [("k1", 0.3), ("k2", 0.025), ("k3", math.exp(-0.1) + math.exp(-0.2) - 1.7)]
)
def test_kl_in_the_reward(estimator: str, kl: float) -> None:
    batch = two_rows()
    o = objective(coef=0.5, placement="reward", estimator=estimator)
    log_probs = batch.log_probs.clone().requires_grad_()
    rewards = torch.tensor([2.0, 3.0], dtype=torch.float64)
    shaped = o.shaped_rewards(rewards, log_probs, batch.ref, batch.mask)
    assert shaped[0].item() == pytest.approx(2 - 0.5 * kl)
    assert not shaped.requires_grad
    # The loss has no KL term then; a given reference only feeds the metric.
    out, _ = batch.loss(o)
    assert out.loss.item() == pytest.approx(GOLD["clip"][1], abs=1e-9)
    assert "kl" in out.metrics
    without = o.policy_loss(batch.log_probs, batch.old, None, batch.advantages, batch.mask, batch.totals)
    assert "kl" not in without.metrics


@pytest.mark.parametrize(("stop", "bias"), [(0.1, 0.155843), (0.2, 0.202359), (0.5, 0.193147)])
def test_dividing_by_the_own_length_makes_wrong_answers_longer(stop: float, bias: float) -> None:
    # An answer of n tokens has probability s (1 - s)^(n - 1); every length is enumerated, every answer is wrong.
    n = torch.arange(1, 401, dtype=torch.float64)
    mask = torch.arange(400) < n[:, None]
    log_probs = torch.full((400, 400), math.log(1 - stop), dtype=torch.float64)
    log_probs.fill_diagonal_(math.log(stop))
    by_stop_logit = torch.full((400, 400), -stop, dtype=torch.float64).fill_diagonal_(1 - stop)
    batch = Batch(log_probs, torch.zeros_like(log_probs), torch.zeros_like(log_probs), -mask.double(), mask)
    for mode, expected in (("sequence_mean", bias), ("constant", 0.0)):
        _, grad = batch.loss(objective(aggregation=mode), Totals(1.0, 1.0))
        got = ((grad * by_stop_logit).sum(1) * stop * (1 - stop) ** (n - 1)).sum().item()
        assert got == pytest.approx(expected, abs=1e-6)  # descent lowers the stop logit by this


@pytest.mark.trap(26)
def test_what_carries_gradient() -> None:
    batch = two_rows()
    log_probs, old, ref, advantages = (
        x.nan_to_num(0.0).requires_grad_() for x in (batch.log_probs, batch.old, batch.ref, batch.advantages.clone())
    )
    o = objective(coef=0.3)
    o.policy_loss(log_probs, old, ref, advantages * 0, batch.mask, batch.totals).loss.backward()
    assert old.grad is None
    assert ref.grad is None
    assert advantages.grad is None
    assert log_probs.grad is not None
    assert log_probs.grad[0, 0].item() == pytest.approx(0.3 * (1 - math.exp(-0.1)) / 4)  # k3 is differentiated


def test_rewards_pass_through_where_kl_is_in_the_loss() -> None:
    rewards, mask = torch.tensor([2.0, 3.0]), torch.ones(2, 1, dtype=torch.bool)
    assert torch.equal(objective(coef=0.5).shaped_rewards(rewards, None, None, mask), rewards)
    assert torch.equal(objective(placement="reward").shaped_rewards(rewards, None, None, mask), rewards)


def test_advantages_use_the_configured_credit() -> None:
    o = dataclasses.replace(objective(), advantage=AdvantageConfig(baseline="leave_one_out", scale="none"))
    got = o.advantages(torch.tensor([1.0, 0.0, 0.0, 0.5]), torch.ones(4, dtype=torch.bool), 4)
    assert got.tolist() == pytest.approx([0.8333333, -0.5, -0.5, 0.1666667])


@pytest.mark.trap(16)
def test_constant_length_comes_from_the_objective_or_the_argument() -> None:
    batch, o = two_rows(), objective(aggregation="constant")
    args = (batch.log_probs, batch.old, None, batch.advantages, batch.mask, batch.totals)
    assert o.policy_loss(*args, constant_length=4).loss.item() == pytest.approx(GOLD["Dr. GRPO"][1], abs=1e-9)
    own = objective(aggregation="constant", length=4)
    assert own.policy_loss(*args, constant_length=99).loss.item() == pytest.approx(GOLD["Dr. GRPO"][1], abs=1e-9)
    with pytest.raises(ValueError, match=r"model\.init_args\.objective\.constant_length"):
        o.policy_loss(*args)


def test_a_missing_reference_is_named() -> None:
    batch = two_rows()
    with pytest.raises(ValueError, match=r"model\.init_args\.objective\.kl\.coef"):
        objective(coef=0.1).policy_loss(batch.log_probs, batch.old, None, batch.advantages, batch.mask, batch.totals)
    with pytest.raises(ValueError, match=r"model\.init_args\.objective\.kl\.coef"):
        objective(coef=0.1, placement="reward").shaped_rewards(torch.ones(2), None, None, batch.mask)


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: RatioConfig(level="token", clip_low=0.0, clip_high=0.2), r"ratio\.clip_low"),
        (lambda: RatioConfig(level="token", clip_low=0.2, clip_high=math.nan), r"ratio\.clip_high"),
        (lambda: KLConfig(estimator="k3", placement="loss", coef=-0.1), r"kl\.coef"),
        (lambda: AdvantageConfig(baseline="group_mean", scale="group_std", eps=-1.0), r"advantage\.eps"),
        (lambda: AdvantageConfig(baseline="group_mean", scale="none", eps=1e-4), r"advantage\.eps"),
        (lambda: objective(aggregation="constant", length=0), "constant_length"),
        (lambda: objective(length=5), "constant_length"),
    ],
)
def test_bad_values_name_their_key(make: Any, key: str) -> None:
    with pytest.raises(ValueError, match=rf"^model\.init_args\.objective\.{key}: "):
        make()


def test_unknown_choices_list_the_known(monkeypatch: pytest.MonkeyPatch) -> None:
    # Not through the constructor, whose annotations the test run checks first; a user's Python would get here.
    config = objective().kl
    object.__setattr__(config, "estimator", "k4")
    with pytest.raises(ValueError, match=r"kl\.estimator: 'k4' is none of k1, k2, k3"):
        config.__post_init__()


def parser() -> jsonargparse.ArgumentParser:
    p = jsonargparse.ArgumentParser(exit_on_error=False)
    p.add_argument("--objective", type=Objective)
    return p


YAML: dict[str, Any] = {
    "advantage": {"baseline": "group_mean", "scale": "group_std"},
    "ratio": {"level": "token", "clip_low": 10, "clip_high": 10},
    "kl": {"estimator": "k3", "placement": "loss", "coef": 0.001},
    "aggregation": "sequence_mean",
}


def test_reads_from_yaml_with_the_clip_of_ten() -> None:
    p = parser()
    o = p.instantiate(p.parse_object({"objective": YAML})).objective
    assert isinstance(o, Objective)
    assert o.ratio == RatioConfig(level="token", clip_low=10.0, clip_high=10.0)
    assert isinstance(o.ratio.clip_low, float)
    assert o.advantage.eps == 0


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"kl": {**YAML["kl"], "estimator": "k4"}}, "k4"),
        ({"aggregation": "mean"}, "mean"),
        ({"colour": 1}, "colour"),
        ({"ratio": {"level": "token", "clip_low": 0.2}}, "clip_high"),
        ({"ratio": {"level": "token", "clip_low": -0.2, "clip_high": 0.2}}, r"ratio\.clip_low"),
    ],
)
def test_yaml_mistakes_are_refused(change: dict[str, Any], named: str) -> None:
    p = parser()
    with pytest.raises((ValueError, jsonargparse.ArgumentError), match=named):
        p.instantiate(p.parse_object({"objective": YAML | change}))


@pytest.mark.parity
@pytest.mark.parametrize(
    ("loss_type", "mode"), [("grpo", "sequence_mean"), ("dapo", "token_mean"), ("dr_grpo", "constant")]
)
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_matches_trl(loss_type: str, mode: Aggregation, level: RatioLevel, beta: float) -> None:
    trainer_class = pytest.importorskip("trl").GRPOTrainer
    batch = ragged(21)
    batch.mask = torch.arange(5) < torch.tensor([[5], [1], [3], [2], [4], [5]])
    leaf = batch.log_probs.clone().requires_grad_()
    metrics: dict[str, Any] = {"train": defaultdict(list)}
    stub = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (leaf, torch.zeros_like(leaf), None),
        accelerator=SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x),
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
        **{"aux_loss_enabled": False, "top_entropy_quantile": 1.0, "off_policy_mask_threshold": None},
        **{"importance_sampling_level": level, "beta": beta, "loss_type": loss_type, "use_vllm": False},
        **{"epsilon_low": 0.2, "epsilon_high": 0.28, "max_completion_length": 10, "_entropy_bonus_enabled": False},
        **{"current_gradient_accumulation_steps": 1, "model": SimpleNamespace(training=True), "_metrics": metrics},
    )
    inputs = {
        **{"prompt_ids": torch.zeros(6, 1), "prompt_mask": torch.ones(6, 1)},
        **{"completion_ids": torch.zeros(6, 5), "completion_mask": batch.mask.long()},
        **{"advantages": batch.advantages[:, 0], "old_per_token_logps": batch.old, "ref_per_token_logps": batch.ref},
        "num_items_in_batch": batch.mask.sum(),
    }
    theirs = trainer_class._compute_loss(stub, None, inputs)
    theirs.backward()
    ours, grad = batch.loss(objective(level, 0.2, 0.28, mode, beta))
    assert leaf.grad is not None
    torch.testing.assert_close(ours.loss, theirs, atol=1e-12, rtol=0)
    torch.testing.assert_close(grad, leaf.grad, atol=1e-12, rtol=0)
    names = ["kl"] if beta else []
    if level == "token":  # per sequence TRL counts clipped sequences, not tokens
        names += ["clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"]
    for name in names:
        assert ours.metrics[name].item() == pytest.approx(metrics["train"][name][0], abs=1e-6)
