"""Reproduce one claim: python scripts/reproduce.py E0. Check all recorded results: python scripts/reproduce.py check.

A run prints the claim, the criterion, the figures of every seed and the verdict, writes them to
logs/reproduce/<ID>/result.json (some with a picture) and exits with 0 if the claim held, else 1. ``check`` judges the
recorded figures again and compares the experiment's source with the one that made them: it exits with 1 where either
has changed.
"""

import argparse
import ast
import hashlib
import importlib
import json
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
EXPERIMENTS = ROOT / "scripts" / "experiments"
RESULTS = ROOT / "logs" / "reproduce"


def identifiers() -> list[str]:
    """Every claim there is an experiment for, as E0, E7a, ..."""
    return sorted(path.stem.capitalize() for path in EXPERIMENTS.glob("e*.py"))


def load(identifier: str) -> ModuleType:
    """The experiment's module.

    Raises:
        ValueError: There is none by this name.
    """
    if identifier not in identifiers():
        raise ValueError(f"{identifier}: no such experiment; there are {', '.join(identifiers())}")
    for folder in (ROOT, ROOT / "tests", EXPERIMENTS):  # the package, its oracles, the experiments
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
    return importlib.import_module(identifier.lower())


def sources(path: Path) -> list[Path]:
    """An experiment's file, then the modules beside it that it imports, and those that they import."""
    found, waiting = [path], [path]
    while waiting:
        for node in ast.walk(ast.parse(waiting.pop().read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                beside = EXPERIMENTS / f"{node.module}.py"
                if beside.is_file() and beside not in found:
                    found.append(beside)
                    waiting.append(beside)
    return [path, *sorted(found[1:])]


def config_hash(identifier: str) -> str:
    """SHA-256 of the experiment's sources, which hold every setting of it."""
    digest = hashlib.sha256()
    for path in sources(EXPERIMENTS / f"{identifier.lower()}.py"):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def table(figures: list[dict[str, Any]]) -> str:
    """One line a figure, one column a seed."""
    names = [name for name in figures[0] if name != "seed"]
    width = max(map(len, [*names, "seed"]))
    lines = [f"{'seed':{width}}" + "".join(f"{f['seed']:>12}" for f in figures)]
    lines += [f"{name:{width}}" + "".join(f"{f[name]:>12.5g}" for f in figures) for name in names]
    return "\n".join(lines)


def reproduce(identifier: str, seeds: list[int] | None, quick: bool, output: Path | None) -> bool:
    """Run an experiment, print and record it; whether its claim held.

    Args:
        identifier: E0, E7a, ...
        seeds: None for the experiment's own.
        quick: A short run that shows the code works.
        output: Folder that receives ``<ID>/result.json``. None records only full runs with the experiment's own seeds.
    """
    module = load(identifier)
    started = time.monotonic()
    print(f"{identifier}: {module.CLAIM}\nHolds if {module.CRITERION}.\n")
    figures = module.run(module.SEEDS if seeds is None else seeds, quick)
    verdict = bool(module.passed(figures))
    print(table(figures))
    print(f"\n{identifier}: {'PASSED' if verdict else 'FAILED'} in {time.monotonic() - started:.0f} s")
    if quick:
        print("(a quick run: too short to judge the claim by)")
    folder = output or (None if quick or seeds is not None else RESULTS)  # what is reported has all its seeds
    if folder is not None:
        record = {
            "claim": module.CLAIM,
            "criterion": module.CRITERION,
            "seeds": figures,
            "passed": verdict,
            "config_hash": config_hash(identifier),
        }
        path = folder / identifier / "result.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=2) + "\n")
        if hasattr(module, "plot"):
            module.plot(figures, path.with_name(f"{identifier.lower()}.png"))
        print(f"Recorded in {path}")
    return verdict


def check(results: Path) -> bool:
    """Whether every recorded verdict follows from its figures and was made by the experiment as it stands."""
    paths = sorted(results.glob("*/result.json"))
    if not paths:
        print(f"no results under {results}")
    sound = bool(paths)
    for path in paths:
        identifier, record = path.parent.name, json.loads(path.read_text())
        module = load(identifier)
        problems = []
        if record["config_hash"] != config_hash(identifier):
            problems.append("the experiment's source has changed since; run it again")
        if bool(module.passed(record["seeds"])) != record["passed"]:
            problems.append(f"the figures do not give the recorded verdict (passed: {record['passed']})")
        sound = sound and not problems
        verdict = "passed" if record["passed"] else "failed"
        seeds = len(record["seeds"])
        print(f"{identifier}: {'; '.join(problems) or f'consistent: {verdict} with {seeds} seeds'}")
    return sound


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and return the exit status."""
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("what", choices=[*identifiers(), "check"], help="a claim, or check")
    cli.add_argument("--seeds", type=int, nargs="+", help="instead of the experiment's own; not recorded")
    cli.add_argument("--quick", action="store_true", help="a short run that shows the code works; not recorded")
    cli.add_argument("--output", type=Path, help="folder of the results (default: logs/reproduce)")
    args = cli.parse_args(argv)
    if args.what == "check":
        return 0 if check(args.output or RESULTS) else 1
    return 0 if reproduce(args.what, args.seeds, args.quick, args.output) else 1


if __name__ == "__main__":
    sys.exit(main())
