"""Log-probs of the reference on disk: found for the same weights and data only, and never believed when damaged."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from offline_runs import data, fit, module, pair, write
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tiny import write_tiny_model
from tiny_runs import Recorder, scalars, trainer

from lit_posttrain.policy import Policy, PolicyConfig
from lit_posttrain.reference import Reference, ReferenceConfig
from lit_posttrain.reference_cache import ReferenceCache


class Filled:
    """A cache after ``fill`` of the training split, and how often a batch was scored for it."""

    def __init__(self, model: Path, folder: Path, examples: Any, precision: str = "float32"):
        policy = Policy(PolicyConfig(model=str(model), compute_dtype="float32"))
        self.cache = ReferenceCache(str(folder), Reference(policy, ReferenceConfig()), precision)
        self.scored = 0
        self.phases: list[tuple[str, int]] = []

        def score(batch: Any, rows: torch.Tensor) -> torch.Tensor:
            self.scored += 1
            # Stands for log-probs: differs from row to row, and the batch's width plays no part.
            sums = -batch.columns["row"].float() - batch.mask.sum(-1) / 64
            return torch.full_like(sums, torch.nan).index_copy(0, rows, sums[rows])

        fill(self.cache, "train", examples, score, lambda name, total: self.phases.append((name, total)))
        self.values = self.cache.values["train"]


def fill(cache: ReferenceCache, split: Any, found: Any, score: Any, phase: Any) -> None:
    """As the preference losses do."""
    examples = found.examples(split)
    contents = [(e.prompt, e.completions, e.masks) for e in examples]
    rows = sum(len(e.completions) for e in examples)
    cache.fill(split, contents, rows, lambda items: found.collate(split, items, items), score, phase)


@pytest.fixture
def examples(tiny_model: Path, tmp_path: Path) -> Any:
    found = data("dpo", tiny_model, tmp_path, dataset=str(write(tmp_path / "many.jsonl", pair, 150)))
    found.setup()
    return found


def expected(examples: Any) -> torch.Tensor:
    masks = [sum(m) for e in examples.examples("train") for m in e.masks]
    return -torch.arange(len(masks)).float() - torch.tensor(masks) / 64


def only(folder: Path) -> Path:
    (file,) = folder.glob("*")
    return file


def test_every_row_has_its_own_value(tiny_model: Path, tmp_path: Path, examples: Any) -> None:
    got = Filled(tiny_model, tmp_path / "c", examples)
    assert got.scored == 3  # 150 examples, 64 at once
    assert got.phases == [("reference log-probs", 3)]
    assert torch.equal(got.values, expected(examples))
    assert torch.equal(got.cache.read("train", torch.tensor([299, 0, 7])), expected(examples)[[299, 0, 7]])


def test_each_split_reads_its_own(tiny_model: Path, tmp_path: Path) -> None:
    found = data("dpo", tiny_model, tmp_path, val_size=None, held_out_percent=40)
    found.setup()
    policy = Policy(PolicyConfig(model=str(tiny_model), compute_dtype="float32"))
    cache = ReferenceCache(str(tmp_path / "c"), Reference(policy, ReferenceConfig()), "float32")
    for split, first in (("train", 0), ("val", 1000)):
        fill(cache, split, found, lambda batch, _, n=first: batch.columns["row"].float() + n, lambda *_: None)
    assert cache.read("train", torch.tensor([3, 0])).tolist() == [3, 0]
    assert cache.read("val", torch.tensor([3, 0])).tolist() == [1003, 1000]


def test_the_same_weights_and_data_find_it(tiny_model: Path, tmp_path: Path, examples: Any) -> None:
    first = Filled(tiny_model, tmp_path / "c", examples)
    before = only(tmp_path / "c").stat().st_mtime_ns
    again = Filled(tiny_model, tmp_path / "c", examples)
    assert (again.scored, again.phases) == (0, [])
    assert torch.equal(again.values, first.values)
    assert only(tmp_path / "c").stat().st_mtime_ns == before


def test_anything_else_does_not(tiny_model: Path, tmp_path: Path, examples: Any) -> None:
    folder = tmp_path / "c"
    Filled(tiny_model, folder, examples)
    other = write_tiny_model(tmp_path / "other", seed=3)
    assert Filled(other, folder, examples).scored > 0
    assert Filled(tiny_model, folder, examples, precision="bfloat16").scored > 0
    example = examples._examples["train"][7]
    changes: list[dict[str, Any]] = [
        {"prompt": [*example.prompt, 9]},
        {"completions": [example.completions[0], [*example.completions[1][:-1], 8]]},
        {"masks": [[False, *example.masks[0][1:]], example.masks[1]]},
    ]
    for change in changes:
        examples._examples["train"][7] = example._replace(**change)
        assert Filled(tiny_model, folder, examples).scored > 0, change
    examples._examples["train"][7] = example._replace(origin="elsewhere")
    assert Filled(tiny_model, folder, examples).scored == 0
    assert len(list(folder.glob("*.safetensors"))) == 6


def test_the_same_weights_used_otherwise_do_not(tiny_model: Path, tmp_path: Path, examples: Any) -> None:
    """A configuration says how: its norms, its positions. Where the model lies, or who wrote it, plays no part."""
    first = Filled(tiny_model, tmp_path / "c", examples)
    for change, scored in (({"rms_norm_eps": 0.1}, 3), ({"transformers_version": "1.0"}, 0)):
        folder = tmp_path / next(iter(change))
        shutil.copytree(tiny_model, folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **change}))
        assert Filled(folder, tmp_path / "c", examples).scored == scored, change
    assert first.scored == 3


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


def flipped(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def empty(file: Path) -> None:
    file.write_bytes(b"")


def without_a_checksum(file: Path) -> None:
    save_file({name: t.clone() for name, t in load_file(file).items()}, file)


def renamed(file: Path) -> None:
    save_file({"other": torch.zeros(3)}, file)


@pytest.mark.parametrize("damage", [cut, flipped, empty, without_a_checksum, renamed], ids=lambda f: f.__name__)
def test_a_damaged_file_is_computed_again(
    damage: Callable[[Path], None], tiny_model: Path, tmp_path: Path, examples: Any
) -> None:
    first = Filled(tiny_model, tmp_path / "c", examples)
    file = only(tmp_path / "c")
    good = load_file(file)["log_probs"].clone()  # what is loaded is mapped to the file
    damage(file)
    again = Filled(tiny_model, tmp_path / "c", examples)
    assert again.scored == 3
    assert torch.equal(again.values, first.values)
    assert torch.equal(load_file(only(tmp_path / "c"))["log_probs"], good)
    assert Filled(tiny_model, tmp_path / "c", examples).scored == 0


@pytest.mark.parametrize("folder", ["taken", "taken/c"])
def test_a_folder_that_cannot_be_written_to_is_refused_beforehand(
    folder: str, tiny_model: Path, tmp_path: Path, examples: Any
) -> None:
    (tmp_path / "taken").write_text("")
    policy = Policy(PolicyConfig(model=str(tiny_model), compute_dtype="float32"))
    cache = ReferenceCache(str(tmp_path / folder), Reference(policy, ReferenceConfig()), "float32")
    with pytest.raises(ValueError, match=rf"^model.init_args.reference_cache: .*{folder} cannot be written to"):
        fill(cache, "train", examples, lambda *_: pytest.fail("computed first"), lambda *_: None)


def test_a_disk_that_fills_up_loses_the_file_alone(
    tiny_model: Path, tmp_path: Path, examples: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: Any, path: Path, **__: Any) -> None:
        path.write_bytes(b"begun")
        raise SafetensorError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("lit_posttrain.reference_cache.save_file", full)
        with pytest.warns(UserWarning, match="could not be kept in .*No space left"):
            got = Filled(tiny_model, tmp_path / "c", examples)
    assert torch.equal(got.values, expected(examples))
    assert list((tmp_path / "c").iterdir()) == []
    assert Filled(tiny_model, tmp_path / "c", examples).scored == 3


def test_held_out_examples_have_a_file_of_their_own(tiny_model: Path, tmp_path: Path) -> None:
    run = module("dpo", tiny_model, reference_cache=str(tmp_path / "c"))
    found = data("dpo", tiny_model, tmp_path, val_size=4, held_out_percent=40)
    fit(run, found, tmp_path, limit_val_batches=1.0, val_check_interval=2)
    assert sorted(f.name.split("-")[0] for f in (tmp_path / "c").glob("*")) == ["train", "val"]
    assert len(run.cache.values["val"]) == 2 * found.size("val")
    assert run.cache.values["val"].lt(0).all()


def kto(model: Path, folder: Path, steps: int, cache: Path | None, **overrides: Any) -> tuple[Any, list[float], Any]:
    """A run over labelled completions, each in a pass of its own so that all round alike; its losses; its data."""
    folder.mkdir(parents=True, exist_ok=True)
    run = module("kto", model, lr=1.0, beta=0.5, reference_cache=None if cache is None else str(cache), token_budget=1)
    recorder = Recorder(run)
    found = data("kto", model, folder, val_size=5, held_out_percent=40, val_batch_size=2)
    fit(
        run, found, folder, limit_val_batches=1.0, val_check_interval=max(1, steps), check_val_every_n_epoch=None,
        max_steps=steps, **overrides,
    )  # fmt: skip
    return run, [r.metrics["loss"] for r in recorder.results], found


def curves(folder: Path) -> dict[str, list[float]]:
    return {tag: [v for _, v in points] for tag, points in scalars(folder).items() if tag.startswith("eval/")}


def test_mismatched_completions_are_cached_too(tiny_model: Path, tmp_path: Path) -> None:
    """Two epochs and an evaluation whose last batch is one example, with a cache and without."""
    cache = tmp_path / "cache"
    _, computed, _ = kto(tiny_model, tmp_path / "computed", 5, None)
    run, read, found = kto(tiny_model, tmp_path / "read", 5, cache)
    assert found.iterations_per_epoch < 5
    assert found.size("val") == 5
    assert read == pytest.approx(computed, rel=1e-6)
    assert len(set(computed)) == 5
    expected, got = curves(tmp_path / "computed"), curves(tmp_path / "read")
    assert got.keys() == expected.keys()
    for tag, values in expected.items():
        assert got[tag] == pytest.approx(values, rel=1e-5, abs=1e-6), tag
    assert run.reference.released
    parts = ["train", *(f"train-mismatched-{e}" for e in range(-(-5 // found.iterations_per_epoch)))]
    assert sorted(f.name.rsplit("-", 1)[0] for f in cache.glob("*")) == [*parts, "val", "val-mismatched"]
    run.reference.recall(torch.device("cpu"), None)
    batches = [("train", found.batch(i)) for i in range(5)]
    batches += [("val", found.evaluation_batch("val", i)) for i in (0, 2)]
    for split, batch in batches:
        assert (batch.columns["row"] < 0).sum() == len(batch.columns["row"]) / 2
        torch.testing.assert_close(run.cached(run.cache, batch, split), run._sums_of(batch), rtol=1e-5, atol=1e-4)


def test_a_longer_run_computes_what_is_new_alone(tiny_model: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    _, _, found = kto(tiny_model, tmp_path / "a", 2, cache)
    epoch = found.iterations_per_epoch
    kto(tiny_model, tmp_path / "b", epoch, cache)
    before = {f.name for f in cache.glob("*")}
    kto(tiny_model, tmp_path / "c", 2 * epoch, cache)
    new = {f.name.rsplit("-", 1)[0] for f in cache.glob("*") if f.name not in before}
    assert new == {"train-mismatched-1"}


def test_without_an_end_there_is_no_cache_of_it(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^model.init_args.reference_cache: .*set trainer.max_steps or trainer.max"):
        kto(tiny_model, tmp_path / "a", -1, tmp_path / "cache", max_epochs=-1)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_a_cached_run_estimates_kl_on_samples(kind: str, tiny_model: Path, tmp_path: Path) -> None:
    estimated = []
    for cache in (None, str(tmp_path / "cache")):
        folder = tmp_path / str(cache is None)
        folder.mkdir()
        run = module(kind, tiny_model, lr=3.0, reference_cache=cache)
        found = data(kind, tiny_model, folder, val_size=4, held_out_percent=40)
        fit(run, found, folder, max_steps=3, limit_val_batches=1.0, val_check_interval=1)
        estimated.append(curves(folder)["eval/objective/kl"])
        assert run.reference.released == (cache is not None)
    assert len(estimated[0]) == 3
    assert abs(estimated[0][-1]) > 1e-3
    assert estimated[1] == pytest.approx(estimated[0], rel=1e-5)


@pytest.mark.trap(28)
def test_other_data_after_training_is_scored_by_the_reference(tiny_model: Path, tmp_path: Path) -> None:
    """It was released by then, and must not be taken for the trained policy."""
    found = []
    for cache in (None, str(tmp_path / "cache")):
        folder = tmp_path / str(cache is None)
        folder.mkdir()
        run = module("dpo", tiny_model, lr=1.0, reference_cache=cache)
        fit(run, data("dpo", tiny_model, folder), folder, max_steps=3)
        other = data("dpo", tiny_model, folder, val_size=4, held_out_percent=40)
        found += trainer(folder, limit_val_batches=1.0).validate(run, other, verbose=False)
    assert abs(found[0]["eval/rewards/margins"]) > 0.1
    assert found[1] == pytest.approx(found[0], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("damage", ["changed", "gone"])
def test_training_outlives_the_references_files(
    damage: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_model, tmp_path / "model")
    run = module("dpo", tmp_path / "model", lr=1.0, reference_cache=str(tmp_path / "cache"))
    found = data("dpo", tiny_model, tmp_path, val_size=4, held_out_percent=40)
    filled = run.fill

    def then_damaged(*arguments: Any) -> None:
        filled(*arguments)
        shutil.rmtree(tmp_path / "model")
        if damage == "changed":
            write_tiny_model(tmp_path / "model", seed=5)

    monkeypatch.setattr(run, "fill", then_damaged)
    with pytest.warns(UserWarning, match=r"no objective/kl: model.init_args"):
        trainer(tmp_path, max_steps=2, limit_val_batches=1.0, val_check_interval=2).fit(run, found)
    assert run.trainer.global_step == 2
    assert "eval/objective/kl" not in curves(tmp_path)
    assert len(curves(tmp_path)["eval/loss"]) == 1
