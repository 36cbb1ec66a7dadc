"""Untrusted evaluation in killable processes: what the answer caused is told apart from what the machine caused."""

import contextlib
import json
import os
import pickle
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lit_posttrain.types import Verdict

WALL_FACTOR = 5
"""The net of wall-clock time is this many times the limit of CPU time."""
JOBS_PER_WORKER = 500
"""A worker is replaced after this many jobs: algebra systems cache, and the memory limit covers all its jobs."""
START_SECONDS = 180.0
MEMORY_EXIT = 71
HEADER = struct.Struct("!I")
MAX_REPLY = 1 << 20


class PoolError(RuntimeError):
    """The processes could not be started or were lost."""


class Outcome(NamedTuple):
    """How a job ended.

    Attributes:
        kind: ``done``; ``timeout``, ``memory`` and ``crash`` are the answer's doing; ``lost`` and ``starved`` the
            machine's.
        value: The worker's reply if ``done``, else None.
    """

    kind: Literal["done", "timeout", "memory", "crash", "lost", "starved"]
    value: dict[str, Any] | None = None

    def verdict(self) -> Verdict:
        """What it means for the sample when the job was not done: 0 by the answer's fault, else ``invalid``."""
        if self.kind in ("lost", "starved"):
            return Verdict(0.0, "invalid", f"worker_{self.kind}")
        return Verdict(0.0, "scored", self.kind)


class _Worker:
    def __init__(self, pid: int, channel: socket.socket):
        self.pid = pid
        self.channel = channel
        self.jobs = 0
        self.deadline = 0.0
        self.started = (0.0, 0.0, 0.0)
        self.reply = bytearray()


class WorkerPool:
    """Warm worker processes that are killed at a limit and replaced in milliseconds.

    Nothing runs before the first job. A copy in a forked process starts processes of its own.

    Args:
        task: Which function of the worker script the jobs are for.
        workers: How many jobs run at the same time.
        timeout: CPU seconds a job may use.
        memory_mb: Address space of a worker, in MiB.
    """

    def __init__(self, task: Literal["math", "gym"], workers: int, timeout: float, memory_mb: int):
        if workers < 1 or not timeout > 0 or memory_mb < 256:
            raise ValueError(
                f"workers {workers}, timeout {timeout}, memory_mb {memory_mb}: must be at least 1, above 0 and "
                f"at least 256"
            )
        self.task = task
        self.workers = workers
        self.timeout = timeout
        self.memory_mb = memory_mb
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        kept = ("task", "workers", "timeout", "memory_mb")
        return {name: getattr(self, name) for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def _forget(self) -> None:
        self._owner = os.getpid()
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._idle: list[_Worker] = []

    def run(self, jobs: Sequence[tuple[Any, ...]]) -> list[Outcome]:
        """Does every job once, several at a time; never raises on account of a job.

        Args:
            jobs: Arguments of the task's function; plain data.

        Raises:
            PoolError: The processes cannot be started at all.
        """
        if self._owner != os.getpid():
            self._forget()  # the processes belong to the parent: use none of its sockets
        outcomes = [Outcome("lost")] * len(jobs)
        waiting = deque(range(len(jobs)))
        busy: dict[_Worker, int] = {}
        with self._lock:
            try:
                while waiting or busy:
                    while waiting and len(busy) < self.workers:
                        index = waiting.popleft()
                        worker = self._start_job(jobs[index])
                        if worker:
                            busy[worker] = index
                    for worker in self._wait(list(busy)):
                        outcome = self._finish(worker)
                        if outcome:
                            outcomes[busy.pop(worker)] = outcome
            finally:
                for worker in busy:  # an interrupt came: their replies would answer the wrong job
                    self._bury(worker)
        return outcomes

    def close(self) -> None:
        """Kills every process of the pool."""
        if self._owner == os.getpid():
            with self._lock:
                self._stop()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            if self._owner == os.getpid():
                self._stop()

    def _stop(self) -> None:
        for worker in self._idle:
            worker.channel.close()
        self._idle = []
        if self._control:
            self._control.close()
        if self._process:
            with contextlib.suppress(subprocess.TimeoutExpired):  # end-of-file makes it kill its workers and leave
                self._process.wait(2.0)
            self._process.kill()
            self._process.wait()
        self._process = self._control = None

    def _zygote(self) -> socket.socket:
        """The control socket; starts the parent process if there is none."""
        if self._control and self._process and self._process.poll() is None:
            return self._control
        self._stop()
        ours, theirs = socket.socketpair()
        script = Path(__file__).with_name("worker.py")
        # A fixed hash seed, since the order of sets decides how far the algebra gets; nothing else of our environment.
        environment = {"PYTHONHASHSEED": "0", "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        environment |= {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
        path = [entry for entry in sys.path if entry]
        # -P: else the folder of the script comes first on the path, and its math.py hides the standard one.
        command = [sys.executable, "-P", "-B", str(script), str(theirs.fileno()), self.task]
        command += [str(self.memory_mb << 20), json.dumps(path)]
        quiet = subprocess.DEVNULL
        self._process = subprocess.Popen(
            command, stdin=quiet, stdout=quiet, stderr=quiet, env=environment, pass_fds=[theirs.fileno()],
            start_new_session=True, cwd="/",
        )  # fmt: skip
        theirs.close()
        ours.settimeout(START_SECONDS)
        self._control = ours
        try:
            greeting = ours.recv(4096)
        except OSError as error:
            greeting = str(error).encode()
        if greeting != b"ready":
            self._stop()
            raise PoolError(f"the {self.task} worker did not start: {greeting.decode(errors='replace') or 'it died'}")
        ours.settimeout(10.0)
        return ours

    def _call(self, message: bytes, descriptors: list[int]) -> int:
        control = self._zygote()
        try:
            socket.send_fds(control, [message], descriptors)
            reply = control.recv(8)
            if len(reply) != 8:
                raise OSError("the parent of the workers is gone")
        except BaseException:  # also an interrupt: a reply that comes late would be taken for the next one
            if self._process:
                self._process.kill()
                self._process.wait()
            raise
        return struct.unpack("!q", reply)[0]

    def _spawn(self) -> _Worker:
        ours, theirs = socket.socketpair()
        try:
            pid = self._call(b"fork", [theirs.fileno()])
        except OSError:
            pid = self._call(b"fork", [theirs.fileno()])  # once more, with a new parent
        finally:
            theirs.close()
        ours.settimeout(10.0)
        return _Worker(pid, ours)

    def _start_job(self, job: tuple[Any, ...]) -> _Worker | None:
        """Gives a job to a warm worker; None if the machine lost two in a row while it was handed over."""
        data = pickle.dumps((self.timeout, job))
        for _ in range(2):
            worker = self._idle.pop() if self._idle else self._spawn_or_fail()
            try:
                worker.channel.sendall(HEADER.pack(len(data)) + data)
            except OSError:  # died while idle: no job of anyone's is to blame
                self._bury(worker)
                continue
            worker.jobs += 1
            worker.reply.clear()
            worker.started = (time.monotonic(), *_scheduled(worker.pid))
            worker.deadline = worker.started[0] + WALL_FACTOR * self.timeout
            return worker
        return None

    def _spawn_or_fail(self) -> _Worker:
        try:
            return self._spawn()
        except OSError as error:
            self._stop()
            raise PoolError(f"the {self.task} workers were lost and could not be started again: {error}") from error

    def _wait(self, busy: list[_Worker]) -> list[_Worker]:
        """The workers that said something or are past their deadline."""
        if not busy:
            return []
        seconds = max(0.0, min(worker.deadline for worker in busy) - time.monotonic())
        poll = select.poll()  # not select: a trainer may hold more than 1,024 descriptors
        for worker in busy:
            poll.register(worker.channel, select.POLLIN)
        ready = {descriptor for descriptor, _ in poll.poll(seconds * 1000 + 1)}
        now = time.monotonic()
        return [worker for worker in busy if worker.channel.fileno() in ready or now >= worker.deadline]

    def _finish(self, worker: _Worker) -> Outcome | None:
        """Reads what there is; None while the reply is incomplete and there is time."""
        part = None
        if _readable(worker.channel):
            try:
                part = worker.channel.recv(1 << 16)
            except OSError:
                part = b""
        if part == b"":
            return _cause_of_death(self._bury(worker))
        worker.reply += part or b""
        if len(worker.reply) >= HEADER.size:
            size = HEADER.unpack(worker.reply[: HEADER.size])[0]
            if size > MAX_REPLY:
                self._bury(worker)
                return Outcome("lost")
            if len(worker.reply) - HEADER.size >= size:
                return self._read(worker)
        if time.monotonic() < worker.deadline:
            return None
        starved = is_starved(worker.started, (time.monotonic(), *_scheduled(worker.pid)), _state(worker.pid))
        self._bury(worker)
        return Outcome("starved" if starved else "timeout")

    def _read(self, worker: _Worker) -> Outcome:
        try:
            value = json.loads(bytes(worker.reply[HEADER.size :]))
        except ValueError:
            value = None
        if not isinstance(value, dict):
            self._bury(worker)
            return Outcome("lost")
        if worker.jobs < JOBS_PER_WORKER:
            self._idle.append(worker)
        else:
            self._bury(worker)
        return Outcome("done", value)

    def _bury(self, worker: _Worker) -> int:
        """Ends a worker; its wait status, -1 if nobody knows any more."""
        worker.channel.close()
        try:
            return self._call(struct.pack("!q", worker.pid), []) if self._control else -1
        except (OSError, PoolError):
            return -1


def _readable(channel: socket.socket) -> bool:
    poll = select.poll()
    poll.register(channel, select.POLLIN)
    return bool(poll.poll(0))


def _cause_of_death(status: int) -> Outcome:
    """Reads a wait status: the CPU timer, the memory limit or a crash are the answer's doing, all else is not."""
    if status < 0:
        return Outcome("lost")
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number == signal.SIGPROF:
            return Outcome("timeout")
        crashes = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL)
        return Outcome("crash" if number in crashes else "lost")
    return Outcome("memory" if os.WEXITSTATUS(status) == MEMORY_EXIT else "lost")


def _scheduled(pid: int) -> tuple[float, float]:
    """Seconds a process has run and has waited for a processor; 0, 0 where the kernel does not say."""
    try:
        run, wait, _ = Path(f"/proc/{pid}/schedstat").read_text().split()
    except (OSError, ValueError):
        return 0.0, 0.0
    return int(run) / 1e9, int(wait) / 1e9


def _state(pid: int) -> str:
    """One letter: R runs, S sleeps, T is stopped, D waits for a disk; empty where the kernel does not say."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""


def is_starved(start: tuple[float, float, float], end: tuple[float, float, float], state: str) -> bool:
    """Whether a job that reached the wall-clock net without using up its CPU time was kept from running.

    Args:
        start: Wall clock, seconds run and seconds waited for a processor, when the job began.
        end: The same now.
        state: Letter of the process's state now.
    """
    wall, ran, waited = (b - a for a, b in zip(start, end, strict=True))
    return state in ("", "T", "t", "D") or waited > 0.5 * (wall - ran)
