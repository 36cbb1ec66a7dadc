"""What may stand in a column: checks that name the file, the line and the column, and the name that was meant."""

import math
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

from lit_posttrain.data.records import check_encodable, column
from lit_posttrain.data.sources import Row, nearest

KEY = "data.init_args.column_map"
_TRUTH = {"true": True, "false": False, "1": True, "0": False}


def where(row: Row, name: str) -> str:
    """How a message names a column of a row."""
    return f"{row.origin}: column {name!r}"


def has(row: Row, *names: str) -> bool:
    """Whether all these columns are there and not null."""
    return all(row.get(name) is not None for name in names)


def kind_of(row: Row, kinds: Mapping[str, Sequence[str]]) -> str:
    """The first kind all of whose columns the row has.

    Args:
        row: The row.
        kinds: Columns by the name of the kind, the preferred first.

    Raises:
        ValueError: There is none; names the column that is missing from the kind that comes closest.
    """
    for kind, names in kinds.items():
        if has(row, *names):
            return kind
    closest = max(kinds.values(), key=lambda names: sum(_closeness(row, name) for name in names) / len(names))
    missing = next(name for name in closest if not has(row, name))
    there = ", ".join(row)
    problem = "is null" if missing in row else f"is missing{nearest(missing, row)}; the columns are {there}"
    raise ValueError(
        f"{where(row, missing)} {problem}. Rows hold {' or '.join('+'.join(names) for names in kinds.values())}; set "
        f"{KEY}.{missing} to the column that holds it"
    )


def _closeness(row: Row, name: str) -> float:
    # A misspelt name points at its kind more than a foreign column that happens to be there.
    return 1.0 if has(row, name) else 0.75 * bool(nearest(name, row)) + 0.25 * (name in row)


def renamed(row: Row, mapping: Mapping[str, str], key: str) -> None:
    """Give columns our names.

    Args:
        row: Changed in place.
        mapping: From our name to the name or dotted path of theirs; ``*`` in a path stands for every item of a list.
        key: The YAML key of the mapping, for messages.
    """
    row.update({ours: column(row, theirs, ours, key) for ours, theirs in mapping.items()})


def check_mapping(mapping: Mapping[str, str], known: Sequence[str]) -> None:
    """See that only known columns are mapped.

    Raises:
        ValueError: One is unknown.
    """
    for name in mapping:
        if name not in known:
            raise ValueError(f"{KEY}.{name}: the columns to map are {', '.join(known)}{nearest(name, known)}")


def check_text(row: Row, names: Sequence[str]) -> None:
    """Refuse lone surrogates anywhere in these columns, and pictures.

    Raises:
        ValueError: There are some.
    """
    for name in ("image", "images"):
        if row.get(name):
            raise ValueError(f"{where(row, name)} holds pictures, and only text can be trained on; remove the column")
    for name in names:
        if name in row:
            _check_leaves(row[name], where(row, name))


def _check_leaves(value: Any, place: str) -> None:
    if isinstance(value, str):
        check_encodable(value, place)
    elif isinstance(value, Mapping):
        for each in value.values():
            _check_leaves(each, place)
    elif isinstance(value, list) and value and not isinstance(value[0], int | float):
        for each in value:
            _check_leaves(each, place)


def text(row: Row, name: str) -> str:
    """A column of text that is not empty.

    Raises:
        ValueError: It is something else.
    """
    return as_text(row.get(name), where(row, name))


def as_text(value: Any, place: str) -> str:
    """Text that is not empty."""
    if not isinstance(value, str):
        raise ValueError(f"{place} must be text, not {_kind(value)}")
    if not value.strip():
        raise ValueError(f"{place} is empty; remove the row")
    return value


def as_list(value: Any, place: str) -> list[Any]:
    """A list that is not empty."""
    if not isinstance(value, list) or not value:
        raise ValueError(f"{place} must be a list, not {'an empty one' if value == [] else _kind(value)}")
    return value


def number(value: Any, place: str) -> float:
    """A finite number; text that spells one counts."""
    try:
        found = (
            math.nan if isinstance(value, bool) or not isinstance(value, int | float | str | Decimal) else float(value)
        )
    except ValueError:
        found = math.nan
    if not math.isfinite(found):
        raise ValueError(f"{place} must be a finite number, not {value!r}; correct or remove the row")
    return found


def flag(value: Any, place: str) -> float:
    """1.0 or 0.0 for a truth value, 1 or 0, or text that spells one of them."""
    if isinstance(value, str):
        value = _TRUTH.get(value.strip().lower(), value)
    if isinstance(value, bool | int | float) and value in (0, 1):
        return float(value)
    raise ValueError(f"{place} must be true or false (or 1 or 0), not {value!r}")


def token_ids(row: Row, name: str, size: int) -> list[int]:
    """A column of token ids.

    Args:
        row: The row.
        name: The column.
        size: Tokens of the vocabulary.

    Raises:
        ValueError: It is something else.
    """
    ids = as_list(row.get(name), where(row, name))
    for at, token in enumerate(ids):
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < size:
            raise ValueError(
                f"{where(row, name)}[{at}] is {token!r}, and the tokenizer's ids are 0 to {size - 1}; was the data "
                "tokenised for another model?"
            )
    return ids


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__
