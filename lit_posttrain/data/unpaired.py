"""Completions that are labelled good or bad, each beside one that belongs to another prompt."""

from collections.abc import Iterable
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
    ``row`` -1), that of the example before it in the whole step's batch over all ranks, or the nearest before that with
    another prompt; the first follows on the last. Such a completion is cut where it would be too long.

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
            prompt, completion, mask = self.encoder.pair(
                row["prompt"], row["completion"], row, ("prompt", "completion")
            )
            found = [(completion, mask, flag(row["label"], where(row, "label")))]
        else:
            compared = comparison(row, self.encoder)
            prompt = compared.prompt
            if compared.completions[0] == compared.completions[1]:
                yield Dropped("identical_completions")
                return
            found = list(zip(compared.completions, compared.masks, compared.preference, strict=True))
        for completion, mask, label in found:
            if self.max_length is not None and len(prompt) + len(completion) > self.max_length:
                yield Dropped("long_examples")
            else:
                yield Example(prompt, [completion], [mask], {"label": [label], "role": [0.0]}, row.origin)

    def check_fits(self, context_length: int) -> None:
        """As the base class does; mismatched completions are cut to the model's positions."""
        super().check_fits(context_length)
        self._longest = min(self.max_length or context_length, context_length)

    def collate(self, split: Split, indices: list[int], positions: list[int]) -> ExampleBatch:
        """These examples as a whole batch."""
        return self.share(split, indices, list(range(len(indices))))

    def share(self, split: Split, whole: list[int], positions: list[int]) -> ExampleBatch:
        """A rank's examples, each followed by its prompt with the completion of another example of the batch."""
        rows = []
        for group, position in enumerate(positions):
            (own,) = self.lines(split, whole[position], group)
            other = self._before(split, whole, position)
            room = None if self._longest is None else max(1, self._longest - len(own.prompt))
            columns = {**own.columns, "role": 1.0}
            rows += [
                own,
                own._replace(completion=other.completion[:room], mask=other.mask[:room], columns=columns, row=-1),
            ]
        return batches.as_batch(rows, self._per_token)

    def _before(self, split: Split, whole: list[int], position: int) -> batches.Line:
        """The nearest example before this one with another prompt, around the batch."""
        examples = self._examples[split]
        own = whole[position]
        if len(whole) == 1:  # the last evaluation batch
            whole, position = list(range(own + 1)), own
        order = [whole[(position - k) % len(whole)] for k in range(1, len(whole) + 1)]
        other = next((i for i in order if examples[i].prompt != examples[own].prompt), order[0])
        return self.lines(split, other, 0)[0]
