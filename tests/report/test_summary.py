"""The before/after table against numbers worked out by hand and against the t interval."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lit_posttrain.report.summary import before_after, commonest_answer, read_rows, summarize


def row(prompt: int, sample: int, correct: bool | None, vote: str | None, formed: bool = True, tokens: int = 5) -> dict:
    return {
        "prompt_id": prompt,
        "answer": str(prompt),
        "sample": sample,
        "tokens": tokens,
        "rewards": {"accuracy": float(bool(correct)), "format": float(formed)},
        "vote": vote,
        "correct": correct,
    }


ROWS = [
    row(1, 0, True, "1"), row(1, 1, True, "1"), row(1, 2, False, "9"), row(1, 3, False, None, formed=False, tokens=9),
    row(2, 0, True, "2"), row(2, 1, False, "8"), row(2, 2, False, "7"), row(2, 3, False, None, formed=False, tokens=9),
    row(3, 0, False, "6"), row(3, 1, False, "6"), row(3, 2, False, "6"), row(3, 3, False, "6"),
]  # fmt: skip


def test_every_figure_of_the_table() -> None:
    table = {name: e.value for name, e in summarize(ROWS).items()}
    assert table == pytest.approx(
        {
            "pass@1": 3 / 12,
            "maj@4": (1 + 1 / 3 + 0) / 3,  # a three-way tie of which one is right
            "pass@4": 2 / 3,
            "format_rate": 10 / 12,
            "right_if_well_formed": 3 / 10,
            "mean_length": (10 * 5 + 2 * 9) / 12,
        }
    )


def test_a_right_answer_in_the_wrong_form_is_not_right_among_the_well_formed() -> None:
    rows = [row(1, 0, True, "1", formed=False), row(1, 1, False, "2")]
    assert summarize(rows)["right_if_well_formed"].value == 0.0
    nothing = summarize([row(1, 0, True, "1", formed=False)])["right_if_well_formed"]
    assert nothing == (0.0, 0.0, 0.0)


def test_intervals_are_over_prompts_and_of_95_percent() -> None:
    rng = np.random.default_rng(3)
    chances = rng.random(400)
    rows = [row(i, j, bool(rng.random() < p), "x") for i, p in enumerate(chances) for j in range(16)]
    estimate = summarize(rows)["pass@1"]
    means = np.array([np.mean([r["correct"] for r in rows[i * 16 : (i + 1) * 16]]) for i in range(400)])
    half = 1.96 * means.std(ddof=1) / 20
    assert estimate.low == pytest.approx(means.mean() - half, abs=0.15 * half)
    assert estimate.high == pytest.approx(means.mean() + half, abs=0.15 * half)


def test_the_commonest_gold_answer_counts_prompts_not_samples() -> None:
    rows = [row(1, 0, True, "1")] + [row(2, j, True, "2") | {"answer": "7"} for j in range(5)]
    rows += [row(3, 0, True, "3") | {"answer": "1"}]
    assert commonest_answer(rows) == ("1", pytest.approx(2 / 3))


def test_prompts_with_different_numbers_of_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="same number of samples"):
        summarize([*ROWS, row(4, 0, True, "4")])
    with pytest.raises(ValueError, match="no rows"):
        summarize([])


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n{half\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl:2"):
        read_rows(path)


def test_the_table_shows_both_sides() -> None:
    from rich.console import Console

    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    better: list[dict[str, Any]] = [r | {"correct": True} for r in ROWS]
    console.print(before_after(summarize(ROWS), summarize(better), "title"))
    text = console.export_text()
    assert "0.250" in text
    assert "1.000" in text
    assert "right if well formed" in text
