"""Where examples come from, and in which shares: one dataset or several, in an order that resumes exactly."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lit_posttrain import randomness
from lit_posttrain.data.columns import renamed
from lit_posttrain.data.sources import Row, is_data_file, iterate_rows, nearest

_BUILDERS = ("json", "csv", "parquet")


@dataclass(frozen=True, kw_only=True)
class Source:
    """One of the datasets that are trained on together.

    Args:
        path: A ``.jsonl``, ``.csv`` or ``.parquet`` file, a folder saved by ``datasets.save_to_disk``, or a name on the
            hub; with ``data_files`` also the folder they lie in, or ``json``, ``csv`` or ``parquet``.
        name: Configuration of a hub dataset.
        data_dir: Folder within a hub dataset.
        data_files: File or files within a hub dataset or a folder.
        split: Split that is trained on.
        columns: Our names of columns to theirs (``{prompt: question}``; dotted paths reach into columns), or a list of
            the columns that are read.
        fraction: Which share of the rows is read, the first ones; above 0, at most 1.
        weight: How often examples of this source are drawn relative to the others', however many there are: a small
            source is repeated, each time in another order. Set it for all sources or for none; without weights every
            example of every source comes once an epoch.
    """

    path: str
    name: str | None = None
    data_dir: str | None = None
    data_files: str | list[str] | None = None
    split: str = "train"
    columns: dict[str, str] | list[str] | None = None
    fraction: float = 1.0
    weight: float | None = None


class MixedRow(Row):
    """A row that knows its source.

    Attributes:
        source: Number of the source in the mixture.
    """

    source: int = 0


def check_sources(sources: Sequence[Source]) -> None:
    """See that shares and weights make sense.

    Raises:
        ValueError: They do not; names the key.
    """
    weighted = [s.weight is not None for s in sources]
    for i, source in enumerate(sources):
        key = f"data.init_args.datasets[{i}]"
        if not 0 < source.fraction <= 1:
            raise ValueError(f"{key}.fraction: must be above 0 and at most 1, is {source.fraction}")
        if source.weight is None and any(weighted):
            raise ValueError(f"{key}.weight: not set, but another source has one; set it for all sources or for none")
        if source.weight is not None and not (source.weight > 0 and math.isfinite(source.weight)):
            raise ValueError(f"{key}.weight: must be above 0 and finite, is {source.weight}; leave the source out")


def percent(share: float) -> int:
    """TRL's ``test_split_size`` in percents.

    Raises:
        ValueError: Not whole ones.
    """
    whole = round(100 * share)
    if not 0 < share < 1 or abs(100 * share - whole) > 1e-6:
        raise ValueError(
            f"data.init_args.test_split_size: must be a share in whole percents (0.01 to 0.99), is {share}"
        )
    return whole


def labels(sources: Sequence[Source]) -> list[str]:
    """A name of each source for logs: its path, numbered where several share one."""
    paths = [s.path for s in sources]
    return [p if paths.count(p) == 1 else f"{p}[{i}]" for i, p in enumerate(paths)]


def read_sources(sources: Sequence[Source], one: bool, val_split: str | None, streaming: bool = False) -> Iterator[Row]:
    """The rows of all sources, or what ``val_split`` names: a file, or a split of each.

    Args:
        sources: The sources.
        one: Whether the YAML names a single ``dataset``.
        val_split: Read this instead, all of it.
        streaming: Read each row when it is asked for.
    """
    if val_split is not None and ("/" in val_split or is_data_file(val_split)):
        yield from iterate_rows(val_split, key="val_split", streaming=streaming)
        return
    for i, source in enumerate(sources):
        key = "dataset" if one else f"datasets[{i}].path"
        if val_split is not None:
            source, key = replace(source, split=val_split, fraction=1.0), "val_split"
        yield from (iterate_source if streaming else read_source)(source, i, key)


def read_source(source: Source, number: int, key: str) -> list[Row]:
    """The rows of a source, its columns named as ours.

    Args:
        source: The source.
        number: Its number in the mixture.
        key: The key under ``data.init_args`` that names it (``dataset`` or ``datasets[0].path``).
    """
    rows = list(_iterate(source, key))
    return [_mixed(row, source, number, key) for row in rows[: max(1, round(source.fraction * len(rows)))]]


def iterate_source(source: Source, number: int, key: str) -> Iterator[Row]:
    """The same rows, each read when it is asked for; all of them, since nobody knows how many there are."""
    for row in _iterate(source, key, streaming=True):
        yield _mixed(row, source, number, key)


def _mixed(row: Row, source: Source, number: int, key: str) -> Row:
    columns_key = f"data.init_args.{key.removesuffix('path')}columns"
    values: dict[str, Any] = row
    if isinstance(source.columns, list):
        for name in source.columns:
            if name not in row:
                raise ValueError(
                    f"{columns_key}: {row.origin} has no column {name!r}{nearest(name, row)}; the columns are "
                    f"{', '.join(row)}"
                )
        values = {name: row[name] for name in source.columns}
    one = MixedRow(values, row.origin, row.number)
    one.source = number
    if isinstance(source.columns, dict):
        renamed(one, source.columns, columns_key)
    return one


def _iterate(source: Source, key: str, **more: Any) -> Iterator[Row]:
    files = [source.data_files] if isinstance(source.data_files, str) else source.data_files
    folder = Path(source.path).expanduser()
    if files and (source.path in _BUILDERS or folder.is_dir()):
        key = key.removesuffix("path") + "data_files"
        for file, path in zip(files, local_files(source), strict=True):
            if not is_data_file(file):
                raise ValueError(f"data.init_args.{key}: cannot read {file}; name .jsonl, .csv or .parquet files")
            if not path.is_file():  # now, and not when the files before it are read
                raise ValueError(f"data.init_args.{key}: there is no file {path}")
        for file in local_files(source):
            yield from iterate_rows(str(file), key=key)
        return
    given = {name: v for name, v in (("data_dir", source.data_dir), ("data_files", files)) if v}
    if given and (is_data_file(source.path) or folder.is_dir()):
        raise ValueError(
            f"data.init_args.{key}: {source.path} is local; data_dir needs data_files, a file needs neither"
        )
    yield from iterate_rows(source.path, source.name, source.split, key, **given, **more)


def local_files(source: Source) -> list[Path]:
    """The files of a source that are on this machine: those it names, or all of its folder."""
    folder = Path(source.path).expanduser()
    files = [source.data_files] if isinstance(source.data_files, str) else source.data_files
    if files and (source.path in _BUILDERS or folder.is_dir()):
        inside = Path(source.data_dir or ".") if source.path in _BUILDERS else folder / (source.data_dir or "")
        return [inside / file for file in files]
    return sorted(p for p in folder.rglob("*") if p.is_file()) if folder.is_dir() else [folder]


class Mixture:
    """Which example stands where in an epoch when sources are drawn by weight.

    Position *p* of epoch *e* draws its source from a uniform keyed by (seed, *e*, *p*), and the *k*-th draw of a source
    of *n* examples over the whole run takes number *k* mod *n* of that source's permutation *k* div *n*. So nothing
    but (seed, epoch, position) decides, every example of a source comes equally often, and a resume needs no state.

    Args:
        members: Which examples each source has.
        weights: One a source.
        length: Positions of an epoch.
    """

    def __init__(self, members: Sequence[Sequence[int]], weights: Sequence[float], length: int):
        self.members = [torch.tensor(m) for m in members]
        self.bounds = torch.cumsum(torch.tensor(weights, dtype=torch.float64), 0) / sum(weights)
        self.length = length
        self._before: list[torch.Tensor] = []  # draws of each source before each epoch, of one seed
        self._seed: int | None = None

    def order(self, seed: int, epoch: int) -> list[int]:
        """The examples of an epoch."""
        drawn = self._draws(seed, epoch)
        before = self._counts_before(seed, epoch)
        order = torch.zeros(self.length, dtype=torch.long)
        for source, members in enumerate(self.members):
            at = (drawn == source).nonzero()[:, 0]
            order[at] = members[self._sequence(seed, source, int(before[source]), len(at))]
        return order.tolist()

    def _draws(self, seed: int, epoch: int) -> torch.Tensor:
        generator = randomness.generator(seed, "mixture", epoch)
        uniforms = torch.rand(self.length, generator=generator, dtype=torch.float64)
        return torch.searchsorted(self.bounds, uniforms, right=True).clamp(max=len(self.members) - 1)

    def _counts_before(self, seed: int, epoch: int) -> torch.Tensor:
        if self._seed != seed or not self._before:
            self._seed, self._before = seed, [torch.zeros(len(self.members), dtype=torch.long)]
        while len(self._before) <= epoch:
            drawn = self._draws(seed, len(self._before) - 1)
            self._before.append(self._before[-1] + torch.bincount(drawn, minlength=len(self.members)))
        return self._before[epoch]

    def _sequence(self, seed: int, source: int, first: int, count: int) -> torch.Tensor:
        """Draws ``first`` to ``first + count`` of a source."""
        n = len(self.members[source])
        laps = range(first // n, (first + max(count, 1) - 1) // n + 1)
        drawn = torch.cat([randomness.permutation(n, seed, "mixture source", source, lap) for lap in laps])
        return drawn[first - laps.start * n :][:count]
