"""Rows that are read while training: drawn by weight, shuffled in a window, resumed by counting."""

import hashlib
import itertools
from abc import abstractmethod
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lit_posttrain import randomness
from lit_posttrain.data import batches
from lit_posttrain.data.base import PostTrainDataModule, Split
from lit_posttrain.data.mixture import Source, iterate_source, local_files, read_sources
from lit_posttrain.data.sources import Row
from lit_posttrain.types import Example

HEAD = 256  # rows that stand for the training set where something looks at it
ENDLESS = 2**40  # examples of an epoch that never ends
_KEPT = 64  # iterations whose counters are remembered
_OPTION = bool | int | float | str | dict
_NO_MATTER = {"tokenizer", "train_size", "val_size", "val_batch_size", "val_split"}  # for which examples come when
Encode = Callable[[Row], list[Example]]


class Window:
    """One source's rows over and over, shuffled within a window; draw *k* depends on the seed and *k* alone.

    The window is emptied before the source starts again, so every row comes once a lap.

    Args:
        number: The source's number in the mixture.
        size: Rows that wait; 1 keeps the source's order.
        rows: Starts the source.

    Attributes:
        drawn: Rows handed out.
        laps: How often the source has begun again.
    """

    def __init__(self, number: int, size: int, rows: Callable[[], Iterator[Row]]):
        self.number, self.size, self.rows = number, size, rows
        self.reset()

    def reset(self) -> None:
        """Go back to the beginning."""
        self.drawn = self.laps = 0
        self._waiting: list[Row] = []
        self._source = self.rows()

    def draw(self) -> Row:
        """The next row."""
        self._fill()
        if not self._waiting:
            self.laps += 1
            self._source = self.rows()
            self._fill()
        key = randomness.key(randomness.run_seed(), "buffer", self.number, self.drawn)
        at = key % len(self._waiting)
        self._waiting[at], self._waiting[-1] = self._waiting[-1], self._waiting[at]
        self.drawn += 1
        return self._waiting.pop()

    def _fill(self) -> None:
        self._waiting.extend(itertools.islice(self._source, self.size - len(self._waiting)))


class Stream:
    """Batches of training examples, by iteration.

    Position *p* of iteration *i* draws its source from a uniform keyed by (seed, *i*, *p*), and takes that source's
    next example; of a row that becomes several, the others come next. What has been drawn is all the state there is.

    Args:
        windows: One a source.
        weights: One a source.
        batch_size: Examples of a batch.
        encode: A row's examples, none if it is left out.
        empty: What to say of a source, by number, none of whose rows becomes an example.
    """

    def __init__(
        self,
        windows: Sequence[Window],
        weights: Sequence[float],
        batch_size: int,
        encode: Encode,
        empty: Callable[[int], str],
    ):
        self.windows, self.batch_size, self.encode, self.empty = windows, batch_size, encode, empty
        total = sum(weights)
        self.bounds = [bound / total for bound in itertools.accumulate(weights)][:-1]
        self._pending: list[list[Example]] = [[] for _ in windows]
        self._examples = [0] * len(windows)
        self._iteration = 0
        self._last: tuple[int, list[Example]] | None = None
        self._states: dict[int, dict[str, Any]] = {}
        self._record()

    def batch(self, iteration: int) -> list[Example]:
        """The examples of ``iteration``; cheap if it is the next one."""
        if self._last is None or self._last[0] != iteration:
            self._move(iteration)
            self._last = iteration, self._draw()
        return self._last[1]

    def state(self, iteration: int) -> dict[str, Any]:
        """Of every source the rows and examples that the iterations before ``iteration`` drew."""
        if iteration not in self._states:
            self._move(iteration)
        return self._states[iteration]

    def load(self, state: dict[str, Any]) -> None:
        """Begin at a state: its rows are passed over when the next batch is drawn, without being tokenised."""
        self._states[state["iteration"]] = state

    def _move(self, iteration: int) -> None:
        nearest = max(i for i in self._states if i <= iteration)
        if not nearest <= self._iteration <= iteration:
            self._restore(self._states[nearest])
        while self._iteration < iteration:
            self._draw()

    def _restore(self, state: dict[str, Any]) -> None:
        self._iteration, self._examples, self._last = state["iteration"], list(state["examples"]), None
        for i, window in enumerate(self.windows):
            window.reset()
            row = None
            while window.drawn < state["rows"][i]:
                row = window.draw()
            left = state["pending"][i]
            self._pending[i] = self.encode(row)[-left:] if row is not None and left else []

    def _draw(self) -> list[Example]:
        seed = randomness.run_seed()
        examples = []
        for position in range(self.batch_size):
            uniform = randomness.key(seed, "stream", self._iteration, position) / 2**63
            examples.append(self._next(bisect_right(self.bounds, uniform)))
        self._iteration += 1
        self._record()
        return examples

    def _record(self) -> None:
        self._states[self._iteration] = {
            "iteration": self._iteration,
            "rows": [w.drawn for w in self.windows],
            "pending": [len(p) for p in self._pending],
            "examples": list(self._examples),
        }
        if self._iteration > _KEPT:  # the beginning stays
            self._states.pop(self._iteration - _KEPT, None)

    def _next(self, number: int) -> Example:
        window, first = self.windows[number], self.windows[number].laps
        while not self._pending[number]:
            self._pending[number] = self.encode(window.draw())
            if window.laps > first + 1:
                raise ValueError(self.empty(number))
        self._examples[number] += 1
        return self._pending[number].pop(0)


def _described(source: Source) -> Any:
    """What a source holds, wherever its files lie."""
    files = [(p.name, p.stat().st_size) for p in local_files(source) if p.is_file()]
    where = files or (source.path, source.name, source.data_dir, source.data_files)
    return where, source.split, source.columns, source.weight


class StreamedData(PostTrainDataModule):
    """What a data set of fixed examples does differently while it streams."""

    sources: list[Source]
    one: bool
    shuffle_buffer: int
    val_split: str | None
    held_out_percent: int
    val_size: int | None
    _examples: dict[Split, list[Example]]
    _first_rows: dict[Split, list[int]]
    _counts: dict[Split, Counter[str]]
    _held: set[Any]
    _stage: str | None
    _stream: Stream | None = None
    _hash: str | None = None
    _context: int | None = None

    @abstractmethod
    def is_held_out(self, row: Row) -> bool:
        """Whether a row is kept for evaluation."""

    @abstractmethod
    def prepared(self, row: Row) -> Row:
        """The row, its columns named as ours and checked."""

    @abstractmethod
    def encode_row(self, row: Row) -> list[Example]:
        """The training examples of a row, counted."""

    def batch(self, iteration: int) -> Any:
        """This rank's share of the batch of ``iteration``. Of a stream every rank draws all of it."""
        if self._stream is None:
            return super().batch(iteration)
        rank, world = self._ranks()
        share = self.batch_size // world
        kept = self._examples["train"], self._first_rows["train"]
        drawn = self._stream.batch(iteration)
        batches.columns_of([*kept[0][:1], *drawn])
        self._counts["train"]["restarts"] = sum(w.laps for w in self._stream.windows)
        firsts = list(itertools.accumulate((len(e.completions) for e in drawn), initial=0))
        self._examples["train"], self._first_rows["train"] = drawn, firsts
        try:
            return self.share("train", list(range(self.batch_size)), list(range(rank * share, (rank + 1) * share)))
        finally:
            self._examples["train"], self._first_rows["train"] = kept

    def state_dict(self) -> dict[str, Any]:
        """Also how far every source has been read."""
        state = super().state_dict()
        return state if self._stream is None else {**state, "stream": self._stream.state(state["iteration"])}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Also pass over what has been trained on."""
        super().load_state_dict(state_dict)
        if self._stream is not None and self._next == state_dict["iteration"]:
            self._stream.load(state_dict["stream"])

    def open_stream(self) -> dict[Split, list[Row]]:
        """Make the stream, and read the beginning of every source: its share of the head and of the held-out rows."""
        openers = [self._opener(i) for i in range(len(self.sources))]
        windows = [Window(i, self.shuffle_buffer, opener) for i, opener in enumerate(openers)]
        weights = [s.weight or 1.0 for s in self.sources]
        self._stream = Stream(windows, weights, self.batch_size, self._encode_streamed, self._empty)
        rows: dict[Split, list[Row]] = {"train": [], "val": []}
        hashed = self.val_split is None and self.held_out_percent > 0
        for i, opener in enumerate(openers):
            totals = {"train": HEAD, "val": (self.val_size or 0) * hashed}
            wanted = {split: n * (i + 1) // len(openers) - n * i // len(openers) for split, n in totals.items()}
            found = opener()
            while any(wanted.values()) and (row := next(found, None)) is not None:
                row = self.prepared(row)
                split: Split = "val" if self.is_held_out(row) else "train"
                if wanted[split]:
                    wanted[split] -= 1
                    rows[split].append(row)
        if self.val_split is not None:
            held = read_sources(self.sources, self.one, self.val_split, streaming=True)
            rows["val"] = [self.prepared(row) for row in itertools.islice(held, self.val_size)]
        return rows

    def first_examples(self, found: set[int]) -> list[tuple[Example, int]]:
        """The first examples of every source that has none in the head, with its number; not for evaluation alone.

        Args:
            found: The sources that have some.

        Raises:
            ValueError: None of a source's rows becomes an example; names it.
        """
        first = []
        missing = set() if self._stage in ("validate", "test") else set(range(len(self.sources))) - found
        for i in sorted(missing):
            examples = next(filter(None, map(self._encode_streamed, self._opener(i)())), None)
            if examples is None:
                raise ValueError(self._empty(i))
            first += [(e, i) for e in examples]
        return first

    def stream_hash(self) -> str:
        """A hash of what is streamed and how when training began; of the rows only the head."""
        if self._hash is None:
            first = [e[:4] for e in self._examples["train"]]
            # All options, a subclass's too: the first examples may not show what they do to later ones.
            options = {
                k: v for k, v in vars(self).items() if isinstance(v, _OPTION) and k not in _NO_MATTER and k[0] != "_"
            }
            what = [_described(s) for s in self.sources], sorted(options.items()), sorted(self._held), first
            self._hash = hashlib.sha256(repr(what).encode()).hexdigest()
        return self._hash

    def _opener(self, number: int) -> Callable[[], Iterator[Row]]:
        key = "dataset" if self.one else f"datasets[{number}].path"
        return lambda: iterate_source(self.sources[number], number, key)

    def _empty(self, number: int) -> str:
        key = "dataset" if self.one else f"datasets[{number}]"
        path, counts = self.sources[number].path, dict(self._counts["train"])
        return f"data.init_args.{key}: no training examples of {path} are left ({counts})"

    def _encode_streamed(self, row: Row) -> list[Example]:
        row = self.prepared(row)
        if self.is_held_out(row):
            self._counts["train"]["held_out"] += 1
            return []
        examples = self.encode_row(row)
        for e in examples:
            if self._context is not None and batches.longest(e) > self._context:
                raise ValueError(
                    f"data.init_args.max_length: {e.origin} has {batches.longest(e)} tokens, and the model has "
                    f"{self._context} positions; set max_length: {self._context}"
                )
        return examples
