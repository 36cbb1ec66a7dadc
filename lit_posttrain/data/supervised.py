"""Demonstrations: texts, conversations, prompts with completions, or tokens, for supervised fine-tuning."""

from collections.abc import Iterable
from itertools import compress
from typing import Any, Literal

from lit_posttrain.data.columns import as_list, as_text, flag, has, kind_of, number, token_ids, where
from lit_posttrain.data.dialogue import Encoded, Supervise
from lit_posttrain.data.examples import Dropped, ExampleData
from lit_posttrain.data.messages import EXTRAS, as_messages, extras_of
from lit_posttrain.data.sources import Row
from lit_posttrain.types import Example

LongExamples = Literal["drop", "truncate", "split", "error"]
_KINDS = {
    "tokens": ("input_ids",),
    "messages": ("messages",),
    "conversations": ("conversations",),
    "pair": ("prompt", "completion"),
    "text": ("text",),
}
_MASKS = ("completion_mask", "assistant_masks")
_OF_TOKENS = ("labels", "seq_lengths", "attention_mask", *_MASKS)
_IGNORED = -100  # what a label says of a token that is not trained on


class SupervisedExamples(ExampleData):
    """Demonstrations, with a mask that says which tokens are trained on.

    Rows hold ``messages`` (role and content) or ``conversations`` (from and value), with ``tools`` and
    ``chat_template_kwargs`` where the chat template reads them; ``prompt`` and ``completion``, both text or both
    messages; ``text``; or ``input_ids`` with ``labels`` (-100: not trained on), ``attention_mask`` (0: padding,
    left out), and ``seq_lengths`` where several sequences are packed into a row. Of a conversation the end-of-turn
    token is trained on and what the template writes behind it is not.

    Args:
        batch_size: Examples per optimizer step over all ranks.
        supervise: ``assistant``: all of the assistant's messages, or the completion; the chat template must render the
            beginning of a conversation as the beginning of the whole. ``last``: only its last message. ``all``: every
            token but the first.
        long_examples: What to do with examples of more than ``max_length`` tokens; ``truncate`` keeps the beginning, so
            they have no end token; ``split`` makes several of them, for texts of which all tokens are trained on.
        **kwargs: As of :class:`~lit_posttrain.data.examples.ExampleData`.
    """

    known = (*(name for names in _KINDS.values() for name in names), *_OF_TOKENS, *EXTRAS)

    def __init__(self, *, supervise: Supervise = "assistant", long_examples: LongExamples = "drop", **kwargs: Any):
        super().__init__(**kwargs)
        if long_examples == "split" and (supervise != "all" or self.max_length is None):
            raise ValueError("data.init_args.long_examples: split needs supervise: all, and max_length")
        self.supervise: Supervise = supervise
        self.long_examples: LongExamples = long_examples

    def encode(self, row: Row) -> Iterable[Example | Dropped]:
        """The examples of a row: one, or as many as are packed into it."""
        kind = kind_of(row, _KINDS)
        for encoded in self._packed(row) if kind == "tokens" else [self._encoded(row, kind)]:
            for piece in self._pieces(encoded):
                yield self._fit(piece, row)

    def _encoded(self, row: Row, kind: str) -> Encoded:
        if kind == "pair":
            prompt, completion = row["prompt"], row["completion"]
            return self.encoder.pair(prompt, completion, row, ("prompt", "completion"), self.supervise)
        if kind == "text":
            ids = self.encoder.ended(self.encoder.start(as_text(row["text"], where(row, "text"))))
            return Encoded(ids[:1], ids[1:], [True] * (len(ids) - 1))
        messages = as_messages(row[kind], where(row, kind))
        return self.encoder.dialogue(messages, row.origin, supervise=self.supervise, extras=extras_of(row))

    def _packed(self, row: Row) -> Iterable[Encoded]:
        padded = token_ids(row, "input_ids", self.encoder.size)
        real = self._flags(row, "attention_mask", len(padded))
        ids, mask = (list(compress(each, real)) for each in (padded, self._mask(row, padded)))
        lengths = [len(ids)]
        if has(row, "seq_lengths"):
            lengths = [
                int(number(n, where(row, "seq_lengths")))
                for n in as_list(row["seq_lengths"], where(row, "seq_lengths"))
            ]
            if sum(lengths) != len(ids) or min(lengths) < 1:
                raise ValueError(
                    f"{where(row, 'seq_lengths')} adds up to {sum(lengths)}, but there are {len(ids)} input_ids"
                )
        start = 0
        for length in lengths:
            # Nothing predicts a sequence's first token.
            own, counts = ids[start : start + length], [False, *mask[start + 1 : start + length]]
            start += length
            if not any(counts):
                raise ValueError(
                    f"{row.origin}: no token of a sequence would be trained on (labels are all -100, or it has one "
                    "token); remove the row"
                )
            first = counts.index(True)
            yield Encoded(own[:first], own[first:], counts[first:])

    def _mask(self, row: Row, ids: list[int]) -> list[bool]:
        masks = [self._flags(row, name, len(ids)) for name in _MASKS]
        if has(row, "labels"):
            labels = _as_many(row, "labels", len(ids))
            for at, (label, token) in enumerate(zip(labels, ids, strict=True)):
                if label not in (_IGNORED, token):
                    raise ValueError(
                        f"{where(row, 'labels')}[{at}] is {label}, neither -100 nor the token {token}; labels are not "
                        "shifted"
                    )
            masks.append([label != _IGNORED for label in labels])
        return [all(of_token) for of_token in zip(*masks, strict=True)]

    @staticmethod
    def _flags(row: Row, name: str, count: int) -> list[bool]:
        """A column of as many truth values; all true where there is none."""
        if not has(row, name):
            return [True] * count
        return [bool(flag(v, f"{where(row, name)}[{i}]")) for i, v in enumerate(_as_many(row, name, count))]

    def _pieces(self, encoded: Encoded) -> list[Encoded]:
        """A text as sequences of at most ``max_length`` tokens; the first token of each is only read."""
        prompt, completion, *_ = encoded
        size = self.max_length
        if self.long_examples != "split" or size is None or len(prompt) + len(completion) <= size:
            return [encoded]
        ids = prompt + completion
        parts = [ids[i : i + size] for i in range(0, len(ids), size)]
        return [Encoded(part[:1], part[1:], [True] * (len(part) - 1)) for part in parts if len(part) > 1]

    def _fit(self, encoded: Encoded, row: Row) -> Example | Dropped:
        prompt, completion, mask, messages = encoded
        if not any(mask):
            raise ValueError(
                f"{row.origin}: no token would be trained on; is the text made of characters that the tokenizer drops?"
            )
        first = mask.index(True)
        prompt, completion, mask = prompt + completion[:first], completion[first:], mask[first:]
        length = len(prompt) + len(completion)
        if self.max_length is not None and length > self.max_length:
            if self.long_examples == "error":
                raise ValueError(
                    f"data.init_args.max_length: the example at {row.origin} has {length} tokens, more than "
                    f"{self.max_length}; raise it, or set data.init_args.long_examples: drop or truncate"
                )
            room = self.max_length - len(prompt)
            if self.long_examples == "drop" or room < 1:
                return Dropped("long_examples")
            completion, mask = completion[:room], mask[:room]
            self.count("truncated")
        return Example(prompt, [completion], [mask], {}, row.origin, messages)


def _as_many(row: Row, name: str, count: int) -> list[Any]:
    values = as_list(row[name], where(row, name))
    if len(values) != count:
        raise ValueError(f"{where(row, name)} has {len(values)} items, but there are {count} input_ids")
    return values
