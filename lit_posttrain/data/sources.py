"""Strict readers: JSONL, CSV, Parquet, saved ``datasets`` folders and the hub; every row knows where it came from.

The JSON reader of ``datasets`` turns ``"1"`` into 1 when a later row holds a number, a missing column into None and a
30-digit integer into a float, and names no line in its errors. A gold answer must survive reading, so ours does not.
"""

import csv
import difflib
import io
import json
from collections.abc import Callable, Iterable, Iterator
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, NoReturn

HUB_TIMEOUT = 3.0  # seconds; without the probe `datasets` retries an unreachable hub for 23
_PARQUET_ROWS = 1024  # that are in memory at a time
_CSV_FIELD = 2**31 - 1  # characters of a value; Python's own limit is 131,072, and documents are longer
_INT_DIGITS = 4000  # Python refuses to convert much longer digit strings


class Row(dict[str, Any]):
    """One row of a data source.

    Attributes:
        origin: Where it stands, as ``file:line`` (from 1) or ``name[split][index]`` (from 0); begins every error.
        number: Its number within the source, from 0.
    """

    def __init__(self, columns: dict[str, Any], origin: str, number: int):
        super().__init__(columns)
        self.origin = origin
        self.number = number


def nearest(name: str, names: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` for the name closest to ``name``, or nothing."""
    close = difflib.get_close_matches(name, list(names), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def is_data_file(name: str) -> bool:
    """Whether ``name`` ends like a file that can be read, whether or not it exists."""
    return Path(name).suffix.lower() in _READERS


def read_rows(
    dataset: str, subset: str | None = None, split: str = "train", key: str = "dataset", **hub: Any
) -> list[Row]:
    """The rows of a local file, a folder saved by ``datasets.save_to_disk``, or a dataset on the hub.

    Args:
        dataset: Path of a ``.jsonl``, ``.json`` (one object per line), ``.ndjson``, ``.csv`` or ``.parquet`` file, or
            of a saved folder; anything else is a name on the hub.
        subset: Configuration of a hub dataset.
        split: Split of a hub dataset or saved folder; a file has only ``train``.
        key: The key under ``data.init_args`` that names the dataset, for messages.
        **hub: What else ``datasets.load_dataset`` is told of a hub dataset.

    Raises:
        ValueError: Nothing there, nothing in it, or a row that cannot be read exactly; names file and line.
    """
    return list(iterate_rows(dataset, subset, split, key, **hub))


def iterate_rows(
    dataset: str, subset: str | None = None, split: str = "train", key: str = "dataset", **hub: Any
) -> Iterator[Row]:
    """The same rows, each read when it is asked for; of the hub only with ``streaming=True`` in ``hub``."""
    path = Path(dataset).expanduser()
    if path.is_dir():
        rows = _read_saved(path, split, key, bool(hub.get("streaming")))
    elif is_data_file(dataset):
        if split != "train":
            raise ValueError(
                f"data.init_args.{_split_key(key)}: {split!r}, but {dataset} is a file and has no splits; "
                "val_split can name a second file, split must go"
            )
        if not path.is_file():
            raise ValueError(f"data.init_args.{key}: there is no file {dataset}")
        rows = _READERS[path.suffix.lower()](path)
    elif path.exists() or dataset.startswith((".", "/", "~")):
        what = f"cannot read {dataset}" if path.exists() else f"there is no file {dataset}"
        raise ValueError(f"data.init_args.{key}: {what}; known endings are {', '.join(_READERS)}")
    else:
        rows = _read_hub(dataset, subset, split, key, hub)
    empty = True
    for row in rows:
        empty = False
        yield row
    if empty:
        raise ValueError(f"data.init_args.{key}: {dataset} is empty (0 rows)")


def read_jsonl(path: Path) -> Iterator[Row]:
    """One JSON object per line, nothing rounded: a number that Python's types cannot hold exactly stays text.

    Blank lines are skipped, a byte order mark is stripped.

    Raises:
        ValueError: Bad UTF-8, malformed JSON, NaN or Infinity, a repeated key, a lone surrogate, or a line that is no
            object.
    """
    for number, line in enumerate(_lines(path), start=1):
        if line.strip():
            yield Row(_parse(line, f"{path}:{number}"), f"{path}:{number}", number - 1)


def read_csv(path: Path) -> Iterator[Row]:
    """A CSV file with a header; every value stays the text it is, so ``025`` keeps its zero.

    Raises:
        ValueError: Bad UTF-8, malformed quoting, a repeated column name, or a row with too few or too many values.
    """
    csv.field_size_limit(_CSV_FIELD)
    reader = csv.reader((part for line in _lines(path) for part in io.StringIO(line, newline="")), strict=True)
    header: list[str] | None = None
    number = 0
    while True:
        start = reader.line_num + 1  # a quoted value may span lines: name the first
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise ValueError(f"{path}:{start}: malformed CSV ({error})") from error
        if not values:
            continue
        if header is None:
            header = values
            repeated = {name for name in header if header.count(name) > 1}
            if repeated:
                raise ValueError(f"{path}:{start}: the header names {sorted(repeated)} more than once")
        elif len(values) != len(header):
            raise ValueError(
                f"{path}:{start}: {len(values)} values for {len(header)} columns ({', '.join(header)}); "
                "quote values that hold commas"
            )
        else:
            yield Row(dict(zip(header, values, strict=True)), f"{path}:{start}", number)
            number += 1


def read_parquet(path: Path) -> Iterator[Row]:
    """A Parquet file, a part of a row group at a time.

    Raises:
        ValueError: It is not one, or is damaged.
    """
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(_PARQUET_ROWS):
                for columns in batch.to_pylist():
                    yield Row(columns, f"{path}:{number + 1}", number)
                    number += 1
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: not a readable Parquet file ({error})") from error


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": read_jsonl,
    ".json": read_jsonl,
    ".ndjson": read_jsonl,
    ".csv": read_csv,
    ".parquet": read_parquet,
}


def _lines(path: Path) -> Iterator[str]:
    # Bytes end lines at \n alone: U+2028 and its like are legal inside a JSON string and would cut the line.
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            raw = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
            try:
                yield raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{path}:{number}: not UTF-8 (byte {raw[error.start]:#04x}); convert the file with: "
                    f"iconv -f <its encoding> -t utf-8 {path.name}"
                ) from error


def _parse(line: str, origin: str) -> dict[str, Any]:
    try:
        value = json.loads(
            line,
            parse_int=lambda text: int(text) if len(text) < _INT_DIGITS else text,
            parse_float=_exact_float,
            parse_constant=_refuse_constant,
            object_pairs_hook=_unique_keys,
        )
    except (ValueError, RecursionError) as error:
        hint = "; the file holds one JSON array, but one object per line is expected" if line.strip() == "[" else ""
        reason = "too deeply nested" if isinstance(error, RecursionError) else error
        raise ValueError(f"{origin}: malformed JSON ({reason}){hint}") from error
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise ValueError(f'{origin}: a JSON {kind}, but one object per line is expected ({{"prompt": ...}})')
    # Only an escape can bring a lone surrogate into strictly decoded text; no tokenizer accepts one.
    if "\\u" in line and not _encodable(json.dumps(value, ensure_ascii=False)):
        raise ValueError(f"{origin}: a lone surrogate (half of a \\ud83d\\ude00 pair) is not text; repair the escape")
    return value


def _encodable(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _exact_float(text: str) -> float | str:
    value = float(text)
    try:
        return value if Decimal(repr(value)) == Decimal(text) else text
    except InvalidOperation:
        return text


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON; write null or a number")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    columns = dict(pairs)
    if len(columns) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(n for n in names if names.count(n) > 1)!r} stands twice in one object")
    return columns


def _read_saved(path: Path, split: str, key: str, streaming: bool) -> Iterator[Row]:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except (ValueError, OSError) as error:
        raise ValueError(
            f"data.init_args.{key}: {path} is a folder, but not one saved by datasets.save_to_disk ({error}); "
            "name a file in it instead"
        ) from error
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            names = [str(name) for name in loaded]
            raise ValueError(
                f"data.init_args.{_split_key(key)}: {path} has no split {split!r}{nearest(split, names)}; "
                f"it has {', '.join(names)}"
            )
        loaded = loaded[split]
    elif split != "train":
        raise ValueError(f"data.init_args.{_split_key(key)}: {split!r}, but {path} was saved without splits")
    for i, columns in enumerate(loaded if streaming else loaded.to_list()):
        yield Row(dict(columns), f"{path}[{split}][{i}]", i)


def _split_key(key: str) -> str:
    if key.endswith(".path"):  # of a mixture
        return key.removesuffix("path") + "split"
    return "split" if key == "dataset" else key


def _read_hub(name: str, subset: str | None, split: str, key: str, more: dict[str, Any]) -> Iterator[Row]:
    import datasets
    from datasets.exceptions import DatasetsError
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE:  # offline by the user's wish, `datasets` answers from its cache, at once
        _probe_hub(name, key)
    try:
        loaded = datasets.load_dataset(name, subset, split=split, **more)
    except (ValueError, OSError, DatasetsError) as error:
        raise ValueError(
            f"data.init_args.{key}: cannot load {name!r} (subset {subset!r}, split {split!r}): {error}"
        ) from error
    assert isinstance(loaded, datasets.Dataset | datasets.IterableDataset)
    for i, columns in enumerate(loaded.to_list() if isinstance(loaded, datasets.Dataset) else loaded):
        yield Row(dict(columns), f"{name}[{split}][{i}]", i)


def _probe_hub(name: str, key: str) -> None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    try:
        HfApi().dataset_info(name, timeout=HUB_TIMEOUT)
    except GatedRepoError as error:
        raise ValueError(
            f"data.init_args.{key}: {name!r} is gated; accept its terms on the hub and log in with `hf auth login`"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ValueError(
            f"data.init_args.{key}: {name!r} is neither a local file or folder nor a dataset on the hub"
        ) from error
    except Exception as error:  # the hub's client lets its HTTP library's own exceptions through
        raise ValueError(
            f"data.init_args.{key}: {name!r} is no local file or folder, and the hub cannot be reached to look for it "
            f"({error}). Where there is a network: datasets.load_dataset({name!r}).save_to_disk(folder); "
            f"then set data.init_args.{key} to that folder"
        ) from error
