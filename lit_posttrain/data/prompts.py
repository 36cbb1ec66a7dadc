"""Verifiable prompts: questions with gold answers, from files, the hub or generated tasks."""

import hashlib
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lit_posttrain.data.base import PostTrainDataModule, Split
from lit_posttrain.data.records import (
    OnBad,
    OnLong,
    Placed,
    Record,
    Renderer,
    UnusableAnswer,
    as_rows,
    default_column,
    held_out,
    record,
    without_duplicates,
    without_overlap,
)
from lit_posttrain.data.sources import is_data_file, nearest, read_rows
from lit_posttrain.data.tasks import Task, distinct_examples
from lit_posttrain.data.templates import Template
from lit_posttrain.model_files import model_folder
from lit_posttrain.types import Prompt, PromptBatch


class VerifiablePrompts(PostTrainDataModule):
    """Questions whose answers can be checked, for reinforcement learning from verifiable rewards.

    Every question appears once, and training and held-out sets share none: without ``val_split`` a question is held
    out iff sha256(question) mod 100 < ``held_out_percent``. What is dropped is counted and printed.
    To bring your own source, subclass and override :meth:`load_examples`.

    Args:
        template: How a question becomes a prompt.
        batch_size: Prompts per iteration over all ranks (each is answered ``group_size`` times).
        dataset: A ``.jsonl``, ``.csv`` or ``.parquet`` file, a folder saved by ``datasets.save_to_disk``, or a name on
            the hub. Exactly one of ``dataset`` and ``task``.
        subset: Configuration of a hub dataset.
        split: Split of ``dataset`` that is trained on.
        val_split: Another split of ``dataset``, or another file, as held-out set; it replaces the split by hash.
        task: A generator of questions.
        train_size: At most so many training prompts, the first of the source; required with ``task``.
        val_size: At most so many held-out prompts, the first of the source; required with ``task``.
        held_out_percent: Share of the questions that is held out, 0 to 99; 0 for no held-out set.
        column_map: Which columns hold ``prompt`` (by default ``prompt``, else ``question``) and ``answer`` (by default
            ``answer``, where there is one); dotted paths reach into columns: ``{answer: reward_model.ground_truth}``.
        answer_after: The gold answer is only what follows the last such text in the answer column: ``"####"`` for
            GSM8K.
        val_batch_size: Prompts per evaluation batch over all ranks; ``batch_size`` if not given.
        max_prompt_length: Longest prompt in tokens.
        long_prompts: What to do with longer ones; ``cut`` keeps as much of a question's beginning as fits.
        bad_answers: What to do with gold answers that the rewards cannot use.
        overlap: What to do with training questions that also stand in ``val_split``.
        tokenizer: Folder or hub name; the command line sets it to the policy's.
    """

    def __init__(
        self,
        *,
        template: Template,
        batch_size: int,
        dataset: str | None = None,
        subset: str | None = None,
        split: str = "train",
        val_split: str | None = None,
        task: Task | None = None,
        train_size: int | None = None,
        val_size: int | None = None,
        held_out_percent: int = 10,
        column_map: dict[str, str] | None = None,
        answer_after: str = "",  # not None: the parser reads "####" for such a type as an empty YAML document
        val_batch_size: int | None = None,
        max_prompt_length: int | None = None,
        long_prompts: OnLong = "error",
        bad_answers: OnBad = "error",
        overlap: OnBad = "error",
        tokenizer: str | None = None,
    ):
        super().__init__(batch_size, val_batch_size)
        self.template = template
        self.dataset, self.subset, self.split, self.val_split = dataset, subset, split, val_split
        self.task = task
        self.train_size, self.val_size, self.held_out_percent = train_size, val_size, held_out_percent
        self.column_map = column_map or {}
        self.answer_after = answer_after
        self.max_prompt_length = max_prompt_length
        self.long_prompts: OnLong = long_prompts
        self.bad_answers: OnBad = bad_answers
        self.overlap: OnBad = overlap
        self.tokenizer = tokenizer
        self._check_arguments()
        self._placed: dict[Split, list[Placed]] = {}
        self._counts: dict[Split, Counter[str]] = {"train": Counter(), "val": Counter()}
        self._stage: str | None = None
        self._announced = False

    def load_examples(self, split: Split) -> list[dict[str, Any]]:
        """The rows of a split, each a dict of columns; override it to bring your own.

        Args:
            split: ``train``; and ``val`` only where ``val_split`` is set, else the held-out set comes out of ``train``.
        """
        if self.task is not None:
            assert self.train_size is not None
            assert self.val_size is not None
            return list(distinct_examples(self.task, self.train_size, self.val_size, self.held_out_percent))
        assert self.dataset is not None
        if split == "train":
            return list(read_rows(self.dataset, self.subset, self.split))
        assert self.val_split is not None
        if "/" in self.val_split or is_data_file(self.val_split):
            return list(read_rows(self.val_split, key="val_split"))
        return list(read_rows(self.dataset, self.subset, self.val_split, key="val_split"))

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that ``tokenizer`` names."""
        if self.tokenizer is None:
            raise ValueError("data.init_args.tokenizer: not set; the command line sets it to the policy's tokenizer")
        key = "model.init_args.policy.model (or its tokenizer)"
        folder = model_folder(self.tokenizer, key, weights=False)
        try:
            return AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"{key}: there is no readable tokenizer in {folder}: {error}") from error

    def setup(self, stage: str | None = None) -> None:
        """Read, split, render and tokenise everything, once; all errors in the data come from here.

        Raises:
            ValueError: Something in the data, or too little of it; names the file and line, or the key.
        """
        if not self._placed:
            self._placed = self._load()
        self._stage = stage
        self._check_sizes()

    def prompts(self, split: Split) -> list[Prompt]:
        """The prompts of ``train`` or ``val`` in source order, after :meth:`setup`."""
        return [placed.prompt for placed in self._placed[split]]

    def summary(self) -> dict[str, dict[str, int]]:
        """Per split: rows read, what was left out and why, prompts left, and the longest of them in tokens.

        Where the held-out set comes out of the training rows, what happened to rows is counted under ``train``.
        ``special_tokens`` counts prompts whose question spells a special token of the tokenizer.
        """
        return {
            split: {
                **self._counts[split],
                "prompts": len(placed),
                "longest_prompt": max((len(p.prompt.token_ids) for p in placed), default=0),
            }
            for split, placed in self._placed.items()
        }

    def check_answers(self, check: Callable[[str | None], None]) -> None:
        """Hold every gold answer against the rewards, after :meth:`setup`.

        Args:
            check: Raises ValueError for an answer that cannot be used.

        Raises:
            ValueError: There are such answers, and ``bad_answers`` is ``error`` or too little is left.
        """
        reasons = {split: [_reason(check, p) for p in placed] for split, placed in self._placed.items()}
        found = [reason for of_split in reasons.values() for reason in of_split if reason]
        if found and self.bad_answers == "error":
            raise ValueError(
                f"data.init_args.bad_answers: {len(found)} of {sum(map(len, reasons.values()))} gold answers cannot be "
                f"checked, the first at {found[0]}. "
                f"Correct them, set data.init_args.column_map.answer (now {self.column_map.get('answer', 'answer')!r}) "
                "to the column that holds them, or set bad_answers: drop"
            )
        for split, placed in self._placed.items():
            self._placed[split] = [p for p, reason in zip(placed, reasons[split], strict=True) if not reason]
            self._counts[split]["bad_answers"] += len(placed) - len(self._placed[split])
        self._check_sizes()

    def check_fits(self, context_length: int, max_new_tokens: int) -> None:
        """See that every prompt and its completion fit into the model, after :meth:`setup`.

        Args:
            context_length: Positions of the model.
            max_new_tokens: Tokens sampled at most.

        Raises:
            ValueError: They do not; names the longest prompt.
        """
        room = context_length - max_new_tokens
        lengths = [(len(p.prompt.token_ids), p.origin) for placed in self._placed.values() for p in placed]
        longest, origin = max(lengths, key=lambda each: each[0])
        if longest > room:
            raise ValueError(
                f"model.init_args.sampling.max_new_tokens: {max_new_tokens} new tokens after the longest prompt "
                f"({longest} tokens, {origin}) need {longest + max_new_tokens} positions, and the model has "
                f"{context_length}; {sum(n > room for n, _ in lengths)} of {len(lengths)} prompts do not fit. Lower "
                f"max_new_tokens, or set data.init_args.max_prompt_length: {max(room, 1)} and long_prompts: drop"
            )

    def size(self, split: Split) -> int:
        """Number of prompts of a split."""
        return len(self._placed[split])

    def collate(self, split: Split, indices: list[int], positions: list[int]) -> PromptBatch:
        """Prompts by index."""
        return PromptBatch([self._placed[split][i].prompt for i in indices], positions)

    def fingerprint(self) -> str:
        """A hash of the training prompts and their answers."""
        digest = hashlib.sha256()
        for prompt in self.prompts("train"):
            digest.update(repr((prompt.id, prompt.token_ids, prompt.answer)).encode())
        return digest.hexdigest()

    def train_dataloader(self) -> DataLoader:
        """Training batches, as :class:`~lit_posttrain.data.base.PostTrainDataModule` orders them."""
        self._announce()
        return super().train_dataloader()

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        """The held-out prompts, or nothing where there are none."""
        self._announce()
        return super().val_dataloader()

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Nothing to move: prompts hold no tensors, and visiting every token id to find out would be slow."""
        return batch

    def _load(self) -> dict[Split, list[Placed]]:
        tokenizer = self.load_tokenizer()
        records: dict[Split, list[Record]] = {"train": self._records("train"), "val": []}
        if self.val_split is None:
            for r in records["train"]:
                if held_out(r.question, self.held_out_percent):
                    records["val"].append(r)
            records["train"] = [r for r in records["train"] if not held_out(r.question, self.held_out_percent)]
        else:
            records["val"] = self._records("val")
            records["train"] = without_overlap(records["train"], records["val"], self.overlap, self._counts["train"])
        assert not {r.question for r in records["train"]} & {r.question for r in records["val"]}
        render = Renderer(self.template, tokenizer, self.max_prompt_length, self.long_prompts)
        return {
            "train": render(records["train"], self.train_size, self._counts["train"]),
            "val": render(records["val"], self.val_size, self._counts["val"]),
        }

    def _records(self, split: Split) -> list[Record]:
        counts = self._counts[split]
        rows = as_rows(self.load_examples(split), f"{type(self).__name__}.load_examples({split!r})")
        if not rows:
            raise ValueError(f"{type(self).__name__}.load_examples({split!r}) returned no rows")
        counts["rows"] += len(rows)
        prompt_column = self.column_map.get("prompt") or default_column(rows, "prompt", "question") or "prompt"
        answer_column = self.column_map.get("answer") or default_column(rows, "answer")
        records = []
        for row in rows:
            try:
                records.append(record(row, prompt_column, answer_column, self.answer_after))
            except UnusableAnswer as error:
                if self.bad_answers == "error":
                    raise ValueError(f"{error}; or set data.init_args.bad_answers: drop") from error
                counts["bad_answers"] += 1
        return without_duplicates(records, counts)

    def _check_arguments(self) -> None:
        own = type(self).load_examples is not VerifiablePrompts.load_examples
        if not own and (self.dataset is None) == (self.task is None):
            raise ValueError("data.init_args.dataset, data.init_args.task: set exactly one of them")
        for name in self.column_map:
            if name not in ("prompt", "answer"):
                raise ValueError(
                    f"data.init_args.column_map.{name}: the columns to map are prompt and answer"
                    f"{nearest(name, ('prompt', 'answer'))}; all others are handed to the rewards as they are"
                )
        for name, least in (("train_size", 1), ("val_size", 0), ("max_prompt_length", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"data.init_args.{name}: must be at least {least}, got {value}")
        if not 0 <= self.held_out_percent <= 99:
            raise ValueError(f"data.init_args.held_out_percent: must be 0 to 99, got {self.held_out_percent}")
        if self.task is None:
            return
        if self.train_size is None or self.val_size is None:
            raise ValueError("data.init_args: a task has no end of its own; set train_size and val_size")
        if self.val_split is not None:
            raise ValueError(
                "data.init_args.val_split: a task has no splits; held_out_percent sets its questions apart"
            )
        if self.val_size and not self.held_out_percent:
            raise ValueError("data.init_args.val_size: held_out_percent is 0, so there is nothing to take it from")

    def _check_sizes(self) -> None:
        has_val = self.val_size != 0 and (self.val_split is not None or self.held_out_percent > 0)
        if not self._placed["val"] and (has_val or self._stage in ("validate", "test")):
            raise ValueError(
                f"data.init_args.held_out_percent: no question is held out (rows: {self.summary()}); raise it, set "
                "val_split, or set val_size: 0 to train without evaluation"
            )
        if not self._placed["train"] and self._stage not in ("validate", "test"):
            raise ValueError(f"data.init_args: no training prompts are left (rows: {self.summary()})")
        if self._stage == "fit":
            self._check_training_size()

    def _announce(self) -> None:
        if not self._announced:
            self._announced = True
            for split, counts in self.summary().items():
                rank_zero_info(f"{split} data: " + ", ".join(f"{k} {n}" for k, n in counts.items()))


def _reason(check: Callable[[str | None], None], placed: Placed) -> str | None:
    try:
        check(placed.prompt.answer)
    except ValueError as error:
        return f"{placed.origin}: {error}"
    return None
