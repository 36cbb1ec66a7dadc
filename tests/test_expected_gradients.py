"""The production objective's expected gradient, by enumeration of every group, against an independent expectation."""

import itertools

import numpy as np
import pytest
import tabular_policy as policy
import torch
from oracles import tabular

THETA = policy.THETA_REF + 0.7 * torch.randn(7, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
OPTIMUM = torch.from_numpy(tabular.optimal_table())
BASELINES, SCALES = ("group_mean", "leave_one_out", "none"), ("group_std", "group_sample_std", "none")
AGGREGATIONS, ESTIMATORS = ("sequence_mean", "token_mean", "constant"), ("k1", "k2", "k3")


def error(theta: torch.Tensor = THETA, group: int = 2, **settings: str | float) -> float:
    settings = {"baseline": "group_mean", "scale": "none", **settings}
    ours = policy.expected_loss_gradient(policy.objective(**settings), theta, group)  # type: ignore[arg-type]
    theirs = tabular.expected_loss_gradient(theta.numpy(), group=group, **settings)  # type: ignore[arg-type]
    assert np.abs(theirs).max() > 1e-3 or settings.get("coef") == 0  # never two zeros that agree
    return np.abs(ours.numpy() - theirs).max()


def test_the_oracle_itself() -> None:
    theta = THETA.numpy()
    assert sum(tabular.probabilities(theta)) == pytest.approx(1, abs=1e-14)
    assert tabular.expected_reward(tabular.THETA_REF) == pytest.approx(0.468664, abs=1e-6)
    star = tabular.optimal_table()
    assert tabular.regularised_reward(star) == pytest.approx(1.108014, abs=1e-6)
    assert tabular.expected_reward(star) == pytest.approx(1.707256, abs=1e-6)
    assert tabular.kl_from_reference(star) == pytest.approx(1.198484, abs=1e-6)
    gradient = tabular.gradient_of_regularised_reward(theta)
    for i, j in itertools.product(range(7), range(3)):
        e = np.zeros((7, 3))
        e[i, j] = 1e-5
        slope = (tabular.regularised_reward(theta + e) - tabular.regularised_reward(theta - e)) / 2e-5
        assert gradient[i, j] == pytest.approx(slope, abs=1e-8)


@pytest.mark.trap(26)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_every_credit_aggregation_and_kl(aggregation: str, baseline: str, scale: str) -> None:
    credit = {"aggregation": aggregation, "baseline": baseline, "scale": scale}
    for placement, estimator in itertools.product(("loss", "reward"), ESTIMATORS):
        assert error(**credit, placement=placement, estimator=estimator, coef=0.5) < 1e-6


@pytest.mark.parametrize("level", ["sequence", "sequence_product"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_every_ratio_level(aggregation: str, level: str) -> None:
    for placement in ("loss", "reward"):
        assert error(aggregation=aggregation, level=level, placement=placement, estimator="k3", coef=0.5) < 1e-6


@pytest.mark.parametrize(
    ("aggregation", "scale"), [("sequence_mean", "group_std"), ("token_mean", "group_sample_std"), ("constant", "none")]
)
def test_groups_of_three(aggregation: str, scale: str) -> None:
    for placement, estimator in (("loss", "k3"), ("reward", "k1")):
        kl = {"placement": placement, "estimator": estimator, "coef": 0.5}
        assert error(group=3, aggregation=aggregation, scale=scale, **kl) < 1e-6


def test_neighbouring_settings_do_differ() -> None:
    # Were two of them the same here, the tests above could not tell one from the other.
    seen = {
        c: policy.expected_loss_gradient(policy.objective(*c, 0.5), THETA, 2).flatten()
        for c in itertools.product(BASELINES, SCALES, AGGREGATIONS, ESTIMATORS, ("loss", "reward"))
    }
    gaps = torch.cdist(*[torch.stack(list(seen.values()))] * 2, compute_mode="donot_use_mm_for_euclid_dist")
    same = {
        (a, b)
        for (i, a), (j, b) in itertools.combinations(enumerate(seen), 2)
        if gaps[i, j] < 1e-4  # a hundred times what the tests above allow
    }
    # An independent baseline changes no expectation where every answer's tokens are summed.
    kl = list(itertools.product(ESTIMATORS, ("loss", "reward")))
    assert same == {(("leave_one_out", "none", "constant", *k), ("none", "none", "constant", *k)) for k in kl}


@pytest.mark.parametrize("group", [2, 3])
def test_dr_grpo_is_unbiased_up_to_its_factor(group: int) -> None:
    o = policy.objective("group_mean", "none", "constant")
    ours = -policy.expected_loss_gradient(o, THETA, group).numpy() * group / (group - 1)
    np.testing.assert_allclose(ours, tabular.gradient_of_regularised_reward(THETA.numpy(), 0.0), atol=1e-14)
    for biased in (policy.objective("group_mean", "none", "sequence_mean"), policy.objective(scale="group_std")):
        other = -policy.expected_loss_gradient(biased, THETA, group).numpy()
        cosine = (ours * other).sum() / np.linalg.norm(ours) / np.linalg.norm(other)
        assert cosine < 0.9999


@pytest.mark.trap(25)
@pytest.mark.parametrize("group", [2, 3])
def test_only_k1_in_the_reward_is_the_gradient_of_the_regularised_reward(group: int) -> None:
    want = tabular.gradient_of_regularised_reward(THETA.numpy())

    def distance(estimator: str, placement: str) -> float:
        o = policy.objective("leave_one_out", "none", "constant", estimator, placement, 0.5)
        return np.abs(policy.expected_loss_gradient(o, THETA, group).numpy() + want).max()

    assert distance("k1", "reward") < 1e-14
    for estimator, placement in itertools.product(ESTIMATORS, ("loss", "reward")):
        if (estimator, placement) != ("k1", "reward"):
            assert distance(estimator, placement) > 1e-3


@pytest.mark.trap(25)
def test_k1_in_the_loss_regularises_nothing() -> None:
    with_kl, without = (policy.objective("leave_one_out", coef=coef) for coef in (0.5, 0.0))
    a, b = (policy.expected_loss_gradient(o, THETA, 2) for o in (with_kl, without))
    torch.testing.assert_close(a, b, atol=1e-14, rtol=0)


@pytest.mark.trap(27)
def test_an_off_policy_product_of_ratios_is_exact_importance_sampling() -> None:
    # Sampled from another policy, the unclipped ratio of whole answers still gives the gradient of E[r] at THETA.
    o = policy.objective("none", "none", "sequence_mean", level="sequence_product", clip=float("inf"))
    old = policy.log_probs(policy.THETA_REF)
    theta = THETA.clone().requires_grad_()
    now = policy.log_probs(theta)
    leaf = now.detach().requires_grad_()
    advantages = policy.REWARDS[:, None].expand(15, 3)
    loss = o.policy_loss(leaf, old, None, advantages, policy.MASK, policy.Totals(1.0, 1.0)).loss
    loss.backward()
    assert leaf.grad is not None
    sampled = policy.answer_log_probs(policy.THETA_REF).exp()[:, None]
    (gradient,) = torch.autograd.grad(now, theta, leaf.grad * sampled)
    np.testing.assert_allclose(
        -gradient.numpy(), tabular.gradient_of_regularised_reward(THETA.numpy(), 0.0), atol=1e-14
    )


@pytest.mark.parametrize("baseline", ["group_mean", "leave_one_out"])
def test_every_group_has_zero_advantage_at_the_optimum(baseline: str) -> None:
    o = policy.objective(baseline, "none", "constant", "k1", "reward", 0.5)
    now = policy.log_probs(OPTIMUM)
    shaped = o.shaped_rewards(policy.REWARDS, now, policy.log_probs(policy.THETA_REF), policy.MASK)
    torch.testing.assert_close(shaped, torch.full_like(shaped, 1.1080143134589), atol=1e-12, rtol=0)
    assert policy.credit(o, now, policy.all_groups(2).flatten(), 2).abs().max().item() < 1e-12
    for aggregation in AGGREGATIONS:
        o = policy.objective(baseline, "none", aggregation, "k1", "reward", 0.5)
        assert policy.expected_loss_gradient(o, OPTIMUM, 2).abs().max().item() < 1e-12


@pytest.mark.trap(25)
@pytest.mark.parametrize(
    ("estimator", "placement", "j", "reward", "kl"),
    [
        ("k2", "loss", 1.103839, 1.720049, 1.232420),
        ("k3", "loss", 1.066083, 1.604093, 1.076020),
        ("k1", "reward", 1.108014, 1.707256, 1.198484),
    ],
)
def test_fixed_points(estimator: str, placement: str, j: float, reward: float, kl: float) -> None:
    o = policy.objective("none", "none", "constant", estimator, placement, 0.5)  # the limit of an infinite group
    point = policy.stationary_point(o, 1, policy.THETA_REF)
    assert policy.expected_loss_gradient(o, point, 1).abs().max().item() < 1e-9
    theta = point.numpy()
    assert tabular.regularised_reward(theta) == pytest.approx(j, abs=1e-6)
    assert tabular.expected_reward(theta) == pytest.approx(reward, abs=1e-6)
    assert tabular.kl_from_reference(theta) == pytest.approx(kl, abs=1e-6)
