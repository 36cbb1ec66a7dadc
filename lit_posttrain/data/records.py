"""From rows of any source to verifiable questions: which column is what, what may stand in it, who is held out."""

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Any, Literal, NamedTuple

from transformers import PreTrainedTokenizerBase

from lit_posttrain.data.sources import Row, nearest
from lit_posttrain.data.templates import Messages, Template
from lit_posttrain.types import Prompt

KEY = "data.init_args.column_map"
OnBad = Literal["error", "drop"]
OnLong = Literal["error", "drop", "cut"]


class Record(NamedTuple):
    """A question before it is rendered.

    Attributes:
        number: Its number within the source.
        origin: Where it stands, for messages.
        question: The bare question; of a conversation of several messages, its transcript.
        prompt: The question, or the messages.
        answer: Gold answer as text, or None.
        columns: The whole row.
    """

    number: int
    origin: str
    question: str
    prompt: str | Messages
    answer: str | None
    columns: dict[str, Any]


class Placed(NamedTuple):
    """A prompt and where it came from."""

    prompt: Prompt
    origin: str


class UnusableAnswer(ValueError):
    """A gold answer that nothing could be compared with."""


def as_rows(examples: list[dict[str, Any]], source: str) -> list[Row]:
    """Plain dicts as rows that know their place in ``source``; rows stay as they are."""
    return [e if isinstance(e, Row) else Row(e, f"{source}[{i}]", i) for i, e in enumerate(examples)]


def default_column(rows: list[Row], *names: str) -> str | None:
    """The first of ``names`` that any row has."""
    return next((name for name in names if any(name in row for row in rows)), None)


def record(row: Row, prompt_column: str, answer_column: str | None, answer_after: str = "") -> Record:
    """The question and the answer of a row.

    Args:
        row: The row.
        prompt_column: Name or dotted path of the question or message list.
        answer_column: Name or dotted path of the gold answer; None: the rows have none.
        answer_after: The answer is what follows the last such text in its column; empty: all of it.

    Raises:
        UnusableAnswer: The answer is neither text nor a finite number nor None, or lacks ``answer_after``.
        ValueError: A column is missing, or the prompt is empty or no text.
    """
    value = column(row, prompt_column, "prompt")
    prompt = _question(value, f"{row.origin}: column {prompt_column!r}") if isinstance(value, str) else None
    if prompt is None:
        prompt = _messages(value, f"{row.origin}: column {prompt_column!r}")
    answer = None
    if answer_column is not None:
        answer = _gold(column(row, answer_column, "answer"), f"{row.origin}: column {answer_column!r}")
    if answer_after:
        _, found, answer = (answer or "").rpartition(answer_after)
        answer = answer.strip()
        if not found or not answer:
            raise UnusableAnswer(f"{row.origin}: no answer after {answer_after!r} (data.init_args.answer_after)")
    question = prompt if isinstance(prompt, str) else _transcript(prompt)
    return Record(row.number, row.origin, question, prompt, answer, dict(row))


def column(row: Row, path: str, ours: str, key: str = KEY) -> Any:
    """The value at a column name or dotted path; numbers index lists, and ``*`` stands for every item of one.

    Args:
        row: The row.
        path: Where to look.
        ours: What we call it.
        key: The YAML key of the mapping, for messages.

    Raises:
        ValueError: There is none; names the closest column and all of them.
    """
    if path in row:
        return row[path]
    value: Any = row
    parts = path.split(".")
    for depth, part in enumerate(parts):
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, list) and part == "*":
            inside = [
                Row(v if isinstance(v, dict) else {"": v}, f"{row.origin}, item {i}", i) for i, v in enumerate(value)
            ]
            rest = ".".join(parts[depth + 1 :])
            return [column(v, rest, ours, key) for v in inside] if rest else value
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            names = list(value) if isinstance(value, Mapping) else list(row)
            inside = f" in {'.'.join(parts[:depth])!r}" if depth and isinstance(value, Mapping) else ""
            raise ValueError(
                f"{row.origin}: no column {path!r}{nearest(part, names)}; the columns{inside} are {', '.join(names)}. "
                f"Set {key}.{ours} to the one that holds the {ours}"
            )
    return value


def held_out(question: str, percent: int) -> bool:
    """Whether a question belongs to the held-out set: sha256(question) mod 100 < percent.

    The content decides, so a question can never stand on both sides, whatever generated or duplicated it.
    """
    return int(hashlib.sha256(question.encode()).hexdigest(), 16) % 100 < percent


def without_duplicates(records: Iterable[Record], counts: Counter[str]) -> list[Record]:
    """The first record of every question; counts the others, and those whose answer contradicts the first."""
    first: dict[str, Record] = {}
    for r in records:
        if first.setdefault(r.question, r) is not r:
            counts["duplicates"] += 1
            counts["conflicting_answers"] += first[r.question].answer != r.answer
    return list(first.values())


def without_overlap(train: list[Record], val: list[Record], policy: OnBad, counts: Counter[str]) -> list[Record]:
    """``train`` without the questions of ``val``.

    Raises:
        ValueError: ``policy`` is ``error`` and there are some.
    """
    asked = {r.question for r in val}
    both = [r for r in train if r.question in asked]
    if both and policy == "error":
        raise ValueError(
            f"data.init_args.val_split: {len(both)} questions of the training set also stand in the held-out set, the "
            f"first at {both[0].origin}: {both[0].question[:80]!r}. Set data.init_args.overlap: drop to train without "
            "them"
        )
    counts["overlap"] += len(both)
    return [r for r in train if r.question not in asked]


class Renderer:
    """Records to prompts.

    Args:
        template: How a question is put.
        tokenizer: Of the model that answers.
        max_length: Longest prompt in tokens, or None.
        on_long: What happens to longer ones.
    """

    def __init__(self, template: Template, tokenizer: PreTrainedTokenizerBase, max_length: int | None, on_long: OnLong):
        self.template = template
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.on_long = on_long

    def __call__(self, records: list[Record], limit: int | None, counts: Counter[str]) -> list[Placed]:
        """The first ``limit`` records that are not too long, rendered and tokenised.

        Raises:
            ValueError: A record that the template or tokenizer refuses, or too long a prompt.
        """
        placed: list[Placed] = []
        long: list[tuple[int, str]] = []
        for r in records:
            if len(placed) == limit:
                break
            prompt = self._prompt(r)
            length = len(prompt.token_ids)
            if self.max_length is not None and length > self.max_length:
                shorter = self._cut(r, length - self.max_length) if self.on_long == "cut" else None
                if shorter is None:
                    long.append((length, r.origin))
                    continue
                prompt = shorter
                counts["cut_prompts"] += 1
            counts["special_tokens"] += any(token in r.question for token in self.tokenizer.all_special_tokens)
            placed.append(Placed(prompt, r.origin))
        if long and self.on_long == "error":
            longest, origin = max(long, key=lambda each: each[0])
            raise ValueError(
                f"data.init_args.max_prompt_length: {len(long)} prompts are longer than {self.max_length} tokens, the "
                f"longest with {longest} at {origin}; raise it, or set data.init_args.long_prompts: drop (or cut)"
            )
        counts["long_prompts"] += len(long)
        return placed

    def _cut(self, r: Record, over: int) -> Prompt | None:
        """With as much of the question's beginning as fits; None where nothing of it does."""
        if not isinstance(r.prompt, str):
            raise ValueError(
                f"{r.origin}: the prompt is a conversation of {over} tokens too many, and only a text can be cut; set "
                "data.init_args.long_prompts: drop"
            )
        assert self.max_length is not None
        ids = self.tokenizer.encode(r.prompt, add_special_tokens=False, verbose=False)
        while True:
            ids = ids[: len(ids) - over]
            # A character of several tokens may be torn.
            text = str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)).rstrip("\ufffd")
            if not text.strip():
                return None
            prompt = self._prompt(r._replace(prompt=text))
            over = len(prompt.token_ids) - self.max_length
            if over <= 0:
                return prompt

    def _prompt(self, r: Record) -> Prompt:
        try:
            rendered = self.template.render(r.prompt, self.tokenizer)
            token_ids = self.template.token_ids(rendered, self.tokenizer)
        except ValueError as error:
            raise ValueError(f"{r.origin}: {error}") from error
        if not token_ids:
            raise ValueError(f"{r.origin}: the prompt has no tokens; is it made of characters the tokenizer drops?")
        return Prompt(r.number, r.question, rendered.prompt, token_ids, rendered.prefill, r.answer, r.columns)


def _question(value: str, where: str) -> str:
    if not value.strip():
        raise ValueError(f"{where} is empty; remove the row")
    check_encodable(value, where)
    return value


def _messages(value: Any, where: str) -> Messages:
    if not isinstance(value, list) or not value:
        kind = "null" if value is None else type(value).__name__
        raise ValueError(f"{where} must be text or a list of messages, not {kind if value != [] else 'an empty list'}")
    messages = []
    for i, message in enumerate(value):
        given = {k: v for k, v in message.items() if v is not None} if isinstance(message, Mapping) else {}
        if set(given) != {"role", "content"} or not all(isinstance(v, str) for v in given.values()):
            raise ValueError(f"{where}[{i}] must be a message {{role: text, content: text}}, not {str(message)[:80]}")
        check_encodable(given["content"], where)
        messages.append({"role": given["role"], "content": given["content"]})
    _question(messages[-1]["content"], f"{where}[{len(messages) - 1}].content")
    return messages


def _transcript(messages: Messages) -> str:
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n".join(f"{m['role']}: {m['content']}" for m in messages)


def _gold(value: Any, where: str) -> str | None:
    if isinstance(value, str):
        check_encodable(value, where)
        return value
    if value is None:
        return None
    if isinstance(value, bool):
        raise UnusableAnswer(f"{where} is the truth value {value}; write the text that counts as right ('yes', 'True')")
    if not isinstance(value, int | float | Decimal):
        raise UnusableAnswer(f"{where} must be text or a number, not {type(value).__name__}")
    if not math.isfinite(value):
        raise UnusableAnswer(f"{where} is {value}; write the answer as text")
    return str(value)


def check_encodable(text: str, where: str) -> None:
    """Refuse text with half of a surrogate pair.

    Raises:
        ValueError: There is one.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where} holds a lone surrogate, which is not text; repair or remove the row") from error
