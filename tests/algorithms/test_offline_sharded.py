"""Learning from fixed examples over two processes gives what one gives: same losses, same weights (fp32)."""

from pathlib import Path
from typing import Any

import pytest
import torch
from offline_runs import data, fit, module
from tiny_runs import Recorder, trainer
from two_processes import train_in_two

from lit_posttrain import reference
from lit_posttrain.callbacks import CheckpointEvery
from lit_posttrain.checkpoint import newest_checkpoint
from lit_posttrain.export import _state_dict
from lit_posttrain.functional.preference_losses import PairLossOptions
from lit_posttrain.sharding import ShardedStrategy, full_tensor

STEPS = 3
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "sft": ("sft", {}),
    "rm": ("rm", {}),
    "dpo": ("dpo", {}),
    "cached dpo": ("dpo", {"reference_cache": "cache"}),
    "cached kto": ("kto", {"beta": 0.5, "reference_cache": "cache"}),
    "aot": ("dpo", {"loss_type": ["aot", "aot_unpaired"], "options": PairLossOptions(beta=0.5)}),
    "kto": ("kto", {"beta": 0.5}),
    "prm": ("prm", {}),
}


def train(name: str, model: Path, out: Path, strategy: Any, devices: int) -> None:
    """A few steps with an evaluation after them; each rank saves what is compared."""
    kind, overrides = RUNS[name][0], dict(RUNS[name][1])
    if "reference_cache" in overrides:
        overrides["reference_cache"] = str(out / "cache")
    run = module(kind, model, lr=0.3, token_budget=20 if name == "rm" else 60, max_grad_norm=None, **overrides)
    recorder = Recorder(run)
    zs: list[float] = []
    if kind == "kto":
        columns = run.columns

        def watched(batch: Any, split: Any) -> Any:
            found = columns(batch, split)
            if split == "train":
                zs.append(float(found["z"].max()))
            return found

        run.columns = watched
    scores: dict[str, float] = {}
    log_scores = run.log_scores
    run.log_scores = lambda prefix, values, step: (scores.update(values), log_scores(prefix, values, step))
    callbacks = [CheckpointEvery(STEPS)] if name == "rm" else []
    examples = data(kind, model, out, val_size=5, held_out_percent=30, val_batch_size=3)
    fit(
        run, examples, out, *callbacks, devices=devices, strategy=strategy, max_steps=STEPS, limit_val_batches=1.0,
        val_check_interval=STEPS, default_root_dir=str(out), **({} if callbacks else {"logger": False}),
    )  # fmt: skip
    weights = {n: full_tensor(p.detach()).clone() for n, p in run.built_policy().trainable()}
    losses = [(r.metrics, r.extremes, r.grad_norm) for r in recorder.results]
    counts = [len(u) for u in recorder.updates]
    torch.save(
        {"weights": weights, "losses": losses, "counts": counts, "z": zs, "eval": scores},
        out / f"rank{run.trainer.global_rank}.pt",
    )


def both(name: str, kind: str, model: Path, folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    one, two = folder / "one", folder / "two"
    for out in (one, two):
        out.mkdir()
        data(RUNS[name][0], model, out)  # writes the file, which two ranks would write at once
    train(name, model, one, "auto", 1)
    train_in_two(kind, lambda strategy: train(name, model, two, strategy, 2))
    ranks = [torch.load(two / f"rank{r}.pt", weights_only=True) for r in range(2)]
    return torch.load(one / "rank0.pt", weights_only=True), ranks


def close(a: dict[str, float], b: dict[str, float]) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert b[name] == pytest.approx(value, rel=2e-4, abs=2e-5), name


@pytest.mark.trap(15)
@pytest.mark.trap(20)
@pytest.mark.parametrize(("name", "kind"), [*((n, "fsdp2") for n in RUNS), ("rm", "ddp"), ("kto", "ddp")])
def test_two_processes_train_as_one(name: str, kind: str, tiny_model: Path, tmp_path: Path) -> None:
    single, ranks = both(name, kind, tiny_model, tmp_path)
    for rank in ranks:
        assert len(rank["losses"]) == STEPS
        for mine, theirs in zip(single["losses"], rank["losses"], strict=True):
            close(mine[0], theirs[0])
            close(mine[1], theirs[1])
            assert theirs[2] == pytest.approx(mine[2], rel=1e-4)
        close(single["eval"], rank["eval"])
        for n, weight in single["weights"].items():
            torch.testing.assert_close(rank["weights"][n], weight, rtol=1e-5, atol=1e-5)
    assert sum(r["counts"][0] for r in ranks) >= single["counts"][0]
    if RUNS[name][0] == "kto":
        assert ranks[0]["z"] == ranks[1]["z"] == pytest.approx(single["z"], rel=1e-4, abs=1e-6)
        assert max(single["z"]) > 0
    if name == "rm":
        found = [newest_checkpoint(tmp_path / f / "version_0") for f in ("one", "two")]
        states = [_state_dict(c) for c in found if c is not None]
        assert len(states) == 2
        for n in ("policy.gain", "policy.shift"):
            torch.testing.assert_close(states[1][n], states[0][n], rtol=1e-5, atol=1e-5)
        assert abs(float(states[0]["policy.shift"])) > 1e-3


def test_a_reference_that_one_rank_cannot_read_again(tiny_model: Path, tmp_path: Path) -> None:
    """No rank goes on into a collective without it, where it would wait for ever."""
    data("dpo", tiny_model, tmp_path)  # writes the file

    def train_without(strategy: Any) -> None:
        run = module("dpo", tiny_model, reference_cache=str(tmp_path / "cache"))
        filled, scores = run.fill, {}

        def then_lost(*arguments: Any) -> None:
            filled(*arguments)
            if run.global_rank == 1:
                reference._hash = lambda _: "of other weights"

        run.fill = then_lost
        run.log_scores = lambda _, values, __: scores.update(values)
        examples = data("dpo", tiny_model, tmp_path, val_size=4, held_out_percent=30)
        fit(
            run, examples, tmp_path, devices=2, strategy=strategy, max_steps=1, limit_val_batches=1.0,
            val_check_interval=1, logger=False,
        )  # fmt: skip
        torch.save(sorted(scores), tmp_path / f"rank{run.global_rank}.pt")

    train_in_two("fsdp2", train_without)
    for rank in range(2):
        names = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        assert "loss" in names
        assert "objective/kl" not in names


def test_an_evaluation_after_training_finds_the_reference_sharded_already(tiny_model: Path, tmp_path: Path) -> None:
    data("dpo", tiny_model, tmp_path)  # writes the file

    def evaluated_twice(strategy: Any) -> None:
        run = module("dpo", tiny_model, lr=0.3)
        examples = data("dpo", tiny_model, tmp_path, val_size=4, held_out_percent=30)
        arguments: dict[str, Any] = {"devices": 2, "limit_val_batches": 1.0, "logger": False}
        fit(run, examples, tmp_path, strategy=strategy, max_steps=1, val_check_interval=1, **arguments)
        seen = [float(run.trainer.callback_metrics["eval/loss"])]
        again = ShardedStrategy(process_group_backend="gloo", timeout_seconds=30.0)
        (got,) = trainer(tmp_path, strategy=again, **arguments).validate(run, examples, verbose=False)
        torch.save([*seen, got["eval/loss"]], tmp_path / f"rank{run.global_rank}.pt")

    train_in_two("fsdp2", evaluated_twice)
    for rank in range(2):
        before, after = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        assert before != pytest.approx(0.6931472, rel=1e-4)
        assert after == pytest.approx(before, rel=1e-5)
