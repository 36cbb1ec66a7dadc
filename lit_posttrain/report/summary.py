"""From every sampled completion and its verdict to a table with confidence intervals."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table

from lit_posttrain.metrics import consensus, pass_at_k

RESAMPLES = 2000
Row = dict[str, Any]


class Estimate(NamedTuple):
    """A mean over prompts and its 95% interval by bootstrap over prompts.

    Attributes:
        value: The mean.
        low: 2.5% quantile.
        high: 97.5% quantile.
    """

    value: float
    low: float
    high: float


def read_rows(path: Path) -> list[Row]:
    """Rows of an evaluation's JSONL.

    Raises:
        ValueError: A line is damaged; names it.
    """
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}:{number}: not a JSON object ({error})") from error
    return rows


def summarize(rows: Sequence[Row], format_reward: str = "format") -> dict[str, Estimate]:
    """pass@1, maj@n, pass@n, format rate, share right among the well-formed, and mean length in tokens.

    Args:
        rows: One sample each, as ``evaluation/step-*.jsonl`` holds them; every prompt has the same number n.
        format_reward: Name of the reward that says whether a completion is well-formed (score 1).

    Raises:
        ValueError: No rows, or prompts with different numbers of samples.
    """
    groups: dict[int, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["prompt_id"], []).append(row)
    sizes = {len(g) for g in groups.values()}
    if len(sizes) != 1:
        raise ValueError(f"every prompt needs the same number of samples, found {sorted(sizes) or 'no rows at all'}")
    n = sizes.pop()
    prompts = list(groups.values())

    def formed(row: Row) -> bool:
        return row["rewards"].get(format_reward) == 1.0

    def per_prompt(f: Callable[[list[Row]], float]) -> np.ndarray:
        return np.array([f(g) for g in prompts], dtype=np.float64)

    ones = np.ones(len(prompts))
    right = per_prompt(lambda g: sum(bool(r["correct"]) for r in g))
    ratios = {
        "pass@1": (right / n, ones),
        f"maj@{n}": (per_prompt(lambda g: consensus([r["vote"] for r in g], [bool(r["correct"]) for r in g])), ones),
        f"pass@{n}": (np.array([pass_at_k(n, int(c), n) for c in right]), ones),
        "format_rate": (per_prompt(lambda g: sum(map(formed, g)) / n), ones),
        "right_if_well_formed": (
            per_prompt(lambda g: sum(bool(r["correct"]) and formed(r) for r in g)),
            per_prompt(lambda g: sum(map(formed, g))),
        ),
        "mean_length": (per_prompt(lambda g: sum(r["tokens"] for r in g) / n), ones),
    }
    # One set of resamples for all, so that intervals of two models on the same prompts go together.
    draws = np.random.default_rng(0).integers(0, len(prompts), (RESAMPLES, len(prompts)))
    return {name: _estimate(top, bottom, draws) for name, (top, bottom) in ratios.items()}


def commonest_answer(rows: Sequence[Row]) -> tuple[str, float]:
    """The gold answer that most prompts have, and the pass@1 of always giving it."""
    answers = {row["prompt_id"]: row["answer"] for row in rows}
    answer, count = Counter(answers.values()).most_common(1)[0]
    return str(answer), count / len(answers)


def _estimate(top: np.ndarray, bottom: np.ndarray, draws: np.ndarray) -> Estimate:
    """Ratio of sums over prompts; a resample without any denominator counts as 0."""
    sums, weights = top[draws].sum(1), bottom[draws].sum(1)
    values = np.divide(sums, weights, out=np.zeros_like(sums), where=weights > 0)
    low, high = np.quantile(values, [0.025, 0.975])
    total = bottom.sum()
    return Estimate(float(top.sum() / total) if total else 0.0, float(low), float(high))


def before_after(before: dict[str, Estimate], after: dict[str, Estimate], title: str) -> Table:
    """Both columns side by side, with their intervals."""
    table = Table(title=title)
    table.add_column("held-out")
    for name in ("before", "after"):
        table.add_column(name, justify="right")
    for name in before:
        table.add_row(name.replace("_", " "), _cell(name, before[name]), _cell(name, after[name]))
    return table


def _cell(name: str, e: Estimate) -> str:
    digits = 1 if name == "mean_length" else 3
    return f"{e.value:.{digits}f} [{e.low:.{digits}f}, {e.high:.{digits}f}]"
