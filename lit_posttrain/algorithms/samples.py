"""Samples as text a person can read, for TensorBoard."""

from collections.abc import Sequence
from typing import Any

from lit_posttrain.rollout.collect import Rollout

_SHOWN = 8
_OF_ONE_PROMPT = 2
_LONGEST = 2000


def as_markdown(rollout: Rollout, advantages: Sequence[float]) -> str:
    """A few samples of the first prompts with what every reward function said of them."""
    names = rollout.judgement.names
    blocks = []
    each = len(rollout.samples) // len(rollout.prompts)
    shown = [i * each + j for i in range(len(rollout.prompts)) for j in range(min(each, _OF_ONE_PROMPT))]
    for row in shown[:_SHOWN]:
        prompt, sample = rollout.prompts[row // each], rollout.samples[row]
        verdicts = rollout.judgement.verdicts[row]
        scores = {n: v.score if v.status == "scored" else v.status for n, v in zip(names, verdicts, strict=True)}
        total = float(rollout.judgement.rewards[row])
        head = f"reward {total:.3g} · advantage {advantages[row]:+.3g} · {_scores(scores)}"
        blocks.append(_block(prompt.question, prompt.answer, sample.completion, sample.stop_reason, head))
    return "\n\n---\n\n".join(blocks)


def evaluation_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """One sample each of the first prompts of an evaluation."""
    shown: dict[int, dict[str, Any]] = {}
    for row in rows:
        shown.setdefault(row["prompt_id"], row)
    blocks = [
        _block(r["question"], r["answer"], r["completion"], r["stop_reason"], _scores(r["rewards"]))
        for r in list(shown.values())[:_SHOWN]
    ]
    return "\n\n---\n\n".join(blocks)


def _block(question: str, answer: str | None, completion: str, stop_reason: str, head: str) -> str:
    ending = "" if stop_reason == "stop" else "  \n*(cut at the length limit)*"
    return (
        f"**{head}**  \n**Question** (answer {answer})\n\n{code_block(question)}\n\n"
        f"**Completion**\n\n{code_block(completion)}{ending}"
    )


def code_block(text: str) -> str:
    """An indented block: nothing in the text can end it or be read as markup."""
    cut = text if len(text) <= _LONGEST else text[:_LONGEST] + " ..."
    return "\n".join("    " + line for line in (cut.splitlines() or [""]))


def _scores(scores: dict[str, Any]) -> str:
    return " · ".join(
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}" for name, value in scores.items()
    )
