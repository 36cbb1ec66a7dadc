"""Plant known faults one at a time and see whether the tests notice (mutation testing with chosen mutants).

``tests/mutations.yaml`` lists slips that a reimplementation of these algorithms really makes: a shift by one, a wrong
degree of freedom, a missing detach, a micro-batch's denominator. Each is written into a copy of the repository, and the
tests that claim to guard the line are run there. A fault that survives is a hole in the suite.

    python scripts/mutate.py [--jobs 2] [--only NAME ...] [--list]

Exit status: 0 if every fault was killed, 1 if one survived, 2 if an entry is stale or its tests fail without any fault.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import yaml
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
LISTING = ROOT / "tests" / "mutations.yaml"
# What no test reads: bulky, private to this checkout, or a cache that could hide the mutated source.
NOT_COPIED = (
    ".git",
    ".venv",
    "logs",
    "models",
    "build",
    "dist",
    "__pycache__",
    "*.egg-info",
    ".*_cache",
    ".hypothesis",
)
TIMEOUT = 300.0
# What nearly every test imports, and no fault can be in.
PRELOADED = ("lightning.pytorch", "transformers", "hypothesis")
console = Console(soft_wrap=True) if sys.stdout.isatty() else Console(width=160, soft_wrap=True)


@dataclass(frozen=True)
class Mutation:
    """One fault to plant.

    Args:
        name: Unique short name, for ``--only``.
        file: The source file, relative to the repository.
        find: Text that occurs exactly once in the file.
        replace: What it becomes.
        tests: The tests that must notice: paths, node ids, or ``-k EXPRESSION``.
        why: The slip in a few words.
    """

    name: str
    file: str
    find: str
    replace: str
    tests: tuple[str, ...]
    why: str

    def source(self) -> str:
        """The file as it is."""
        return (ROOT / self.file).read_text()

    def defect(self) -> str | None:
        """Why this entry cannot be planted, or None."""
        if not (ROOT / self.file).is_file():
            return f"{self.file} does not exist"
        if (count := self.source().count(self.find)) != 1:
            return f"`find` occurs {count} times in {self.file}, not once"
        return None

    def mutated(self) -> str:
        """The file with the fault in it."""
        return self.source().replace(self.find, self.replace)

    def place(self) -> str:
        """The file and the first line that changes."""
        pairs = zip(self.source().splitlines(), self.mutated().splitlines(), strict=False)
        return f"{self.file}:{next((line for line, (old, new) in enumerate(pairs, 1) if old != new), 0)}"

    def arguments(self) -> list[str]:
        """The tests as arguments of pytest."""
        return [part for test in self.tests for part in (test.split(" ", 1) if test.startswith("-k ") else [test])]


@dataclass(frozen=True)
class Result:
    """What became of one mutation: status ``killed``, ``SURVIVED`` or ``BROKEN`` (pytest could not run)."""

    mutation: Mutation
    status: str
    detail: str
    seconds: float


def read_mutations(path: Path = LISTING) -> list[Mutation]:
    """Read the listing; raises TypeError if an entry lacks a key or has one too many."""
    return [Mutation(**{**entry, "tests": tuple(entry["tests"])}) for entry in yaml.safe_load(path.read_text())]


class Worker:
    """A copy of the repository, and a process started in it that forks for each test run.

    The process has imported ``PRELOADED``, and nothing of this package, before it forks: a run starts in a tenth of a
    second instead of the ten that importing torch and lightning takes.
    """

    def __init__(self, folder: Path):
        self.copy = folder / ROOT.name
        shutil.copytree(ROOT, self.copy, ignore=shutil.ignore_patterns(*NOT_COPIED))
        # Bytecode is matched to its source by size and whole seconds: a mutant of equal length could run the original.
        fixed = {"PYTHONPATH": str(self.copy), "PYTHONDONTWRITEBYTECODE": "1", "TOKENIZERS_PARALLELISM": "false"}
        environment = {**os.environ, **fixed, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-c", "import lit_posttrain; print(lit_posttrain.__file__)"]
        origin = subprocess.check_output(command, cwd=self.copy, env=environment, text=True).strip()
        if not Path(origin).is_relative_to(self.copy):
            # An editable install that came first would test the source without the fault, and all would survive.
            raise RuntimeError(f"the copy in {self.copy} is shadowed by {origin}")
        self.server = subprocess.Popen(
            [sys.executable, __file__, "--serve", *PRELOADED],
            cwd=self.copy,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def pytest(self, arguments: list[str], timeout: float = TIMEOUT) -> tuple[int | None, str]:
        """Run pytest until the first failure; returns (exit status, output), status None after ``timeout`` seconds."""
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        line = json.dumps(
            [timeout, "-x", "-q", "-p", "no:cacheprovider", "--tb=short", "--disable-warnings", *arguments]
        )
        print(line, file=self.server.stdin, flush=True)
        status, output = json.loads(self.server.stdout.readline())
        return status, output

    def plant(self, mutation: Mutation) -> Result:
        """Plant one fault, run its tests, and take the fault out again."""
        start = time.perf_counter()
        target = self.copy / mutation.file
        source = target.read_text()  # not the checkout's, which somebody may be editing
        target.write_text(source.replace(mutation.find, mutation.replace))
        status, output = self.pytest(mutation.arguments())
        target.write_text(source)
        seconds = time.perf_counter() - start
        if status is None:
            return Result(mutation, "killed", f"no end within {TIMEOUT:.0f} s", seconds)
        if status == 0:
            return Result(mutation, "SURVIVED", mutation.why, seconds)
        if status != 1:  # a mutant that cannot even be collected says nothing about the tests
            return Result(mutation, "BROKEN", (output.strip() or f"exit {status}").splitlines()[-1], seconds)
        failed = re.search(r"^(?:FAILED|ERROR) \S*?::(.+?)(?: - .*)?$", output, re.MULTILINE)
        return Result(mutation, "killed", failed[1] if failed else "", seconds)

    def close(self) -> None:
        """End the process."""
        self.server.communicate()


def serve(modules: list[str]) -> int:
    """The process of a ``Worker``: for each line of arguments fork, run pytest, answer [status, output]."""
    import pytest

    for module in modules:
        importlib.import_module(module)
    for line in sys.stdin:
        timeout, *arguments = json.loads(line)
        with tempfile.TemporaryFile() as output:
            if (child := os.fork()) == 0:
                os.setsid()  # so that what the tests start can be ended with them
                with open(os.devnull) as nothing:
                    os.dup2(nothing.fileno(), 0)
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
                sys.argv = ["pytest", *arguments]
                status = 3
                try:
                    status = int(pytest.main(arguments))
                finally:
                    sys.stdout.flush()
                    os._exit(status)
            status = wait(child, timeout)
            output.seek(0)
            print(json.dumps([status, output.read().decode(errors="replace")]), flush=True)
    return 0


def wait(child: int, timeout: float) -> int | None:
    """Exit status of a child process; None if it had to be killed after ``timeout`` seconds."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def run(mutations: list[Mutation], jobs: int) -> list[Result]:
    """Plant all faults with ``jobs`` workers, printing each outcome as it comes; empty if the tests fail without."""
    with tempfile.TemporaryDirectory(prefix="mutate-") as folder, ThreadPoolExecutor(jobs) as pool:
        workers = [Worker(Path(folder) / str(index)) for index in range(jobs)]
        free: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        for worker in workers:
            free.put(worker)

        def work(mutation: Mutation) -> Result:
            worker = free.get()
            try:
                result = worker.plant(mutation)
            finally:
                free.put(worker)
            console.print(f"{result.status:<8} {mutation.name} ({result.seconds:.1f} s)", highlight=False)
            return result

        try:
            return list(pool.map(work, mutations)) if green(mutations, workers[0]) else []
        finally:
            for worker in workers:
                worker.close()


def green(mutations: list[Mutation], worker: Worker) -> bool:
    """Whether the tests of all entries pass without a fault; if they do not, no kill would mean anything."""
    tests = {test for mutation in mutations for test in mutation.tests if not test.startswith("-k ")}
    # Naming a whole file makes its own node ids redundant, and pytest would run them twice.
    tests = {test for test in tests if "::" not in test or test.split("::")[0] not in tests}
    status, output = worker.pytest(sorted(tests), timeout=len(tests) * TIMEOUT)
    if status != 0:
        print(f"{output}\nthe tests fail without any fault: mend them first")
        return False
    console.print(f"without a fault: {output.strip().splitlines()[-1]}", highlight=False)
    return True


def report(results: list[Result]) -> Table:
    """Render the outcome as a table, one row a fault."""
    killed = sum(result.status == "killed" for result in results)
    table = Table(title=f"{killed} of {len(results)} faults killed", title_justify="left")
    for column in ("fault", "place", "outcome", "by (or: the fault)", "s"):
        table.add_column(column, justify="right" if column == "s" else "left", overflow="fold")
    for result in results:
        style = "green" if result.status == "killed" else "bold red"
        cells = (result.mutation.name, result.mutation.place(), f"[{style}]{result.status}[/]")
        table.add_row(*cells, result.detail.replace("[", r"\["), f"{result.seconds:.1f}")
    return table


def main() -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2, help="faults tested at the same time")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="just these entries")
    parser.add_argument("--list", action="store_true", help="print the entries and stop")
    parser.add_argument("--serve", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve is not None:
        return serve(options.serve)
    mutations = read_mutations()
    if unknown := set(options.only or ()) - {mutation.name for mutation in mutations}:
        parser.error(f"no such entry: {', '.join(sorted(unknown))}; see --list")
    mutations = [mutation for mutation in mutations if not options.only or mutation.name in options.only]
    if stale := [f"{mutation.name}: {defect}" for mutation in mutations if (defect := mutation.defect())]:
        print("\n".join(stale))
        return 2
    if options.list:
        for mutation in mutations:
            print(f"{mutation.name:<40} {mutation.place():<50} {mutation.why}")
        return 0
    results = run(mutations, max(1, options.jobs))
    if not results:
        return 2
    console.print(report(results))
    return int(any(result.status != "killed" for result in results))


if __name__ == "__main__":
    sys.exit(main())
