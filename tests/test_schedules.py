"""Schedules against closed forms; residual dropout against its definition."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from offline_runs import data, fit, module
from tiny_runs import curve, scalars
from torch import nn

from lit_posttrain.callbacks import CheckpointEvery
from lit_posttrain.checkpoint import newest_checkpoint
from lit_posttrain.dropout import add_residual_dropout
from lit_posttrain.policy import load_network
from lit_posttrain.schedules import Schedule

PEAK = 0.5


def rates(steps: int, run: int | None = None, **arguments: Any) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=PEAK)
    schedule = Schedule(optimizer, **arguments)
    if run is not None:
        schedule.run_for(run)
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return seen


def test_cosine_after_a_warm_up() -> None:
    expected = [PEAK * (0.2 + 0.8 * i / 4) for i in range(4)]
    expected += [PEAK * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * i / 6))) for i in range(7)]
    got = rates(11, decay="cosine", warmup_steps=4, warmup_ratio=0.2, final_ratio=0.1, total_steps=10)
    assert got == pytest.approx(expected, rel=1e-12)
    assert got[4] == PEAK
    assert got[7] == pytest.approx(PEAK * 0.55)  # half-way between peak and end
    assert got[10] == pytest.approx(PEAK * 0.1)


def test_linear_falls_by_equal_steps() -> None:
    got = rates(9, decay="linear", warmup_steps=2, final_ratio=0.25, total_steps=8)
    assert got == pytest.approx([0.0, 0.25, *[PEAK * (1 - 0.75 * i / 6) for i in range(7)]])


def test_constant_never_falls() -> None:
    assert rates(6, run=4, decay="constant", warmup_steps=2) == pytest.approx([0.0, 0.25, 0.5, 0.5, 0.5, 0.5])


def test_the_end_is_not_passed_and_a_given_length_goes_first() -> None:
    assert rates(6, decay="linear", total_steps=3)[3:] == [0.0, 0.0, 0.0]
    assert rates(6, run=100, decay="linear", total_steps=3) == rates(6, decay="linear", total_steps=3)
    assert rates(6, run=3, decay="linear") == rates(6, decay="linear", total_steps=3)


def test_every_group_keeps_its_own_peak() -> None:
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (1.0, 0.1)]
    optimizer = torch.optim.SGD(groups)
    schedule = Schedule(optimizer, decay="linear", warmup_steps=1, warmup_ratio=0.5)
    schedule.run_for(4)
    assert [g["lr"] for g in optimizer.param_groups] == [0.5, 0.05]


def test_a_loaded_schedule_goes_on_from_where_it_stood() -> None:
    """Warm-up over two iterations from one half, then a line down to 0 at iteration 8; saved before iteration 5."""
    seen: list[float] = []
    state: list[dict[str, Any]] = []
    for stop in (5, 8):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=PEAK)
        schedule = Schedule(optimizer, decay="linear", warmup_steps=2, warmup_ratio=0.5)
        schedule.run_for(8)
        for saved, into in zip(state, (optimizer, schedule), strict=False):
            into.load_state_dict(saved)
        while len(seen) < stop:
            seen.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        state = [optimizer.state_dict(), schedule.state_dict()]
    assert seen == pytest.approx([0.25, 0.375, *[PEAK * (1 - i / 6) for i in range(6)]])


@pytest.mark.parametrize(
    ("wrong", "key"),
    [
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"warmup_ratio": 1.1}, "warmup_ratio"),
        ({"final_ratio": -0.1}, "final_ratio"),
        ({"total_steps": 0}, "total_steps"),
    ],
)
def test_arguments_are_checked(wrong: dict[str, Any], key: str) -> None:
    with pytest.raises(ValueError, match=rf"model.init_args.scheduler.init_args.{key}: "):
        rates(1, **wrong)


# --- in runs --------------------------------------------------------------------------------------------------------


def linear(optimizer: torch.optim.Optimizer) -> Schedule:
    return Schedule(optimizer, decay="linear", warmup_steps=2, warmup_ratio=0.5)


def test_a_run_ends_where_its_epochs_do(tiny_model: Path, tmp_path: Path) -> None:
    """16 examples in batches of 4, twice: 8 iterations."""
    run = module("sft", tiny_model, lr=PEAK, scheduler=linear)
    fit(run, data("sft", tiny_model, tmp_path), tmp_path, max_steps=-1, max_epochs=2)
    expected = [0.25, 0.375, *[PEAK * (1 - i / 6) for i in range(6)]]
    assert curve(tmp_path, "train/learning_rate") == pytest.approx(expected)


def test_a_resume_goes_on_where_the_schedule_was(tiny_model: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    run = module("sft", tiny_model, lr=PEAK, scheduler=linear)
    fit(run, data("sft", tiny_model, whole), whole, max_steps=-1, max_epochs=1)

    class Stop(Exception):
        pass

    def broken(batch: Any, batch_idx: int) -> None:
        if first.trainer.global_step == 3:
            raise Stop
        step(batch, batch_idx)

    first = module("sft", tiny_model, lr=PEAK, scheduler=linear)
    step, first.training_step = first.training_step, broken
    with pytest.raises(Stop):
        fit(first, data("sft", tiny_model, parts), parts, CheckpointEvery(1), max_steps=-1, max_epochs=1)
    found = newest_checkpoint(parts / "version_0")
    assert found is not None
    assert found.step == 3 - 1 or found.step == 3
    from tiny_runs import trainer

    second = module("sft", tiny_model, lr=PEAK, scheduler=linear)
    trainer(parts, CheckpointEvery(1), max_steps=-1, max_epochs=1).fit(
        second, data("sft", tiny_model, parts), ckpt_path=found.state
    )
    tag = "train/learning_rate"
    assert dict(scalars(parts)[tag]) == dict(scalars(whole)[tag])


def test_without_an_end_it_is_asked_for(tiny_model: Path, tmp_path: Path) -> None:
    run = module("sft", tiny_model, scheduler=linear)
    with pytest.raises(ValueError, match=r"scheduler.init_args.total_steps: set it, or trainer.max_epochs"):
        fit(run, data("sft", tiny_model, tmp_path), tmp_path, max_steps=-1, max_epochs=-1)


def test_a_schedule_that_waits_for_a_metric_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau
    with pytest.raises(ValueError, match=r"model\.init_args\.scheduler: ReduceLROnPlateau"):
        fit(module("sft", tiny_model, scheduler=plateau), data("sft", tiny_model, tmp_path), tmp_path)


class Enough(Callback):
    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        trainer.should_stop = trainer.global_step == 3


@pytest.mark.parametrize(
    ("shape", "expected"),
    [({"decay": "linear", "total_steps": 4}, (1.0, 0.75, 0.5)), ({"decay": "constant"}, (1.0, 1.0, 1.0))],
)
def test_an_endless_run_whose_schedule_knows_enough(
    shape: dict[str, Any], expected: tuple[float, ...], tiny_model: Path, tmp_path: Path
) -> None:
    run = module("sft", tiny_model, lr=PEAK, scheduler=lambda o: Schedule(o, **shape))
    fit(run, data("sft", tiny_model, tmp_path), tmp_path, Enough(), max_steps=-1, max_epochs=-1)
    rates_seen = [rate for _, rate in scalars(tmp_path)["train/learning_rate"]]
    assert rates_seen == pytest.approx([PEAK * share for share in expected])


# --- dropout --------------------------------------------------------------------------------------------------------

IDS = torch.tensor([[5, 80, 200, 7, 9]])


def states(network: Any) -> torch.Tensor:
    with torch.no_grad():
        return network(input_ids=IDS).logits


def test_dropout_is_random_in_training_and_absent_in_evaluation(tiny_model: Path) -> None:
    plain, dropped = load_network(str(tiny_model)), load_network(str(tiny_model))
    add_residual_dropout(dropped, 0.2)
    assert not torch.allclose(states(dropped), states(dropped))
    dropped.eval()
    torch.testing.assert_close(states(dropped), states(plain), rtol=0, atol=0)


def test_a_branch_loses_the_asked_share_and_keeps_its_mean(tiny_model: Path) -> None:
    network = load_network(str(tiny_model))
    branch: Any = network.model.layers[0].mlp
    x = torch.randn(1, 4000, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = branch(x)
        add_residual_dropout(network, 0.2)
        after = branch(x)
    lost = after == 0
    assert float(lost.float().mean()) == pytest.approx(0.2, abs=0.01)
    torch.testing.assert_close(after[~lost], before[~lost] / 0.8)
    for layer in network.model.layers:
        assert [n for n, b in layer.named_children() if b._forward_hooks] == ["self_attn", "mlp"]


def test_training_with_dropout_differs_and_evaluation_does_not(tiny_model: Path, tmp_path: Path) -> None:
    losses = {}
    for p in (0.0, 0.3):
        folder = tmp_path / str(p)
        folder.mkdir()
        run = module("sft", tiny_model, lr=1e-9, dropout=p, max_grad_norm=None)
        held_out = str(tmp_path / "0.0/sft.jsonl") if p else None
        examples = data("sft", tiny_model, folder, val_size=4, held_out_percent=30)
        assert held_out is None or Path(held_out).exists()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("lit_posttrain.gates.require_change", lambda *_: None)
            fit(run, examples, folder, limit_val_batches=1.0, max_steps=1, val_check_interval=1)
        losses[p] = curve(folder, "train/loss")[0], curve(folder, "eval/loss")[0]
    assert losses[0.3][0] != pytest.approx(losses[0.0][0], rel=1e-4)
    assert losses[0.3][1] == pytest.approx(losses[0.0][1], rel=1e-5)


@pytest.mark.parametrize("p", [-0.1, 1.0, 1.5])
def test_a_probability_out_of_range(p: float, tiny_model: Path) -> None:
    with pytest.raises(ValueError, match=r"model.init_args.dropout: must be at least 0 and below 1"):
        add_residual_dropout(load_network(str(tiny_model)), p)
