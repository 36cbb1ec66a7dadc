"""Several datasets at once: shares, order, resume."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import jsonargparse
import pytest

from lit_posttrain.data import SupervisedExamples
from lit_posttrain.data.mixture import Mixture, Source

Jsonl = Callable[..., str]


def texts(name: str, n: int) -> list[dict[str, Any]]:
    return [{"text": f"{name} {i}"} for i in range(n)]


@pytest.fixture
def paths(jsonl: Jsonl) -> list[str]:
    return [jsonl(texts("a", 60), "a.jsonl"), jsonl(texts("b", 12), "b.jsonl"), jsonl(texts("c", 30), "c.jsonl")]


@pytest.fixture
def make(tokenizer_folder: str) -> Callable[..., SupervisedExamples]:
    def build(rank: int = 0, world: int = 1, **arguments: Any) -> SupervisedExamples:
        defaults = {"batch_size": 4, "tokenizer": tokenizer_folder, "held_out_percent": 0, "val_size": 0}
        data = SupervisedExamples(**(defaults | arguments))
        if world > 1:
            data.trainer = SimpleNamespace(  # type: ignore[assignment]
                distributed_sampler_kwargs={"rank": rank, "num_replicas": world}, state=SimpleNamespace(fn="fit")
            )
        data.setup("fit")
        return data

    return build


def mixed(paths: list[str], *weights: float | None, **more: Any) -> list[Source]:
    return [Source(path=p, weight=w, **more) for p, w in zip(paths, weights, strict=True)]


def drawn(data: SupervisedExamples, start: int, stop: int) -> list[str]:
    tokenizer = data.encoder.tokenizer
    found = []
    for i in range(start, stop):
        batch = data.batch(i)
        for ids, length in zip(batch.sequences.ids.tolist(), batch.sequences.lengths.tolist(), strict=True):
            found.append(str(tokenizer.decode(ids[:length], skip_special_tokens=True)))
    return found


def test_without_weights_everything_comes_once_an_epoch(make: Any, paths: list[str]) -> None:
    data = make(datasets=mixed(paths, None, None, None), batch_size=6)
    assert data.iterations_per_epoch == 17
    expected = sorted(r["text"] for name, n in (("a", 60), ("b", 12), ("c", 30)) for r in texts(name, n))
    first, second = drawn(data, 0, 17), drawn(data, 17, 34)
    assert sorted(first) == sorted(second) == expected
    assert first != second
    assert data.draws(17) == dict(zip(paths, (60, 12, 30), strict=True))


def test_weights_set_the_shares_whatever_the_sizes(make: Any, paths: list[str]) -> None:
    weights = (1.0, 3.0, 1.0)
    data = make(datasets=mixed(paths, *weights))
    iterations = 1000
    counts = Counter(text.split()[0] for text in drawn(data, 0, iterations))
    n = iterations * data.batch_size
    for name, weight in zip("abc", weights, strict=True):
        p = weight / sum(weights)
        assert abs(counts[name] - n * p) < 4 * (n * p * (1 - p)) ** 0.5
    assert data.draws(iterations) == {path: counts[name] for name, path in zip("abc", paths, strict=True)}
    assert data.draws(10) == {
        p: Counter(t[0] for t in drawn(data, 0, 10))[n] for n, p in zip("abc", paths, strict=True)
    }


def test_every_example_of_a_source_comes_equally_often(make: Any, paths: list[str]) -> None:
    data = make(datasets=mixed(paths, 1.0, 3.0, 1.0))
    counts = Counter(drawn(data, 0, 1000))
    for name, size in (("a", 60), ("b", 12), ("c", 30)):
        own = [counts[r["text"]] for r in texts(name, size)]
        assert max(own) - min(own) <= 1
    seen = [t for t in drawn(data, 0, 200) if t.startswith("b")]
    laps = [seen[i : i + 12] for i in range(0, 120, 12)]
    assert all(len(set(lap)) == 12 for lap in laps)
    assert len({tuple(lap) for lap in laps}) == len(laps)  # each time in another order


@pytest.mark.parametrize("weights", [(1.0, 3.0, 1.0), (None, None, None)])
def test_the_order_depends_on_the_iteration_alone(make: Any, paths: list[str], weights: Any) -> None:
    sources = mixed(paths, *weights)
    expected = drawn(make(datasets=sources), 0, 80)
    resumed = make(datasets=sources)
    assert drawn(resumed, 57, 80) == expected[57 * 4 :]
    assert resumed.draws(80) == make(datasets=sources).draws(80)
    shares = [make(rank=r, world=2, datasets=sources) for r in (0, 1)]
    together = [t for i in range(80) for share in shares for t in drawn(share, i, i + 1)]
    assert together == expected


def test_the_seed_changes_the_order(make: Any, paths: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    sources = mixed(paths, 1.0, 3.0, 1.0)
    data = make(datasets=sources)
    first = drawn(data, 0, 20)
    monkeypatch.setenv("PL_GLOBAL_SEED", "8")
    assert drawn(data, 0, 20) != first
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    assert drawn(data, 0, 20) == first


def test_other_weights_refuse_a_resume(make: Any, paths: list[str]) -> None:
    assert (
        make(datasets=mixed(paths, 1.0, 2.0, 1.0)).fingerprint()
        != make(datasets=mixed(paths, 1.0, 3.0, 1.0)).fingerprint()
    )


def test_a_mixture_counts_over_epochs() -> None:
    """Draws go on where the epoch before ended: no example of a source is passed over."""
    mixture = Mixture([[0, 1, 2], [10, 11, 12, 13, 14, 15, 16]], [1.0, 1.0], 5)
    order = [i for epoch in range(40) for i in mixture.order(3, epoch)]
    again = Mixture([[0, 1, 2], [10, 11, 12, 13, 14, 15, 16]], [1.0, 1.0], 5)
    assert again.order(3, 39) == order[-5:]
    for size, first in ((3, 0), (7, 10)):
        own = [i for i in order if first <= i < first + size]
        for lap in range(len(own) // size):
            assert sorted(own[lap * size : (lap + 1) * size]) == list(range(first, first + size))


def test_fraction_takes_the_first_rows(make: Any, paths: list[str]) -> None:
    data = make(datasets=[Source(path=paths[0], fraction=0.1), Source(path=paths[1], fraction=0.5)])
    assert [e.origin.rsplit(":", 1)[1] for e in data.examples("train")] == [
        *map(str, range(1, 7)),
        *map(str, range(1, 7)),
    ]


def test_columns_rename_and_select(make: Any, jsonl: Jsonl) -> None:
    renamed = jsonl([{"q": f"a{i}", "nested": {"a": "b"}} for i in range(4)], "renamed.jsonl")
    selected = jsonl(
        [{"messages": "not these", "prompt": f"c{i}", "completion": "d"} for i in range(4)], "selected.jsonl"
    )
    data = make(
        datasets=[
            Source(path=renamed, columns={"prompt": "q", "completion": "nested.a"}),
            Source(path=selected, columns=["prompt", "completion"]),
        ]
    )
    assert {e.origin.rsplit("/", 1)[1].split(":")[0] for e in data.examples("train")} == {
        "renamed.jsonl",
        "selected.jsonl",
    }
    assert data.size("train") == 8


def test_data_files_of_a_folder_and_of_a_builder(make: Any, jsonl: Jsonl, tmp_path: Path) -> None:
    one, two = jsonl(texts("a", 5), "one.jsonl"), jsonl(texts("b", 6), "two.jsonl")
    sources = [
        Source(path=str(tmp_path), data_files=["one.jsonl", "two.jsonl"]),
        Source(path="json", data_files=one),
        Source(path="json", data_files=two),
    ]
    data = make(datasets=sources)
    assert [e.origin.split("/")[-1] for e in data.examples("train")][::5] == [
        "one.jsonl:1",
        "two.jsonl:1",
        "two.jsonl:6",
        "one.jsonl:5",
        "two.jsonl:5",
    ]
    assert list(data.draws(0)) == [str(tmp_path), "json[1]", "json[2]"]


def test_val_split_of_every_source(make: Any, tmp_path: Path) -> None:
    for name in ("x", "y"):
        splits = {s: datasets.Dataset.from_list(texts(f"{name} {s}", 6)) for s in ("train", "test")}
        datasets.DatasetDict(splits).save_to_disk(str(tmp_path / name))
    sources = [Source(path=str(tmp_path / name), fraction=0.5) for name in ("x", "y")]
    data = make(datasets=sources, val_split="test", val_size=None)
    assert [data.size("train"), data.size("val")] == [6, 12]
    assert all("[test]" in e.origin for e in data.examples("val"))


def test_the_yaml_of_trl_parses(paths: list[str], tokenizer_folder: str) -> None:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(SupervisedExamples, "data")
    given = {
        "datasets": [
            {"path": paths[0], "name": None, "split": "train", "columns": ["text"], "fraction": 0.5},
            {"path": paths[1], "columns": {"text": "text"}, "weight": None},
        ],
        "test_split_size": 0.25,
        "batch_size": 4,
        "tokenizer": tokenizer_folder,
    }
    data = parser.instantiate(parser.parse_object({"data": given})).data
    data.setup("fit")
    assert data.held_out_percent == 25
    assert data.size("train") + data.size("val") == 42
    assert data.size("val") > 3


BAD = {
    "fraction": ({"fraction": 0.0}, r"^data.init_args.datasets\[0\].fraction: must be above 0 and at most 1, is 0.0"),
    "fraction above": ({"fraction": 1.5}, r"datasets\[0\].fraction"),
    "some weights": ({"weight": 1.0}, r"^data.init_args.datasets\[1\].weight: not set, but another source has one"),
    "negative": ({"weight": -1.0}, r"^data.init_args.datasets\[0\].weight: must be above 0"),
    "column": (
        {"columns": ["txet"]},
        r"datasets\[0\].columns: .*a.jsonl:1 has no column 'txet' \(did you mean 'text'\?\)",
    ),
    "mapped": (
        {"columns": {"text": "txt"}},
        r"a.jsonl:1: no column 'txt' \(did you mean 'text'\?\).*Set data.init_args.datasets\[0\].columns.text",
    ),
    "split": ({"split": "test"}, r"^data.init_args.datasets\[0\].split: 'test', but .* is a file"),
    "data_dir": ({"data_dir": "x"}, r"^data.init_args.datasets\[0\].path: .* is local"),
}


@pytest.mark.parametrize(("more", "message"), BAD.values(), ids=BAD.keys())
def test_wrong_sources(make: Any, paths: list[str], more: dict[str, Any], message: str) -> None:
    sources = [Source(path=paths[0], **more), Source(path=paths[1])]
    if message.startswith(r"^data.init_args.datasets\[0\].weight"):
        sources[1] = Source(path=paths[1], weight=1.0)
    with pytest.raises(ValueError, match=message):
        make(datasets=sources)


def test_no_such_file_is_named(make: Any) -> None:
    with pytest.raises(ValueError, match=r"^data.init_args.datasets\[0\].path: there is no file ./x.jsonl"):
        make(datasets=[Source(path="./x.jsonl")])


def test_a_weighted_source_with_nothing_left(make: Any, paths: list[str], jsonl: Jsonl) -> None:
    long = jsonl([{"text": "x" * 50}], "long.jsonl")
    with pytest.raises(
        ValueError, match=r"^data.init_args.datasets\[1\]: no training examples of .*long.jsonl are left"
    ):
        make(datasets=mixed([paths[0], long], 1.0, 1.0), max_length=20)
