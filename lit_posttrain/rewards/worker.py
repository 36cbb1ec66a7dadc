"""The processes in which untrusted answers are evaluated: a parent that imports once and forks, and its workers.

This file is run as a script by its path, never imported by the trainer: it must not import torch or this package.
The trainer holds one socket to the parent ("zygote") and one to each worker. Every process here ends when the trainer
does, however that ends: the parent at end-of-file or when it is orphaned, the workers by the parent-death signal.
"""

import contextlib
import ctypes
import gc
import json
import os
import pickle
import resource
import select
import signal
import socket
import struct
import sys
from typing import Any

PR_SET_PDEATHSIG = 1
MEMORY_EXIT = 71
HEADER = struct.Struct("!I")


def math_equal(gold: str, answers: list[str]) -> dict[str, Any]:
    """Whether every answer equals gold; ``known`` says whether gold itself could be read."""
    from latex2sympy2_extended.sets import FiniteSet
    from math_verify import LatexExtractionConfig, parse, verify

    # LaTeX only: the other extraction hands the text to sympy.parse_expr, which is eval. No SIGALRM time limits: they
    # need a main thread and do not stop a power of big integers; the CPU timer of this process does.
    config = [LatexExtractionConfig(boxed_match_priority=-1)]

    def read(text: str) -> list[Any]:
        found = parse(f"${text}$", config, fallback_mode="no_fallback", parsing_timeout=None)  # type: ignore[arg-type]
        return [] if found == [FiniteSet()] and "emptyset" not in text else found

    wanted = read(gold)
    if not wanted:
        return {"known": False, "equal": False, "read": False}
    for answer in answers:
        given = read(answer)
        if not given:
            return {"known": True, "equal": False, "read": False}
        if not verify(wanted, given, timeout_seconds=None, allow_set_relation_comp=True):
            return {"known": True, "equal": False, "read": True}
    return {"known": True, "equal": True, "read": True}


def gym_score(name: str, answer: str, entry: dict[str, Any]) -> dict[str, Any]:
    """Score of an answer by the scorer of a reasoning-gym generator, or the class of what it raised."""
    from reasoning_gym import get_score_answer_fn

    scorer: Any = get_score_answer_fn(name)
    try:
        return {"score": float(scorer(answer=answer, entry=entry))}
    except MemoryError:
        raise
    except Exception as error:
        return {"error": type(error).__name__}


TASKS = {"math": math_equal, "gym": gym_score}


def warm_up(task: str) -> None:
    """Imports and compiles what every job needs, so that forks inherit it."""
    import logging

    logging.disable(logging.CRITICAL)
    if task == "math":
        math_equal(r"\frac{1}{2}", [r"x=\frac{2}{4}"])
    else:
        import reasoning_gym  # noqa: F401


def die_with_parent(parent: int) -> None:
    """SIGKILL when the parent ends; at once if it already has."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def receive(channel: socket.socket) -> bytes | None:
    """One length-prefixed message; None at end-of-file."""
    data = bytearray()
    size = HEADER.size
    while len(data) < size:
        part = channel.recv(min(size - len(data), 1 << 16))
        if not part:
            return None
        data += part
        if size == HEADER.size == len(data):
            size += HEADER.unpack(data)[0]
    return bytes(data[HEADER.size :])


def limit(memory: int) -> None:
    """No more memory than this, no files, no cores; the first to go when the machine runs out of memory."""
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
    for what, value in (("AS", memory), ("FSIZE", 0), ("CORE", 0), ("NOFILE", 64)):
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(getattr(resource, f"RLIMIT_{what}"), (value, value))


def work(channel: socket.socket, task: str, memory: int, parent: int) -> None:
    """Answers jobs until the trainer hangs up. A job that uses up its CPU time is ended by the kernel's timer."""
    die_with_parent(parent)
    limit(memory)
    while (message := receive(channel)) is not None:
        seconds, arguments = pickle.loads(message)  # from the trainer; the way back is JSON
        try:
            # SIGPROF keeps its default action, which ends the process even inside one long operation in C.
            signal.setitimer(signal.ITIMER_PROF, seconds)
            reply = TASKS[task](*arguments)
        except MemoryError:
            os._exit(MEMORY_EXIT)
        except Exception as error:
            reply = {"raised": type(error).__name__}
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        data = json.dumps(reply).encode()
        channel.sendall(HEADER.pack(len(data)) + data)


def serve(control: socket.socket, task: str, memory: int) -> None:
    """Forks a worker for each socket that arrives, and kills and buries the one it is told to."""
    trainer, me = os.getppid(), os.getpid()
    children: set[int] = set()
    while True:
        if not select.select([control], [], [], 1.0)[0]:
            if os.getppid() == trainer:
                continue
            break  # a fork of the trainer still holds our socket open, but the trainer is gone
        message, descriptors, _, _ = socket.recv_fds(control, 64, 1)
        if not message:
            break
        if descriptors:
            child = os.fork()
            if child == 0:
                control.close()
                try:
                    work(socket.socket(fileno=descriptors[0]), task, memory, me)
                finally:
                    os._exit(0)
            os.close(descriptors[0])
            children.add(child)
            control.sendall(struct.pack("!q", child))
        else:
            (child,) = struct.unpack("!q", message)
            status = -1
            if child in children:  # never any other process: a number may have been given to someone else by now
                children.discard(child)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
                status = os.waitpid(child, 0)[1]
            control.sendall(struct.pack("!q", status))
    for child in children:
        os.kill(child, signal.SIGKILL)


def main() -> None:
    """Arguments: descriptor of the control socket, task, memory limit in bytes, the trainer's import path as JSON."""
    # The trainer's signals (Ctrl-C, a batch system's warning) mean "save and stop" to it and nothing to us.
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGPIPE"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    control = socket.socket(fileno=int(sys.argv[1]))
    sys.path[:] = json.loads(sys.argv[4])
    try:
        warm_up(sys.argv[2])
        gc.freeze()
    except Exception as error:
        control.sendall(f"{type(error).__name__}: {error}".encode()[:4000])
        return
    control.sendall(b"ready")
    serve(control, sys.argv[2], int(sys.argv[3]))


if __name__ == "__main__":
    main()
