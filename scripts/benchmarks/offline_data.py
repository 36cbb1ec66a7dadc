"""What the sections ``sft``, ``rm`` and ``dpo`` learn from: chat prompts and completions, written by a fixed procedure.

An example is ``{"prompt": ids, "completions": [ids, ...]}``, its completions from the best to the worst.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import NormalDist, mean
from typing import Any

from .questions import QUESTIONS

Example = dict[str, Any]
# Name of a data set: examples, completions of each. Demonstrations have lengths of their own.
SHAPES = {"sft": (32, 1), "dpo": (16, 2), "rm": (8, 4), "pairs": (24, 2)}
# Tokens of a demonstration: log-normal, cut at both ends, which makes a mean of about 200.
MEDIAN, SIGMA, SHORTEST, LONGEST = 165, 0.6, 40, 512
PROMPT_SHARE, LEAST_COMPLETION = 0.35, 8
# Tokens of what is compared: evenly spread.
COMPARED_PROMPTS, COMPARED_COMPLETIONS = (100, 140), (30, 200)


class Writer:
    """Draws text from the words of ``QUESTIONS``.

    Args:
        tokenizer: Of the model.
        seed: The same seed writes the same text.
    """

    def __init__(self, tokenizer: Any, seed: str):
        self.tokenizer, self.draw = tokenizer, random.Random(seed)
        self.words = sorted({word for question in QUESTIONS for word in question.split()})

    def text(self, words: int) -> str:
        """So many words."""
        return " ".join(self.draw.choice(self.words) for _ in range(words))

    def tokens(self, count: int) -> list[int]:
        """Exactly so many tokens of text."""
        # Every word is one token at least.
        return self.tokenizer(self.text(count), add_special_tokens=False)["input_ids"][:count]

    def prompt(self, about: int) -> list[int]:
        """A user's message as the chat template writes it, of about so many tokens; bare text without a template."""
        if self.tokenizer.chat_template is None:
            return self.tokens(about)
        a_word = len(self.tokenizer(self.text(100), add_special_tokens=False)["input_ids"]) / 100
        room = about - len(self._rendered(""))
        return self._rendered(self.text(max(1, round(room / a_word))))

    def completion(self, length: int) -> list[int]:
        """So many tokens, the last of which ends the turn."""
        return [*self.tokens(length - 1), self.tokenizer.eos_token_id]

    def _rendered(self, text: str) -> list[int]:
        messages = [{"role": "user", "content": text}]
        rendered = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        return list(rendered["input_ids"])


def make(name: str, tokenizer: Any, seed: int, *, quick: bool = False) -> list[Example]:
    """One of the data sets that ``SHAPES`` names, or a quarter of it."""
    writer = Writer(tokenizer, f"{name} {seed}")
    count, completions = SHAPES[name]
    count = count // 4 if quick else count
    return demonstrations(writer, count) if name == "sft" else comparisons(writer, count, completions)


def demonstrations(writer: Writer, count: int) -> list[Example]:
    """Prompts with one completion; the lengths are quantiles, so that every seed has the same mean."""
    lengths = [MEDIAN * math.exp(SIGMA * NormalDist().inv_cdf((i + 0.5) / count)) for i in range(count)]
    writer.draw.shuffle(lengths)
    examples = []
    for length in (min(LONGEST, max(SHORTEST, round(n))) for n in lengths):
        prompt = writer.prompt(round(PROMPT_SHARE * length))
        completion = writer.completion(max(LEAST_COMPLETION, length - len(prompt)))
        examples.append({"prompt": prompt, "completions": [completion]})
    return examples


def comparisons(writer: Writer, count: int, completions: int) -> list[Example]:
    """Prompts with several completions."""
    draw = writer.draw.randint
    return [
        {
            "prompt": writer.prompt(draw(*COMPARED_PROMPTS)),
            "completions": [writer.completion(draw(*COMPARED_COMPLETIONS)) for _ in range(completions)],
        }
        for _ in range(count)
    ]


def useful_tokens(examples: Iterable[Example]) -> int:
    """Every prompt and every completion once, whoever computes them how often."""
    return sum(len(e["prompt"]) + sum(map(len, e["completions"])) for e in examples)


def pairs(examples: Iterable[Example]) -> int:
    """Comparisons of a better with a worse completion."""
    return sum(len(e["completions"]) * (len(e["completions"]) - 1) // 2 for e in examples)


def described(examples: Sequence[Example]) -> dict[str, Any]:
    """Numbers and lengths, in tokens."""
    prompts = [len(e["prompt"]) for e in examples]
    completions = [len(c) for e in examples for c in e["completions"]]
    return {
        "examples": len(examples),
        "completions_each": len(examples[0]["completions"]),
        "pairs": pairs(examples),
        "useful_tokens": useful_tokens(examples),
        "prompt_tokens": {"mean": mean(prompts), "min": min(prompts), "max": max(prompts)},
        "completion_tokens": {"mean": mean(completions), "min": min(completions), "max": max(completions)},
    }


def padding_token(tokenizer: Any, examples: Iterable[Example], besides: Sequence[int] = ()) -> str:
    """A token that occurs nowhere: HF's classifiers take the last token that is not padding for the end."""
    used = {t for e in examples for ids in (e["prompt"], *e["completions"]) for t in ids} | set(besides)
    special = [i for i in tokenizer.all_special_ids if i not in used]
    free = special or [i for i in range(len(tokenizer)) if i not in used]
    return tokenizer.convert_ids_to_tokens(free[0])


def write_classifier(model: str, tokenizer: Any, folder: Path, seed: int) -> None:
    """The network with a random scalar head, as a HF sequence classifier: what both sides begin with."""
    import torch
    from transformers import AutoModelForSequenceClassification

    network = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, dtype=torch.float32)
    size = network.config.get_text_config().hidden_size
    with torch.no_grad():
        drawn = torch.randn(network.score.weight.shape, generator=torch.Generator().manual_seed(seed))
        network.score.weight.copy_(drawn / (size + 1) ** 0.5)
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
