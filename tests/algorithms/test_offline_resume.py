"""Learning from fixed examples that is killed anywhere goes on bit for bit."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from kills import At, Tick, bits, ignore, losses, record, saved, start
from offline_runs import data, demonstration, module, trained, write
from tiny_runs import child, scalars

from lit_posttrain import callbacks
from lit_posttrain.checkpoint import newest_checkpoint
from lit_posttrain.data import Source
from lit_posttrain.schedules import Schedule

STEPS = 6  # 16 examples in batches of 4: into the second epoch
KINDS = ("sft", "rm", "dpo", "kto", "cached dpo", "cached kto", "streamed")
LOGGED = ("loss", "grad_norm", "learning_rate", "num_tokens", "epoch")


def build(kind: str, model: Path, folder: Path, tick: Tick, **overrides: Any) -> Any:
    if kind.startswith("cached "):
        kind, overrides = kind.split()[1], {"reference_cache": str(folder / "cache"), **overrides}
    if kind in ("sft", "streamed"):
        kind, overrides = "sft", {"dropout": 0.2, **overrides}
    run = module(
        kind, model,
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-2),
        scheduler=lambda o: Schedule(o, warmup_steps=2, warmup_ratio=0.5, final_ratio=0.1, total_steps=STEPS),
        **overrides,
    )  # fmt: skip
    record(run, folder, tick)
    return run


def examples(kind: str, model: Path, folder: Path) -> Any:
    if kind != "streamed":
        return data(kind.split()[-1], model, folder)
    # 24 examples of sources of 9 and 4: into further laps of both.
    files = [str(write(folder / name, demonstration, n)) for name, n in (("a.jsonl", 9), ("b.jsonl", 4))]
    mixed = [Source(path=file, weight=weight) for file, weight in zip(files, (2.0, 1.0), strict=True)]
    return data("sft", model, folder, datasets=mixed, streaming=True, shuffle_buffer=3, train_size=16)


def attempt(kind: str, model: Path, folder: Path, tick: Tick) -> None:
    """One start of the program."""
    start(lambda: (build(kind, model, folder, tick), examples(kind, model, folder)), folder, tick, STEPS)


def result(folder: Path) -> Any:
    """All losses of all attempts; the curves; and everything that the last checkpoint holds."""
    logged = scalars(folder)
    # A source's name is its path, which holds the run's folder.
    drawn = {Path(tag).name: [(s, v.hex()) for s, v in logged[tag]] for tag in logged if "/draws/" in tag}
    step, _, digest = saved(folder)
    return losses(folder), {**bits(folder, LOGGED), **drawn}, step, digest


@pytest.fixture(scope="module")
def undisturbed(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    outcomes = {}
    for kind in KINDS:
        folder = tmp_path_factory.mktemp(kind)
        os.environ["PL_GLOBAL_SEED"] = "1"
        assert child(lambda kind=kind, folder=folder: attempt(kind, tiny_model, folder, ignore)) == 0
        outcomes[kind] = result(folder)
    return outcomes


def test_the_undisturbed_runs(undisturbed: dict[str, Any]) -> None:
    for history, curves, last, _ in undisturbed.values():
        assert last == STEPS
        assert list(history) == [(step, True) for step in range(STEPS)]
        assert len({v for _, v in curves["loss"]}) == STEPS
        assert len({v for _, v in curves["learning_rate"]}) >= STEPS - 1
        assert [float.fromhex(v) for _, v in curves["epoch"]] == [i / 4 for i in range(1, STEPS + 1)]
    drawn = [undisturbed["streamed"][1][name] for name in ("a.jsonl", "b.jsonl")]
    counts = [[float.fromhex(v) for _, v in curve] for curve in drawn]
    assert [a + b for a, b in zip(*counts, strict=True)] == [4 * i for i in range(1, STEPS + 1)]
    assert counts[0][-1] > 9
    assert counts[1][-1] > 4
    # Where the reference's log-probs come from plays no part; their last bit depends on what was scored together.
    for name in ("dpo", "kto"):
        (computed, *_), (read, *_) = undisturbed[name], undisturbed[f"cached {name}"]
        for step, values in computed.items():
            assert [float.fromhex(v) for v in read[step]] == pytest.approx([float.fromhex(v) for v in values], rel=1e-5)


@pytest.mark.trap(43)
@pytest.mark.trap(28)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "point", [("before update", 2), ("last update", 4), ("between", 3), ("before save", 3)], ids=str
)
def test_killed_and_started_again(
    kind: str, point: tuple[str, int], tiny_model: Path, tmp_path: Path, undisturbed: dict[str, Any]
) -> None:
    killed = child(lambda: attempt(kind, tiny_model, tmp_path, At(*point)))
    assert killed == -signal.SIGKILL
    assert child(lambda: attempt(kind, tiny_model, tmp_path, ignore)) == 0
    assert result(tmp_path) == undisturbed[kind]


@pytest.mark.parametrize("kind", ["sft", "dpo", "streamed"])
def test_asked_to_stop_it_saves_and_goes_on_exactly(
    kind: str, tiny_model: Path, tmp_path: Path, undisturbed: dict[str, Any]
) -> None:
    asked = At("before update", 2, signal.SIGTERM)
    assert child(lambda: attempt(kind, tiny_model, tmp_path, asked)) == callbacks.STOPPED
    newest = newest_checkpoint(tmp_path / "version_0")
    assert newest is not None
    assert newest.step == 3
    assert child(lambda: attempt(kind, tiny_model, tmp_path, ignore)) == 0
    assert result(tmp_path) == undisturbed[kind]


def test_another_initial_model_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    """The reference was loaded from it."""
    from tiny import write_tiny_model

    assert child(lambda: attempt("dpo", tiny_model, tmp_path, At("between", 3, signal.SIGTERM))) == callbacks.STOPPED
    other = write_tiny_model(tmp_path / "other", seed=7)

    def resumed() -> None:
        with pytest.raises(ValueError, match=r"model.init_args.reference: .*not those this run began with"):
            attempt("dpo", other, tmp_path, ignore)

    assert child(resumed) == 0


def test_the_models_folder_under_another_configuration_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    """All weights are the checkpoint's; how they are used is not."""
    assert child(lambda: attempt("sft", tiny_model, tmp_path, At("between", 3, signal.SIGTERM))) == callbacks.STOPPED
    edited = tmp_path / "edited"
    shutil.copytree(tiny_model, edited)
    config = json.loads((edited / "config.json").read_text())
    (edited / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))

    def resumed() -> None:
        with pytest.raises(ValueError, match=r"^model.init_args.policy.model: .*hash of its configuration"):
            attempt("sft", edited, tmp_path, ignore)

    assert child(resumed) == 0


def test_a_cache_of_what_streams_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    """Its rows would be numbered otherwise than those it was filled with."""
    with pytest.raises(
        ValueError, match=r"^model.init_args.reference_cache: data.init_args.streaming reads rows while"
    ):
        trained(
            "dpo", tiny_model, tmp_path, data=data("dpo", tiny_model, tmp_path, streaming=True),
            reference_cache=str(tmp_path / "cache"),
        )  # fmt: skip
    assert not (tmp_path / "cache").exists()
