"""Log-probs of the reference on disk: found for the same weights and data only, and never believed when damaged."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from offline_runs import data, fit, module, pair, write
from safetensors.torch import load_file, save_file
from tiny import write_tiny_model

from lit_posttrain.policy import Policy, PolicyConfig
from lit_posttrain.reference import Reference, ReferenceConfig
from lit_posttrain.reference_cache import ReferenceCache

CPU = torch.device("cpu")


class Filled:
    """A cache after ``fill`` of the training split, and how often a batch was scored for it."""

    def __init__(self, model: Path, folder: Path, examples: Any, precision: str = "float32"):
        policy = Policy(PolicyConfig(model=str(model), compute_dtype="float32"))
        self.cache = ReferenceCache(str(folder), Reference(policy, ReferenceConfig()), precision)
        self.scored = 0
        self.phases: list[tuple[str, int]] = []

        def score(batch: Any) -> torch.Tensor:
            self.scored += 1
            # Stands for log-probs: differs from row to row, and the batch's width plays no part.
            return -batch.columns["row"].float() - batch.mask.sum(-1) / 64

        self.cache.fill("train", examples, score, lambda name, total: self.phases.append((name, total)), CPU)
        self.values = self.cache.values["train"]


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
        cache.fill(split, found, lambda batch, n=first: batch.columns["row"].float() + n, lambda *_: None, CPU)
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


def test_held_out_examples_have_a_file_of_their_own(tiny_model: Path, tmp_path: Path) -> None:
    run = module("dpo", tiny_model, reference_cache=str(tmp_path / "c"))
    found = data("dpo", tiny_model, tmp_path, val_size=4, held_out_percent=40)
    fit(run, found, tmp_path, limit_val_batches=1.0, val_check_interval=2)
    assert sorted(f.name.split("-")[0] for f in (tmp_path / "c").glob("*")) == ["train", "val"]
    assert len(run.cache.values["val"]) == 2 * found.size("val")
    assert run.cache.values["val"].lt(0).all()
