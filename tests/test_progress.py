"""What a person sees: phase, iteration, ETA and reward, on a terminal and in a log file."""

import io
import sys
import time
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import lightning.pytorch as pl
import pytest

from lit_posttrain import progress
from lit_posttrain.progress import PhaseProgressBar


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def trainer(step: int, /, **metrics: Any) -> Any:
    stand_in = Mock(spec=pl.Trainer)  # passes for a Trainer with the run-time type checks
    values = {"global_step": step, "max_steps": 100, "max_epochs": 3, "num_training_batches": 20}
    values |= {"progress_bar_metrics": metrics, "sanity_checking": False, "num_val_batches": [2, 2]}
    values |= {"training": False, "state": SimpleNamespace(fn="fit")}
    stand_in.configure_mock(**values)
    return stand_in


def hook(bar: PhaseProgressBar, name: str, trainer: Any) -> None:
    extra = [None, None, 0] if "batch" in name else []
    getattr(bar, name)(trainer, Mock(spec=pl.LightningModule), *extra)


def test_a_log_file_gets_one_line_an_iteration(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    bar = PhaseProgressBar()
    hook(bar, "on_train_start", trainer(40))
    bar.phase("rollout", 64)
    clock.now += 30
    hook(bar, "on_train_batch_end", trainer(41, loss=0.25, reward=0.5, v_num=3, step=41.0))
    clock.now += 30
    hook(bar, "on_train_batch_end", trainer(42, loss=0.25, reward=0.625))
    first, second = capsys.readouterr().out.splitlines()
    # 30 s an iteration since the run began at 40 of 60
    assert first.startswith("iteration 41/60")
    assert "elapsed 0:30  ETA 9:30  reward 0.5  loss 0.25" in first
    assert second.startswith("iteration 42/60")
    assert second.endswith("elapsed 1:00  ETA 9:00  reward 0.625  loss 0.25")


def test_a_long_phase_shows_life_between_iterations(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    bar = PhaseProgressBar(line_seconds=10.0)
    hook(bar, "on_train_start", trainer(0))
    bar.phase("rollout", 64)
    for _ in range(16):
        clock.now += 1
        bar.advance(4)
        bar.show(reward=0.75)
    (line,) = capsys.readouterr().out.splitlines()
    assert line == "iteration 0/60  rollout 40/64 (0:06 left)  elapsed 0:10  ETA ?  reward 0.75"
    bar.phase("update", 0)
    assert "update" in bar.line()
    assert "rollout" not in bar.line()


def test_validation_is_a_phase(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    bar = PhaseProgressBar()
    hook(bar, "on_train_start", trainer(4))
    hook(bar, "on_validation_start", trainer(4))
    hook(bar, "on_validation_batch_end", trainer(4))
    assert "validation 1/4" in bar.line()
    hook(bar, "on_validation_end", trainer(4, val_reward=0.125))
    assert "val_reward 0.125" in capsys.readouterr().out
    assert "validation" not in bar.line()


def test_a_batch_does_not_count_in_a_phase_of_the_modules_own(clock: Clock) -> None:
    bar = PhaseProgressBar()
    hook(bar, "on_validation_start", trainer(4))
    bar.phase("evaluation", 1)
    bar.advance()
    hook(bar, "on_validation_batch_end", trainer(4))
    assert "evaluation 1/1" in bar.line()


def test_a_terminal_gets_two_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    screen.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stdout", screen)
    bar = PhaseProgressBar()
    hook(bar, "on_train_start", trainer(40))
    bar.phase("rollout", 64)
    time.sleep(0.15)
    bar.advance(8)
    hook(bar, "on_train_batch_end", trainer(41, reward=0.5))
    bar.phase("update", 6)
    time.sleep(0.15)
    bar.advance(3)
    bar.print("a sample")
    hook(bar, "on_train_end", trainer(41))
    shown = screen.getvalue()
    for text in ("training", "41/60", "rollout", "8/64", "update", "3/6", "reward=0.5", "a sample"):
        assert text in shown


def test_other_ranks_show_nothing(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    bar = PhaseProgressBar(line_seconds=0.0)
    bar.disable()
    hook(bar, "on_train_start", trainer(0))
    bar.phase("rollout", 4)
    bar.advance(4)
    bar.print("x")
    hook(bar, "on_train_batch_end", trainer(1, reward=0.5))
    hook(bar, "on_train_end", trainer(1))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("steps", "epochs", "batches", "expected"),
    [(100, 3, 20, 60), (50, 3, 20, 50), (-1, -1, 20, None), (7, -1, 20, 7), (-1, 2, float("inf"), None)],
)
def test_the_total_counts_every_limit(steps: int, epochs: int, batches: float, expected: int | None) -> None:
    limits = Mock(spec=pl.Trainer)
    limits.configure_mock(max_steps=steps, max_epochs=epochs, num_training_batches=batches)
    assert progress._total_iterations(limits) == expected


def test_a_negative_interval_is_refused() -> None:
    with pytest.raises(ValueError, match="line_seconds"):
        PhaseProgressBar(-1.0)
