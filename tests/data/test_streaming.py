"""Rows that are read while training: shares, order, resume, ranks, held-out rows, formats."""

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch
from offline_runs import KINDS, write
from streams import HEAD, asked, drawn, mixed, rows_of, same, texts

from lit_posttrain.data import Source, UnpairedPreferences, sources, streaming
from lit_posttrain.data.sources import Row, read_parquet
from lit_posttrain.data.streaming import Window

Jsonl = Callable[..., str]


def is_held(prompt: str, percent: int) -> bool:
    return int(hashlib.sha256(prompt.encode()).hexdigest(), 16) % 100 < percent


# --- shares and order -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [(1.0, 3.0, 0.5), (None, None, None)], ids=["weights", "equally often"])
def test_weights_set_the_shares_and_draws_count_them(make: Any, paths: list[str], weights: Any) -> None:
    data = make(datasets=mixed(paths, *weights), batch_size=40)
    taken = [text[0] for text in drawn(data, 0, 25)]
    n, total = len(taken), sum(w or 1 for w in weights)
    assert n == 1000
    for name, weight in zip("abc", weights, strict=True):
        p = (weight or 1) / total
        assert abs(taken.count(name) - n * p) < 4 * (n * p * (1 - p)) ** 0.5
    for iteration in (25, 24, 3, 0):
        before = Counter(taken[: 40 * iteration])
        assert data.draws(iteration) == {path: before[name] for path, name in zip(paths, "abc", strict=True)}


def laps_of(window: Window, n: int, laps: int) -> list[list[int]]:
    return [[window.draw()["i"] for _ in range(n)] for _ in range(laps)]


def numbered(n: int) -> Callable[[], Iterator[Row]]:
    return lambda: (Row({"i": i}, f"x:{i}", i) for i in range(n))


def test_every_lap_is_a_permutation_that_reaches_as_far_as_the_window() -> None:
    laps = laps_of(Window(0, 8, numbered(50)), 50, 20)
    assert all(sorted(lap) == list(range(50)) for lap in laps)
    assert len(set(map(tuple, laps))) == 20
    ahead = [row - place for lap in laps for place, row in enumerate(lap)]
    assert max(ahead) == 7  # the last of the eight that wait
    assert min(ahead) < -14  # and some wait long


def test_a_window_draws_uniformly() -> None:
    firsts = Counter(lap[0] for lap in laps_of(Window(0, 100, numbered(5)), 5, 1000))
    assert all(abs(firsts[i] - 200) < 4 * (1000 * 0.2 * 0.8) ** 0.5 for i in range(5))


def test_a_window_of_one_keeps_the_order(make: Any, paths: list[str]) -> None:
    data = make(dataset=paths[1], shuffle_buffer=1)
    assert drawn(data, 0, 6) == 2 * [r["text"] for r in texts("b", 12)]
    assert data.draws(6) == {}  # nothing is mixed


def test_a_seed_is_an_order(make: Any, paths: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = mixed(paths, 1.0, 1.0, 1.0)
    first = drawn(make(datasets=chosen), 0, 10)
    assert drawn(make(datasets=chosen), 0, 10) == first
    monkeypatch.setenv("PL_GLOBAL_SEED", "8")
    other = drawn(make(datasets=chosen), 0, 10)
    assert [t[0] for t in other] != [t[0] for t in first]  # other sources
    assert [t for t in other if t[0] == "a"][:5] != [t for t in first if t[0] == "a"][:5]  # and other rows


def test_laps_are_counted(make: Any, jsonl: Jsonl) -> None:
    data = make(dataset=jsonl(texts("a", 5)), shuffle_buffer=3)
    found = []
    for i in range(5):
        data.batch(i)
        found.append(data.summary()["train"]["restarts"])
    assert found == [0, 1, 2, 3, 3]  # 4, 8, 12, 16 and 20 rows of laps of 5


def test_train_size_is_the_length_of_an_epoch(make: Any, paths: list[str]) -> None:
    endless = make(datasets=mixed(paths, 1.0, 1.0, 1.0))
    data = make(datasets=mixed(paths, 1.0, 1.0, 1.0), train_size=14)
    assert data.iterations_per_epoch == len(list(data.take())) == 3
    assert endless.iterations_per_epoch > 10**9
    assert drawn(data, 0, 8) == drawn(endless, 0, 8)  # the next epoch goes on


@pytest.mark.parametrize("kind", KINDS)
def test_all_kinds_of_examples_stream(kind: str, make: Any, tmp_path: Path) -> None:
    file = str(write(tmp_path / "rows.jsonl", KINDS[kind][2]))
    whole = make(KINDS[kind][1], dataset=file, streaming=False)
    data = make(KINDS[kind][1], dataset=file, shuffle_buffer=1)
    for i in (0, 1):
        expected = whole.collate("train", list(range(4 * i, 4 * i + 4)), [0, 1, 2, 3])
        # Rows are numbered within the batch, not within a split that nobody knows; -1 - n is a mismatched completion n.
        own = expected.columns["row"]
        expected.columns["row"] = torch.where(own < 0, own + own[0], own - own[0])
        assert same(data.batch(i), expected)


# --- resume and ranks -------------------------------------------------------------------------------------------


@pytest.fixture
def labelled(make: Any, jsonl: Jsonl) -> Callable[..., Any]:
    """Pairs that become two examples, rows that are dropped, rows that are held out, and a second source."""
    pairs = [{"prompt": f"p{i}", "chosen": f" {'x' * (i % 4 * 8)}", "rejected": " no"} for i in range(23)]
    for i in range(0, 23, 4):
        pairs[i]["chosen"] = pairs[i]["rejected"]
    single = [{"prompt": f"s{i}", "completion": " y", "label": i % 2 == 0} for i in range(9)]
    files = jsonl(pairs, "pairs.jsonl"), jsonl(single, "single.jsonl")

    def build(**arguments: Any) -> Any:
        given = {"shuffle_buffer": 5, "held_out_percent": 20, "max_length": 16, "batch_size": 3, "train_size": 12}
        return make(UnpairedPreferences, datasets=mixed(list(files), 3.0, 1.0), **{**given, **arguments})

    return build


def through(data: Any, n: int) -> list[Any]:
    """The next batches, an epoch after the other."""
    return list(itertools.islice(itertools.chain.from_iterable(data.take() for _ in itertools.count()), n))


def test_a_resume_at_any_iteration_equals_going_through(labelled: Any) -> None:
    expected = through(labelled(), 17)
    undisturbed = labelled()
    within = 0
    for cut in range(14):
        state = json.loads(json.dumps(undisturbed.state_dict()))
        assert state["iteration"] == cut
        within += any(state["stream"]["pending"])
        resumed = labelled()
        resumed.load_state_dict(state)
        assert all(map(same, through(resumed, 3), expected[cut : cut + 3]))
        assert resumed.state_dict() == {**resumed.state_dict(), "iteration": cut + 3}
        through(undisturbed, 1)
        assert resumed.draws(cut + 1) == undisturbed.draws(cut + 1)
    assert 3 < within < 11  # some stop between the examples of a row


def test_a_state_is_a_few_counters(labelled: Any) -> None:
    data = labelled()
    through(data, 30)
    state = data.state_dict()["stream"]
    assert state == json.loads(json.dumps(state))
    assert len(json.dumps(state)) < 200
    assert sum(state["examples"]) == 90


def test_batches_come_in_any_order(labelled: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "_KEPT", 4)
    expected = through(labelled(), 20)
    data = labelled()
    for i in (19, 3, 17, 18, 0, 16, 0, 1):  # further back than counters are kept, too
        assert same(data.batch(i), expected[i])
    assert data.draws(2) == labelled().draws(2)


def test_what_was_handed_out_but_not_trained_comes_again(labelled: Any) -> None:
    expected = through(labelled(), 6)
    data = labelled()
    through(data, 5)
    progress = SimpleNamespace(total=SimpleNamespace(processed=4))
    data.trainer = SimpleNamespace(fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress)))
    state = data.state_dict()
    assert state["iteration"] == 4
    resumed = labelled()
    resumed.load_state_dict(state)
    assert all(map(same, through(resumed, 2), expected[4:]))


def test_rows_are_passed_over_without_being_tokenised(labelled: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    data = labelled()
    through(data, 20)
    state, resumed = data.state_dict(), labelled()
    encoded: list[Any] = []
    encode = resumed.encode_row
    monkeypatch.setattr(resumed, "encode_row", lambda row: [encoded.append(row), encode(row)][1])
    resumed.load_state_dict(state)
    through(resumed, 1)
    assert len(encoded) < 10


@pytest.mark.parametrize("kind", ["sft", "rm", "kto"])
def test_shares_of_two_ranks_make_up_the_batch(kind: str, make: Any, tmp_path: Path) -> None:
    files = [str(write(tmp_path / f"{n}.jsonl", KINDS[kind][2], n)) for n in (16, 7)]
    arguments = {"datasets": mixed(files, 2.0, 1.0), "shuffle_buffer": 4, "batch_size": 6}
    one = make(KINDS[kind][1], **arguments)
    ranks = [make(KINDS[kind][1], rank=r, world=2, **arguments) for r in (0, 1)]
    for i in range(12):
        shares = [rows_of(rank.batch(i)) for rank in ranks]
        assert [row for share in shares for row in share] == rows_of(one.batch(i))
        assert all(shares)
    assert ranks[0].draws(12) == ranks[1].draws(12) == one.draws(12)


# --- held-out rows ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", [6, 10**9])
def test_held_out_rows_are_never_trained_on(wanted: int, make: Any, jsonl: Jsonl) -> None:
    rows = {name: asked(120, name) for name in "qr"}
    files = [jsonl(r, f"{name}.jsonl") for name, r in rows.items()]
    both = mixed(files, None, None)
    data = make(datasets=both, held_out_percent=20, val_size=wanted, shuffle_buffer=7, batch_size=40)
    whole = {r["prompt"] + r["completion"]: is_held(r["prompt"], 20) for some in rows.values() for r in some}
    assert 30 < sum(whole.values()) < 70
    assert set(drawn(data, 0, 15)) == {text for text, held in whole.items() if not held}
    decode = data.encoder.tokenizer.decode
    val = [decode(e.prompt + e.completions[0], skip_special_tokens=True) for e in data.examples("val")]
    held = {name: [t for t, h in whole.items() if h and t[0] == name] for name in "qr"}
    assert val == held["q"][: wanted // 2] + held["r"][: wanted // 2]


def test_a_validation_file_is_not_trained_on_and_read_no_further_than_asked(
    make: Any, jsonl: Jsonl, tmp_path: Path
) -> None:
    train = jsonl(asked(20), "train.jsonl")
    val = Path(jsonl(asked(4) + asked(3, "other"), "val.jsonl"))
    data = make(dataset=train, val_split=str(val), val_size=None)
    assert data.size("val") == 7
    assert set(drawn(data, 0, 20)) == {f"q{i}? {i}" for i in range(4, 20)}
    with val.open("a") as file:
        file.write("not json\n")
    assert make(dataset=train, val_split=str(val), val_size=5).size("val") == 5
    with pytest.raises(ValueError, match=r"val.jsonl:8: malformed JSON"):
        make(dataset=train, val_split=str(val), val_size=9)


# --- formats and memory -----------------------------------------------------------------------------------------


def saved(folder: Path, form: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Rows in a format, as arguments."""
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    comma = "text\n" + "".join(f"{row['text']}\n" for row in rows)
    file = folder / f"rows.{'jsonl' if form == 'files' else form.split()[0]}"
    if form in ("jsonl", "jsonl with BOM"):
        file.write_bytes(b"\xef\xbb\xbf" * form.endswith("BOM") + lines.encode())
    elif form in ("csv", "csv with BOM"):
        file.write_bytes(b"\xef\xbb\xbf" * form.endswith("BOM") + comma.encode())
    elif form == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file, row_group_size=4)
    elif form == "folder":
        datasets.Dataset.from_list(rows).save_to_disk(str(file))
    else:
        file.write_text(lines)
        (folder / "more.csv").write_text("text\nlast\n")
        return {"datasets": [Source(path=str(folder), data_files=["rows.jsonl", "more.csv"])]}
    return {"dataset": str(file)}


@pytest.mark.parametrize("form", ["jsonl", "jsonl with BOM", "csv", "csv with BOM", "parquet", "folder", "files"])
def test_formats(form: str, make: Any, tmp_path: Path) -> None:
    rows = texts("é", 11) + [{"text": "last"}] * (form != "files")
    data = make(**saved(tmp_path, form, rows), shuffle_buffer=1)
    expected = [f"é {i}" for i in range(11)] + ["last"]
    assert drawn(data, 0, 6) == 2 * expected


def test_a_parquet_file_is_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(texts("a", 100)), file)
    parts: list[int] = []
    whole = pyarrow.parquet.ParquetFile.iter_batches

    def counted(*arguments: Any) -> Any:
        for part in whole(*arguments):
            parts.append(len(part))
            yield part

    monkeypatch.setattr(sources, "_PARQUET_ROWS", 16)
    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "iter_batches", counted)
    rows = read_parquet(file)
    assert [next(rows).origin for _ in range(17)][-1] == f"{file}:17"
    assert parts == [16, 16]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A hub data set that streams: what was asked for, and how many rows it gave."""
    seen = SimpleNamespace(calls=[], rows=Counter())

    def rows(split: str) -> Iterator[dict[str, Any]]:
        for row in asked(5000, split):
            seen.rows[split] += 1
            yield row

    def load(name: str, subset: str | None, split: str, **more: Any) -> Any:
        seen.calls.append((name, subset, split, more))
        return datasets.IterableDataset.from_generator(rows, gen_kwargs={"split": split})

    monkeypatch.setattr(sources, "_probe_hub", lambda name, key: None)
    monkeypatch.setattr(datasets, "load_dataset", load)
    return seen


def test_hub_datasets_stream_and_only_a_few_rows_are_held(make: Any, hub: Any) -> None:
    source = Source(path="some/set", name="main", data_dir="part", weight=1.0)
    data = make(datasets=[source], shuffle_buffer=10, val_split="test", val_size=3)
    assert {split: n for split, n in hub.rows.items() if n <= HEAD + 1} == {"train": HEAD, "test": 3}
    assert {call[2] for call in hub.calls} == {"train", "test"}
    assert all(call == ("some/set", "main", call[2], {"data_dir": "part", "streaming": True}) for call in hub.calls)
    found = drawn(data, 0, 5)
    assert hub.rows["train"] <= HEAD + 10 + 20
    assert len(set(found) & {f"train{i}? {i}" for i in range(30)}) == 20
    assert [e.origin for e in data.examples("val")] == [f"some/set[test][{i}]" for i in range(3)]
    resumed = make(datasets=[source], shuffle_buffer=10, val_split="test", val_size=3)
    resumed.load_state_dict({**data.state_dict(), "iteration": 3, "stream": data._stream.state(3)})
    assert drawn(resumed, 3, 5) == found[12:]
