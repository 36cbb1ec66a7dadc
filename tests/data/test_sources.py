import json
import pickle
import socket
import time
from pathlib import Path

import datasets
import huggingface_hub.constants
import pyarrow
import pyarrow.parquet
import pytest

from lit_posttrain.data import sources
from lit_posttrain.data.sources import Row, nearest, read_rows


def write(folder: Path, content: bytes | str, name: str = "rows.jsonl") -> str:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


BAD_JSONL = {
    "bad UTF-8": (b'{"prompt": "a"}\n{"prompt": "\xff"}\n', ":2: not UTF-8 (byte 0xff)"),
    "UTF-16": ('{"prompt": "a"}\n'.encode("utf-16"), ":1: not UTF-8"),
    "malformed": ('{"prompt": "a"}\n\n{"prompt": }\n', ":3: malformed JSON"),
    "cut short": ('{"prompt": "a"}\n{"prompt": "b', ":2: malformed JSON"),
    "two objects on a line": ('{"a": 1}{"a": 2}\n', ":1: malformed JSON"),
    "array file": ('[\n{"prompt": "a"}\n]\n', "one JSON array"),
    "array line": ('[{"prompt": "a"}]\n', ":1: a JSON list"),
    "bare text": ('{"prompt": "a"}\n"b"\n', ":2: a JSON str"),
    "NaN": ('{"prompt": "a", "answer": NaN}\n', ":1: malformed JSON (NaN is not JSON"),
    "Infinity": ('{"a": 1}\n{"answer": -Infinity}\n', ":2: malformed JSON (-Infinity is not JSON"),
    "repeated key": ('{"answer": "1", "answer": "2"}\n', ":1: malformed JSON (key 'answer' stands twice"),
    "lone surrogate": ('{"a": "fine \\ud83d\\ude00"}\n{"prompt": "half \\ud83d"}\n', ":2: a lone surrogate"),
    "lone surrogate in a key": ('{"x": {"\\udc00": 1}}\n', ":1: a lone surrogate"),
    "control character": ('{"prompt": "a\tb"}\n', ":1: malformed JSON"),
    "nested without end": ("[" * 100_000 + "\n", ":1: malformed JSON (too deeply nested)"),
    "empty": ("", "is empty (0 rows)"),
    "blank": ("\n \n", "is empty (0 rows)"),
}


@pytest.mark.parametrize(("content", "message"), BAD_JSONL.values(), ids=BAD_JSONL.keys())
def test_a_bad_line_is_refused_by_file_and_line(tmp_path: Path, content: bytes | str, message: str) -> None:
    with pytest.raises(ValueError, match=r"rows\.jsonl") as error:
        read_rows(write(tmp_path, content))
    assert message in str(error.value)


BAD_CSV = {
    "too few values": ("prompt,answer\na,1\nb\n", ":3: 1 values for 2 columns (prompt, answer)"),
    "too many values": ("prompt,answer\na,1,000\n", ":2: 3 values for 2 columns"),
    "line counted after a value of two lines": ('prompt,answer\n"a\nb",1\nc\n', ":4: 1 values"),
    "open quote": ('prompt,answer\n"a,1\n', ":2: malformed CSV"),
    "column twice": ("a,b,a\n1,2,3\n", ":1: the header names ['a'] more than once"),
    "bad UTF-8": (b"prompt\na\n\xe9\n", ":3: not UTF-8 (byte 0xe9)"),
    "header only": ("prompt,answer\n", "is empty (0 rows)"),
    "empty": ("", "is empty (0 rows)"),
}


@pytest.mark.parametrize(("content", "message"), BAD_CSV.values(), ids=BAD_CSV.keys())
def test_bad_csv_is_refused_by_file_and_line(tmp_path: Path, content: bytes | str, message: str) -> None:
    with pytest.raises(ValueError, match=r"rows\.csv") as error:
        read_rows(write(tmp_path, content, "rows.csv"))
    assert message in str(error.value)


def test_json_values_are_read_exactly(tmp_path: Path) -> None:
    line = (
        '{"text": "025", "int": 123456789012345678901234567890, "long": 0.12345678901234567890123, "short": 0.1, '
        '"huge": 1e400, "exponent": 1e999999999999999999999, "digits": ' + "7" * 5000 + "}"
    )
    row = read_rows(write(tmp_path, line))[0]
    assert row["text"] == "025"
    assert row["int"] == 123456789012345678901234567890
    assert row["long"] == "0.12345678901234567890123"
    assert row["short"] == 0.1
    assert isinstance(row["short"], float)
    assert row["huge"] == "1e400"
    assert row["exponent"] == "1e999999999999999999999"
    assert row["digits"] == "7" * 5000


def test_a_byte_order_mark_is_stripped(tmp_path: Path) -> None:
    assert read_rows(write(tmp_path, b'\xef\xbb\xbf{"prompt": "a"}\n')) == [{"prompt": "a"}]
    assert read_rows(write(tmp_path, b"\xef\xbb\xbfprompt\na\n", "rows.csv")) == [{"prompt": "a"}]


def test_only_a_newline_ends_a_row(tmp_path: Path) -> None:
    text = "a\u2028b\u0085c"
    rows = read_rows(write(tmp_path, json.dumps({"prompt": text}, ensure_ascii=False) + '\r\n\n{"prompt": "d"}'))
    assert rows == [{"prompt": text}, {"prompt": "d"}]
    assert [(row.number, row.origin.rpartition(":")[2]) for row in rows] == [(0, "1"), (2, "3")]


def test_csv_values_stay_text(tmp_path: Path) -> None:
    rows = read_rows(write(tmp_path, 'prompt,answer\n"a, ""b""\nc",025\r\nd,NaN\n', "rows.csv"))
    assert rows == [{"prompt": 'a, "b"\nc', "answer": "025"}, {"prompt": "d", "answer": "NaN"}]
    assert [row.origin.rpartition(":")[2] for row in rows] == ["2", "4"]


def test_a_long_document_fits_into_csv(tmp_path: Path) -> None:
    text = "word " * 40_000
    assert read_rows(write(tmp_path, f"text\n{text}\n", "rows.csv")) == [{"text": text}]


def test_parquet(tmp_path: Path) -> None:
    columns = [{"prompt": "a", "reward_model": {"ground_truth": "025"}}, {"prompt": "b", "reward_model": None}]
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(columns), path)
    rows = read_rows(str(path))
    assert rows == columns
    assert rows[1].origin == f"{path}:2"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"not a readable Parquet file"):
        read_rows(str(path))
    pyarrow.parquet.write_table(pyarrow.table({"prompt": pyarrow.array([], pyarrow.string())}), path)
    with pytest.raises(ValueError, match=r"is empty \(0 rows\)"):
        read_rows(str(path))


def test_saved_folders(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_list([{"prompt": "a", "answer": "1"}, {"prompt": "b", "answer": "2"}])
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk(tmp_path / "several")
    assert read_rows(str(tmp_path / "one")) == rows.to_list()
    (row,) = read_rows(str(tmp_path / "several"), split="test")
    assert (row, row.origin) == ({"prompt": "b", "answer": "2"}, f"{tmp_path / 'several'}[test][0]")
    with pytest.raises(ValueError, match=r"data.init_args.split: .* no split 'tset' \(did you mean 'test'\?\)"):
        read_rows(str(tmp_path / "several"), split="tset")
    with pytest.raises(ValueError, match=r"data.init_args.val_split: 'test', but .* was saved without splits"):
        read_rows(str(tmp_path / "one"), split="test", key="val_split")
    with pytest.raises(ValueError, match=r"data.init_args.dataset: .* not one saved by datasets.save_to_disk"):
        read_rows(str(tmp_path))


def test_a_path_to_nothing_is_no_hub_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data.init_args.dataset: there is no file nowhere.jsonl"):
        read_rows("nowhere.jsonl")
    with pytest.raises(ValueError, match=r"there is no file ./nowhere"):
        read_rows("./nowhere")
    with pytest.raises(ValueError, match=r"cannot read .*rows.txt; known endings are .jsonl, .json"):
        read_rows(write(tmp_path, "a", "rows.txt"))
    with pytest.raises(ValueError, match=r"data.init_args.split: 'test', but .* is a file"):
        read_rows(write(tmp_path, '{"prompt": "a"}'), split="test")


def test_an_unreachable_hub_is_one_error_within_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"data.init_args.dataset: 'openai/gsm8k' .* cannot be reached .*save_to_disk"):
        read_rows("openai/gsm8k", "main")
    assert time.monotonic() - start < 4


def test_a_hub_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(sources, "HUB_TIMEOUT", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        start = time.monotonic()
        with pytest.raises(ValueError, match=r"cannot be reached"):
            read_rows("openai/gsm8k")
    assert time.monotonic() - start < 4


def test_hub_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(name: str, subset: str | None, split: str) -> datasets.Dataset:
        asked.append((name, subset, split))
        if subset != "main":
            raise ValueError("BuilderConfig 'mian' not found. Available: ['main']")
        return datasets.Dataset.from_list([{"question": "q", "answer": "1"}])

    monkeypatch.setattr(sources, "_probe_hub", lambda name, key: None)
    monkeypatch.setattr(datasets, "load_dataset", load)
    (row,) = read_rows("openai/gsm8k", "main", "test")
    assert (row, row.origin) == ({"question": "q", "answer": "1"}, "openai/gsm8k[test][0]")
    assert asked == [("openai/gsm8k", "main", "test")]
    with pytest.raises(ValueError, match=r"data.init_args.dataset: .*subset 'mian'.*Available: \['main'\]"):
        read_rows("openai/gsm8k", "mian")


def test_nearest() -> None:
    assert nearest("promt", ["answer", "prompt"]) == " (did you mean 'prompt'?)"
    assert nearest("xyz", ["answer", "prompt"]) == ""


def test_rows_survive_pickling() -> None:
    copy = pickle.loads(pickle.dumps(Row({"a": 1}, "file:3", 2)))
    assert (copy, copy.origin, copy.number) == ({"a": 1}, "file:3", 2)
