"""What the user asked for, and what it means on this machine."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .workers import ROOT


@dataclass
class Bench:
    """One call of the script.

    Attributes:
        args: The command line.
        model: Folder of the model.
        folder: For whatever is written on the way.
        env: Environment of every worker.
        found: What ``prepare`` answered: device, dtype, prompts, stop tokens, machine.
        results: The sections so far, those of the merged file included.
    """

    args: argparse.Namespace
    model: str
    folder: str
    env: dict[str, str]
    found: dict[str, Any]
    results: dict[str, Any] = field(default_factory=dict)

    @property
    def dtype(self) -> str:
        """What matrix products are computed in."""
        return self.found["dtype"]

    @property
    def peer_python(self) -> str | None:
        """The interpreter of peers; None is ours."""
        return self.args.peer_python

    def setup(self, **more: Any) -> dict[str, Any]:
        """The first request of any worker."""
        return {
            "model": self.model,
            "device": self.found["device"],
            "dtype": self.dtype,
            "threads": self.args.threads,
            "seed": self.args.seed,
            "samples": self.args.samples,
            "new_tokens": self.args.new_tokens,
            "token_budget": self.args.token_budget or self.found["token_budget"],
            "stops": self.found["stops"],
            "folder": self.folder,
            **more,
        }

    def variants(self, known: Iterable[str]) -> list[str]:
        """Those of a section's comparisons that were asked for, in the section's order."""
        return [name for name in known if name in self.args.variants]

    def prompts(self, kind: str) -> list[list[int]]:
        """Questions where completions end by themselves, random tokens where they do not."""
        return self.found["natural_prompts" if kind == "ragged" else "fixed_prompts"]

    def request(self, kind: str, **more: Any) -> dict[str, Any]:
        """The request for one rollout or iteration."""
        return {
            "kind": kind,
            "prompts": self.prompts(kind),
            "samples": self.args.samples,
            "new_tokens": self.args.new_tokens,
            **more,
        }

    def record(self, section: str, result: dict[str, Any]) -> None:
        """Take in a section's results, finished or so far, and write everything to FILE.

        Args:
            section: Its name.
            result: Its ``settings``, if any, are those in which it differs from the others.
        """
        self.results[section] = {**result, "settings": self.described() | result.get("settings", {})}
        if self.args.json is not None:
            self.args.json.parent.mkdir(parents=True, exist_ok=True)
            self.args.json.write_text(json.dumps(self.results, indent=2) + "\n")

    def described(self) -> dict[str, Any]:
        """The settings that figures of two sections must share to be compared."""
        args = self.args
        return {
            "model": args.random_init or _from_here(args.model),
            "random_weights": args.random_init is not None,
            "prompts": args.prompts,
            "samples": args.samples,
            "prompt_tokens": [len(p) for p in self.found["fixed_prompts"]],
            "natural_prompts": self.found["natural_source"],
            "natural_prompt_tokens": [len(p) for p in self.found["natural_prompts"]],
            "new_tokens": args.new_tokens,
            "token_budget": args.token_budget or self.found["token_budget"],
            "threads": args.threads,
            "dtype": self.dtype,
            "allocator": args.allocator,
            "seed": args.seed,
        }

    def floor(self, name: str) -> float | None:
        """A floor of the ``limits`` section; None where it was not measured with these settings."""
        limits = self.results.get("limits")
        return limits[name] if limits is not None and limits["settings"] == self.described() else None


def _from_here(folder: str) -> str:
    """A folder of this repository by its place in it: results are read elsewhere."""
    inside = Path(folder).absolute()
    return str(inside.relative_to(ROOT)) if inside.is_relative_to(ROOT) else folder
