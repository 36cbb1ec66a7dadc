"""How a question becomes the text the model continues, and that text its token ids: once, with one BOS."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lit_posttrain.model_files import model_folder

Messages = list[dict[str, str]]

KEY = "data.init_args.template"
# A chat template is a program of the model's: whatever it trips over is about the messages it was given.
_ERRORS = (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError)
SLOT = "{question}"
SEPARATOR = "\n\n"

R1_ZERO = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The assistant "
    "first thinks about the reasoning process in the mind and then provides the user with the answer. The reasoning "
    "process and answer are enclosed within <think>...</think> and <answer>...</answer> tags, respectively, i.e., "
    "<think> reasoning process here </think> <answer> answer here </answer>. User: {prompt}. Assistant:"
)
"""Table 1 of DeepSeek-R1 (arXiv 2501.12948); ``{prompt}`` is where the question goes."""


@dataclass(frozen=True)
class Example:
    """A solved question shown to the model before the one it is asked.

    Args:
        question: As it would stand in the dataset.
        completion: The whole answer, the template's ``prefill`` included.
    """

    question: str
    completion: str


class Rendered(NamedTuple):
    """A question in its template.

    Attributes:
        prompt: What reward functions receive: the text without the prefill, or the message list of a chat.
        text: What is tokenised: everything the model is conditioned on.
        prefill: What the template already wrote of the answer, for rewards to see in front of the completion.
    """

    prompt: str | Messages
    text: str
    prefill: str


@dataclass(frozen=True, kw_only=True)
class Template:
    """How questions are put to the model.

    Questions are inserted literally: braces in them mean nothing. Text in them that spells one of the tokenizer's
    special tokens (``<|im_end|>``, ``<s>``) becomes that token, as it does everywhere in transformers; the summary of
    the data counts such prompts.

    Args:
        kind: ``plain``: the instruction alone. ``few_shot``: the examples and then the question, each through the
            instruction, a blank line between them, each completion directly after its question (so the instruction or
            the completion brings the space or line break between the two). ``chat``: the tokenizer's chat template,
            examples as earlier turns. ``r1_zero``: the template of DeepSeek-R1-Zero, Table 1 of arXiv 2501.12948.
        system: System message of a chat; without one some tokenizers insert a default of their own.
        instruction: Text with ``{question}`` where the question goes. In a chat prompt that is already a list of
            messages it wraps the last user message.
        examples: Solved questions for ``few_shot`` and ``chat``.
        prefill: Beginning of the answer, written for the model (``<think>``, say). It is tokenised together with the
            prompt, and reward functions see it in front of the completion. Where a chat template itself opens a
            ``<think>``, that counts as prefill too.
    """

    kind: Literal["plain", "few_shot", "chat", "r1_zero"]
    system: str | None = None
    instruction: str = SLOT
    examples: tuple[Example, ...] = ()
    prefill: str = ""

    def __post_init__(self) -> None:
        if SLOT not in self.instruction:
            raise ValueError(f"{KEY}.instruction: must contain {SLOT}, or every prompt would be the same text")
        if self.system is not None and self.kind != "chat":
            raise ValueError(f"{KEY}.system: only kind chat has a system message; put the text into {KEY}.instruction")
        if self.kind == "few_shot" and not self.examples:
            raise ValueError(f"{KEY}.examples: few_shot needs at least one; or set {KEY}.kind: plain")
        if self.examples and self.kind not in ("few_shot", "chat"):
            raise ValueError(f"{KEY}.examples: kind {self.kind} shows none; set {KEY}.kind: few_shot or chat")

    def render(self, question: str | Messages, tokenizer: PreTrainedTokenizerBase) -> Rendered:
        """Put a question into the template.

        Args:
            question: The question, or for ``chat`` also the messages so far, the last of them the user's.
            tokenizer: Whose chat template ``chat`` uses; the other kinds do not look at it.

        Raises:
            ValueError: Messages for a kind that is not ``chat``, a second system message, or a tokenizer without a
                chat template or whose template refuses these messages.
        """
        if self.kind == "chat":
            return self._render_chat(question, tokenizer)
        if not isinstance(question, str):
            raise ValueError(f"the prompt is a list of messages: set {KEY}.kind: chat, not {self.kind}")
        text = self._fill(question)
        if self.kind == "few_shot":
            shown = [self._fill(e.question) + e.completion for e in self.examples]
            text = SEPARATOR.join([*shown, text])
        elif self.kind == "r1_zero":
            text = R1_ZERO.replace("{prompt}", text)
        return Rendered(text, text + self.prefill, self.prefill)

    def token_ids(self, rendered: Rendered, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Tokenise a rendered prompt.

        A chat template writes its special tokens itself, so none are added to its text. Plain text gets what the
        tokenizer puts in front by default (BOS), unless it already begins with it, and never what the tokenizer puts
        behind (EOS): the model is to go on from here.

        Returns:
            Ids of the text, prefill included: the two are one text, since tokens may span their boundary.
        """
        bare = tokenizer.encode(rendered.text, add_special_tokens=False, verbose=False)
        if self.kind == "chat":
            return bare
        added = leading_specials(tokenizer)
        return bare if bare[: len(added)] == added else added + bare

    def _fill(self, question: str) -> str:
        # Never str.format: a question may hold braces (LaTeX, code, JSON).
        return self.instruction.replace(SLOT, question)

    def _render_chat(self, question: str | Messages, tokenizer: PreTrainedTokenizerBase) -> Rendered:
        if tokenizer.chat_template is None:
            raise ValueError(
                f"{KEY}.kind: chat needs a chat template, and the tokenizer {tokenizer.name_or_path!r} has none; set "
                "kind: plain, few_shot or r1_zero, or use a model tuned for chat"
            )
        messages = self._conversation(question)
        closed, text = (rendered(tokenizer, messages, generation=opened) for opened in (False, True))
        prefill = _opened_thought(text[len(closed) :] if text.startswith(closed) else "") + self.prefill
        return Rendered(messages, text + self.prefill, prefill)

    def _conversation(self, question: str | Messages) -> Messages:
        turns = [{"role": "user", "content": question}] if isinstance(question, str) else question
        opening, turns = (turns[:1], turns[1:]) if turns[0]["role"] == "system" else ([], turns)
        if not turns or turns[-1]["role"] != "user":
            raise ValueError("the last message of a prompt must be the user's: that is what the model answers")
        if self.system is not None:
            if opening:
                raise ValueError(f"the prompt has a system message of its own; remove {KEY}.system")
            opening = [{"role": "system", "content": self.system}]
        shown = [
            {"role": role, "content": content}
            for e in self.examples
            for role, content in (("user", self._fill(e.question)), ("assistant", e.completion))
        ]
        asked = {**turns[-1], "content": self._fill(turns[-1]["content"])}
        return [*opening, *shown, *turns[:-1], asked]


def load_tokenizer(name: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub name.

    Raises:
        ValueError: No name, or nothing readable there.
    """
    if name is None:
        raise ValueError("data.init_args.tokenizer: not set; the command line sets it to the policy's tokenizer")
    key = "model.init_args.policy.model (or its tokenizer)"
    folder = model_folder(name, key, weights=False)
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{key}: there is no readable tokenizer in {folder}: {error}") from error


def rendered(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[dict[str, Any]],
    *,
    generation: bool,
    tools: list[Any] | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> str:
    """A conversation as the tokenizer's chat template writes it.

    Args:
        tokenizer: Has one.
        messages: Role, content, and what else the template reads.
        generation: Whether the assistant's next message is begun.
        tools: Descriptions of tools, for templates that show them.
        arguments: Of the template itself.

    Raises:
        ValueError: The template refuses the messages, or trips over them.
    """
    try:
        text = tokenizer.apply_chat_template(
            list(messages), tools, tokenize=False, add_generation_prompt=generation, **(arguments or {})
        )
    except _ERRORS as error:
        roles = ", ".join(m["role"] for m in messages)
        raise ValueError(f"the tokenizer's chat template refuses these messages ({roles}): {error}") from error
    return str(text)


def leading_specials(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts in front of a text by default (BOS).

    Raises:
        ValueError: It changes the text itself.
    """
    probe = "a"
    bare = tokenizer.encode(probe, add_special_tokens=False)
    full = tokenizer.encode(probe, add_special_tokens=True)
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start]
    raise ValueError(
        f"the tokenizer {tokenizer.name_or_path!r} changes text when it adds special tokens; set {KEY}.kind: chat"
    )


def _opened_thought(generation_prompt: str) -> str:
    start = generation_prompt.rfind("<think>")
    return "" if start < 0 or "</think>" in generation_prompt[start:] else generation_prompt[start:]
