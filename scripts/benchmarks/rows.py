"""Measured rows: printed as they come, and summed up by medians."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple


class Row(NamedTuple):
    """One measurement.

    Attributes:
        case: What was measured (``fixed``, ``ragged``, ...).
        contender: Who.
        tokens: Useful tokens.
        seconds: Time they took.
        answer: Everything the worker said.
    """

    case: str
    contender: str
    tokens: int
    seconds: float
    answer: dict[str, Any]

    @property
    def rate(self) -> float:
        """Useful tokens a second."""
        return self.tokens / self.seconds


class Rows:
    """All rows of a section, in the order in which they were measured.

    Args:
        section: Printed in front of each.
    """

    def __init__(self, section: str):
        self.section = section
        self.rows: list[Row] = []

    def add(self, case: str, contender: str, answer: dict[str, Any], note: str = "") -> Row:
        """Keep and print a worker's answer."""
        row = Row(case, contender, answer["tokens"], answer["seconds"], answer)
        self.rows.append(row)
        phases = "  ".join(f"{k} {v:.2f} s" for k, v in answer.get("phases", {}).items() if v >= 0.005)
        say(
            f"{self.section} {len(self.rows):3d}  {case:8s} {contender:22s} {row.seconds:9.3f} s {row.tokens:7d} tok "
            f"{row.rate:10.1f} tok/s  peak {answer['peak_bytes'] / 2**30:5.2f} GiB  {phases}  {note}".rstrip()
        )
        return row

    def of(self, case: str, contender: str) -> list[Row]:
        """The rows of one contender in one case."""
        return [row for row in self.rows if row.case == case and row.contender == contender]

    def order(self) -> list[str]:
        """Who was measured after whom."""
        return [f"{row.case}/{row.contender}" for row in self.rows]

    def summary(self, case: str, contender: str) -> dict[str, Any]:
        """Medians with their spread."""
        rows = self.of(case, contender)
        result: dict[str, Any] = {
            "tokens_per_s": spread(row.rate for row in rows),
            "seconds": spread(row.seconds for row in rows),
            "tokens": [row.tokens for row in rows],
            "peak_bytes": max(row.answer["peak_bytes"] for row in rows),
        }
        names = rows[0].answer.get("phases", {})
        if names:
            result["phases_s"] = {n: statistics.median(row.answer["phases"].get(n, 0.0) for row in rows) for n in names}
        return result

    def speedup(self, case: str, ours: str, peer: str) -> float:
        """Ratio of the median rates."""
        return median(row.rate for row in self.of(case, ours)) / median(row.rate for row in self.of(case, peer))

    def table(self) -> str:
        """Every case and contender once."""
        keys = dict.fromkeys((row.case, row.contender) for row in self.rows)
        head = ("contender", "runs", "tok/s", "min", "max", "s", "GiB")
        lines = [f"{self.section:8s} {{:22s}} {{:>4s}} {{:>10s}} {{:>10s}} {{:>10s}} {{:>9s}} {{:>6s}}".format(*head)]
        for case, contender in keys:
            s = self.summary(case, contender)
            rate = s["tokens_per_s"]
            lines.append(
                f"{case:8s} {contender:22s} {len(s['tokens']):4d} {rate['median']:10.1f} {rate['min']:10.1f} "
                f"{rate['max']:10.1f} {s['seconds']['median']:9.3f} {s['peak_bytes'] / 2**30:6.2f}"
            )
        return "\n".join(lines)


def median(values: Iterable[float]) -> float:
    """The median."""
    return float(statistics.median(values))


def spread(values: Iterable[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    kept: Sequence[float] = list(values)
    return {"median": median(kept), "min": min(kept), "max": max(kept)}


def say(text: str) -> None:
    """A line that is there at once, also in a log."""
    print(text, flush=True)
