"""GRPO end to end on the tiny model: what counts in a step, what is left out, and that rewards are learned."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import (
    BATCH,
    GROUP,
    Failing,
    Recorder,
    Watch,
    curve,
    even,
    fit,
    gap,
    grpo,
    objective,
    prompts,
    scalars,
    trained,
    trainer,
    weights,
)

from lit_posttrain.data import Template
from lit_posttrain.gates import GateError
from lit_posttrain.types import PromptBatch

ROWS = BATCH * GROUP


# --- what counts and what does not ----------------------------------------------------------------------------------


def only_first_prompt(prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Mixed rewards for one prompt of each two, a constant that fp32 cannot hold for the other."""
    texts = sorted(set(prompts))
    return [r if prompt == texts[0] else 0.7 for prompt, r in zip(prompts, even(completion_ids), strict=True)]


def of_rows(columns: dict[str, torch.Tensor]) -> torch.Tensor:
    """The one number that all tokens of an answer have."""
    advantages = columns["advantages"]
    return torch.where(advantages.amax(-1) > 0, advantages.amax(-1), advantages.amin(-1))


@pytest.mark.trap(18)
@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean", "constant"])
def test_groups_without_signal_are_skipped_and_stay_in_every_denominator(
    tiny_model: Path, tmp_path: Path, aggregation: str
) -> None:
    """From the third iteration on, what no gate needs is not computed; the weights are those of computing it."""
    rows: dict[bool, list[int]] = {False: [], True: []}
    results = {}
    for skipping in (True, False):
        folder = tmp_path / str(skipping)
        folder.mkdir()
        module = grpo(tiny_model, only_first_prompt, objective=objective("group_std", aggregation), lr=0.1)
        recorder = Recorder(module)
        if not skipping:
            module.contributes = lambda rollout, *_: rollout.mask.any(-1)  # type: ignore[method-assign]
        fit(module, prompts(tiny_model, folder), folder, max_steps=4)
        rows[skipping] = [sum(len(batch.rows) for batch, _ in update) for update in recorder.updates]
        assert all(totals.sequences == ROWS for update in recorder.updates for _, totals in update)
        results[skipping] = weights(module)
    for name, value in results[True].items():
        assert torch.allclose(value, results[False][name], rtol=1e-6, atol=1e-7)
    assert rows[False] == [ROWS] * 4
    assert rows[True] == [ROWS, ROWS, GROUP, GROUP]
    for tag in ("train/loss", "train/grad_norm"):
        assert curve(tmp_path / "True", tag) == pytest.approx(curve(tmp_path / "False", tag), abs=1e-6)


@pytest.mark.trap(18)
def test_an_iteration_without_any_signal_moves_nothing(tiny_model: Path, tmp_path: Path) -> None:
    module = grpo(tiny_model, lambda completions, **_: [0.7] * len(completions), lr=1.0)
    seen: list[Any] = []
    watch = Watch(lambda trainer, module: seen.append(weights(module)))
    fit(module, prompts(tiny_model, tmp_path), tmp_path, watch, max_steps=4)
    assert all(gap(seen[0], each) == 0 for each in seen)
    assert curve(tmp_path, "train/frac_reward_zero_std") == [1.0] * 4
    assert curve(tmp_path, "train/grad_norm") == [0.0] * 4
    assert curve(tmp_path, "train/reward") == pytest.approx([0.7] * 4)


def test_momentum_decays_through_iterations_without_signal(tiny_model: Path, tmp_path: Path) -> None:
    """A gradient of exactly zero is a gradient: the optimizer sees it."""
    calls = [0]

    def first_only(completion_ids: list[list[int]], **_: Any) -> list[float]:
        calls[0] += 1
        return even(completion_ids) if calls[0] == 1 else [0.0] * len(completion_ids)

    seen: list[Any] = []
    watch = Watch(lambda trainer, module: seen.append(weights(module)))
    module = grpo(tiny_model, first_only, optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.5))
    fit(module, prompts(tiny_model, tmp_path), tmp_path, watch, max_steps=4)
    moved = [gap(a, b) for a, b in pairwise(seen)]
    assert moved[0] > 0
    assert moved[1] == pytest.approx(moved[0] / 2, rel=1e-2)
    assert moved[2] == pytest.approx(moved[0] / 4, rel=1e-2)


@pytest.mark.trap(19)
def test_invalid_samples_leave_mean_std_and_loss(tiny_model: Path, tmp_path: Path) -> None:
    """The advantages of the others are those of their own mean and std, and the totals do not count the invalid."""
    kept: list[Any] = []
    module = grpo(tiny_model, [Failing(lambda s: s.token_ids[0] % 3 == 0)])
    recorder = Recorder(module)
    real = module.credit
    module.credit = lambda *a: kept.append((a[0], real(*a))) or kept[-1][1]  # type: ignore[method-assign]
    fit(module, prompts(tiny_model, tmp_path), tmp_path)
    assert 0 < sum(int((~r.judgement.valid).sum()) for r, _ in kept) < 2 * ROWS
    for (rollout, columns), update in zip(kept, recorder.updates, strict=True):
        advantages = of_rows(columns)
        valid = torch.tensor([c.token_ids[0] % 3 != 0 for c in rollout.completions])
        assert torch.equal(rollout.judgement.valid, valid)
        for i in range(BATCH):
            members = [j for j in range(i * GROUP, (i + 1) * GROUP) if valid[j]]
            rewards = torch.tensor(even([rollout.completions[j].token_ids for j in members]))
            expected = (rewards - rewards.mean()) / rewards.std(correction=0)
            if len(members) > 1 and len(set(rewards.tolist())) > 1:
                assert torch.allclose(advantages[members], expected, atol=1e-5)
        assert not advantages[~valid].any()
        for _, totals in update:
            assert totals.sequences == int(valid.sum())
            lengths = torch.tensor([len(c.token_ids) for c in rollout.completions])
            assert totals.tokens == int(lengths[valid].sum())
        assert set(torch.cat([b.rows for b, _ in update]).tolist()) == set(valid.nonzero()[:, 0].tolist())
    assert curve(tmp_path, "train/invalid_samples") == [float((~r.judgement.valid).sum()) for r, _ in kept]
    means = [float(r.judgement.rewards[r.judgement.valid].mean()) for r, _ in kept]
    assert curve(tmp_path, "train/reward") == pytest.approx(means)


def test_a_minibatch_of_nothing_but_invalid_samples(tiny_model: Path, tmp_path: Path) -> None:
    """It is an update without data; the run goes on."""
    module = grpo(tiny_model, [Failing(lambda s: s.token_ids[0] % 4 != 0)], num_minibatches=ROWS)
    recorder = Recorder(module)
    fit(module, prompts(tiny_model, tmp_path), tmp_path, max_steps=3)
    assert [not update for update in recorder.updates].count(True) > ROWS
    assert not all(recorder.updates[::ROWS])
    assert len(curve(tmp_path, "train/loss")) == 3


@pytest.mark.trap(11)
@pytest.mark.trap(26)
def test_a_learning_rate_of_zero_changes_nothing(tiny_model: Path, tmp_path: Path) -> None:
    first: list[Any] = []
    watch = Watch(lambda trainer, module: first.append(weights(module)))
    # One row a micro-batch: some CPUs round a product otherwise in other company, and the reference sees other rows.
    options = {"objective": objective(kl=0.1), "num_epochs": 2, "num_minibatches": 2, "token_budget": 1}
    module = trained(tiny_model, tmp_path / "run", watch, lr=0.0, steps=3, **options)
    untouched = weights(trained(tiny_model, tmp_path / "other", lr=0.0, steps=1))
    assert all(gap(untouched, each) == 0.0 for each in first)
    values = scalars(tmp_path / "run")
    for tag in ("kl", "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"):
        assert [v for _, v in values[f"train/{tag}"]] == [0.0] * 3
    for tag in ("max", "mean", "min"):
        ratio = [v for _, v in values[f"train/sampling/importance_sampling_ratio/{tag}"]]
        assert ratio == pytest.approx([1.0] * 3, abs=1e-4)
    assert all(n > 0 for n in curve(tmp_path / "run", "train/grad_norm"))
    assert module.trainer.global_step == 3


def test_a_simple_reward_is_learned(tiny_model: Path, tmp_path: Path) -> None:
    trained(tiny_model, tmp_path / "run", steps=15, optimizer=lambda p: torch.optim.AdamW(p, lr=3e-2))
    rewards = curve(tmp_path / "run", "train/reward")
    assert sum(rewards[:2]) / 2 < 0.7
    assert sum(rewards[-3:]) / 3 > sum(rewards[:2]) / 2 + 0.25
    loss = curve(tmp_path / "run", "train/loss")
    assert max(map(abs, loss)) < 1e-6  # advantages sum to 0 in a group: the value of the loss says nothing


@pytest.mark.trap(20)
def test_groups_of_equal_prompts_stay_apart(tiny_model: Path, tmp_path: Path) -> None:
    """Two rows of the data with the same tokens are two groups, each with its own samples and baseline."""
    base = prompts(tiny_model, tmp_path)

    class Twice(type(base)):
        def collate(self, split: Any, indices: list[int], positions: list[int]) -> PromptBatch:
            (first, *_), _ = batch = super().collate(split, indices, positions)
            return PromptBatch([first, first._replace(id=first.id + 1000)], batch.positions)

    kept: list[Any] = []
    module = grpo(tiny_model, objective=objective("none"))
    real = module.credit
    module.credit = lambda *a: kept.append((a[0], real(*a))) or kept[-1][1]  # type: ignore[method-assign]
    data = Twice(
        template=Template(kind="plain"), dataset=base.dataset, batch_size=BATCH, tokenizer=str(tiny_model),
        held_out_percent=0, val_size=0,
    )  # fmt: skip
    fit(module, data, tmp_path)
    for rollout, columns in kept:
        advantages = of_rows(columns)
        completions = [tuple(c.token_ids) for c in rollout.completions]
        assert completions[:GROUP] != completions[GROUP:]
        assert len(set(completions)) > GROUP
        rewards = torch.tensor(even([list(c) for c in completions])).view(BATCH, GROUP)
        assert torch.allclose(advantages.view(BATCH, GROUP), rewards - rewards.mean(1, keepdim=True), atol=1e-6)


@pytest.mark.trap(7)
def test_the_temperature_reaches_every_log_prob(tiny_model: Path, tmp_path: Path) -> None:
    """Engine, policy, old and reference agree at 0.7, and it is not the temperature 1 that they agree on."""
    module = grpo(tiny_model, temperature=0.7, objective=objective(kl=0.1), num_minibatches=2, lr=0.0)
    kept: list[Any] = []
    real = module.score
    module.score = lambda rollout: kept.append((rollout, real(rollout))) or kept[-1][1]  # type: ignore[method-assign]
    fit(module, prompts(tiny_model, tmp_path), tmp_path)
    for rollout, scored in kept:
        old, ref = scored["old_log_probs"], scored["ref_log_probs"]
        mask = rollout.mask
        assert torch.allclose(old[mask], rollout.engine_log_probs[mask], atol=1e-5)
        assert torch.allclose(ref[mask], rollout.engine_log_probs[mask], atol=1e-5)
        at_one = module.built_policy()(rollout.sequences, mask, 1.0).log_probs
        assert (at_one - old)[mask].abs().max() > 0.1
    assert max(curve(tmp_path, "train/sampling/sampling_logp_difference/max")) < 1e-4


# --- steps that cannot be taken -------------------------------------------------------------------------------------


def broken(module: Any, iterations: set[int]) -> Any:
    """Make the loss of these iterations infinite."""
    real = module.loss

    def loss(batch: Any, totals: Any) -> Any:
        out = real(batch, totals)
        bad = module.trainer.global_step in iterations
        return out._replace(loss=out.loss * float("inf")) if bad else out

    module.loss = loss
    return module


def test_a_gradient_that_is_not_finite_is_left_out(tiny_model: Path, tmp_path: Path) -> None:
    seen: list[Any] = []
    watch = Watch(lambda trainer, module: seen.append(weights(module)))
    module = broken(grpo(tiny_model, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1)), {1, 2})
    with pytest.warns(UserWarning, match="not finite: this step is left out"):
        trainer(tmp_path, watch, max_steps=4).fit(module, prompts(tiny_model, tmp_path))
    moved = [gap(a, b) for a, b in pairwise(seen)]
    assert moved[:2] == [0.0, 0.0]
    assert moved[2] > 0
    assert curve(tmp_path, "train/skipped_updates") == [0, 1, 1, 0]
    assert all(w.isfinite().all() for w in seen[-1].values())
    assert module.bad_steps == 0


def test_three_such_gradients_in_a_row_stop_the_run(tiny_model: Path, tmp_path: Path) -> None:
    module = broken(grpo(tiny_model), {1, 2, 3, 4, 5})
    with pytest.raises(GateError, match="3 steps in a row had a gradient that is not finite"):
        fit(module, prompts(tiny_model, tmp_path), tmp_path, max_steps=6)
    assert module.trainer.global_step == 3
