"""Reproduce one claim: python scripts/reproduce.py E0. Check all recorded results: python scripts/reproduce.py check.

A run prints the claim, the criterion, the figures of every seed and the verdict, writes them to
logs/reproduce/<ID>/result.json (some with a picture) and exits with 0 if the claim held, else 1; the reported results
stand there in the repository, and git brings them back. ``check`` judges the recorded figures again and compares claim
and source with those that made them: it exits with 1 where something has changed.
"""

import argparse
import ast
import hashlib
import importlib
import itertools
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
    """An experiment's file, then the modules beside it or among the tests that it imports, and those they import."""
    found, waiting = [path], [path]
    while waiting:
        for node in ast.walk(ast.parse(waiting.pop().read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(f"{node.module}.{name}" for name in names)]
            for folder, name in itertools.product((EXPERIMENTS, ROOT / "tests"), names):
                beside = folder / f"{name.replace('.', '/')}.py"
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


def chosen(own: list[int], count: int | None, first: int | None) -> list[int]:
    """The first ``count`` of an experiment's seeds, or so many from ``first`` on."""
    count = len(own) if count is None else count
    if first is not None:
        return list(range(first, first + count))
    return [*own, *range(max(own) + 1, max(own) + 1 + count)][:count]


def reproduce(identifier: str, count: int | None, first: int | None, quick: bool, folder: Path) -> bool:
    """Run an experiment, print and record it; whether its claim held.

    Args:
        identifier: E0, E7a, ...
        count: How many seeds; None for as many as the experiment has.
        first: Its first seed; None for the experiment's own.
        quick: A short run that shows the code works.
        folder: Receives ``<ID>/result.json``.
    """
    module = load(identifier)
    started = time.monotonic()
    print(f"{identifier}: {module.CLAIM}\nHolds if {module.CRITERION}.\n")
    seeds = chosen(module.SEEDS, count, first)
    figures = module.run(seeds, quick)
    verdict = bool(module.passed(figures))
    print(table(figures))
    print(f"\n{identifier}: {'PASSED' if verdict else 'FAILED'} in {time.monotonic() - started:.0f} s")
    if quick:
        print("(a quick run: too short to judge the claim by)")
    record = {
        "claim": module.CLAIM,
        "criterion": module.CRITERION,
        "seeds": figures,
        "passed": verdict,
        "config_hash": config_hash(identifier),
        **({"quick": True} if quick else {}),
    }
    path = folder / identifier / "result.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n")
    if hasattr(module, "plot"):
        module.plot(figures, path.with_name(f"{identifier.lower()}.png"))
    print(f"Recorded in {path}")
    if folder == RESULTS and partial(record, module):
        print(f"(in the place of the reported result, which `git checkout {path.parent}` brings back)")
    return verdict


def partial(record: dict[str, Any], module: ModuleType) -> str:
    """What a record lacks of a whole one; empty for nothing."""
    missing = len(set(module.SEEDS) - {f["seed"] for f in record["seeds"]})
    return ", ".join(["a quick run"] * bool(record.get("quick")) + [f"{missing} seeds missing"] * bool(missing))


def verdict_on(path: Path) -> tuple[bool, str]:
    """Whether a recorded verdict follows from its figures and was made by the experiment as it stands, and how."""
    try:
        record = json.loads(path.read_text())
        module = load(path.parent.name)
        problems = []
        if record["config_hash"] != config_hash(path.parent.name):
            problems.append("the experiment's source has changed since; run it again")
        if (record["claim"], record["criterion"]) != (module.CLAIM, module.CRITERION):
            problems.append("claim or criterion are not the experiment's")
        if not record["seeds"]:
            problems.append("there are no figures")
        if bool(module.passed(record["seeds"])) != record["passed"]:
            problems.append(f"the figures do not give the recorded verdict (passed: {record['passed']})")
        lacking = partial(record, module)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return False, f"no readable record ({type(error).__name__}: {error})"
    verdict = "passed" if record["passed"] else "failed"
    said = f"consistent: {verdict} with {len(record['seeds'])} seeds" + (f" ({lacking})" if lacking else "")
    return not problems, "; ".join(problems) or said


def check(results: Path) -> bool:
    """Whether every record under a folder is sound; prints what is wrong."""
    paths = sorted(results.glob("*/result.json"))
    if not paths:
        print(f"no results under {results}")
    sound = bool(paths)
    for path in paths:
        good, said = verdict_on(path)
        sound = sound and good
        print(f"{path.parent.name}: {said}")
    return sound


def positive(text: str) -> int:
    """A number of seeds."""
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text} is no number of seeds; --seeds 3 runs three")
    return int(text)


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and return the exit status."""
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("what", choices=[*identifiers(), "check"], help="a claim, or check")
    cli.add_argument("--seeds", type=positive, metavar="N", help="how many seeds (default: all of the experiment's)")
    cli.add_argument("--first", type=int, metavar="SEED", help="begin with this seed, a pilot's say")
    cli.add_argument("--quick", action="store_true", help="a short run that shows the code works")
    cli.add_argument("--output", type=Path, help="folder of the results (default: logs/reproduce)")
    args = cli.parse_args(argv)
    if args.what == "check":
        return 0 if check(args.output or RESULTS) else 1
    return 0 if reproduce(args.what, args.seeds, args.first, args.quick, args.output or RESULTS) else 1


if __name__ == "__main__":
    sys.exit(main())
