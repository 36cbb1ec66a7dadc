"""GRPO end to end on the tiny model: layout, updates within an iteration, and the reference."""

from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from tiny_runs import BATCH, GROUP, Recorder, curve, even, fit, gap, grpo, objective, prompts, scalars, trained, weights

from lit_posttrain import kept_prompts
from lit_posttrain.data import Template
from lit_posttrain.reference import ReferenceConfig
from lit_posttrain.types import PromptBatch

ROWS = BATCH * GROUP


# --- layout never changes the objective -----------------------------------------------------------------------------


@pytest.mark.trap(15)
@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean", "constant"])
def test_any_token_budget_gives_the_same_weights(
    tiny_model: Path, tmp_path: Path, aggregation: str, keeps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_prompts, "PASS_TOKENS", 0 if keeps else 10**9)
    counts: dict[int, list[int]] = {}
    results = {}
    for budget in (10_000, 60, 1):
        sizes = counts.setdefault(budget, [])
        module = grpo(
            tiny_model, objective=objective("none", aggregation, kl=0.1), num_minibatches=2, token_budget=budget
        )
        real = module.optimize
        module.optimize = lambda streams, real=real, sizes=sizes, **k: (  # type: ignore[method-assign]
            sizes.append(len(streams[0].micro_batches)) or real(streams, **k)
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
    credit = module.credit
    module.credit = lambda *a: kept.append((*a, credit(*a))) or kept[-1][-1]  # type: ignore[method-assign]
    fit(module, prompts(tiny_model, tmp_path), tmp_path, max_steps=3)
    rollout, scored, columns = kept[-1]
    old, ref, given = scored["old_log_probs"], scored["ref_log_probs"], columns["advantages"].amax(-1)
    given = torch.where(given > 0, given, columns["advantages"].amin(-1))  # one number a row, 0 outside the answer
    d = (old - ref).where(rollout.mask, 0.0)
    assert d.abs().max() > 1e-3
    k3 = (torch.exp(-d) + d - 1).sum(-1)
    shaped = (torch.tensor(even([c.token_ids for c in rollout.completions])) - 0.5 * k3).view(BATCH, GROUP)
    assert torch.allclose(given.view(BATCH, GROUP), shaped - shaped.mean(1, keepdim=True), atol=1e-5)


def test_a_rollout_finds_no_gradients(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They would take a network's room beside the cache and the packed weights."""
    found: list[int] = []
    module = grpo(tiny_model)
    sync = module.engine.sync

    def watched(policy: Any) -> None:
        found.append(sum(p.grad is not None for p in policy.parameters()))
        sync(policy)

    monkeypatch.setattr(module.engine, "sync", watched)
    fit(module, prompts(tiny_model, tmp_path), tmp_path, max_steps=3)
    assert found == [0, 0, 0]
