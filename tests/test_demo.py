"""The demo's own path on a tiny model: every phase, its results, resuming, and the table recomputed from the JSONL."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lit_posttrain.report.plots import read_scalars

ROOT = Path(__file__).resolve().parent.parent
# The size overrides of the demo: everything else is as a user runs it.
OVERRIDES = {
    "trainer.max_steps": 30,
    "trainer.val_check_interval": 20,
    "model.group_size": 2,
    "model.sampling.max_new_tokens": 8,
    "model.evaluation.samples": 4,
    "model.policy.compute_dtype": "float32",
    "data.train_size": 20,
    "data.val_size": 5,
    "data.batch_size": 2,
}


def command(out: Path, model: Path, *extra: str) -> list[str]:
    words = [sys.executable, "scripts/demo.py", "--out", str(out), "--model", str(model), "--no-fetch", *extra]
    return words + [f"--override=--{key}={value}" for key, value in OVERRIDES.items()]


def demo(out: Path, model: Path, *extra: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(out, model, *extra), cwd=ROOT, capture_output=True, text=True, timeout=600)


def kill_in_training(out: Path, model: Path) -> None:
    """Start the demo and kill it and its children once training has saved something."""
    process = subprocess.Popen(
        command(out, model), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 600
    while not list(out.glob("train/version_0/checkpoints/step-*")):
        assert process.poll() is None, "it ended before it saved a checkpoint"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="module")
def finished(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("demo") / "demo"
    kill_in_training(out, tiny_model)
    result = demo(out, tiny_model)
    assert result.returncode == 0, result.stdout + result.stderr
    return out, result.stdout


def test_killed_in_training_and_typed_again_it_goes_on(finished: tuple[Path, str]) -> None:
    out, text = finished
    assert "before: already measured" in text
    assert "training: going on from iteration" in text
    assert len(list((out / "train").iterdir())) == 1
    steps, _ = read_scalars(out / "train/version_0")["train/reward"]
    assert steps == list(range(1, 31))


def test_it_says_what_it_found_shows_progress_and_ends_with_table_and_paths(finished: tuple[Path, str]) -> None:
    out, text = finished
    for expected in ("auto precision", "minutes", "iteration 30/30", "ETA", "reward", "pass@1", "format rate", "95%"):
        assert expected in text, text
    for line in ("summary:", "curves:", "TensorBoard:", "model:", "commonest answer"):
        assert line in text
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "model/model.safetensors").exists()


def test_the_summary_can_be_recomputed_from_the_samples(finished: tuple[Path, str]) -> None:
    out, _ = finished
    summary = json.loads((out / "summary.json").read_text())
    for name in ("before", "after"):
        rows = [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]
        assert len(rows) == 5 * 4
        assert summary[name]["pass@1"] == pytest.approx(sum(r["correct"] for r in rows) / len(rows))
        assert summary[name]["format_rate"] == pytest.approx(sum(r["rewards"]["format"] == 1 for r in rows) / len(rows))
        assert summary[name]["mean_length"] == pytest.approx(sum(r["tokens"] for r in rows) / len(rows))
        prompts = {r["prompt_id"] for r in rows}
        some = sum(any(r["correct"] for r in rows if r["prompt_id"] == p) for p in prompts) / len(prompts)
        assert summary[name]["pass@4"] == pytest.approx(some)


def test_typed_again_it_repeats_no_phase_and_other_settings_are_refused(
    finished: tuple[Path, str], tiny_model: Path
) -> None:
    out, _ = finished
    (out / "summary.json").unlink()
    again = demo(out, tiny_model)
    assert again.returncode == 0, again.stdout + again.stderr
    assert again.stdout.count("already") == 4
    assert (out / "summary.json").exists()
    other = demo(out, tiny_model, "--override=--seed_everything=5")
    assert other.returncode == 1
    assert "--fresh" in other.stderr
