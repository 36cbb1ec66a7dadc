"""Curves come back from event files in order, a resumed run's as one, and the picture is drawn."""

from pathlib import Path

import pytest
from torch.utils.tensorboard import SummaryWriter

from lit_posttrain.report.plots import plot_curves, read_scalars


def test_curves_of_two_event_files_are_one(tmp_path: Path) -> None:
    for steps in ((1, 2, 3), (3, 4)):
        with SummaryWriter(str(tmp_path), purge_step=steps[0]) as writer:
            for step in steps:
                writer.add_scalar("train/reward", step / 2, step)
    steps, values = read_scalars(tmp_path)["train/reward"]
    assert steps == [1, 2, 3, 4]
    assert values == pytest.approx([0.5, 1.0, 1.5, 2.0])


def test_the_picture_shows_what_there_is_and_leaves_out_what_is_missing(tmp_path: Path) -> None:
    curves = {"train/reward": ([1, 2], [0.0, 1.0]), "eval/pass@1": ([2], [0.5])}
    out = tmp_path / "new" / "curves.png"
    plot_curves(curves, {"reward": ["train/reward", "train/gone"], "held-out": ["eval/pass@1"]}, out, "title")
    assert out.read_bytes().startswith(b"\x89PNG")
