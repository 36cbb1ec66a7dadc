"""What the model will see, before it is trained: rendered examples with their loss mask, lengths, and what is wrong."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from lit_posttrain.types import Example, Prompt

SHOWN_TOKENS = 600
_BINS = 10
_BAR = 40
_SPLITS = ("train", "val")
_SIZES = ("rows", "examples", "prompts", "longest_prompt", "longest", "tokens", "supervised_tokens")
# What is counted of examples that stay.
_STAYS = (
    "truncated", "truncated_prompts", "truncated_responses", "cut_prompts",
    "special_tokens", "identical", "contradictory_completions", "conflicting_answers", "held_out", "restarts",
)  # fmt: skip


@dataclass
class Inspection:
    """What was found.

    Attributes:
        summary: Per split what the DataModule counted.
        lengths: Tokens of every example, by split and kind (``prompt``, ``completion``, ``whole``).
        duplicates: Examples that stand more than once, by split.
        overlap: Training examples that are also held out.
        asked: Training examples whose prompt is also held out, with another completion.
        unended: Completions without an end token, by split, of how many.
        drifting: Examples whose text, tokenised again, gives other tokens, by split.
        problems: What has to be mended, one sentence each.
        notes: What may be as intended.
    """

    summary: dict[str, dict[str, int]]
    lengths: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    duplicates: dict[str, int] = field(default_factory=dict)
    overlap: int = 0
    asked: int = 0
    unended: dict[str, tuple[int, int]] = field(default_factory=dict)
    drifting: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def examples_of(data: Any, split: str) -> list[Example]:
    """Examples of any DataModule; prompts are examples without completions."""
    if hasattr(data, "examples"):
        return data.examples(split)
    prompts: list[Prompt] = data.prompts(split)
    return [Example(p.token_ids, [], [], {}, f"prompt {p.id}") for p in prompts]


def inspect(
    data: Any, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int], context: int | None, new_tokens: int = 0
) -> Inspection:
    """Look at everything that ``setup`` made.

    Args:
        data: A DataModule after ``setup``.
        tokenizer: Of the model.
        stop_ids: Tokens that end a completion.
        context: Positions of the model, None where unlimited.
        new_tokens: How many more will be sampled after a prompt.
    """
    found = Inspection(data.summary())
    seen: dict[str, set[Any]] = {}
    for split in _SPLITS:
        examples = examples_of(data, split)
        keys = [(tuple(e.prompt), tuple(map(tuple, e.completions))) for e in examples]
        seen[split] = set(keys)
        found.duplicates[split] = len(keys) - len(seen[split])
        rows = [(e.prompt, c) for e in examples for c in (e.completions or [[]])]
        found.lengths[split] = {
            "prompt": [len(e.prompt) for e in examples],
            "completion": [len(c) for e in examples for c in e.completions],
            "whole": [len(p) + len(c) for p, c in rows],
        }
        completions = [c for e in examples for c in e.completions]
        ended = sum(bool(c) and c[-1] in stop_ids for c in completions)
        found.unended[split] = (len(completions) - ended, len(completions))
        found.drifting[split] = sum(_drifts(tokenizer, p + c) for p, c in rows)
    found.overlap = len(seen["train"] & seen["val"])
    # Of a text without a prompt only the first token is the prompt, and that may be any text's.
    asked = {prompt for prompt, _ in seen["val"] if len(prompt) > 1}
    found.asked = sum(tuple(e.prompt) in asked for e in examples_of(data, "train")) - found.overlap
    _judge(found, data, context, new_tokens)
    return found


def _drifts(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> bool:
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return tokenizer.encode(str(text), add_special_tokens=False, verbose=False) != ids


def _judge(found: Inspection, data: Any, context: int | None, new_tokens: int) -> None:
    """Say what is wrong, and what may be."""
    for split in _SPLITS:
        without, completions = found.unended[split]
        if completions and without == completions:
            found.problems.append(
                f"{split}: no completion ends with an end token, so the model would never learn to stop; look at the "
                "chat template and the tokenizer's eos_token"
            )
        elif without:
            found.notes.append(f"{split}: {without} of {completions} completions have no end token (they were cut)")
        counts = found.summary.get(split, {})
        dropped = dropped_of(counts)
        if sum(dropped.values()) > candidates(counts) / 2:
            reasons = ", ".join(f"{reason} {n}" for reason, n in dropped.most_common())
            found.problems.append(f"{split}: more than half of the {candidates(counts)} rows are left out ({reasons})")
        examples = len(found.lengths[split]["prompt"])
        if examples and found.duplicates[split] > examples / 2:
            found.problems.append(f"{split}: {found.duplicates[split]} of {examples} examples are duplicates")
        longest = max(found.lengths[split]["whole"], default=0) + new_tokens
        if context is not None and longest > context:
            found.problems.append(f"{split}: the longest example takes {longest} positions and the model has {context}")
        if found.drifting[split]:
            found.notes.append(
                f"{split}: {found.drifting[split]} rows tokenise otherwise when their text is read again (boundaries "
                "between prompt and completion; they are trained on as tokenised)"
            )
    labels = _labels(examples_of(data, "train"))
    if len(labels) > 1 and len(set(labels)) == 1:
        found.problems.append(f"train: all {len(labels)} labels are {labels[0]:g}, so nothing tells good from bad")
    if found.asked:
        found.notes.append(
            f"{found.asked} training examples have a prompt that is also held out, with another completion; where the "
            "held-out set is to measure new prompts, remove them or leave val_split out"
        )
    if found.overlap:
        found.problems.append(f"{found.overlap} training examples are also held out")
    if not found.lengths["train"]["prompt"]:
        found.problems.append("train: nothing is left to train on")


def _labels(examples: Sequence[Example]) -> list[Any]:
    """The labels of all completions or steps; none of kinds of examples that have none."""
    labels: list[Any] = []
    for e in examples:
        columns: dict[str, Any] = e.columns
        labels += columns.get("label", [])
        for values, mask in zip(columns.get("step_labels", []), e.masks, strict=False):
            labels += [v for v, counts in zip(values, mask, strict=True) if counts]
    return labels


def dropped_of(counts: dict[str, int]) -> Counter[str]:
    """The reasons among a summary's counts for which rows were left out."""
    return Counter({name: n for name, n in counts.items() if name not in (*_SIZES, *_STAYS) and n})


def candidates(counts: dict[str, int]) -> int:
    """How many there were before some were left out: rows, or examples where a row becomes several."""
    kept = counts.get("examples", 0) + counts.get("prompts", 0)
    return max(counts.get("rows", 0), kept + dropped_of(counts).total())


# --- what a person sees ---------------------------------------------------------------------------------------


def show(found: Inspection, data: Any, tokenizer: PreTrainedTokenizerBase, console: Console, shown: int) -> None:
    """Print everything."""
    for split in _SPLITS:
        for example in examples_of(data, split)[: shown if split == "train" else 1]:
            console.rule(f"{split} · {example.origin}")
            for text in rendered(example, tokenizer, console.is_terminal):
                console.print(text, soft_wrap=True)
    for split in _SPLITS:
        for kind in ("prompt", "completion"):
            if found.lengths[split][kind]:
                console.print(histogram(f"{split}: tokens of a {kind}", found.lengths[split][kind]))
    console.print(_counts(found))
    for note in found.notes:
        console.print(f"note: {note}", soft_wrap=True)
    for problem in found.problems:
        console.print(f"PROBLEM: {problem}", style="bold red", soft_wrap=True)
    console.print("nothing is wrong" if not found.problems else f"{len(found.problems)} problem(s)")


def rendered(example: Example, tokenizer: PreTrainedTokenizerBase, colour: bool) -> Iterator[Text]:
    """Prompt and completions token by token: what counts in the loss is green, or between « and » without colour."""
    if not example.completions:
        yield _line("prompt", [(t, False) for t in example.prompt], tokenizer, colour)
    for number, (completion, mask) in enumerate(zip(example.completions, example.masks, strict=True)):
        columns = ", ".join(f"{n} {v[number]:g}" for n, v in example.columns.items() if isinstance(v[number], float))
        tokens = [(t, False) for t in example.prompt] if number == 0 else []
        head = f"completion {number + 1} ({columns})" if columns else "example"
        yield _line(head, [*tokens, *zip(completion, mask, strict=True)], tokenizer, colour)


def _line(head: str, tokens: Sequence[tuple[int, bool]], tokenizer: PreTrainedTokenizerBase, colour: bool) -> Text:
    text = Text(f"{head}: ", style="bold")
    counted = False
    for token, counts in tokens[:SHOWN_TOKENS]:
        if counts != counted and not colour:
            text.append("«" if counts else "»")
        counted = counts
        shown = str(tokenizer.decode([token], clean_up_tokenization_spaces=False))
        # A control character could move the cursor or colour the rest.
        shown = "".join(c if c.isprintable() or c == "\n" else f"\\x{ord(c):02x}" for c in shown)
        text.append(shown, style="black on green" if counts and colour else "dim" if colour else "")
    if counted and not colour:
        text.append("»")
    if len(tokens) > SHOWN_TOKENS:
        text.append(f" ... ({len(tokens) - SHOWN_TOKENS} more tokens)", style="italic")
    return text


def histogram(title: str, values: Sequence[int]) -> Text:
    """Bars over equal bins from the smallest to the largest."""
    low, high = min(values), max(values)
    width = max(1, -(-(high - low + 1) // _BINS))
    counts = Counter((v - low) // width for v in values)
    most = max(counts.values())
    lines = [f"{title} ({len(values)}, mean {sum(values) / len(values):.1f})"]
    for b in range((high - low) // width + 1):
        start = low + b * width
        bar = "█" * round(_BAR * counts[b] / most)
        lines.append(f"  {start:>6} to {start + width - 1:<6} {bar} {counts[b]}")
    return Text("\n".join(lines))


def _counts(found: Inspection) -> Table:
    table = Table(title="counts")
    table.add_column("")
    for split in _SPLITS:
        table.add_column(split, justify="right")
    names = dict.fromkeys(name for counts in found.summary.values() for name in counts)
    for name in names:
        table.add_row(name.replace("_", " "), *(_share(found.summary.get(s, {}), name) for s in _SPLITS))
    table.add_row("in both splits", str(found.overlap), "")
    table.add_row("only the prompt in both splits", str(found.asked), "")
    table.add_row("completions without end token", *("{} of {}".format(*found.unended[s]) for s in _SPLITS))
    table.add_row("rows that re-tokenise otherwise", *(str(found.drifting[s]) for s in _SPLITS))
    return table


def _share(counts: dict[str, int], name: str) -> str:
    """A count, and what part of all rows it is unless it is a size."""
    count = counts.get(name, 0)
    return str(count) if name in _SIZES or not count else f"{count} ({count / candidates(counts):.0%})"


def write_json(found: Inspection, file: Path) -> None:
    """The same for programs."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(vars(found), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
