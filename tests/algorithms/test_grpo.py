"""GRPO end to end on the tiny model: what a whole run computes, step by step."""

import json
import re
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from lightning.pytorch.callbacks import Callback
from tiny_runs import BATCH, GROUP, Watch, curve, even, fit, gap, grpo, objective, prompts, scalars, trainer, weights

from lit_posttrain.algorithms.base import StepResult
from lit_posttrain.algorithms.evaluation import EvaluationConfig
from lit_posttrain.data import Template
from lit_posttrain.gates import GateError
from lit_posttrain.reference import ReferenceConfig
from lit_posttrain.rewards import ExactAnswer, PerSampleReward, Verifier
from lit_posttrain.types import PromptBatch, Sample, Verdict

ROWS = BATCH * GROUP


def trained(model: Path, folder: Path, *callbacks: Callback, steps: int = 2, data: Any = None, **overrides: Any) -> Any:
    """A module after a few iterations in a folder of its own."""
    folder.mkdir()
    return fit(grpo(model, **overrides), data or prompts(model, folder), folder, *callbacks, max_steps=steps)


# --- layout never changes the objective -----------------------------------------------------------------------------


@pytest.mark.trap(15)
@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean", "constant"])
def test_any_token_budget_gives_the_same_weights(tiny_model: Path, tmp_path: Path, aggregation: str) -> None:
    counts: dict[int, list[int]] = {}
    results = {}
    for budget in (10_000, 60, 1):
        sizes = counts.setdefault(budget, [])
        module = grpo(
            tiny_model, objective=objective("none", aggregation, kl=0.1), num_minibatches=2, token_budget=budget
        )
        real = module.optimize
        module.optimize = lambda batches, *a, real=real, sizes=sizes, **k: (
            sizes.append(len(batches))
            or real(  # type: ignore[method-assign]
                batches, *a, **k
            )
        )
        folder = tmp_path / str(budget)
        folder.mkdir()
        results[budget] = weights(fit(module, prompts(tiny_model, folder), folder))
    assert counts[10_000] == [1, 1, 1, 1]
    assert counts[1] == [ROWS // 2] * 4  # one row at a time
    start = weights(trained(tiny_model, tmp_path / "start", lr=0.0, steps=1))
    assert gap(results[10_000], start) > 1e-4
    for budget in (60, 1):
        assert gap(results[10_000], results[budget]) < 1e-6


@pytest.mark.trap(16)
def test_the_order_of_prompts_changes_nothing(tiny_model: Path, tmp_path: Path) -> None:
    """Prompts are answered from their own random numbers, so a reversed batch is the same batch."""

    class Reversed(type(prompts(tiny_model, tmp_path))):
        def collate(self, split: Any, indices: list[int], positions: list[int]) -> PromptBatch:
            batch = super().collate(split, indices, positions)
            return PromptBatch(batch.prompts[::-1], batch.positions)

    folder = tmp_path / "reversed"
    folder.mkdir()
    questions = str(tiny_runs.write_questions(tmp_path / "q.jsonl"))
    data = Reversed(
        template=Template(kind="plain"), dataset=questions, batch_size=BATCH, tokenizer=str(tiny_model),
        held_out_percent=0, val_size=0,
    )  # fmt: skip
    backwards = fit(grpo(tiny_model), data, folder)
    straight = trained(tiny_model, tmp_path / "straight")
    assert gap(weights(backwards), weights(straight)) < 1e-6
    for tag in ("train/reward", "train/completions/mean_length", "train/grad_norm"):
        assert curve(folder, tag) == pytest.approx(curve(tmp_path / "straight", tag), abs=1e-6)


def test_logged_gradient_norm_is_that_of_an_independent_computation(tiny_model: Path, tmp_path: Path) -> None:
    """One iteration of plain policy gradient, written down again with HF's own logits and autograd."""
    kept: dict[str, Any] = {}
    module = grpo(tiny_model, objective=objective("group_std", "sequence_mean"), max_grad_norm=None)
    real = module.collect
    module.collect = lambda *a: kept.setdefault("rollout", real(*a))  # type: ignore[method-assign]
    fit(module, prompts(tiny_model, tmp_path), tmp_path, max_steps=1)

    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(tiny_model)
    total = torch.zeros(())
    for i, prompt in enumerate(kept["rollout"].prompts):
        group = kept["rollout"].completions[i * GROUP : (i + 1) * GROUP]
        rewards = torch.tensor(even([c.token_ids for c in group]))
        credit = (rewards - rewards.mean()) / rewards.std(correction=0)
        for advantage, completion in zip(credit, group, strict=True):
            ids = torch.tensor([prompt.token_ids + completion.token_ids])
            scores = network(ids).logits[0].log_softmax(-1)
            n = len(completion.token_ids)
            taken = scores[-n - 1 : -1].gather(1, torch.tensor(completion.token_ids)[:, None])
            total = total - advantage * taken.mean() / ROWS
    total.backward()
    norm = torch.stack([p.grad.norm() for p in network.parameters() if p.grad is not None]).norm()
    assert curve(tmp_path, "train/grad_norm") == pytest.approx([float(norm)], rel=1e-4)


# --- updates within an iteration ------------------------------------------------------------------------------------


class Recorder:
    """What ``loss`` was given and what ``optimize`` returned, update by update."""

    def __init__(self, module: Any):
        self.updates: list[list[Any]] = []
        self.results: list[StepResult] = []
        optimize, loss = module.optimize, module.loss

        def recording(batches: Any, totals: Any, function: Any, **kwargs: Any) -> StepResult:
            self.updates.append([])
            self.results.append(optimize(batches, totals, wrapped, **kwargs))
            return self.results[-1]

        def wrapped(batch: Any, totals: Any) -> Any:
            self.updates[-1].append((batch, totals))
            return loss(batch, totals)

        module.optimize = recording


@pytest.mark.trap(27)
def test_old_log_probs_stay_those_of_the_sampling_policy(tiny_model: Path, tmp_path: Path) -> None:
    """Two epochs of two minibatches: the first update's ratio is exactly 1, the others are off-policy against the
    log-probs of the policy that sampled, which the engine's own log-probs are."""
    module = grpo(tiny_model, num_epochs=2, num_minibatches=2, lr=0.5, max_grad_norm=None)
    recorder = Recorder(module)
    ratios: list[float] = []
    real = module.objective.policy_loss

    def watched(log_probs: Any, old: Any, *rest: Any) -> Any:
        mask = rest[2]
        ratios.append(float((log_probs - old).detach().abs()[mask].max()))
        return real(log_probs, old, *rest)

    object.__setattr__(module.objective, "policy_loss", watched)
    fit(module, prompts(tiny_model, tmp_path), tmp_path, max_steps=1)
    assert len(recorder.updates) == 4
    assert ratios[0] == 0.0
    assert all(r > 1e-3 for r in ratios[1:])
    seen = []
    for number, update in enumerate(recorder.updates):
        rows = [row for batch, _ in update for row in batch.rows.tolist()]
        assert len(rows) == ROWS // 2
        seen.append(set(rows))
        for batch, totals in update:
            assert totals.sequences == ROWS // 2
            if number:
                old, engine = batch.columns["old_log_probs"], batch.columns["engine_log_probs"]
                assert torch.allclose(old[batch.mask], engine[batch.mask], atol=1e-5)
    assert seen[0] | seen[1] == seen[2] | seen[3] == set(range(ROWS))
    assert seen[0] & seen[1] == seen[2] & seen[3] == set()
    assert seen[0] not in (seen[2], seen[3]), "every epoch cuts the rollout anew"


def test_one_global_step_an_iteration_however_many_updates(tiny_model: Path, tmp_path: Path) -> None:
    module = trained(tiny_model, tmp_path / "run", steps=3, num_epochs=2, num_minibatches=2)
    assert module.trainer.global_step == 3
    assert [step for step, _ in scalars(tmp_path / "run")["train/reward"]] == [1, 2, 3]


@pytest.mark.trap(35)
def test_the_schedule_moves_once_an_iteration(tiny_model: Path, tmp_path: Path) -> None:
    """Logged is the rate that the iteration used."""
    rates: list[float] = []
    module = grpo(
        tiny_model,
        num_epochs=2,
        num_minibatches=2,
        optimizer=lambda params: torch.optim.SGD(params, lr=1.0),
        scheduler=lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 0.1 / (1 + step)),
    )
    real = module.optimize
    module.optimize = lambda *a, **k: rates.append(module.learning_rate()) or real(*a, **k)  # type: ignore[method-assign]
    fit(module, prompts(tiny_model, tmp_path), tmp_path, max_steps=3)
    assert rates == pytest.approx([r for r in (0.1, 0.05, 0.1 / 3) for _ in range(4)])
    assert curve(tmp_path, "train/learning_rate") == pytest.approx([0.1, 0.05, 0.1 / 3])


def test_gradient_clipping(tiny_model: Path, tmp_path: Path) -> None:
    """With plain SGD a step is as long as lr x the clipped norm; the norm logged is the one before clipping."""
    start = weights(trained(tiny_model, tmp_path / "start", lr=0.0, steps=1))
    length = {}
    for limit in (None, 0.05, 1e6):
        module = trained(tiny_model, tmp_path / str(limit), lr=0.1, steps=1, max_grad_norm=limit)
        after = weights(module)
        length[limit] = torch.cat([(after[n] - start[n]).flatten() for n in start]).norm().item() / 0.1
    norm = curve(tmp_path / "0.05", "train/grad_norm")
    assert norm[0] > 0.1
    assert curve(tmp_path / "None", "train/grad_norm") == norm
    assert length[None] == pytest.approx(norm[0], rel=1e-3)
    assert length[1e6] == pytest.approx(norm[0], rel=1e-3)
    assert length[0.05] == pytest.approx(0.05, rel=1e-3)


# --- what counts and what does not ----------------------------------------------------------------------------------


def only_first_prompt(prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Mixed rewards for one prompt of each two, a constant that fp32 cannot hold for the other."""
    texts = sorted(set(prompts))
    return [r if prompt == texts[0] else 0.7 for prompt, r in zip(prompts, even(completion_ids), strict=True)]


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
            module._contributes = lambda rollout, *_: rollout.mask.any(-1)  # type: ignore[method-assign]
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


class Failing(PerSampleReward):
    """The share of even tokens; invalid or absurd for the samples that it chooses."""

    def __init__(self, bad: Any, absurd: float | None = None):
        super().__init__(name="failing")
        self.bad, self.absurd = bad, absurd

    def score(self, sample: Sample) -> Verdict:
        if self.bad(sample):
            return Verdict(0.0, "invalid", "lost") if self.absurd is None else Verdict(self.absurd)
        return Verdict(even([sample.token_ids])[0])


@pytest.mark.trap(19)
def test_invalid_samples_leave_mean_std_and_loss(tiny_model: Path, tmp_path: Path) -> None:
    """The advantages of the others are those of their own mean and std, and the totals do not count the invalid."""
    kept: list[Any] = []
    module = grpo(tiny_model, [Failing(lambda s: s.token_ids[0] % 3 == 0)])
    recorder = Recorder(module)
    real = module.advantages
    module.advantages = lambda *a: kept.append((a[0], real(*a))) or kept[-1][1]  # type: ignore[method-assign]
    fit(module, prompts(tiny_model, tmp_path), tmp_path)
    assert 0 < sum(int((~r.judgement.valid).sum()) for r, _ in kept) < 2 * ROWS
    for (rollout, advantages), update in zip(kept, recorder.updates, strict=True):
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
    options = {"objective": objective(kl=0.1), "num_epochs": 2, "num_minibatches": 2}
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
    real = module.advantages
    module.advantages = lambda *a: kept.append((a[0], real(*a))) or kept[-1][1]  # type: ignore[method-assign]
    data = Twice(
        template=Template(kind="plain"), dataset=base.dataset, batch_size=BATCH, tokenizer=str(tiny_model),
        held_out_percent=0, val_size=0,
    )  # fmt: skip
    fit(module, data, tmp_path)
    for rollout, advantages in kept:
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
    module.score = lambda rollout: kept.append((rollout, *real(rollout))) or kept[-1][1:]  # type: ignore[method-assign]
    fit(module, prompts(tiny_model, tmp_path), tmp_path)
    for rollout, old, ref in kept:
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


# --- what is logged -------------------------------------------------------------------------------------------------

ALWAYS = re.findall(
    r"\S+",
    """
loss grad_norm learning_rate epoch num_tokens step_time reward reward_std frac_reward_zero_std rewards/even/mean
rewards/even/std entropy clip_ratio/low_mean clip_ratio/low_min clip_ratio/high_mean clip_ratio/high_max
clip_ratio/region_mean completions/mean_length completions/min_length completions/max_length completions/clipped_ratio
completions/mean_terminated_length completions/min_terminated_length completions/max_terminated_length
sampling/sampling_logp_difference/mean sampling/sampling_logp_difference/max sampling/importance_sampling_ratio/min
sampling/importance_sampling_ratio/mean sampling/importance_sampling_ratio/max
""",
)


def test_every_tag_of_the_peer_is_there_at_the_right_iterations(tiny_model: Path, tmp_path: Path) -> None:
    kept: list[Any] = []
    module = grpo(tiny_model, objective=objective(kl=0.1), log_samples_every=2)
    real = module.collect
    module.collect = lambda *a: kept.append(real(*a)) or kept[-1]  # type: ignore[method-assign]
    fit(module, prompts(tiny_model, tmp_path), tmp_path, max_steps=3)
    values = scalars(tmp_path)
    for tag in (*ALWAYS, "kl"):
        assert [step for step, _ in values[f"train/{tag}"]] == [1, 2, 3], tag
    lengths = torch.tensor([[float(len(c.token_ids)) for c in r.completions] for r in kept])
    assert curve(tmp_path, "train/completions/mean_length") == pytest.approx(lengths.mean(1).tolist())
    assert curve(tmp_path, "train/completions/max_length") == lengths.amax(1).tolist()
    rewards = torch.tensor([even([c.token_ids for c in r.completions]) for r in kept])
    assert curve(tmp_path, "train/reward") == pytest.approx(rewards.mean(1).tolist())
    stds = rewards.view(3, BATCH, GROUP).std(-1).mean(1)
    assert curve(tmp_path, "train/reward_std") == pytest.approx(stds.tolist(), rel=1e-4)
    tokens = torch.tensor([float(r.sequences.lengths.sum()) for r in kept]).cumsum(0)
    assert curve(tmp_path, "train/num_tokens") == tokens.tolist()
    per_epoch = tiny_runs.QUESTIONS // BATCH
    assert curve(tmp_path, "train/epoch") == pytest.approx([(i + 1) / per_epoch for i in range(3)])

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "version_0"))
    events.Reload()
    assert [e.step for e in events.Tensors("train/samples/text_summary")] == [1, 2]


def test_what_has_no_meaning_is_not_logged(tiny_model: Path, tmp_path: Path) -> None:
    """No KL without a reference; reasons only where there are any; a function that scored nothing has no mean."""

    def seldom(completions: list[str], log_metric: Any, **_: Any) -> list[float | None]:
        log_metric("tries", 3.0)
        return [None] * len(completions)

    from lit_posttrain.rewards import PythonReward

    fit(grpo(tiny_model, [PythonReward(even), PythonReward(seldom)]), prompts(tiny_model, tmp_path), tmp_path)
    tags = scalars(tmp_path)
    assert not any("kl" in tag.split("/") for tag in tags)
    assert "train/rewards/seldom/mean" not in tags
    assert "train/rewards/even/mean" in tags
    assert tags["train/rewards/seldom/reasons/not_applicable"] == [(1, ROWS), (2, ROWS)]
    assert tags["train/tries"] == [(1, 3.0), (2, 3.0)]  # what the function itself logs


# --- evaluation -----------------------------------------------------------------------------------------------------


class LastToken(Verifier):
    """Right where the last token's id is 0 modulo 3; its vote is that number."""

    def extract(self, sample: Sample) -> str | None:
        number = sample.token_ids[-1] % 4
        return None if number == 3 else str(number)

    def score(self, sample: Sample) -> float:
        return float(self.extract(sample) == "0")


def evaluated(model: Path, folder: Path, **overrides: Any) -> Any:
    module = grpo(
        model, [LastToken(name="last"), Failing(lambda s: False)], evaluation=EvaluationConfig(samples=4, k=[1, 2, 4])
    )
    data = prompts(model, folder, held_out_percent=50, val_size=5, val_batch_size=2, batch_size=2)
    run = trainer(folder, limit_val_batches=None, val_check_interval=2, check_val_every_n_epoch=None, **overrides)
    return run, module, data


def recomputed(path: Path) -> dict[str, float]:
    """pass@k, maj@k and means from the file alone, by enumeration."""
    from itertools import combinations

    rows = [json.loads(line) for line in path.read_text().splitlines()]
    groups: dict[int, list[Any]] = {}
    for row in rows:
        groups.setdefault(row["prompt_id"], []).append(row)
    assert {tuple(r["sample"] for r in g) for g in groups.values()} == {(0, 1, 2, 3)}
    values: dict[str, list[float]] = {}
    for group in groups.values():
        for k in (1, 2, 4):
            tries = [any(r["correct"] for r in some) for some in combinations(group, k)]
            values.setdefault(f"pass@{k}", []).append(sum(tries) / len(tries))
        votes = [r["vote"] for r in group if r["vote"] is not None]
        winners = [v for v in set(votes) if votes.count(v) == max(map(votes.count, votes))]
        values.setdefault("maj@4", []).append(winners.count("0") / len(winners) if winners else 0.0)
    flat = {
        "completions/mean_length": [r["tokens"] for r in rows],
        "completions/clipped_ratio": [r["stop_reason"] == "length" for r in rows],
        "rewards/last/mean": [r["rewards"]["last"] for r in rows],
        "rewards/failing/mean": [r["rewards"]["failing"] for r in rows],
    }
    return {name: sum(v) / len(v) for name, v in {**values, **flat}.items()}


@pytest.mark.trap(41)
def test_logged_evaluation_is_what_its_file_says(tiny_model: Path, tmp_path: Path) -> None:
    run, module, data = evaluated(tiny_model, tmp_path, max_steps=2)
    run.fit(module, data)
    expected = recomputed(tmp_path / "version_0/evaluation/step-2.jsonl")
    assert 0 < expected["pass@1"] < expected["pass@4"]
    logged = scalars(tmp_path)
    for name, value in expected.items():
        assert logged[f"eval/{name}"] == [(2, pytest.approx(value, abs=1e-6))], name


@pytest.mark.parametrize("command", ["validate", "test"])
def test_evaluation_alone_equals_the_one_within_training(tiny_model: Path, tmp_path: Path, command: str) -> None:
    run, module, data = evaluated(tiny_model, tmp_path, max_steps=2)
    (out,) = getattr(run, command)(module, data)
    assert out.pop("step") == 0
    prefix = "eval" if command == "validate" else "test"
    expected = recomputed(tmp_path / "version_0/evaluation/step-0.jsonl")
    assert out == {f"{prefix}/{name}": pytest.approx(v, abs=1e-6) for name, v in {**expected, "invalid": 0.0}.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run, module, data = evaluated(tiny_model, tmp_path / "again", max_steps=2)
        getattr(run, command)(module, data)
    files = [p / "version_0/evaluation/step-0.jsonl" for p in (tmp_path, tmp_path / "again")]
    assert files[0].read_text() == files[1].read_text()


def test_evaluation_of_a_checkpoint_is_named_after_its_iteration(tiny_model: Path, tmp_path: Path) -> None:
    from lit_posttrain.callbacks import CheckpointEvery
    from lit_posttrain.checkpoint import newest_checkpoint

    run, module, data = evaluated(tiny_model, tmp_path, max_steps=2)
    run.callbacks.append(CheckpointEvery(2))
    run.fit(module, data)
    found = newest_checkpoint(tmp_path / "version_0")
    assert found is not None
    run, module, data = evaluated(tiny_model, tmp_path / "alone")
    (out,) = run.validate(module, data, ckpt_path=found.state)
    assert out["step"] == 2
    files = [p / "version_0/evaluation/step-2.jsonl" for p in (tmp_path, tmp_path / "alone")]
    assert files[0].read_text() == files[1].read_text()


def test_predict_writes_every_training_prompt(tiny_model: Path, tmp_path: Path) -> None:
    run, module, data = evaluated(tiny_model, tmp_path)
    run.predict(module, data)
    rows = [json.loads(line) for line in (tmp_path / "version_0/predictions/step-0.jsonl").read_text().splitlines()]
    assert [r["question"] for r in rows] == [p.question for p in data.prompts("train") for _ in range(4)]
    assert all(set(r["rewards"]) == {"last", "failing"} and r["completion"] for r in rows)


def test_evaluation_at_temperature_zero_is_greedy(tiny_model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    module = grpo(tiny_model, [ExactAnswer()], evaluation=EvaluationConfig(samples=2, temperature=0.0))
    data = prompts(tiny_model, tmp_path, held_out_percent=50, val_size=2)
    trainer(tmp_path, limit_val_batches=None).validate(module, data, verbose=False)
    rows = [json.loads(line) for line in (tmp_path / "version_0/evaluation/step-0.jsonl").read_text().splitlines()]
    network = AutoModelForCausalLM.from_pretrained(tiny_model)
    tokenizer = module.tokenizer
    for i, prompt in enumerate(data.prompts("val")):
        ids = torch.tensor([prompt.token_ids])
        out = network.generate(ids, max_new_tokens=tiny_runs.NEW_TOKENS, do_sample=False, pad_token_id=0)
        text = tokenizer.decode(out[0, ids.shape[1] :]).removesuffix("<|im_end|>")
        assert rows[2 * i]["completion"] == rows[2 * i + 1]["completion"] == text


# --- the reference --------------------------------------------------------------------------------------------------


@pytest.mark.trap(28)
@pytest.mark.parametrize("lora", [False, True])
def test_a_refreshed_reference_is_a_copy_of_the_policy(tiny_model: Path, tmp_path: Path, lora: bool) -> None:
    """At a refresh the KL falls to 0, between refreshes it does not, and later updates do not reach the copy."""
    from lit_posttrain.policy import LoraConfig

    module = grpo(
        tiny_model,
        objective=objective(kl=0.01),
        policy={"lora": LoraConfig(r=2)} if lora else None,
        optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2),
        reference=ReferenceConfig(refresh_every=2),
    )
    fit(module, prompts(tiny_model, tmp_path), tmp_path, max_steps=5)
    kl = curve(tmp_path, "train/kl")
    assert [k < 1e-9 for k in kl] == [True, False, True, False, True]
    assert not any("reference" in name for name in module.state_dict())


def test_kl_in_the_reward_is_subtracted_before_the_baseline(tiny_model: Path, tmp_path: Path) -> None:
    kept: list[Any] = []
    module = grpo(tiny_model, objective=objective("none", kl=0.5, placement="reward"), lr=0.2, max_grad_norm=None)
    score, advantages = module.score, module.advantages
    module.score = lambda r: kept.append([r, *score(r)]) or tuple(kept[-1][1:])  # type: ignore[method-assign]
    module.advantages = lambda *a: kept[-1].append(advantages(*a)) or kept[-1][-1]  # type: ignore[method-assign]
    fit(module, prompts(tiny_model, tmp_path), tmp_path, max_steps=3)
    rollout, old, ref, given = kept[-1]
    d = (old - ref).where(rollout.mask, 0.0)
    assert d.abs().max() > 1e-3
    k3 = (torch.exp(-d) + d - 1).sum(-1)
    shaped = (torch.tensor(even([c.token_ids for c in rollout.completions])) - 0.5 * k3).view(BATCH, GROUP)
    assert torch.allclose(given.view(BATCH, GROUP), shaped - shaped.mean(1, keepdim=True), atol=1e-5)
