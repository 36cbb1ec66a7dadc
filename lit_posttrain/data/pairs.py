"""Comparisons as rows hold them: explicit or implicit prompts, pairs or rankings, texts or messages or tokens."""

from collections.abc import Sequence
from itertools import pairwise, takewhile
from typing import Any, NamedTuple

import torch

from lit_posttrain.data.columns import as_list, as_text, has, kind_of, number, token_ids, where
from lit_posttrain.data.dialogue import Encoded, Encoder
from lit_posttrain.data.messages import as_messages, asked, extras_of, transcript
from lit_posttrain.data.sources import Row

KINDS = {
    "chosen_ids": ("chosen_ids", "rejected_ids"),
    "chosen_input_ids": ("chosen_input_ids", "rejected_input_ids"),
    "scores": ("prompt", "completions", "scores"),
    "ranks": ("prompt", "completions", "ranks"),
    "chosen": ("chosen", "rejected"),
}
PAIR = ("chosen", "rejected")
PROMPT_IDS = ("prompt_ids", "prompt_input_ids")


class Comparison(NamedTuple):
    """A prompt, its completions, and how good each is.

    Attributes:
        prompt: Tokens that all completions are conditioned on.
        completions: Tokens of each completion.
        masks: Which of them count.
        preference: Of each completion, higher is better.
        messages: The prompt as a conversation, where it is one.
    """

    prompt: list[int]
    completions: list[list[int]]
    masks: list[list[bool]]
    preference: list[float]
    messages: list[dict[str, str]] | None = None


def comparison(row: Row, encoder: Encoder) -> Comparison:
    """What a row compares.

    Raises:
        ValueError: The row is wrong; names the column.
    """
    kind = kind_of(row, KINDS)
    if kind in ("scores", "ranks"):
        preference = _preference(row, kind)
        prompt = row["prompt"]
        if isinstance(prompt, str) and any(isinstance(c, list) for c in row["completions"]):
            prompt = [{"role": "user", "content": as_text(prompt, where(row, "prompt"))}]
        encoded = [
            encoder.pair(prompt, completion, row, ("prompt", f"completions[{i}]"))
            for i, completion in enumerate(row["completions"])
        ]
    else:
        preference = [1.0, 0.0]
        encoded = _pair(row, encoder) if kind == "chosen" else _tokenised(row, encoder, *KINDS[kind])
    return Comparison(*_of_one_prompt(encoded), preference, encoded[0].messages)


def content(row: Row) -> str:
    """The prompt as text, also where it is implicit; of tokenised rows the prompt's ids."""
    if has(row, "prompt"):
        return asked(row)
    for name in PROMPT_IDS:
        if has(row, name):
            return str(row[name])
    kind = kind_of(row, KINDS)
    chosen, rejected = (row[name] for name in KINDS[kind])
    if isinstance(chosen, str) and isinstance(rejected, str):
        return chosen[: _shared_text(chosen, rejected)]
    if kind != "chosen":
        chosen, rejected = (as_list(row[name], where(row, name)) for name in KINDS[kind])
        return str(chosen[: _shared(chosen, rejected)])
    conversations = [as_messages(row[name], where(row, name)) for name in PAIR]
    return transcript(conversations[0][: _shared(*conversations)])


def _preference(row: Row, kind: str) -> list[float]:
    completions = as_list(row["completions"], where(row, "completions"))
    values = as_list(row[kind], where(row, kind))
    if len(values) != len(completions):
        raise ValueError(f"{where(row, kind)} has {len(values)} items, but there are {len(completions)} completions")
    numbers = [number(v, f"{where(row, kind)}[{i}]") for i, v in enumerate(values)]
    if kind == "scores":
        return _kept_apart(numbers)
    for i, rank in enumerate(numbers):
        if rank < 1 or rank != int(rank):
            raise ValueError(f"{where(row, kind)}[{i}] must be 1 (the best), 2, ..., not {values[i]!r}")
    return [-rank for rank in numbers]


def _kept_apart(scores: list[float]) -> list[float]:
    """The scores; or their order alone where single precision, in which batches hold them, would make some equal."""
    levels = sorted(set(scores))
    rounded = set(torch.tensor(scores, dtype=torch.float64).float().tolist())
    return scores if len(rounded) == len(levels) else [float(levels.index(score)) for score in scores]


def _pair(row: Row, encoder: Encoder) -> list[Encoded]:
    sides = [row[name] for name in PAIR]
    kinds = {type(side) for side in sides}
    if kinds not in ({str}, {list}):
        raise ValueError(f"{row.origin}: columns 'chosen' and 'rejected' must both be text or both lists of messages")
    prompt = row.get("prompt")
    if prompt is not None and not isinstance(prompt, str | list):
        raise ValueError(
            f"{where(row, 'prompt')} must be text or a list of messages, not {type(prompt).__name__}; leave the column "
            "out where 'chosen' and 'rejected' hold the prompt"
        )
    if isinstance(prompt, list) or (isinstance(prompt, str) and kinds == {str}):
        return [encoder.pair(prompt, side, row, ("prompt", name)) for name, side in zip(PAIR, sides, strict=True)]
    if kinds == {str}:
        texts = [as_text(side, where(row, name)) for name, side in zip(PAIR, sides, strict=True)]
        at = _shared_text(*texts)
        if not texts[0][:at].strip():
            if texts[0] == texts[1]:
                return _same(texts[0], encoder)
            raise ValueError(
                f"{row.origin}: 'chosen' and 'rejected' share no beginning to be the prompt; add a column prompt"
            )
        return [
            encoder.pair(t[:at], t[at:], row, ("the shared beginning", n)) for n, t in zip(PAIR, texts, strict=True)
        ]
    conversations = [as_messages(side, where(row, name)) for name, side in zip(PAIR, sides, strict=True)]
    shared = _shared(*conversations) - (conversations[0] == conversations[1])
    if isinstance(prompt, str) and not any(m["content"].strip() == prompt.strip() for m in conversations[0][:shared]):
        if shared:
            raise ValueError(f"{where(row, 'prompt')} is none of the messages that 'chosen' and 'rejected' begin with")
        conversations = [
            [{"role": "user", "content": as_text(prompt, where(row, "prompt"))}, *c] for c in conversations
        ]
        shared = 1
    if not shared and conversations[0] == conversations[1]:
        return _same(transcript(conversations[0]), encoder)
    if all(message["role"] == "system" for message in conversations[0][:shared]):
        raise ValueError(
            f"{row.origin}: 'chosen' and 'rejected' share no message to be the prompt (a system message asks nothing); "
            "add a column prompt"
        )
    for name, messages in zip(PAIR, conversations, strict=True):
        if len(messages) == shared:
            raise ValueError(f"{where(row, name)} has no message of its own, only what both share; remove the row")
    return [encoder.dialogue(c, row.origin, first=shared, extras=extras_of(row)) for c in conversations]


def tied(completions: Sequence[Sequence[int]], preference: Sequence[float]) -> list[float]:
    """Preferences in which completions of the same tokens tie, midway between theirs: nothing can tell them apart."""
    of_tokens: dict[tuple[int, ...], list[float]] = {}
    for ids, value in zip(completions, preference, strict=True):
        of_tokens.setdefault(tuple(ids), []).append(value)
    groups = [of_tokens[tuple(ids)] for ids in completions]
    return [min(group) / 2 + max(group) / 2 for group in groups]


def _same(text: str, encoder: Encoder) -> list[Encoded]:
    """Both sides alike and nothing of them the prompt, to be counted and left out."""
    ids = encoder.start(text)
    return [Encoded([], ids, [True] * len(ids))] * 2


def _tokenised(row: Row, encoder: Encoder, *names: str) -> list[Encoded]:
    sides = [token_ids(row, name, encoder.size) for name in names]
    for name in PROMPT_IDS:
        if has(row, name):
            prompt = token_ids(row, name, encoder.size)
            return [Encoded(prompt, ids, [True] * len(ids)) for ids in sides]
    shared = min(_shared(*sides), *(len(ids) - 1 for ids in sides))
    if not shared:
        raise ValueError(f"{row.origin}: columns {names[0]!r} and {names[1]!r} share no first token to be the prompt")
    return [Encoded(ids[:shared], ids[shared:], [True] * (len(ids) - shared)) for ids in sides]


def _of_one_prompt(encoded: Sequence[Encoded]) -> tuple[list[int], list[list[int]], list[list[bool]]]:
    # A template may write the beginning of an answer for one completion and not for another.
    shared = min(_shared(a.prompt, b.prompt) for a, b in pairwise([*encoded, encoded[0]]))
    prompt = encoded[0].prompt[:shared]
    completions = [e.prompt[shared:] + e.completion for e in encoded]
    masks = [[False] * (len(e.prompt) - shared) + e.mask for e in encoded]
    return prompt, completions, masks


def _shared(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Length of the common beginning."""
    return sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(a, b, strict=False)))


def _shared_text(a: str, b: str) -> int:
    """Length of the common beginning up to a word's end, so that no word is torn; something is left of both.

    A space belongs to the word after it, as tokenizers have it; a line break ends the prompt.
    """
    at = min(_shared(a, b), len(a.rstrip()) - 1, len(b.rstrip()) - 1)
    while at > 0 and not a[at - 1].isspace():
        at -= 1
    return at - 1 if at and a[at - 1] == " " else at
