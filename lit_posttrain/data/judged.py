"""Completions with judgements: of every step of a solution, or of the whole."""

from collections.abc import Iterable
from typing import Any

from lit_posttrain.data.columns import as_list, as_text, flag, kind_of, where
from lit_posttrain.data.examples import Dropped, ExampleData
from lit_posttrain.data.messages import EXTRAS, as_messages, extras_of
from lit_posttrain.data.sources import Row
from lit_posttrain.types import Example

_STEPS = ("prompt", "completions", "labels")
_WHOLE = ("prompt", "completion", "label")


class StepwiseSupervision(ExampleData):
    """Solutions in steps, each labelled right or wrong, for process reward models.

    Rows hold ``prompt``, ``completions`` (the steps) and ``labels`` (one a step). The steps are joined by the
    separator, which belongs to the step before it, and the last ends with the end token; only each step's last token
    counts.

    Args:
        batch_size: Solutions per optimizer step over all ranks.
        step_separator: Stands between two steps.
        **kwargs: As of :class:`~lit_posttrain.data.examples.ExampleData`.
    """

    known = (*_STEPS, *EXTRAS)

    def __init__(self, *, step_separator: str = "\n", **kwargs: Any):
        super().__init__(**kwargs)
        if not step_separator:
            raise ValueError("data.init_args.step_separator: must not be empty, or steps would run into one another")
        self.step_separator = step_separator

    def encode(self, row: Row) -> Iterable[Example | Dropped]:
        """The solution as one completion."""
        kind_of(row, {"steps": _STEPS})
        steps = as_list(row["completions"], where(row, "completions"))
        labels = as_list(row["labels"], where(row, "labels"))
        if len(steps) != len(labels):
            raise ValueError(f"{where(row, 'labels')} has {len(labels)} items, but there are {len(steps)} completions")
        prompt = self._prompt(row)
        separator = self.encoder.then(self.step_separator)
        ids: list[int] = []
        mask: list[bool] = []
        values: list[float] = []
        for i, (step, label) in enumerate(zip(steps, labels, strict=True)):
            own = self.encoder.then(as_text(step, f"{where(row, 'completions')}[{i}]"))
            own = self.encoder.ended(own) if i == len(steps) - 1 else own + separator
            ids += own
            mask += [False] * (len(own) - 1) + [True]
            values += [0.0] * (len(own) - 1) + [flag(label, f"{where(row, 'labels')}[{i}]")]
        if self.max_length is not None and len(prompt) + len(ids) > self.max_length:
            return [Dropped("long_examples")]
        return [Example(prompt, [ids], [mask], {"step_labels": [values]}, row.origin)]

    def _prompt(self, row: Row) -> list[int]:
        if isinstance(row["prompt"], str):
            return self.encoder.start(as_text(row["prompt"], where(row, "prompt")))
        return self.encoder.question(as_messages(row["prompt"], where(row, "prompt")), row.origin, extras_of(row))


class PointwiseLabels(ExampleData):
    """Completions that are labelled by themselves, safe or not, for pointwise reward models.

    Rows hold ``prompt``, ``completion`` and ``label`` (true is safe).

    Args:
        batch_size: Completions per optimizer step over all ranks.
        **kwargs: As of :class:`~lit_posttrain.data.examples.ExampleData`.
    """

    known = (*_WHOLE, *EXTRAS)

    def encode(self, row: Row) -> Iterable[Example | Dropped]:
        """The labelled completion."""
        kind_of(row, {"whole": _WHOLE})
        encoded = self.encoder.pair(row["prompt"], row["completion"], row, ("prompt", "completion"))
        prompt, completion, mask, messages = encoded
        label = flag(row["label"], where(row, "label"))
        if self.max_length is not None and len(prompt) + len(completion) > self.max_length:
            return [Dropped("long_examples")]
        return [Example(prompt, [completion], [mask], {"label": [label]}, row.origin, messages)]
