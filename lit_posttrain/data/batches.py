"""From examples to batches, and what is measured of them."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from rich.console import Console
from rich.progress import track

from lit_posttrain.batching import pad_sequences
from lit_posttrain.data.sources import Row
from lit_posttrain.types import Example, ExampleBatch

_SHOWS_PROGRESS = 2000  # rows


class Line(NamedTuple):
    """One row of a batch.

    Attributes:
        prompt: Its prompt.
        completion: Its completion.
        mask: Which tokens of the completion count.
        columns: One number, or one a completion token, by name.
        group: Number of its example in the batch.
        row: Number of the completion in the split.
    """

    prompt: list[int]
    completion: list[int]
    mask: list[bool]
    columns: dict[str, Any]
    group: int
    row: int


def lines(example: Example, group: int, first_row: int) -> list[Line]:
    """An example's rows."""
    return [
        Line(
            example.prompt,
            completion,
            mask,
            {name: values[i] for name, values in example.columns.items()},
            group,
            first_row + i,
        )
        for i, (completion, mask) in enumerate(zip(example.completions, example.masks, strict=True))
    ]


def as_batch(rows: Sequence[Line], per_token: dict[str, bool]) -> ExampleBatch:
    """Padded rows with their masks and columns.

    Args:
        rows: The rows, perhaps none.
        per_token: The columns, and whether each has one number a completion token.
    """
    sequences = pad_sequences([r.prompt for r in rows], [r.completion for r in rows])
    width = max(sequences.ids.shape[1] - 1, 0)
    # Position i scores token i + 1, so a completion's first token stands one before its place.
    starts = [len(r.prompt) - 1 for r in rows]
    mask = _placed([r.mask for r in rows], starts, width, torch.bool)
    columns = {
        name: _placed([r.columns[name] for r in rows], starts, width, torch.float32)
        if inside
        else torch.tensor([r.columns[name] for r in rows], dtype=torch.float32)
        for name, inside in per_token.items()
    }
    columns["group"] = torch.tensor([r.group for r in rows], dtype=torch.long)
    columns["row"] = torch.tensor([r.row for r in rows], dtype=torch.long)
    return ExampleBatch(sequences, mask, columns)


def _placed(values: Sequence[Sequence[Any]], starts: Sequence[int], width: int, dtype: torch.dtype) -> torch.Tensor:
    placed = torch.zeros(len(values), width, dtype=dtype)
    for i, (row, start) in enumerate(zip(values, starts, strict=True)):
        placed[i, start : start + len(row)] = torch.tensor(row, dtype=dtype)
    return placed


def columns_of(examples: Sequence[Example]) -> dict[str, bool]:
    """The columns that all examples have, and whether each has one number a completion token.

    Raises:
        ValueError: An example has one that another lacks.
    """
    if not examples:
        return {}
    first = examples[0]
    for e in examples:
        if different := set(e.columns) ^ set(first.columns):
            having, lacking = (e, first) if different & set(e.columns) else (first, e)
            raise ValueError(
                f"{lacking.origin}: there is no {min(different)}, but {having.origin} has one; give it to every row or "
                "to none (data.init_args.datasets[...].columns can leave a column out)"
            )
    return {name: isinstance(values[0], list) for name, values in first.columns.items()}


def key(example: Example) -> tuple[tuple[int, ...], ...]:
    """What makes two examples the same: their tokens."""
    return (tuple(example.prompt), *map(tuple, example.completions))


def longest(example: Example) -> int:
    """Tokens of the prompt and the longest completion."""
    return len(example.prompt) + max(map(len, example.completions))


def spells(row: Row, names: Iterable[str], specials: Sequence[str]) -> bool:
    """Whether text in these columns spells a special token, which the tokenizer will take for one."""
    return any(_spells(row.get(name), specials) for name in names)


def _spells(value: Any, specials: Sequence[str]) -> bool:
    if isinstance(value, str):
        return any(token in value for token in specials)
    if isinstance(value, dict):
        return any(_spells(v, specials) for v in value.values())
    return isinstance(value, list) and not _numbers(value) and any(_spells(v, specials) for v in value)


def _rank() -> int:
    return getattr(rank_zero_only, "rank", 0)


def _numbers(value: list[Any]) -> bool:
    return bool(value) and isinstance(value[0], int | float)


def progress(rows: Sequence[Row], what: str) -> Iterable[Row]:
    """The rows, with a bar where there are many and someone looks."""
    console = Console(stderr=True)
    hidden = len(rows) <= _SHOWS_PROGRESS or bool(_rank()) or not console.is_terminal
    return track(rows, what, console=console, transient=True, disable=hidden)
