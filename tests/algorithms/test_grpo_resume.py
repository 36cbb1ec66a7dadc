"""GRPO that is killed or stopped anywhere goes on bit for bit: reference, minibatches, schedule and adapters too."""

import os
import shutil
import signal
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from kills import At, Tick, bits, ignore, losses, record, saved, start
from tiny_runs import child, grpo, objective, prompts, trainer

from lit_posttrain import callbacks
from lit_posttrain.callbacks import CheckpointEvery
from lit_posttrain.checkpoint import newest_checkpoint
from lit_posttrain.policy import LoraConfig
from lit_posttrain.reference import ReferenceConfig
from lit_posttrain.rollout import ReferenceEngine

STEPS = 5
LOGGED = ("loss", "kl", "reward", "entropy", "grad_norm", "learning_rate", "num_tokens", "epoch")


class TickingEngine(ReferenceEngine):
    def __init__(self, tick: Tick):
        super().__init__()
        self.tick, self.iteration = tick, 0

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Any, keys: Any, tick: Any = None) -> Any:
        def each(finished: int) -> None:
            self.tick("token", keys[0].iteration)
            if tick is not None:
                tick(finished)

        return super().generate(prompts, sampling, keys, each)


def build(model: Path, folder: Path, tick: Tick, lora: bool, **overrides: Any) -> Any:
    module = grpo(
        model,
        objective=objective(kl=0.05),
        policy={"lora": LoraConfig(r=2)} if lora else None,
        engine=TickingEngine(tick),
        num_minibatches=2,
        reference=ReferenceConfig(refresh_every=2),
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-2),
        scheduler=lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 0.8**step),
        **overrides,
    )
    record(module, folder, tick)
    return module


def attempt(model: Path, folder: Path, tick: Tick, lora: bool) -> None:
    """One start of the program."""
    start(lambda: (build(model, folder, tick, lora), prompts(model, folder)), folder, tick, STEPS)


def outcome(folder: Path) -> Any:
    """All losses of all attempts; the curves; and everything that the last checkpoint holds."""
    step, _, digest = saved(folder)
    return losses(folder), bits(folder, LOGGED), step, digest


@pytest.fixture(scope="module")
def undisturbed(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Any]:
    outcomes = {}
    for lora in (False, True):
        folder = tmp_path_factory.mktemp(f"lora-{lora}")
        os.environ["PL_GLOBAL_SEED"] = "1"
        assert child(lambda folder=folder, lora=lora: attempt(tiny_model, folder, ignore, lora)) == 0
        outcomes[lora] = outcome(folder)
    return outcomes


@pytest.mark.trap(28)
def test_the_undisturbed_run(undisturbed: dict[bool, Any]) -> None:
    for history, curves, last, _ in undisturbed.values():
        assert last == STEPS
        assert list(history) == [(step, final) for step in range(STEPS) for final in (False, True)]
        assert [s for s, _ in curves["loss"]] == [1, 2, 3, 4, 5]
        assert len({v for _, v in curves["learning_rate"]}) == STEPS
        # Without the refreshes at 2 and 4 the KL of the first minibatch would not be small again.
        kl = [float.fromhex(v) for _, v in curves["kl"]]
        assert kl[3] > kl[2]
        assert kl[4] < kl[3]
    assert undisturbed[False] != undisturbed[True]


POINTS = [
    *(("token", 1, 1), ("token", 3, 2), ("update", 2, 1), ("update", 3, 1), ("last update", 3, 1)),
    *(("between", 4, 1), ("before save", 3, 1), ("after save", 3, 1), ("after save", 5, 1)),
]


@pytest.mark.trap(43)
@pytest.mark.trap(28)
@pytest.mark.parametrize("point", POINTS, ids=lambda p: f"{p[0]} {p[1]}".replace(" ", "-"))
def test_killed_and_started_again(
    tiny_model: Path, tmp_path: Path, undisturbed: dict[bool, Any], point: tuple[str, int, int]
) -> None:
    name, step, nth = point
    assert child(lambda: attempt(tiny_model, tmp_path, At(name, step, nth=nth), False)) == -signal.SIGKILL
    assert child(lambda: attempt(tiny_model, tmp_path, ignore, False)) == 0
    assert outcome(tmp_path) == undisturbed[False]


@pytest.mark.parametrize("point", [("token", 3), ("update", 4), ("before save", 2)], ids=lambda p: p[0])
def test_killed_and_started_again_with_adapters(
    tiny_model: Path, tmp_path: Path, undisturbed: dict[bool, Any], point: tuple[str, int]
) -> None:
    assert child(lambda: attempt(tiny_model, tmp_path, At(*point), True)) == -signal.SIGKILL
    assert child(lambda: attempt(tiny_model, tmp_path, ignore, True)) == 0
    assert outcome(tmp_path) == undisturbed[True]


def test_killed_three_times(tiny_model: Path, tmp_path: Path, undisturbed: dict[bool, Any]) -> None:
    for point in (("update", 2), ("token", 3), ("last update", 4)):
        code = child(lambda point=point: attempt(tiny_model, tmp_path, At(*point), False))
        assert code == -signal.SIGKILL
    assert child(lambda: attempt(tiny_model, tmp_path, ignore, False)) == 0
    assert outcome(tmp_path) == undisturbed[False]


@pytest.mark.parametrize(("name", "step", "saved"), [("token", 3, 3), ("update", 2, 3), ("between", 4, 4)])
def test_asked_to_stop_it_saves_and_goes_on_exactly(
    tiny_model: Path, tmp_path: Path, undisturbed: dict[bool, Any], name: str, step: int, saved: int
) -> None:
    """Within a rollout at once; within an update after the iteration."""
    asked = At(name, step, signal.SIGTERM)
    assert child(lambda: attempt(tiny_model, tmp_path, asked, False)) == callbacks.STOPPED
    newest = newest_checkpoint(tmp_path / "version_0")
    assert newest is not None
    assert newest.step == saved
    assert child(lambda: attempt(tiny_model, tmp_path, ignore, False)) == 0
    assert outcome(tmp_path) == undisturbed[False]


# --- what a resume refuses ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def three_iterations(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("three")
    os.environ["PL_GLOBAL_SEED"] = "1"
    assert child(lambda: attempt(tiny_model, folder, At("between", 3, signal.SIGTERM), False)) == callbacks.STOPPED
    return folder


def resume(model: Path, folder: Path, module: Any = None) -> None:
    found = newest_checkpoint(folder / "version_0")
    assert found is not None
    assert found.step == 3
    run = trainer(folder, CheckpointEvery(1), max_steps=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run.fit(module or build(model, folder, ignore, False), prompts(model, folder), ckpt_path=found.state)


def test_a_changed_seed(
    tiny_model: Path, three_iterations: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(three_iterations, tmp_path / "run")
    monkeypatch.setenv("PL_GLOBAL_SEED", "2")
    with pytest.raises(ValueError, match="seed_everything"):
        resume(tiny_model, tmp_path / "run")
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    resume(tiny_model, tmp_path / "run")  # nothing was lost by the refusal


def test_a_changed_precision(tiny_model: Path, three_iterations: Path, tmp_path: Path) -> None:
    from lit_posttrain.policy import PolicyConfig

    shutil.copytree(three_iterations, tmp_path / "run")
    other = build(tiny_model, tmp_path, ignore, False)
    other.policy_config = PolicyConfig(model=str(tiny_model), compute_dtype="bfloat16")
    with pytest.raises(ValueError, match=r"policy.compute_dtype: this run began in torch.float32 .* set it to float32"):
        resume(tiny_model, tmp_path / "run", other)


def test_other_data(tiny_model: Path, three_iterations: Path, tmp_path: Path) -> None:
    shutil.copytree(three_iterations, tmp_path / "run")
    found = newest_checkpoint(tmp_path / "run/version_0")
    assert found is not None
    other = prompts(tiny_model, tmp_path / "run", batch_size=4)
    with pytest.raises(ValueError, match=r"data.init_args.batch_size: 4 is not what the checkpoint was trained with"):
        trainer(tmp_path / "run", CheckpointEvery(1), max_steps=4).fit(
            build(tiny_model, tmp_path, ignore, False), other, ckpt_path=found.state
        )


@pytest.mark.trap(28)
def test_another_initial_model(tiny_model: Path, three_iterations: Path, tmp_path: Path) -> None:
    """The reference was loaded from it."""
    from tiny import write_tiny_model

    shutil.copytree(three_iterations, tmp_path / "run")
    other = write_tiny_model(tmp_path / "other", seed=7)
    with pytest.raises(ValueError, match=r"model.init_args.reference: .*not those this run began with"):
        resume(tiny_model, tmp_path / "run", build(other, tmp_path, ignore, False))


def test_a_reference_that_is_gone_or_damaged(tiny_model: Path, three_iterations: Path, tmp_path: Path) -> None:
    """The checkpoint that names it does not verify, so it is not offered."""
    shutil.copytree(three_iterations, tmp_path / "run")
    artefacts = [p for p in (tmp_path / "run/version_0").rglob("*.safetensors") if "reference-" in str(p)]
    assert artefacts, "the reference of iteration 2 is saved"
    for path in artefacts:
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    said: list[str] = []
    found = newest_checkpoint(tmp_path / "run/version_0", report=said.append)
    assert found is None or found.step < 3
    assert said
