"""PPO's step against one written out by hand on the plain HF network, and what its settings do."""

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ppo_runs import GROUP, ppo, ppo_objective
from tiny import write_tiny_model
from tiny_runs import BATCH, Watch, curve, fit, gap, prompts, scalars, trainer, weights
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from lit_posttrain import kept_prompts, scoring
from lit_posttrain.algorithms import PPO
from lit_posttrain.critic import CriticConfig, load_critic
from lit_posttrain.objective import KLConfig
from lit_posttrain.policy import LoraConfig, PolicyConfig
from lit_posttrain.ppo_objective import GAEConfig, ValueConfig
from lit_posttrain.reference import ReferenceConfig

LR = 1e-2


def ran(tiny: Path, folder: Path, *callbacks: Any, steps: int = 1, **overrides: Any) -> PPO:
    folder.mkdir(parents=True, exist_ok=True)
    return fit(ppo(tiny, **overrides), prompts(tiny, folder), folder, *callbacks, max_steps=steps)  # type: ignore


def kept_columns(module: PPO) -> list[Any]:
    """(rollout, columns of scores and credit) of every iteration."""
    kept: list[Any] = []
    credit = module.credit

    def keeping(rollout: Any, scored: Any) -> Any:
        kept.append((rollout, {**scored, **credit(rollout, scored)}))
        return {name: column for name, column in kept[-1][1].items() if name not in scored}

    module.credit = keeping  # type: ignore[method-assign]
    return kept


def by_hand(rollout: Any, values: Tensor, kl: Tensor, coef: float, lam: float) -> list[tuple[list[int], Any, Any]]:
    """Each answer's positions, advantages and returns, in plain Python."""
    rows = []
    for i, completion in enumerate(rollout.completions):
        first = int(rollout.sequences.prompt_lengths[i]) - 1
        at = list(range(first, first + len(completion.token_ids)))
        rewards = [-coef * float(kl[i, t]) for t in at]
        rewards[-1] += float(rollout.judgement.rewards[i])
        v = [float(values[i, t]) for t in at] + [0.0]
        advantage, advantages = 0.0, []
        for k in reversed(range(len(at))):
            advantage = rewards[k] + v[k + 1] - v[k] + lam * advantage
            advantages.insert(0, advantage)
        rows.append((at, advantages, [a + b for a, b in zip(advantages, v, strict=False)]))
    return rows


@pytest.mark.trap(9)
@pytest.mark.trap(8)
def test_one_step_is_the_one_written_out_by_hand(tiny_model: Path, tmp_path: Path) -> None:
    """From the rollout alone: HF's logits and score head, GAE in Python, whitening, both losses, plain SGD."""
    kl = KLConfig(estimator="k1", placement="reward", coef=0.3)
    module = ppo(tiny_model, lr=LR, objective=ppo_objective(kl=0.3), max_grad_norm=None, critic=CriticConfig(lr=3 * LR))
    assert module.objective.kl == kl
    kept = kept_columns(module)
    start: dict[str, Any] = {}

    def remember(trainer: Any, m: PPO) -> None:
        start["critic"] = {n: p.detach().clone() for n, p in m.critic.model.named_parameters()}  # type: ignore

    module.on_train_start = lambda real=module.on_train_start: (real(), remember(None, module))[0]  # type: ignore
    # A reference of other weights, so that the KL is not 0.
    other = write_tiny_model(tmp_path / "other", seed=1)
    module.reference_config = ReferenceConfig(model=str(other))
    fit(module, prompts(tiny_model, tmp_path), tmp_path, max_steps=1)
    (rollout, _), ids = kept[0], kept[0][0].sequences.ids
    network = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    reference = AutoModelForCausalLM.from_pretrained(other, dtype=torch.float32)

    def log_probs(of: Any) -> Tensor:
        return of(ids).logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]

    own = log_probs(network)
    critic: Any = AutoModelForSequenceClassification.from_pretrained(tiny_model, dtype=torch.float32, num_labels=1)
    critic.score = torch.nn.Linear(32, 1)
    critic.load_state_dict(start["critic"])
    values = critic.score(critic.model(ids).last_hidden_state)[:, :-1, 0]
    with torch.no_grad():
        rows = by_hand(rollout, values, own - log_probs(reference), 0.3, 0.95)
    flat = torch.tensor([a for _, advantages, _ in rows for a in advantages], dtype=torch.float64)
    flat = (flat - flat.mean()) / (flat.var(correction=0) + 1e-8).sqrt()
    chosen = torch.cat([own[i, at] for i, (at, _, _) in enumerate(rows)])
    policy_loss = -(flat.float() * (chosen - chosen.detach()).exp()).mean()
    predicted = torch.cat([values[i, at] for i, (at, _, _) in enumerate(rows)])
    returns = torch.tensor([r for _, _, each in rows for r in each])
    value_loss = 0.5 * (predicted - returns).square().mean()
    policy_loss.backward()
    (0.1 * value_loss).backward()
    after = weights(module)
    for name, p in network.named_parameters():
        torch.testing.assert_close(after[name], (p - LR * p.grad).detach(), atol=2e-6, rtol=1e-4)
    for name, p in critic.named_parameters():
        got = dict(module.critic.model.named_parameters())[name]  # type: ignore[union-attr]
        torch.testing.assert_close(got.detach(), (p - 3 * LR * p.grad).detach(), atol=2e-6, rtol=1e-4)
    assert curve(tmp_path, "train/loss/value_avg") == pytest.approx([float(value_loss)], rel=1e-4)
    kl_of_answers = (own - log_probs(reference)).detach()
    mean = sum(float(kl_of_answers[i, at].sum()) for i, (at, _, _) in enumerate(rows)) / len(rows)
    assert curve(tmp_path, "train/objective/kl") == pytest.approx([mean], rel=1e-4)
    assert curve(tmp_path, "train/objective/non_score_reward") == pytest.approx([-0.3 * mean], rel=1e-4)
    variance = float(returns.double().var(correction=0))
    explained = 1 - float((returns - predicted).square().mean()) / variance
    assert curve(tmp_path, "train/val/explained_variance") == pytest.approx([explained], rel=1e-3)


def same_tags(one: Path, other: Path) -> None:
    """Every curve agrees, but for times."""
    ours, theirs = scalars(one), scalars(other)
    for tag in ours.keys() & theirs.keys():
        if tag.startswith("train/") and tag.removeprefix("train/") not in ("step_time", "eps"):
            assert [v for _, v in ours[tag]] == pytest.approx([v for _, v in theirs[tag]], rel=1e-5, abs=1e-6), tag


@pytest.mark.parametrize("warmup", [0, 1])
@pytest.mark.parametrize("whiten", [False, True])
def test_values_that_come_with_the_update_are_those_of_a_pass_of_their_own(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whiten: bool, warmup: int
) -> None:
    """One update a rollout: the critic runs once a micro-batch, and nothing else about the training changes."""
    from lit_posttrain.scalar_heads import ScoreNetwork

    calls: list[int] = []
    forward = ScoreNetwork.forward
    monkeypatch.setattr(ScoreNetwork, "forward", lambda *a, **k: (calls.append(1), forward(*a, **k))[1])
    gae = GAEConfig(gamma=0.9, lam=0.8, whiten_advantages=whiten, whiten_rewards=whiten)
    trained, counts, columns = [], [], []
    for together in (True, False):
        calls.clear()
        module = ppo(
            tiny_model, objective=ppo_objective(kl=0.3, gae=gae), token_budget=40, critic=CriticConfig(warmup=warmup)
        )
        assert module._values_with_update() is False  # before there is a critic
        if not together:
            monkeypatch.setattr(module, "_values_with_update", lambda: False)
        columns.append(kept_columns(module))
        (tmp_path / str(together)).mkdir()
        fit(module, prompts(tiny_model, tmp_path), tmp_path / str(together), max_steps=3)
        trained.append({n: p.detach().clone() for n, p in module.named_parameters()})
        counts.append(len(calls))
    assert gap(*trained) == 0.0
    assert counts[1] == 2 * counts[0]
    same_tags(tmp_path / "True", tmp_path / "False")
    for (_, one), (_, other) in zip(*columns, strict=True):
        for name in ("advantages", "returns", "old_values"):
            assert torch.equal(one[name], other[name]), name


@pytest.mark.trap(15)
@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_any_token_budget_gives_the_same_weights(
    tiny_model: Path, tmp_path: Path, shared: bool, keeps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_prompts, "PASS_TOKENS", 0 if keeps else 10**9)
    results = []
    for budget in (10_000, 40, 1):
        module = ran(
            tiny_model, tmp_path / str(budget), steps=2, num_minibatches=2, num_epochs=2, token_budget=budget,
            critic=CriticConfig(shared=shared),
        )  # fmt: skip
        results.append({n: p.detach().clone() for n, p in module.named_parameters()})
    for other in results[1:]:
        assert gap(results[0], other) < 1e-6


@pytest.mark.parametrize("critic", [CriticConfig(), CriticConfig(shared=True)])
def test_a_divided_prompt_goes_through_each_network_once(
    tiny_model: Path, tmp_path: Path, critic: CriticConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens that policy, reference and critic compute in scoring and in updates: as few as in one piece."""
    decoder_of, counts = scoring._decoder, {}
    other = write_tiny_model(tmp_path / "other", seed=9)
    for budget, limit in ((10_000, 0), (20, 0), (20, 10**9)):
        tokens = counts[budget, limit] = dict[int, int]()

        def counting(network: Any, tokens: dict[int, int] = tokens) -> Any:
            def run(**named: Any) -> Any:
                tokens[id(network)] = tokens.get(id(network), 0) + named["input_ids"].numel()
                return decoder_of(network)(**named)

            return run

        monkeypatch.setattr(kept_prompts, "PASS_TOKENS", limit)
        monkeypatch.setattr(scoring, "_decoder", counting)
        ran(
            tiny_model, tmp_path / f"{budget} {limit}", steps=1, num_epochs=2, token_budget=budget, critic=critic,
            reference=ReferenceConfig(model=str(other)),
        )  # fmt: skip
        monkeypatch.setattr(scoring, "_decoder", decoder_of)
    whole, kept, again = (list(each.values()) for each in counts.values())
    assert len(whole) == (2 if critic.shared else 3)
    assert kept == whole
    assert all(a > b for a, b in zip(again, whole, strict=True))


def test_a_second_epoch_clips_around_the_first_values(tiny_model: Path, tmp_path: Path) -> None:
    """Two epochs: a critic that runs off is held back by its values before the first."""
    objective = ppo_objective(kl=0.0, value=ValueConfig(coef=1.0, clip=1e-3))
    ran(tiny_model, tmp_path / "run", objective=objective, num_epochs=2, critic=CriticConfig(lr=0.5))
    assert curve(tmp_path / "run", "train/val/clipfrac_avg")[0] > 0


def test_the_first_update_of_an_iteration_has_ratio_1_and_later_ones_the_old_policy(
    tiny_model: Path, tmp_path: Path
) -> None:
    ran(tiny_model, tmp_path / "run", lr=0.0, num_epochs=3, num_minibatches=2)
    values = scalars(tmp_path / "run")
    for tag, expected in (
        ("policy/approxkl_avg", 0.0),
        ("val/ratio", 1.0),
        ("val/ratio_var", 0.0),
        ("loss/policy_avg", 0),
    ):
        assert values[f"train/{tag}"][0][1] == pytest.approx(expected, abs=1e-5)


@pytest.mark.trap(24)
@pytest.mark.parametrize(("reward", "penalty"), [(-1.0, 0.0), (None, 0.5)])
def test_answers_that_were_cut(tiny_model: Path, tmp_path: Path, reward: float | None, penalty: float) -> None:
    """What they score, and that nothing is bootstrapped behind their last token."""
    module = ppo(
        tiny_model,
        objective=ppo_objective(kl=0.0, missing_eos_reward=reward, missing_eos_penalty=penalty,
                                gae=GAEConfig(gamma=1.0, lam=1.0, whiten_advantages=False, whiten_rewards=False)),
    )  # fmt: skip
    kept = kept_columns(module)
    fit(module, prompts(tiny_model, tmp_path), tmp_path, max_steps=4)
    seen = set()
    for rollout, columns in kept:
        for i, completion in enumerate(rollout.completions):
            score = float(rollout.judgement.rewards[i])
            if completion.stop_reason == "length":
                score = score - penalty if reward is None else reward
            seen.add(completion.stop_reason)
            returns = columns["returns"][i][rollout.mask[i]]
            torch.testing.assert_close(returns, torch.full_like(returns, score))
    assert seen == {"stop", "length"}


@pytest.mark.trap(42)
def test_the_kl_coefficient_is_adapted_by_answers(tiny_model: Path, tmp_path: Path) -> None:
    kl = KLConfig(estimator="k1", placement="reward", coef=0.2, target=0.05, horizon=100.0)
    ran(tiny_model, tmp_path / "run", steps=4, lr=0.3, objective=replace(ppo_objective(), kl=kl))
    coefs, kls = (curve(tmp_path / "run", f"train/objective/{n}") for n in ("kl_coef", "kl"))
    expected = [0.2]
    for measured in kls[:-1]:
        error = min(max(measured / 0.05 - 1, -0.2), 0.2)
        expected.append(expected[-1] * (1 + error * BATCH * GROUP / 100.0))
    assert coefs == pytest.approx(expected, rel=1e-5)
    assert len(set(coefs)) == 4
    charged = curve(tmp_path / "run", "train/objective/non_score_reward")
    assert charged == pytest.approx([-c * k for c, k in zip(coefs, kls, strict=True)], rel=1e-4, abs=1e-6)


def test_the_kl_coefficient_waits_for_the_policy(tiny_model: Path, tmp_path: Path) -> None:
    """While the critic warms up the KL is 0 and says nothing about the coefficient."""
    kl = KLConfig(estimator="k1", placement="reward", coef=0.2, target=0.05, horizon=100.0)
    ran(
        tiny_model, tmp_path / "run", steps=4, lr=0.3, objective=ppo_objective(kl), critic=CriticConfig(warmup=2),
    )  # fmt: skip
    coefs = curve(tmp_path / "run", "train/objective/kl_coef")
    assert coefs[:3] == pytest.approx([0.2] * 3, rel=1e-6)
    assert coefs[3] != pytest.approx(0.2, rel=1e-6)


def test_a_horizon_that_one_iteration_could_overshoot_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    def built(horizon: float) -> PPO:
        return ppo(tiny_model, objective=ppo_objective(KLConfig(estimator="k1", placement="reward", coef=0.2,
                                                                target=6.0, horizon=horizon)))  # fmt: skip

    module = built(1.6)
    with pytest.raises(ValueError, match=r"objective\.kl\.horizon: .* = 0\.2 \* 2 \* 4 = 1\.6, is 1\.6"):
        fit(module, prompts(tiny_model, tmp_path), tmp_path)
    assert module.policy is None
    assert fit(built(1.7), prompts(tiny_model, tmp_path), tmp_path, max_steps=1).kl_coef > 0


@pytest.mark.parametrize("lora", [None, LoraConfig(r=2, alpha=4)])
def test_the_average_of_a_policy_that_rests_is_the_policy(
    tiny_model: Path, tmp_path: Path, lora: LoraConfig | None
) -> None:
    """Adapters are drawn at random: the average begins at the policy's own."""
    module = ran(
        tiny_model, tmp_path / "run", steps=2, ema_decay=0.8, critic=CriticConfig(warmup=9), policy={"lora": lora}
    )
    assert module.average is not None
    for (name, mine), theirs in zip(module.average.named_parameters(), module.built_policy().parameters(), strict=True):
        assert torch.equal(mine, theirs), name


@pytest.mark.parametrize("shared", [False, True])
def test_the_critic_warms_up_alone(tiny_model: Path, tmp_path: Path, shared: bool) -> None:
    seen: list[Any] = []

    def note(trainer: Any, module: PPO) -> None:
        policy = {n: p.detach().clone() for n, p in module.policy.model.named_parameters()}  # type: ignore[union-attr]
        critic = module.parameter_groups()[1]["params"]
        seen.append((policy, {str(i): p.detach().clone() for i, p in enumerate(critic)}))

    critic = CriticConfig(shared=shared, warmup=2)
    optimizer = lambda params: torch.optim.AdamW(params, lr=1e-2, weight_decay=0.5)  # noqa: E731
    module = ran(tiny_model, tmp_path / "run", Watch(note), steps=4, critic=critic, optimizer=optimizer)
    start = dict(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).named_parameters())
    assert gap(start, seen[0][0]) == gap(seen[0][0], seen[1][0]) == 0.0
    assert gap(seen[1][0], seen[2][0]) > 0
    for (_, before), (_, after) in itertools.pairwise(seen):
        assert gap(before, after) > 0
    assert module.trainer.global_step == 4


def test_a_shared_critic_begins_at_zero_and_learns(tiny_model: Path, tmp_path: Path) -> None:
    module = ppo(tiny_model, critic=CriticConfig(shared=True, lr=0.3), lr=0.0, objective=ppo_objective(kl=0.0))
    kept = kept_columns(module)
    fit(module, prompts(tiny_model, tmp_path), tmp_path, max_steps=12)
    assert (kept[0][1]["old_values"] == 0).all()
    losses = curve(tmp_path, "train/loss/value_avg")
    assert sum(losses[-3:]) < sum(losses[:3]) / 1.5


def test_a_zero_head(tiny_model: Path, tmp_path: Path) -> None:
    module = ppo(tiny_model, critic=CriticConfig(zero_head=True))
    kept = kept_columns(module)
    fit(module, prompts(tiny_model, tmp_path), tmp_path, max_steps=1)
    assert (kept[0][1]["old_values"] == 0).all()


@pytest.mark.trap(22)
def test_whitening_uses_the_moments_of_all_answers(tiny_model: Path, tmp_path: Path) -> None:
    objective = ppo_objective(
        gae=GAEConfig(gamma=1.0, lam=1.0, whiten_advantages=True, whiten_rewards=True),
        value=ValueConfig(coef=1.0, clip=9.0),
    )
    module = ppo(tiny_model, objective=objective, num_minibatches=4)
    kept = kept_columns(module)
    fit(module, prompts(tiny_model, tmp_path), tmp_path, max_steps=1)
    rollout, columns = kept[0]
    advantages = columns["advantages"][rollout.mask].double()
    assert float(advantages.mean()) == pytest.approx(0.0, abs=1e-5)
    assert float(advantages.var(correction=0)) == pytest.approx(1.0, rel=1e-4)
    # Rewards are 0 but for the score: whitened with their mean kept, then summed.
    rewards = torch.zeros_like(columns["returns"]).double()
    for i in range(len(rewards)):
        last = int(rollout.mask[i].nonzero()[-1])
        rewards[i, last] = rollout.judgement.rewards[i]
    inside = rewards[rollout.mask]
    white = (inside - inside.mean()) / (inside.var(correction=0) + 1e-8).sqrt() + inside.mean()
    first = int(rollout.mask[0].sum())
    assert float(columns["returns"][0][rollout.mask[0]][0]) == pytest.approx(float(white[:first].sum()), rel=1e-4)


@pytest.mark.parametrize("critic", [None, 3 * LR])
def test_rates_are_those_of_the_iteration(tiny_model: Path, tmp_path: Path, critic: float | None) -> None:
    halved = lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 0.5**step)  # noqa: E731
    ran(tiny_model, tmp_path / "run", steps=3, lr=LR, scheduler=halved, critic=CriticConfig(lr=critic))
    values = scalars(tmp_path / "run")
    rates = [LR, LR / 2, LR / 4]
    for tag in ("train/lr", "train/learning_rate"):
        assert [v for _, v in values[tag]] == pytest.approx(rates)
    if critic is None:
        assert "train/lr/critic" not in values
    else:
        assert [v for _, v in values["train/lr/critic"]] == pytest.approx([3 * r for r in rates])


def test_kl_and_entropy_of_the_first_update_where_nothing_was_scored_before(tiny_model: Path, tmp_path: Path) -> None:
    """KL in the loss, one update a rollout: the same numbers as where the policy is scored for its rewards."""
    other = ReferenceConfig(model=str(write_tiny_model(tmp_path / "other", seed=1)))
    for placement in ("reward", "loss"):
        kl = KLConfig(estimator="k1", placement=placement, coef=0.3)
        ran(tiny_model, tmp_path / placement, objective=ppo_objective(kl), reference=other, token_budget=40)
    for name in ("kl", "entropy", "kl_coef"):
        values = [curve(tmp_path / placement, f"train/objective/{name}") for placement in ("reward", "loss")]
        assert values[0] == pytest.approx(values[1], rel=1e-5), name
        assert values[0] != [0.0]


def test_every_tag_of_the_last_trl_ppo(tiny_model: Path, tmp_path: Path) -> None:
    ran(tiny_model, tmp_path / "run", num_minibatches=2)
    tags = {t.removeprefix("train/") for t in scalars(tmp_path / "run")}
    assert {
        "objective/kl", "objective/entropy", "objective/non_score_reward", "objective/rlhf_reward", "objective/scores",
        "policy/approxkl_avg", "policy/clipfrac_avg", "policy/entropy_avg", "loss/policy_avg", "loss/value_avg",
        "val/clipfrac_avg", "val/ratio", "val/ratio_var", "val/num_eos_tokens", "lr", "episode", "eps",
        "objective/kl_coef", "val/explained_variance", "grad_norm/policy", "grad_norm/critic",
    } <= tags  # fmt: skip


def test_a_simple_reward_is_learned(tiny_model: Path, tmp_path: Path) -> None:
    ran(
        tiny_model, tmp_path / "run", steps=15, objective=ppo_objective(kl=0.0), num_epochs=2,
        optimizer=lambda p: torch.optim.AdamW(p, lr=2e-2),
    )  # fmt: skip
    rewards = curve(tmp_path / "run", "train/reward")
    assert sum(rewards[-3:]) / 3 > sum(rewards[:2]) / 2 + 0.2


@pytest.mark.parametrize(
    ("build", "key"),
    [
        (lambda m: ppo(m, critic=CriticConfig(shared=True, model=str(m))), "critic.model"),
        (lambda m: ppo(m, critic=CriticConfig(warmup=-1)), "critic.warmup"),
        (lambda m: ppo(m, objective=ppo_objective(missing_eos_penalty=-1.0)), "missing_eos_penalty"),
        (lambda m: ppo(m, objective=ppo_objective(lam=1.5)), "gae.lam"),
        (lambda m: ppo(m, objective=ppo_objective(entropy_coef=-1.0)), "entropy_coef"),
        (lambda m: ppo(m, objective=ppo_objective(value=ValueConfig(coef=0.0, clip=0.2))), "value.coef"),
        (lambda m: ppo(m, objective=ppo_objective(value=ValueConfig(coef=0.1, clip=0.0))), "value.clip"),
        (lambda m: ppo(m, ema_decay=1.0), "ema_decay"),
        (lambda m: ppo(m, critic=CriticConfig(lr=math.nan)), "critic.lr"),
        (lambda m: ppo(m, critic=CriticConfig(shared=True, gradient_checkpointing=True)), "critic.gradient_checkp"),
        (lambda m: ppo(m, objective=ppo_objective(missing_eos_penalty=math.nan)), "missing_eos_penalty"),
        (lambda m: ppo(m, objective=ppo_objective(missing_eos_reward=math.inf)), "missing_eos_reward"),
        (lambda m: ppo(m, max_grad_norm=math.nan), "max_grad_norm"),
        (lambda m: ppo(m, max_grad_norm=math.inf), "max_grad_norm"),
        (lambda m: KLConfig(estimator="k1", placement="loss", coef=0.1, target=1.0, horizon=9.0), "kl.target"),
        (lambda m: KLConfig(estimator="k1", placement="reward", coef=0.1, target=1.0), "kl.horizon"),
        (lambda m: ppo_objective(kl=0.1, missing_eos_reward=-1.0, missing_eos_penalty=0.5), "missing_eos_penalty"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tiny_model: Path, build: Callable[[Path], Any], key: str) -> None:
    with pytest.raises(ValueError, match=key.replace(".", r"\.")):
        build(tiny_model)


NO_FIT = {
    "vocabulary": ({"vocab_size": 100}, "knows 100 tokens and the policy's tokenizer has 258"),
    "positions": ({"max_position_embeddings": 8}, "has fewer positions than the policy.* the model has 8"),
    "tokenizer": ({}, "has another tokenizer than the policy: 2 tokens have other ids there"),
}


@pytest.mark.parametrize("key", ["critic", "reference"])
@pytest.mark.parametrize("fault", NO_FIT)
def test_a_network_that_cannot_read_the_policys_tokens_is_named_before_anything_is_sampled(
    tiny_model: Path, tmp_path: Path, key: str, fault: str
) -> None:
    overrides, message = NO_FIT[fault]
    other = write_tiny_model(tmp_path / "other", seed=3, **overrides)
    if fault == "tokenizer":
        file = other / "tokenizer.json"
        content = json.loads(file.read_text())
        vocabulary = content["model"]["vocab"]
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
        file.write_text(json.dumps(content))
    config: Any = CriticConfig(model=str(other)) if key == "critic" else ReferenceConfig(model=str(other))
    module = ppo(tiny_model, **{key: config})
    module.collect = lambda *_: pytest.fail("it sampled")  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=rf"model\.init_args\.{key}\.model: .*other {message}"):
        fit(module, prompts(tiny_model, tmp_path), tmp_path)


def test_a_critic_without_a_tokenizer_is_taken(tiny_model: Path, tmp_path: Path) -> None:
    other = write_tiny_model(tmp_path / "other", seed=3, hidden_size=48)
    for file in other.glob("token*"):
        file.unlink()
    ran(tiny_model, tmp_path / "run", critic=CriticConfig(model=str(other)))


def test_a_run_that_ends_before_the_policy_is_trained_is_warned_of(tiny_model: Path, tmp_path: Path) -> None:
    module = ppo(tiny_model, critic=CriticConfig(warmup=1))
    with pytest.warns(UserWarning, match=r"critic\.warmup: the run has 1 iterations"):
        trainer(tmp_path, max_steps=1).fit(module, prompts(tiny_model, tmp_path))


def test_an_architecture_without_a_classifier_may_share_the_policys_network(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(config: Any, key: str) -> Any:
        raise ValueError(f"{key}: transformers has no sequence classifier")

    monkeypatch.setattr("lit_posttrain.scalar_heads.biased", none)
    for critic, mended in ((CriticConfig(), True), (CriticConfig(model=str(tiny_model)), False)):
        with pytest.raises(ValueError, match=r"^model\.init_args\.critic\.model: ") as error:
            load_critic(PolicyConfig(model=str(tiny_model)), critic)
        assert ("critic.shared: true" in str(error.value)) is mended


def test_a_critic_that_is_no_model_is_named(tiny_model: Path, tmp_path: Path) -> None:
    module = ppo(tiny_model, critic=CriticConfig(model=str(tmp_path / "nowhere")))
    with pytest.raises(ValueError, match=r"critic\.model"):
        fit(module, prompts(tiny_model, tmp_path), tmp_path)


def test_dual_clip_by_hand() -> None:
    from lit_posttrain.functional.policy_losses import clipped_policy_loss

    log_probs = torch.tensor([[math.log(5.0), math.log(2.0), math.log(5.0)]], requires_grad=True)
    advantages, yes = torch.tensor([[-1.0, -1.0, 1.0]]), torch.ones(1, 3, dtype=torch.bool)
    out = clipped_policy_loss(log_probs, torch.zeros(1, 3), advantages, yes, "token", 0.2, 0.2, 3.0)
    torch.testing.assert_close(out.per_token, torch.tensor([[3.0, 2.0, -1.2]]))
    (gradient,) = torch.autograd.grad(out.per_token.sum(), log_probs)
    torch.testing.assert_close(gradient, torch.tensor([[0.0, 2.0, 0.0]]))
    assert out.clipped_dual.tolist() == [[True, False, False]]


def test_the_critics_view_follows_its_weights(tiny_model: Path, tmp_path: Path) -> None:
    """In bf16 values are computed with a copy of the weights, made again after every update."""
    policy = {"compute_dtype": "bfloat16"}
    module = ppo(tiny_model, policy=None, lr=0.5, objective=ppo_objective(kl=0.0))
    module.policy_config = PolicyConfig(model=str(tiny_model), **policy)  # type: ignore[arg-type]
    fit(module, prompts(tiny_model, tmp_path), tmp_path, max_steps=2)
    critic = module.critic
    assert critic is not None
    assert critic.view is not None
    for master, low in critic.view.pairs:
        assert torch.equal(low, master.to(torch.bfloat16))
