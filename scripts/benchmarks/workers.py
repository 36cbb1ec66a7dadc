"""The parent's side: a contender is a process that has loaded its model and waits for requests."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

SCRIPTS = Path(__file__).resolve().parent.parent
ROOT = SCRIPTS.parent
# glibc hands memory of large tensors back at every free and faults it in again at the next allocation; above these
# sizes it would, and no tensor is.
KEEP_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(8 << 30), "MALLOC_TRIM_THRESHOLD_": str(16 << 30)}
TCMALLOC = ("libtcmalloc_minimal.so.4", "libtcmalloc.so.4")
SHOWN_LINES = 25
# What a process writes when it is refused memory; the kernel kills one without a word.
_NO_MEMORY = ("MemoryError", "can't allocate memory", "std::bad_alloc")


class BenchError(Exception):
    """Something the user can read and mend; ends the run with status 1."""


class OutOfMemory(BenchError):
    """A worker died for want of memory: a peer's setting that this machine cannot run is left out."""


def allocator_environment(allocator: str) -> dict[str, str]:
    """Environment variables that give every worker the same allocator.

    Args:
        allocator: ``default`` (glibc as it is), ``mallopt`` (glibc keeps freed memory) or ``tcmalloc``.

    Raises:
        BenchError: tcmalloc is not installed.
    """
    if allocator == "mallopt":
        return KEEP_FREED_MEMORY
    if allocator == "default":
        return {}
    cache = subprocess.run(["/sbin/ldconfig", "-p"], capture_output=True, text=True, check=False).stdout
    for name in TCMALLOC:
        for line in cache.splitlines():
            if line.strip().startswith(name + " "):
                return {"LD_PRELOAD": line.split("=>")[1].strip()}
    raise BenchError("--allocator tcmalloc: not found; on Debian and Ubuntu: apt-get install libtcmalloc-minimal4")


def environment(threads: int, allocator: str) -> dict[str, str]:
    """The environment of every worker, ours and a peer's alike: the allocator is the one that the JSON names."""
    of_allocators = {*KEEP_FREED_MEMORY, "LD_PRELOAD", "GLIBC_TUNABLES", "THP_MEM_ALLOC_ENABLE"}
    inherited = {k: v for k, v in os.environ.items() if k not in of_allocators}
    path = os.pathsep.join(filter(None, [str(SCRIPTS), os.environ.get("PYTHONPATH")]))
    return {
        **inherited,
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **allocator_environment(allocator),
    }


class Worker:
    """One contender. Use as a context manager; leaving it ends the process.

    Args:
        name: What rows call it.
        module: Module of this package that the process runs.
        setup: First request; its answer is ``hello``.
        env: The process's environment.
        python: The interpreter, ours by default.
        wait: False leaves ``ready`` to the caller: for processes that load at the same time, or wait for one another.

    Raises:
        BenchError: The process died; the message holds the end of what it wrote to stderr.
    """

    def __init__(
        self,
        name: str,
        module: str,
        setup: Mapping[str, Any],
        env: Mapping[str, str],
        python: str | None = None,
        *,
        wait: bool = True,
    ):
        self.name = name
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed in close)
        # Only our own interpreter may see the package: a peer's environment need not be able to import it.
        path = env["PYTHONPATH"] if python else os.pathsep.join((env["PYTHONPATH"], str(ROOT)))
        command = [python or sys.executable, "-m", f"{__package__}.{module}"]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env={**env, "PYTHONPATH": path},
                text=True,
            )
        except OSError as error:
            raise BenchError(f"{name}: cannot start {command[0]} ({error.strerror})") from error
        self.hello: dict[str, Any] = {}
        try:
            self.send(**setup)
            if wait:
                self.ready()
        except BaseException:
            self.close()
            raise

    def ready(self) -> None:
        """Wait until it has loaded."""
        self.hello = self.answer()

    def send(self, **values: Any) -> None:
        """Ask without waiting for the answer."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(values) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self._died()

    def answer(self) -> dict[str, Any]:
        """The answer to the oldest request that has none."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._died()
        return json.loads(line)

    def request(self, **values: Any) -> dict[str, Any]:
        """Ask and wait."""
        self.send(**values)
        return self.answer()

    def _died(self) -> None:
        status = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").splitlines()[-SHOWN_LINES:]
        tail = "\n".join(f"  | {line}" for line in lines)
        short = status == -signal.SIGKILL or any(sign in line for line in lines for sign in _NO_MEMORY)
        kind = OutOfMemory if short else BenchError
        raise kind(f"the worker {self.name!r} ended with status {status}; the end of its stderr:\n{tail}")

    def close(self) -> None:
        """End the process: it has nothing to save, and its trainer would go on for ever."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):  # a request that nobody read
                pipe.close()
        self._errors.close()

    def __enter__(self) -> Worker:
        """The worker itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the process."""
        self.close()


def run_once(
    module: str, setup: Mapping[str, Any], env: Mapping[str, str], python: str | None = None, name: str | None = None
) -> dict[str, Any]:
    """What a worker answers to its setup, when nothing else is asked of it."""
    with Worker(name or module, module, setup, env, python) as worker:
        return worker.hello


def interleaved(workers: Sequence[Worker], repeats: int) -> list[Worker]:
    """A B A B ...: a slow minute of the machine then falls on both."""
    return [worker for _ in range(repeats) for worker in workers]
