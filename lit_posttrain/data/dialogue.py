"""From texts and messages to token ids and loss masks, by rendering prefixes of the chat template."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal, NamedTuple

from transformers import PreTrainedTokenizerBase

from lit_posttrain.data.columns import as_text, where
from lit_posttrain.data.messages import ASSISTANT, Extras, Message, as_messages, extras_of
from lit_posttrain.data.sources import Row
from lit_posttrain.data.templates import leading_specials, rendered

Supervise = Literal["assistant", "last", "all"]

KEY = "data.init_args.supervise"
_ANCHORS = ("\n", "x", ".")


class Encoded(NamedTuple):
    """A completion after its prompt, in tokens.

    Attributes:
        prompt: What stands before the completion.
        completion: The completion, its end token included.
        mask: Which of its tokens the assistant wrote.
        messages: The prompt as a conversation, where it is one.
    """

    prompt: list[int]
    completion: list[int]
    mask: list[bool]
    messages: list[dict[str, str]] | None = None


class Encoder:
    """Tokenises what rows hold exactly as inference does.

    A prompt is tokenised by itself and a completion after it, so no token spans the two.

    Args:
        tokenizer: Of the model.

    Raises:
        ValueError: The tokenizer has no end token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        if tokenizer.eos_token_id is None:
            raise ValueError(
                f"model.init_args.policy.tokenizer: {tokenizer.name_or_path!r} has no eos_token, so the model could "
                "not learn to stop; set one in its tokenizer_config.json"
            )
        self.tokenizer = tokenizer
        self.eos = int(tokenizer.eos_token_id)  # pyright: ignore[reportArgumentType]
        self.size = len(tokenizer)
        added = tokenizer.added_tokens_decoder.items()
        self.specials = {i: str(t) for i, t in added if t.special} | {self.eos: str(tokenizer.eos_token)}
        # Tokenizers of the SentencePiece family put a space in front of any text, also of one that continues another:
        # it is tokenised behind an anchor, the first that does not become one token with its beginning.
        anchors = {text: self._ids(text) for text in _ANCHORS}
        first = anchors[_ANCHORS[0]]
        self._anchors = anchors if self._ids("x") != self._ids(_ANCHORS[0] + "x")[len(first) :] else {}

    def start(self, text: str) -> list[int]:
        """Text that begins a sequence, BOS in front once."""
        ids = self._ids(text)
        return ids if ids[: len(self.leading)] == self.leading else self.leading + ids

    @cached_property
    def leading(self) -> list[int]:
        """What stands in front of a text (BOS); chat templates write their own."""
        return leading_specials(self.tokenizer)

    def then(self, text: str) -> list[int]:
        """Text that continues another."""
        for anchor, own in self._anchors.items():
            ids = self._ids(anchor + text)
            if ids[: len(own)] == own:
                return ids[len(own) :]
        return self._ids(text)

    def ended(self, ids: list[int]) -> list[int]:
        """With the end token, unless it is there."""
        return ids if ids[-1:] == [self.eos] else [*ids, self.eos]

    def ends(self, token: int) -> bool:
        """Whether a completion's last token is an end token."""
        return token in self.specials

    def pair(
        self, prompt: Any, completion: Any, row: Row, names: tuple[str, str], supervise: Supervise = ASSISTANT
    ) -> Encoded:
        """A prompt and a completion, each text or messages.

        Args:
            prompt: Its column.
            completion: Its column; text after a prompt of messages is the assistant's answer.
            row: Where they stand.
            names: The columns, for messages.
            supervise: As in :meth:`dialogue`; of text everything after the prompt, or with ``all`` everything.
        """
        at_prompt, at_completion = (where(row, name) for name in names)
        if isinstance(prompt, list):
            if isinstance(completion, str):
                completion = [{"role": ASSISTANT, "content": as_text(completion, at_completion)}]
            before, after = as_messages(prompt, at_prompt), as_messages(completion, at_completion)
            if after[: len(before)] == before:  # some data sets repeat the prompt
                after = after[len(before) :]
            first = 0 if supervise == "all" else len(before)
            extras = extras_of(row)
            return self.dialogue([*before, *after], row.origin, first=first, supervise=supervise, extras=extras)
        before = as_text(prompt, at_prompt)
        if isinstance(completion, list):
            raise ValueError(f"{at_completion} is a list of messages, but {at_prompt} is text; write both alike")
        ids, start = self.ended(self.then(as_text(completion, at_completion))), self.start(before)
        if not start:
            raise ValueError(f"{at_prompt} has no tokens; is it made of characters that the tokenizer drops?")
        if supervise == "all":
            ids, start = start[1:] + ids, start[:1]
        return Encoded(start, ids, [True] * len(ids))

    def question(self, messages: Sequence[Message], origin: str, extras: Extras) -> list[int]:
        """A conversation that the assistant is to go on with."""
        return self._ids(self._render(messages, extras, origin, generation=True))

    def dialogue(
        self,
        messages: Sequence[Message],
        origin: str,
        *,
        first: int = 0,
        supervise: Supervise = ASSISTANT,
        extras: Extras = Extras(),  # noqa: B008 (immutable)
    ) -> Encoded:
        """A conversation, cut off after the last token that is trained on.

        Args:
            messages: The conversation.
            origin: Where it stands, for messages.
            first: The messages before this number are the prompt. 0: all before the first supervised token is.
            supervise: The assistant's messages, only the last of them, or every message. With ``all`` and without
                ``first`` the prompt is the first token.
            extras: For the template.

        Raises:
            ValueError: The template cannot be told where its messages begin and end, or leaves something out.
        """
        turns = [i for i, m in enumerate(messages) if m["role"] == ASSISTANT and i >= first]
        if supervise == "last":
            turns = turns[-1:]
        if supervise == "all":
            turns = [len(messages) - 1]
        elif not turns:
            raise ValueError(f"{origin}: no message is the assistant's, so nothing would be trained on; remove the row")
        messages = messages[: turns[-1] + 1]
        whole = self._render(messages, extras, origin)
        if supervise == "all":
            self._check_contents(messages, whole, origin)
        pieces: list[tuple[str, bool]] = []
        at = 0
        if first:
            at = self._start(whole, messages, first, extras, origin)
            pieces.append((whole[:at], False))
        for i in turns:
            start = at if first and i == first else self._start(whole, messages, i, extras, origin)
            end = self._turn_end(whole, start, messages, i, extras, origin)
            pieces += [(whole[at:start], supervise == "all"), (whole[start:end], True)]
            at = end
        asked = messages[: first or turns[0]] if supervise != "all" else []
        return self._encode(pieces, bool(first), supervise, origin)._replace(messages=[dict(m) for m in asked] or None)

    def _encode(self, pieces: list[tuple[str, bool]], has_prompt: bool, supervise: Supervise, origin: str) -> Encoded:
        ids: list[int] = []
        mask: list[bool] = []
        prompt = 0
        for number, (text, counts) in enumerate(pieces):
            new = (self.then(text) if ids else self._ids(text)) if text else []
            ids += new
            mask += [counts] * len(new)
            if number == 0 and has_prompt:
                prompt = len(ids)
        if not self.ends(ids[-1]):  # the template ends no message, yet the model has to stop
            ids.append(self.eos)
            mask.append(True)
        if not has_prompt:
            prompt = 1 if supervise == "all" else mask.index(True)
        if not prompt:
            raise ValueError(
                f"{origin}: the conversation begins with the assistant, so there is no prompt that it answers; remove "
                f"that message, or set {KEY}: last or all"
            )
        return Encoded(ids[:prompt], ids[prompt:], mask[prompt:])

    # --- the template -----------------------------------------------------------------------------------------

    def _render(self, messages: Sequence[Message], extras: Extras, origin: str, *, generation: bool = False) -> str:
        if not messages:
            return ""
        if self.tokenizer.chat_template is None:
            raise ValueError(
                f"{origin}: the row holds messages, and the tokenizer {self.tokenizer.name_or_path!r} has no chat "
                "template; use a model tuned for chat (or model.init_args.policy.tokenizer), or rows of plain text"
            )
        try:
            return rendered(
                self.tokenizer, messages, generation=generation, tools=extras.tools, arguments=extras.arguments
            )
        except ValueError as error:
            raise ValueError(f"{origin}: {error}") from error

    def _turn_end(
        self, whole: str, start: int, messages: Sequence[Message], i: int, extras: Extras, origin: str
    ) -> int:
        """Where the end token of message ``i`` ends, which begins at ``start``."""
        content = messages[i]["content"].strip()
        until = self._end(whole, messages, i, extras, origin)
        if content not in whole[start:until]:  # what the assistant begins with the template may write (an open thought)
            start = self._start(whole, messages, i, extras, origin, opened=False)
        turn = whole[start:until]
        self._check_contents(messages[i : i + 1], turn, origin)
        return start + self._end_token(turn, content)

    def _start(
        self, whole: str, messages: Sequence[Message], i: int, extras: Extras, origin: str, *, opened: bool = True
    ) -> int:
        """Where message ``i`` begins: after what the template writes for the assistant, if it is the assistant's."""
        for generation in (True, False) if opened and messages[i]["role"] == ASSISTANT else (False,):
            before = self._render(messages[:i], extras, origin, generation=generation)
            if (length := self._prefix(whole, before)) is not None:
                return length
        raise self._no_prefix(i, origin)

    def _end(self, whole: str, messages: Sequence[Message], i: int, extras: Extras, origin: str) -> int:
        if i == len(messages) - 1:
            return len(whole)
        length = self._prefix(whole, self._render(messages[: i + 1], extras, origin))
        if length is None:
            raise self._no_prefix(i, origin)
        return length

    def _prefix(self, whole: str, beginning: str) -> int | None:
        """Length of the beginning, or None if it is none.

        Some templates put EOS behind the last message, which has an end token of its own; there it does not count.
        """
        ended = beginning.removesuffix(self.specials[self.eos])
        if not any(token and ended.rstrip().endswith(token) for token in self.specials.values()):
            ended = beginning
        return next((len(text) for text in (beginning, ended) if whole.startswith(text)), None)

    def _no_prefix(self, i: int, origin: str) -> ValueError:
        return ValueError(
            f"{origin}: the chat template renders the conversation up to message {i} otherwise than as the beginning "
            "of the whole (it rewrites earlier messages, drops their reasoning, say), so what the model would have "
            f"written there cannot be trained on; set {KEY}: last, or use a template that keeps earlier messages"
        )

    def _end_token(self, turn: str, content: str) -> int:
        """Length of the turn up to and with its end token; all of it where there is none."""
        at = turn.find(content) + len(content)
        tail = turn[at:]
        if self.specials[self.eos] in tail:
            return at + tail.index(self.specials[self.eos]) + len(self.specials[self.eos])
        ends = [tail.rindex(token) + len(token) for token in self.specials.values() if token and token in tail]
        return at + max(ends) if ends else len(turn)

    @staticmethod
    def _check_contents(messages: Sequence[Message], rendered: str, origin: str) -> None:
        for message in messages:
            if message["role"] == ASSISTANT and message["content"].strip() not in rendered:
                raise ValueError(
                    f"{origin}: the chat template leaves out part of the assistant's message "
                    f"{message['content'].strip()[:80]!r} (its reasoning, say), so it would not be trained on; use a "
                    f"template that keeps it (model.init_args.policy.tokenizer), or set {KEY}: last if it is not the "
                    "last message"
                )

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False, verbose=False)
