"""Worker processes: what kills them, who is blamed, and that nothing is left behind."""

import contextlib
import faulthandler
import os
import pickle
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from lit_posttrain.rewards import pool as pools
from lit_posttrain.rewards import worker
from lit_posttrain.rewards.pool import Outcome, PoolError, WorkerPool, is_starved

pytest.importorskip("math_verify")
if sys.platform != "linux":
    pytest.skip("process control of Linux", allow_module_level=True)

EASY = (r"\frac{1}{2}", ["2^{-1}"])
WRONG = (r"\frac{1}{2}", ["3^{-1}"])
ENDLESS = ("5", ["9^{9^{9}}"])


@pytest.fixture(scope="module")
def warm():
    pool = WorkerPool("math", workers=1, timeout=20.0, memory_mb=1024)
    pool.run([EASY])
    yield pool
    pool.close()


def children(pid):
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def eventually(condition, seconds=5.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.01)
    return condition()


def in_background(function):
    """Runs it in a thread; returns a function that waits for what it returned."""
    box = []
    thread = threading.Thread(target=lambda: box.append(function()), daemon=True)
    thread.start()

    def result():
        thread.join(30)
        return box[0]

    return result


def busy_worker(pool):
    """The pid of the worker, once it is computing."""
    zygote = pool._process.pid
    assert eventually(lambda: any(pools._state(pid) == "R" for pid in children(zygote)), 10)
    return next(pid for pid in children(zygote) if pools._state(pid) == "R")


def test_replies_belong_to_their_jobs(warm):
    outcomes = warm.run([EASY, WRONG] * 5)
    assert [o.kind for o in outcomes] == ["done"] * 10
    assert [o.value["equal"] for o in outcomes] == [True, False] * 5
    assert warm.run([]) == []


def test_cpu_limit_is_the_answers_doing():
    pool = WorkerPool("math", workers=1, timeout=0.3, memory_mb=1024)
    try:
        outcomes = pool.run([ENDLESS, (r"\frac12", ["0.5"])])
        if outcomes[0].kind != "starved":  # a machine this busy may deny it even 0.3 s
            assert outcomes[0].kind == "timeout"
            assert outcomes[0].verdict() == (0.0, "scored", "timeout")
        assert len(children(pool._process.pid)) <= 1
    finally:
        pool.close()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_killed_worker(warm, number):
    """kill -9 (say, by the kernel out of memory) is the machine's doing, a segmentation fault the answer's."""
    result = in_background(lambda: warm.run([ENDLESS, EASY]))
    os.kill(busy_worker(warm), number)
    first, second = result()
    assert first.verdict() == (
        (0.0, "invalid", "worker_lost") if number == signal.SIGKILL else (0.0, "scored", "crash")
    )
    assert second.value["equal"]  # the next job has a new worker


def test_respawn_is_fast(warm):
    warm.run([EASY])
    child = children(warm._process.pid)[0]
    os.kill(child, signal.SIGKILL)
    assert eventually(lambda: not is_alive(child))
    start = time.monotonic()
    assert warm.run([EASY])[0].value["equal"]  # died while idle: no sample pays for it
    assert time.monotonic() - start < 1.0
    assert len(children(warm._process.pid)) == 1


def test_lost_parent_is_replaced(warm):
    old = children(warm._process.pid)
    os.kill(warm._process.pid, signal.SIGKILL)
    assert eventually(lambda: not any(is_alive(pid) for pid in old))
    assert warm.run([EASY])[0].kind == "done"


def test_parent_lost_during_a_job(warm):
    result = in_background(lambda: warm.run([ENDLESS, EASY]))
    busy_worker(warm)
    os.kill(warm._process.pid, signal.SIGKILL)
    first, second = result()
    assert first.verdict().status == "invalid"
    assert second.value["equal"]


def test_stopped_worker_is_starved_not_slow():
    pool = WorkerPool("math", workers=1, timeout=0.6, memory_mb=1024)
    try:
        pool.run([EASY])
        child = children(pool._process.pid)[0]
        os.kill(child, signal.SIGSTOP)
        assert pool.run([EASY])[0].verdict() == (0.0, "invalid", "worker_starved")
        assert not is_alive(child)
        assert pool.run([EASY])[0].kind == "done"
    finally:
        pool.close()


@pytest.mark.parametrize(
    ("ran", "waited", "state", "starved"),
    [(0.5, 4.4, "R", True), (0.5, 0.1, "S", False), (0.5, 0.1, "T", True), (0.0, 0.1, "D", True), (0.0, 0.0, "", True),
     (4.9, 0.0, "R", False)],
)  # fmt: skip
def test_starvation_rule(ran, waited, state, starved):
    assert is_starved((10.0, 1.0, 2.0), (15.0, 1.0 + ran, 2.0 + waited), state) is starved


def test_kill_minus_nine_many_times(warm):
    """No verdict is invented, none belongs to another job, nobody is left behind, no descriptor leaks."""
    warm.run([EASY])
    stop, before = threading.Event(), len(os.listdir("/proc/self/fd"))

    def nemesis():
        while not stop.wait(0.01):
            with contextlib.suppress(OSError, AttributeError, IndexError):
                os.kill(children(warm._process.pid)[0], signal.SIGKILL)

    thread = threading.Thread(target=nemesis, daemon=True)
    thread.start()
    try:
        outcomes = warm.run([EASY, WRONG] * 30)
    finally:
        stop.set()
        thread.join()
    assert len(outcomes) == 60
    for i, outcome in enumerate(outcomes):
        assert outcome.kind == "lost" or outcome.value["equal"] is (i % 2 == 0)
    warm.run([EASY])
    assert len(children(warm._process.pid)) == 1
    assert len(os.listdir("/proc/self/fd")) <= before + 1


def test_close_ends_everything_and_a_later_job_starts_anew():
    pool = WorkerPool("math", workers=2, timeout=20.0, memory_mb=1024)
    pool.run([EASY, WRONG])
    pids = [pool._process.pid, *children(pool._process.pid)]
    assert len(pids) >= 2
    pool.close()
    pool.close()
    assert not any(is_alive(pid) for pid in pids)


def test_no_orphans_when_the_trainer_is_killed():
    read, write = os.pipe()
    trainer = os.fork()
    if trainer == 0:
        try:
            pool = WorkerPool("math", workers=1, timeout=100.0, memory_mb=1024)
            pool.run([EASY])
            os.write(write, f"{pool._process.pid} {children(pool._process.pid)[0]}".encode())
            pool.run([ENDLESS])
        finally:
            os._exit(0)
    pids = [int(pid) for pid in os.read(read, 100).split()]
    os.close(read)
    os.close(write)
    assert eventually(lambda: pools._state(pids[1]) == "R", 10)
    os.kill(trainer, signal.SIGKILL)
    os.waitpid(trainer, 0)
    assert eventually(lambda: not any(is_alive(pid) for pid in pids))


def test_copies_start_processes_of_their_own(warm):
    copy = pickle.loads(pickle.dumps(warm))
    assert copy._process is None
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            done = warm.run([EASY])[0].value["equal"]
            os.write(write, f"{done} {warm._process.pid}".encode())
            warm.close()
        finally:
            os._exit(0)
    done, pid = os.read(read, 100).split()
    os.waitpid(child, 0)
    os.close(read)
    os.close(write)
    assert done == b"True"
    assert int(pid) != warm._process.pid
    assert warm.run([EASY])[0].value["equal"]


def test_worker_ignores_the_trainers_signals(warm):
    warm.run([EASY])
    pids = [warm._process.pid, *children(warm._process.pid)]
    for pid in pids:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
            os.kill(pid, number)
        assert os.getsid(pid) != os.getsid(0)  # a terminal's Ctrl-C does not reach it at all
    assert warm.run([EASY])[0].value["equal"]
    assert [warm._process.pid, *children(warm._process.pid)] == pids


def test_worker_holds_no_secrets_and_no_torch(warm):
    warm.run([EASY])
    child = children(warm._process.pid)[0]
    environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
    names = {entry.split(b"=")[0] for entry in environment if entry}
    assert names <= {
        b"PYTHONHASHSEED",
        b"LANG",
        b"LC_CTYPE",
        b"OMP_NUM_THREADS",
        b"OPENBLAS_NUM_THREADS",
        b"LD_LIBRARY_PATH",
    }
    assert "libtorch" not in Path(f"/proc/{child}/maps").read_text()
    limits = Path(f"/proc/{child}/limits").read_text()
    assert f"{1024 << 20}" in next(line for line in limits.splitlines() if line.startswith("Max address space"))
    links = [os.readlink(f"/proc/{child}/fd/{fd}") for fd in os.listdir(f"/proc/{child}/fd")]
    assert all(link == "/dev/null" or link.startswith("socket:") for link in links)


def run_worker(job, seconds=5.0, memory=2 << 30):
    """One job in a forked worker whose task is the given function; its reply, or the outcome of its death."""
    ours, theirs = socket.socketpair()
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        try:
            faulthandler.disable()
            ours.close()
            worker.TASKS["math"] = job
            worker.work(theirs, "math", memory, parent)
        finally:
            os._exit(0)
    theirs.close()
    data = pickle.dumps((seconds, ()))
    ours.sendall(worker.HEADER.pack(len(data)) + data)
    reply = worker.receive(ours)
    ours.close()
    status = os.waitpid(child, 0)[1]
    return pools._cause_of_death(status) if reply is None else reply


def spin():
    while True:
        pass


def hoard():
    grown = resource.getrlimit(resource.RLIMIT_AS)[0]
    return {"unlimited": len(bytearray(grown)) > 0}


def fail():
    raise LookupError("no")


@pytest.mark.parametrize(
    ("job", "expected"),
    [
        (spin, Outcome("timeout")),
        (hoard, Outcome("memory")),
        (os.abort, Outcome("crash")),
        (fail, b'{"raised": "LookupError"}'),
    ],
)
def test_ends_of_a_job(job, expected):
    assert run_worker(job, seconds=0.2, memory=16 << 30) == expected


def test_what_cannot_start_says_why(monkeypatch):
    monkeypatch.setattr(sys, "path", ["/nonexistent"])
    pool = WorkerPool("math", workers=1, timeout=1.0, memory_mb=1024)
    with pytest.raises(PoolError, match="did not start: ModuleNotFoundError"):
        pool.run([EASY])


@pytest.mark.parametrize("wrong", [(0, 1.0, 1024), (1, 0.0, 1024), (1, 1.0, 1)])
def test_limits_are_checked(wrong):
    with pytest.raises(ValueError, match="memory_mb"):
        WorkerPool("math", *wrong)


def test_worker_script_needs_only_the_standard_library():
    code = (
        "import sys, runpy; runpy.run_path(sys.argv[1], run_name='x');"
        "assert not {'torch', 'lit_posttrain', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-I", "-c", code, worker.__file__], check=True)
