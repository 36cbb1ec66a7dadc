"""What all data sets of fixed examples share: reading, holding out, tokenising once, batches by iteration."""

import hashlib
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from lit_posttrain import randomness
from lit_posttrain.data import batches
from lit_posttrain.data.base import Split
from lit_posttrain.data.checks import check_arguments, check_stage
from lit_posttrain.data.columns import KEY, check_text, has, renamed
from lit_posttrain.data.dialogue import Encoder
from lit_posttrain.data.messages import asked
from lit_posttrain.data.mixture import Mixture, Source, labels, percent, read_sources
from lit_posttrain.data.records import as_rows, held_out
from lit_posttrain.data.sources import Row
from lit_posttrain.data.streaming import ENDLESS, StreamedData
from lit_posttrain.data.templates import load_tokenizer
from lit_posttrain.types import Example, ExampleBatch


class Dropped(NamedTuple):
    """A row, or one of its examples, that is left out.

    Attributes:
        reason: Why, as counted.
    """

    reason: str


class ExampleData(StreamedData):
    """Fixed examples, tokenised once: of every row what the model sees is known before the first step.

    Without ``val_split`` a row is held out iff sha256(its prompt) mod 100 < ``held_out_percent``, so no prompt stands
    on both sides. What is left out is counted and printed. To bring your own source, subclass and override
    :meth:`load_examples`; for another kind of example, :meth:`encode`.

    Args:
        batch_size: Examples per optimizer step over all ranks.
        dataset: A ``.jsonl``, ``.csv`` or ``.parquet`` file, a folder saved by ``datasets.save_to_disk``, or a name on
            the hub. Exactly one of ``dataset`` and ``datasets``.
        subset: Configuration of a hub dataset.
        split: Split of ``dataset`` that is trained on.
        datasets: Several datasets, mixed.
        val_split: Another split of the dataset (or of each of them), or another file, as held-out set; it replaces the
            split by hash.
        held_out_percent: Share of the prompts that is held out, 0 to 99; 0 for no held-out set.
        test_split_size: The same as a share, in whole percents (0.05); takes the place of ``held_out_percent``.
        train_size: At most so many training examples, the first of the dataset.
        val_size: At most so many held-out examples, the first of the dataset.
        column_map: Our names of columns to theirs; dotted paths reach into columns, ``*`` into all items of a list.
        max_length: Most tokens of a prompt and a completion together.
        val_batch_size: Examples per evaluation batch over all ranks; ``batch_size`` if not given.
        tokenizer: Folder or hub name; the command line sets it to the policy's.
        streaming: Rows are read while training, never all at once; needs ``trainer.max_steps``, and ``val_size`` unless
            ``val_split`` is set. The order is the stream's, shuffled within ``shuffle_buffer`` rows; without weights
            all sources are drawn equally often. ``train_size`` then only says how long an epoch is.
        shuffle_buffer: Rows of each source that wait to be drawn while streaming; 1 keeps the source's order.
    """

    # Columns that are read.
    known: tuple[str, ...] = ()

    def __init__(
        self,
        *,
        batch_size: int,
        dataset: str | None = None,
        subset: str | None = None,
        split: str = "train",
        datasets: list[Source] | None = None,
        val_split: str | None = None,
        held_out_percent: int = 5,
        test_split_size: float | None = None,
        train_size: int | None = None,
        val_size: int | None = None,
        column_map: dict[str, str] | None = None,
        max_length: int | None = None,
        val_batch_size: int | None = None,
        tokenizer: str | None = None,
        streaming: bool = False,
        shuffle_buffer: int = 1024,
    ):
        super().__init__(batch_size, val_batch_size)
        self.one = dataset is not None
        self.sources = [Source(path=dataset, name=subset, split=split)] if dataset is not None else datasets or []
        self.val_split = val_split
        self.held_out_percent = held_out_percent if test_split_size is None else percent(test_split_size)
        self.train_size, self.val_size, self.max_length = train_size, val_size, max_length
        self.column_map = column_map or {}
        self.tokenizer = tokenizer
        self.streaming, self.shuffle_buffer = streaming, shuffle_buffer
        check_arguments(self, dataset, datasets, type(self).load_examples is not ExampleData.load_examples)
        self._examples: dict[Split, list[Example]] = {}
        self._first_rows: dict[Split, list[int]] = {}  # number of each example's first row
        self._source_of: list[int] = []
        self._counts: dict[Split, Counter[str]] = {"train": Counter(), "val": Counter()}
        self._mixture: Mixture | None = None
        self._mixed: tuple[tuple[int, int], list[int]] | None = None
        self._drawn: tuple[int, Counter[int]] = (0, Counter())
        self._stage: str | None = None
        self._announced = False

    @abstractmethod
    def encode(self, row: Row) -> Iterable[Example | Dropped]:
        """The examples that a row becomes, or why it becomes none.

        Raises:
            ValueError: The row is wrong; names where it stands and the column.
        """

    def content(self, row: Row) -> str:
        """What decides whether a row is held out: its prompt, as text."""
        return asked(row) or str(next((row[name] for name in self.known if has(row, name)), ""))

    def count(self, what: str) -> None:
        """Count something that happened to the row being encoded."""
        self._counting[what] += 1

    def load_examples(self, split: Split) -> list[dict[str, Any]]:
        """The rows of a split, each a dict of columns; override it to bring your own.

        Args:
            split: ``train``; and ``val`` only where ``val_split`` is set, else the held-out set comes out of ``train``.
        """
        return list(read_sources(self.sources, self.one, self.val_split if split == "val" else None))

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that ``tokenizer`` names."""
        return load_tokenizer(self.tokenizer)

    def setup(self, stage: str | None = None) -> None:
        """Read, split and tokenise everything, once; all errors in the data come from here.

        Raises:
            ValueError: Something in the data, or too little of it; names the file and line, or the key.
        """
        self._stage = stage
        if not self._examples:
            self._load()
        self._check_sizes()

    def examples(self, split: Split) -> list[Example]:
        """The examples of ``train`` or ``val`` in source order, after :meth:`setup`; a stream's first 256."""
        return self._examples[split]

    def summary(self) -> dict[str, dict[str, int]]:
        """Per split: rows read, what was left out and why, examples left, their tokens, and the longest of them.

        ``identical`` counts examples that stand more than once (and stay), ``special_tokens`` rows whose text spells a
        special token of the tokenizer.
        """
        return {
            split: {
                **self._counts[split],
                "examples": len(examples),
                "tokens": sum(len(e.prompt) + len(c) for e in examples for c in e.completions),
                "supervised_tokens": sum(sum(m) for e in examples for m in e.masks),
                "longest": max((batches.longest(e) for e in examples), default=0),
            }
            for split, examples in self._examples.items()
        }

    def check_fits(self, context_length: int) -> None:
        """See that every example fits into the model, after :meth:`setup`.

        Raises:
            ValueError: One does not; names the longest.
        """
        self._context = context_length
        lengths = [(batches.longest(e), e.origin) for examples in self._examples.values() for e in examples]
        longest, origin = max(lengths, key=lambda each: each[0], default=(0, ""))
        if longest > context_length:
            over = sum(n > context_length for n, _ in lengths)
            raise ValueError(
                f"data.init_args.max_length: the longest example has {longest} tokens ({origin}), and the model has "
                f"{context_length} positions; {over} of {len(lengths)} examples do not fit. Set max_length: "
                f"{context_length}"
            )

    def draws(self, iteration: int) -> dict[str, int]:
        """How many examples of each source the iterations before ``iteration`` took; empty for a single source."""
        if len(self.sources) < 2:
            return {}
        if self._stream is not None:
            return dict(zip(labels(self.sources), self._stream.state(iteration)["examples"], strict=True))
        done, counts = self._drawn if self._drawn[0] <= iteration else (0, Counter[int]())
        for i in range(done, iteration):
            epoch, number = divmod(i, self.iterations_per_epoch)
            order = self._permutation(epoch)[number * self.batch_size : (number + 1) * self.batch_size]
            counts.update(self._source_of[e] for e in order)
        self._drawn = iteration, counts
        return {name: counts[i] for i, name in enumerate(labels(self.sources))}

    def size(self, split: Split) -> int:
        """Number of examples of a split; of a stream those of an epoch, which without ``train_size`` never ends."""
        if split == "train" and self._stream is not None:
            return self.train_size or ENDLESS
        return len(self._examples[split])

    def collate(self, split: Split, indices: list[int], positions: list[int]) -> ExampleBatch:
        """Examples by index."""
        rows = [line for group, i in enumerate(indices) for line in self.lines(split, i, group)]
        return batches.as_batch(rows, self._per_token)

    def lines(self, split: Split, index: int, group: int) -> list[batches.Line]:
        """An example's rows as number ``group`` of a batch."""
        return batches.lines(self._examples[split][index], group, self._first_rows[split][index])

    def fingerprint(self) -> str:
        """A hash of the training examples and of how sources are mixed."""
        if self._stream is not None:
            return self.stream_hash()
        digest = hashlib.sha256()
        for example in self._examples["train"]:
            digest.update(repr(example[:4]).encode())
        digest.update(repr(([s.weight for s in self.sources], self._source_of if self._mixture else None)).encode())
        return digest.hexdigest()

    def train_dataloader(self) -> DataLoader:
        """Training batches, as :class:`~lit_posttrain.data.base.PostTrainDataModule` orders them."""
        self._announce()
        return super().train_dataloader()

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        """The held-out examples, or nothing where there are none."""
        self._announce()
        return super().val_dataloader()

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Nothing moves: micro-batches do, one at a time."""
        return batch

    # --- reading ----------------------------------------------------------------------------------------------

    def _load(self) -> None:
        self.encoder = Encoder(self.load_tokenizer())
        rows = self.open_stream() if self.streaming else self._rows()
        val = self._encode_all(rows["val"], "val", self.val_size)
        self._held = {batches.key(e) for e, _ in val}
        train = self._encode_all(rows["train"], "train", None if self.streaming else self.train_size)
        train += self.first_examples({source for _, source in train}) if self.streaming else []
        self._examples = {"train": [e for e, _ in train], "val": [e for e, _ in val]}
        self._source_of = [source for _, source in train]
        for split, examples in self._examples.items():
            self._first_rows[split] = list(accumulate((len(e.completions) for e in examples), initial=0))
            self._counts[split]["identical"] = len(examples) - len({batches.key(e) for e in examples})
        self._per_token = batches.columns_of([*self._examples["train"], *self._examples["val"]])
        self._mix()

    def _read(self, split: Split) -> list[Row]:
        name = f"{type(self).__name__}.load_examples({split!r})"
        rows = as_rows(self.load_examples(split), name)
        if not rows:
            raise ValueError(f"{name} returned no rows")
        return list(map(self.prepared, rows))

    def _rows(self) -> dict[Split, list[Row]]:
        rows: dict[Split, list[Row]] = {"train": [], "val": []}
        for row in self._read("train"):
            rows["val" if self.is_held_out(row) else "train"].append(row)
        if self.val_split is not None:
            rows["val"] = self._read("val")
        return rows

    def prepared(self, row: Row) -> Row:
        """The row, its columns named as ours and checked."""
        renamed(row, self.column_map, KEY)
        check_text(row, self.known)
        return row

    def is_held_out(self, row: Row) -> bool:
        """Whether the split by hash keeps a row for evaluation."""
        return self.val_split is None and held_out(self.content(row), self.held_out_percent)

    def _encode_all(self, rows: Sequence[Row], split: Split, limit: int | None) -> list[tuple[Example, int]]:
        kept = []
        for row in batches.progress(rows, f"tokenising {split} data"):
            if limit is not None and len(kept) >= limit:
                break
            kept += [(e, getattr(row, "source", 0)) for e in self.encode_row(row, split)]
        return kept[:limit]

    def encode_row(self, row: Row, split: Split = "train") -> list[Example]:
        """The examples of a row that stay, everything counted."""
        counts = self._counting = self._counts[split]
        counts["rows"] += 1
        counts["special_tokens"] += batches.spells(row, self.known, tuple(self.encoder.specials.values()))
        kept = []
        for example in self.encode(row):
            if isinstance(example, Dropped):
                counts[example.reason] += 1
            elif split == "train" and batches.key(example) in self._held:
                counts["overlap"] += 1
            else:
                kept.append(example)
        return kept

    def _mix(self) -> None:
        weights = [s.weight for s in self.sources if s.weight is not None]
        if not weights or self.streaming:
            return
        members: list[list[int]] = [[] for _ in weights]
        for i, source in enumerate(self._source_of):
            members[source].append(i)
        for i, of_source in enumerate(members):
            if not of_source and self._examples["train"]:
                raise ValueError(
                    f"data.init_args.datasets[{i}]: no training examples of {self.sources[i].path} are left"
                )
        self._mixture = Mixture(members, weights, self.iterations_per_epoch * self.batch_size)

    def _permutation(self, epoch: int) -> list[int]:
        if self._mixture is None:
            return super()._permutation(epoch)
        key = (randomness.run_seed(), epoch)
        if self._mixed is None or self._mixed[0] != key:
            self._mixed = key, self._mixture.order(*key)
        return self._mixed[1]

    # --- checks -----------------------------------------------------------------------------------------------

    def _check_sizes(self) -> None:
        has_val = self.val_size != 0 and (self.val_split is not None or self.held_out_percent > 0)
        if not self._examples["val"] and (has_val or self._stage in ("validate", "test")):
            raise ValueError(
                f"data.init_args.held_out_percent: nothing is held out ({self.summary()}); raise it, set val_split, or "
                "set val_size: 0 to train without evaluation"
            )
        if not self._examples["train"] and self._stage not in ("validate", "test"):
            raise ValueError(f"data.init_args: no training examples are left ({self.summary()})")
        check_stage(self, self._stage)
        if self._stage == "fit":
            self._check_training_size()

    def _announce(self) -> None:
        if not self._announced:
            self._announced = True
            for split, counts in self.summary().items():
                rank_zero_info(f"{split} data: " + ", ".join(f"{k} {n}" for k, n in counts.items()))
