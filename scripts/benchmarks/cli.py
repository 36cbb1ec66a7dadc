"""Command line, merging of results, error messages."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from . import grpo, limits, offline, ppo, rollout, scale, train
from .models import CONFIGS
from .rows import say
from .settings import Bench
from .workers import ROOT, BenchError, environment, run_once

SECTIONS: dict[str, tuple[Callable[[Bench], dict[str, Any]], str]] = {
    "limits": (limits.run, "what this machine would allow"),
    "rollout": (rollout.run, "tokens a second of the rollout engine, beside Hugging Face's generate"),
    "grpo": (grpo.run, "whole GRPO iterations, beside TRL with --peer trl"),
    "train": (train.run, "forward and backward over ragged sequences, beside padded HF with --peer trl"),
    "scale": (scale.run, "time against prompt length, group size, completion length and processes"),
    "sft": (partial(offline.run, "sft"), "steps of supervised fine-tuning, beside TRL with --peer trl"),
    "rm": (partial(offline.run, "rm"), "steps of a reward model on rankings, beside TRL's on pairs with --peer trl"),
    "dpo": (partial(offline.run, "dpo"), "steps of DPO, beside TRL with --peer trl"),
    "ppo": (ppo.run, "whole PPO iterations, beside our GRPO, and beside TRL 1.12 with --peer trl"),
}
ALL = ("limits", "rollout", "grpo", "train")
COMPARISONS: dict[str, Sequence[str]] = {
    "grpo": list(grpo.VARIANTS),
    "ppo": list(ppo.VARIANTS),
    **{task: list(names) for task, names in offline.VARIANTS.items()},
}
DEFAULT_MODEL = ROOT / "models" / "SmolLM2-135M-Instruct"  # as scripts/fetch_model.py leaves it


def parser() -> argparse.ArgumentParser:
    """All options; every section takes all of them, so that one line can be repeated with another section."""
    cli = argparse.ArgumentParser(
        prog="bench.py",
        description="This machine's limits, and lit_posttrain beside Hugging Face and TRL, interleaved.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    what = "; ".join(f"{name}: {text}" for name, (_, text) in SECTIONS.items())
    cli.add_argument("section", nargs="+", choices=[*SECTIONS, "all"], help=f"{what}; all: {', '.join(ALL)}")
    cli.add_argument(
        "--model",
        metavar="DIR",
        help=f"folder of a HF causal LM; for sft, rm, dpo and ppo models/{DEFAULT_MODEL.name} if unset",
    )
    cli.add_argument("--random_init", metavar="CONFIG", help=f"random weights instead: {', '.join(CONFIGS)}")
    cli.add_argument("--peer", choices=["trl"], help="also measure this library (grpo, train, sft, rm, dpo, ppo)")
    cli.add_argument("--peer_python", metavar="PATH", help="Python that has the peers; ours by default")
    cli.add_argument("--json", type=Path, metavar="FILE", help="write results here; other sections in it are kept")
    cli.add_argument("--prompts", type=positive, default=8, help="prompts of one iteration")
    cli.add_argument("--samples", type=positive, default=8, help="completions of each prompt")
    cli.add_argument("--prompt_tokens", type=positive, default=60, help="longest random prompt")
    cli.add_argument("--new_tokens", type=positive, default=128, help="most tokens of a completion")
    cli.add_argument("--repeats", type=positive, default=5, help="measurements of each contender")
    cli.add_argument("--threads", type=positive, default=available_cores(), help="threads of each worker")
    cli.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="compute precision")
    cli.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to compute")
    cli.add_argument("--seed", type=int, default=0, help="of prompts, weights and samples")
    cli.add_argument("--engine", choices=["native", "reference"], default="native", help="our rollout engine")
    cli.add_argument(
        "--allocator", choices=["mallopt", "default", "tcmalloc"], default="mallopt", help="of all workers alike"
    )
    cli.add_argument(
        "--micro_batches",
        type=positives,
        default=[4, 8, 16, 32],
        help="sizes in sequences that the peer may choose from, by commas; one without memory for it is left out",
    )
    known = "; ".join(f"{section}: {', '.join(names)}" for section, names in COMPARISONS.items())
    cli.add_argument(
        "--variants", type=variants, default=all_variants(), help=f"which comparisons, by commas ({known})"
    )
    cli.add_argument(
        "--token_budget", type=positive, help="tokens of our micro-batches; the product's default if unset"
    )
    cli.add_argument("--scale_tokens", type=positive, default=4096, help="scale: tokens of an iteration, about")
    cli.add_argument(
        "--quick",
        action="store_true",
        help="scale: short axes; limits: a small copy; sft, rm, dpo: a quarter of the examples",
    )
    return cli


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def positive(text: str) -> int:
    """An integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, is {value}")
    return value


def positives(text: str) -> list[int]:
    """Integers of at least 1, separated by commas."""
    return [positive(part) for part in text.split(",")]


def all_variants() -> list[str]:
    """Every name in ``COMPARISONS`` once."""
    return list(dict.fromkeys(name for names in COMPARISONS.values() for name in names))


def variants(text: str) -> list[str]:
    """Names in ``COMPARISONS``, separated by commas."""
    names = text.split(",")
    if unknown := [name for name in names if name not in all_variants()]:
        raise argparse.ArgumentTypeError(f"{unknown[0]}: no such comparison; there are {', '.join(all_variants())}")
    return names


def sections(args: argparse.Namespace) -> list[str]:
    """What is run, each once."""
    return list(dict.fromkeys(name for asked in args.section for name in (ALL if asked == "all" else [asked])))


def check(args: argparse.Namespace) -> None:
    """What no type can say.

    Raises:
        BenchError: The arguments contradict each other or name what is not there.
    """
    asked = sections(args)
    if args.model is None and args.random_init is None and set(asked) <= {*offline.VARIANTS, "ppo"}:
        args.model = str(DEFAULT_MODEL)
    if (args.model is None) == (args.random_init is None):
        raise BenchError("give either --model DIR or --random_init CONFIG")
    for section in asked:
        if section in COMPARISONS and not set(args.variants) & set(COMPARISONS[section]):
            raise BenchError(
                f"--variants: none of them is one of {section}, which has {', '.join(COMPARISONS[section])}"
            )
    if args.random_init is not None and args.random_init not in CONFIGS:
        raise BenchError(f"--random_init {args.random_init}: no such configuration; there are {', '.join(CONFIGS)}")
    if args.model is not None and not (Path(args.model) / "config.json").is_file():
        raise BenchError(f"--model {args.model}: no config.json there")
    if args.peer_python is not None and not Path(args.peer_python).exists():
        raise BenchError(f"--peer_python {args.peer_python}: no such file")
    if args.samples < 2:
        raise BenchError("--samples: a group has at least 2")


def previous(path: Path | None) -> dict[str, Any]:
    """What FILE holds already.

    Raises:
        BenchError: It is something else.
    """
    if path is None or not path.exists():
        return {}
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise BenchError(f"--json {path}: is there and holds no JSON ({error}); name another file") from error
    if not isinstance(found, dict):
        raise BenchError(f"--json {path}: is there and holds no results; name another file")
    return found


def merge(path: Path | None, results: dict[str, Any], machine: dict[str, Any]) -> dict[str, Any]:
    """The results with what they were measured on.

    Raises:
        BenchError: FILE is from another machine.
    """
    before = results.get("machine")
    if before is not None and any(before[k] != machine[k] for k in ("cpu", "gpu", "device")):
        raise BenchError(f"--json {path}: holds results of another machine ({before['cpu']}, {before['device']})")
    versions = {**(before or {}).get("versions", {}), **machine["versions"]}
    return {**results, "machine": {**machine, "versions": versions}}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the section; the exit status."""
    args = parser().parse_args(argv)
    try:
        check(args)
        run(args)
    except BenchError as error:
        print(f"bench.py: {error}", flush=True, file=sys.stderr)
        return 1
    return 0


def run(args: argparse.Namespace) -> None:
    """Prepare once, then each section; results are written after each."""
    results, env = previous(args.json), environment(args.threads, args.allocator)
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        model = args.model or str(Path(folder) / "model")
        setup = {
            k: getattr(args, k)
            for k in ("random_init", "device", "dtype", "seed", "prompts", "samples", "prompt_tokens", "quick")
        }
        tasks = [name for name in sections(args) if name in offline.VARIANTS]
        found = run_once(
            "prepare",
            {**setup, "model": model, "offline": tasks, "ppo": "ppo" in sections(args), "folder": folder},
            env,
        )
        if "error" in found:
            raise BenchError(found["error"])
        bench = Bench(args, model, folder, env, found, results)
        machine = found["machine"] | {"threads": args.threads, "allocator": args.allocator}
        found["machine"] = machine
        bench.results = merge(args.json, results, machine)
        say(f"{machine['gpu'] or machine['cpu']}, {args.threads} threads, {machine['dtype']}, {machine['versions']}")
        for section in sections(args):
            result = SECTIONS[section][0](bench)
            bench.results = merge(args.json, bench.results, found["machine"])
            bench.record(section, result)
    say("\n" + json.dumps(bench.results, indent=2))
