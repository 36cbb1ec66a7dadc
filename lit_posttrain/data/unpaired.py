"""Completions that are labelled good or bad, each beside one that belongs to another prompt."""

from collections.abc import Iterable, Sequence
from typing import Any

from lit_posttrain.data import batches
from lit_posttrain.data.base import Split
from lit_posttrain.data.columns import flag, has, kind_of, where
from lit_posttrain.data.examples import Dropped, ExampleData
from lit_posttrain.data.messages import EXTRAS
from lit_posttrain.data.pairs import KINDS, PAIR, comparison, content
from lit_posttrain.data.sources import Row
from lit_posttrain.types import Example, ExampleBatch

_SINGLE = ("prompt", "completion", "label")


class UnpairedPreferences(ExampleData):
    """Completions that are labelled good or bad, for KTO.

    Rows hold ``prompt``, ``completion`` and ``label``; of ``chosen`` and ``rejected`` each becomes an example. Every
    example has two rows in a batch: its own (column ``role`` 0), and its prompt with another completion (``role`` 1,
    ``row`` -1 - n for the completion whose ``row`` is n), that of the example before it in the whole step's batch over
    all ranks, or the nearest before that with another prompt; the first follows on the last. Such a completion is cut
    where it would be too long.

    Args:
        batch_size: Completions per optimizer step over all ranks, at least 2.
        **kwargs: As of :class:`~lit_posttrain.data.examples.ExampleData`.
    """

    known = (*_SINGLE, *PAIR, *EXTRAS)

    def __init__(self, *, batch_size: int, **kwargs: Any):
        super().__init__(batch_size=batch_size, **kwargs)
        self._longest: int | None = self.max_length
        if batch_size < 2:
            raise ValueError("data.init_args.batch_size: must be at least 2, so that completions can change places")

    def content(self, row: Row) -> str:
        """The prompt, also where it is implicit."""
        return super().content(row) if has(row, "prompt") else content(row)

    def encode(self, row: Row) -> Iterable[Example | Dropped]:
        """The labelled completion, or both of a pair."""
        if kind_of(row, {"single": _SINGLE, "pair": KINDS["chosen"]}) == "single":
            prompt, completion, mask, messages = self.encoder.pair(
                row["prompt"], row["completion"], row, ("prompt", "completion")
            )
            found = [(completion, mask, flag(row["label"], where(row, "label")))]
        else:
            compared = comparison(row, self.encoder)
            prompt, messages = compared.prompt, compared.messages
            if compared.completions[0] == compared.completions[1]:
                yield Dropped("identical_completions")
                return
            found = list(zip(compared.completions, compared.masks, compared.preference, strict=True))
        for completion, mask, label in found:
            if self.max_length is not None and len(prompt) + len(completion) > self.max_length:
                yield Dropped("long_examples")
            else:
                yield Example(prompt, [completion], [mask], {"label": [label], "role": [0.0]}, row.origin, messages)

    def check_fits(self, context_length: int) -> None:
        """As the base class does; mismatched completions are cut to the model's positions."""
        super().check_fits(context_length)
        self._longest = min(self.max_length or context_length, context_length)

    def collate(self, split: Split, indices: list[int], positions: list[int]) -> ExampleBatch:
        """These examples as a whole batch."""
        return self.share(split, indices, list(range(len(indices))))

    def share(self, split: Split, whole: list[int], positions: list[int]) -> ExampleBatch:
        """A rank's examples, each followed by its prompt with the completion of another example of the batch."""
        others = self.exchanged(split, whole)
        rows = []
        for group, position in enumerate(positions):
            rows += self.lines(split, whole[position], group)
            rows.append(self.mismatched_line(split, whole[position], others[position], group))
        return batches.as_batch(rows, self._per_token)

    def exchanged(self, split: Split, whole: list[int]) -> list[int]:
        """Of each example of a batch the nearest before it with another prompt, around the batch."""
        examples = self._examples[split]
        # An evaluation batch of one looks further back.
        order, first = (list(range(whole[0] + 1)), whole[0]) if len(whole) == 1 else (whole, 0)
        found = []
        for position, own in enumerate(whole, first):
            before = (order[(position - k) % len(order)] for k in range(1, len(order)))
            others = (i for i in before if examples[i].prompt != examples[own].prompt)
            found.append(next(others, order[position - 1]))
        return found

    def mismatched(self, split: Split, pairs: Sequence[tuple[int, int]], first: int) -> ExampleBatch:
        """Prompts of examples with completions of others, their rows numbered from ``first``."""
        lines = [self.mismatched_line(split, own, other, i) for i, (own, other) in enumerate(pairs)]
        rows = [line._replace(row=first + i) for i, line in enumerate(lines)]
        return batches.as_batch(rows, self._per_token)

    def mismatched_line(self, split: Split, own: int, other: int, group: int = 0) -> batches.Line:
        """An example's prompt with another's completion, cut where it would be too long."""
        (line,), (theirs,) = self.lines(split, own, group), self.lines(split, other, group)
        room = None if self._longest is None else max(1, self._longest - len(line.prompt))
        columns = {**line.columns, "role": 1.0}
        return line._replace(
            completion=theirs.completion[:room], mask=theirs.mask[:room], columns=columns, row=-1 - theirs.row
        )
