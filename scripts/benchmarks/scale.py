"""Section ``scale``: how the time of an iteration grows with each axis, and what a second process brings."""

from __future__ import annotations

import math
import random
import socket
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from .rows import median, say
from .settings import Bench
from .workers import Worker, environment

BASE = {"prompt": 64, "group": 8, "completion": 64}
AXES = {
    "prompt": (64, 128, 256, 512, 1024),
    "group": (4, 8, 16, 32, 64),
    "completion": (64, 128, 256, 512, 1024),
}
QUICK_BASE = {"prompt": 16, "group": 4, "completion": 16}
QUICK_AXES = {"prompt": (16, 32, 64), "group": (4, 8, 16), "completion": (16, 32, 64)}
QUICK_TOKENS = 1024
# Of one micro-batch, at every point: above the longest prompt with its answers, which are not divided then.
TOKEN_BUDGET = 2048
WARMUPS = 2


def run(bench: Bench) -> dict[str, Any]:
    """Time of rollout and update per token along each axis at about the same number of tokens; then 1 and 2 processes.

    Along an axis the number of prompts is fixed, so tokens grow with it, and the exponent of time against tokens says
    whether an iteration's cost is linear in its tokens (1) or worse. FILE gets every point when it is measured.
    """
    args = bench.args
    base, axes, budget = (QUICK_BASE, QUICK_AXES, QUICK_TOKENS) if args.quick else (BASE, AXES, args.scale_tokens)
    own = {"token_budget": setup(bench)["token_budget"]}
    points: dict[str, list[dict[str, Any]]] = {}
    with Worker("ours", "ours_grpo", setup(bench), bench.env) as worker:
        for _ in range(WARMUPS):
            worker.request(**request(bench, base, 2))
        for axis, values in axes.items():
            points[axis] = []
            for value in values:
                points[axis].append(point(bench, worker, {**base, axis: value}, axis, budget))
                bench.record("scale", {"unfinished": True, "points": points, "settings": own})
        two = processes(bench, worker, base, budget)
    exponents = {axis: exponent([(p["tokens"], p["seconds"]) for p in along]) for axis, along in points.items()}
    for axis, value in exponents.items():
        say(f"scale  time grows with tokens ^ {value:.2f} along the {axis} axis")
    result = {"exponents": exponents, "points": points, "processes": two, "settings": own}
    if args.json is not None:
        result["plot"] = plot(points, exponents, args.json.with_name(args.json.stem + "_scale.png"))
        say(f"scale  {result['plot']}")
    return result


def setup(bench: Bench, **more: Any) -> dict[str, Any]:
    """Of a worker."""
    return bench.setup(engine=bench.args.engine, token_budget=bench.args.token_budget or TOKEN_BUDGET, **more)


def request(bench: Bench, shape: dict[str, int], prompts: int) -> dict[str, Any]:
    """An iteration of this shape; lengths are exact, nothing stops early."""
    draw = random.Random(bench.args.seed)
    tokens = [token for prompt in bench.prompts("fixed") for token in prompt]
    given = [[draw.choice(tokens) for _ in range(shape["prompt"])] for _ in range(prompts)]
    return {"kind": "fixed", "prompts": given, "samples": shape["group"], "new_tokens": shape["completion"]}


def prompts_for(shape: dict[str, int], budget: int) -> int:
    """As many prompts as the budget of tokens holds, prompts counted once."""
    return max(1, round(budget / (shape["prompt"] + shape["group"] * shape["completion"])))


def point(bench: Bench, worker: Worker, shape: dict[str, int], axis: str, budget: int) -> dict[str, Any]:
    """One shape: at a fixed number of prompts for the exponent, and at the token budget for the time per token."""
    axes = QUICK_AXES if bench.args.quick else AXES
    middle = {**shape, axis: axes[axis][len(axes[axis]) // 2]}
    count = prompts_for(middle, budget)
    seconds = timed(worker, request(bench, shape, count), bench.args.repeats)
    tokens = count * (shape["prompt"] + shape["group"] * shape["completion"])
    even = prompts_for(shape, budget)
    even_tokens = even * (shape["prompt"] + shape["group"] * shape["completion"])
    per_token = timed(worker, request(bench, shape, even), bench.args.repeats) / even_tokens
    say(
        f"scale  {axis:10s} {shape[axis]:5d}: {count:3d} prompts {tokens:7d} tok {seconds:8.3f} s;  at the budget "
        f"{even_tokens:6d} tok {per_token * 1e6:8.1f} us a token"
    )
    return {
        "value": shape[axis],
        "tokens": tokens,
        "seconds": seconds,
        "budget_tokens": even_tokens,
        "us_per_token": per_token * 1e6,
    }


def timed(worker: Worker, what: dict[str, Any], repeats: int) -> float:
    """Median seconds of an iteration, after one of the same shape."""
    worker.request(**what)
    return median(worker.request(**what)["seconds"] for _ in range(repeats))


def exponent(points: Sequence[tuple[float, float]]) -> float:
    """Slope of log time against log tokens, by least squares."""
    x, y = ([math.log(p[i]) for p in points] for i in (0, 1))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


def processes(bench: Bench, alone: Worker, base: dict[str, int], budget: int) -> dict[str, Any] | None:
    """The same iteration by one process with all threads and by two with half of them each, replicated, A B A B.

    None on a machine with a single GPU, which two processes would only share.
    """
    if bench.found["gpus"] == 1:
        return None
    what = request(bench, base, max(2, prompts_for(base, budget) // 2 * 2))
    threads = max(1, bench.args.threads // 2)
    env = environment(threads, bench.args.allocator) | rendezvous(2)
    times: dict[str, list[float]] = {"1": [], "2": []}
    with ExitStack() as stack:
        team = []
        for rank in range(2):
            own = {**env, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            given = setup(bench, rank=rank, world=2, threads=threads)
            team.append(stack.enter_context(Worker(f"process {rank}", "ours_grpo", given, own, wait=False)))
        for worker in team:
            worker.ready()
        for i in range(WARMUPS + 1 + bench.args.repeats):
            for name, workers in (("1", [alone]), ("2", team)):
                for worker in workers:
                    worker.send(**what)
                seconds = max(worker.answer()["seconds"] for worker in workers)
                if i > WARMUPS:
                    times[name].append(seconds)
    seconds = {name: median(values) for name, values in times.items()}
    say(
        f"scale  1 process with {bench.args.threads} threads: {seconds['1']:.3f} s; "
        f"2 processes with {threads}: {seconds['2']:.3f} s"
    )
    return {
        "seconds": seconds,
        "threads": {"1": bench.args.threads, "2": threads},
        "speedup": seconds["1"] / seconds["2"],
    }


def rendezvous(world: int) -> dict[str, str]:
    """What torchrun would set."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    size = str(world)
    return {
        "TORCHELASTIC_RUN_ID": "bench", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GROUP_RANK": "0",
        "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size,
    }  # fmt: skip


def plot(points: dict[str, list[dict[str, Any]]], exponents: dict[str, float], path: Path) -> str:
    """Seconds against tokens, and time a token at the budget against each axis."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4))
    for axis, along in points.items():
        left.loglog(
            [p["tokens"] for p in along], [p["seconds"] for p in along], "o-", label=f"{axis}: {exponents[axis]:.2f}"
        )
        right.semilogx([p["value"] for p in along], [p["us_per_token"] for p in along], "o-", label=axis, base=2)
    left.set(xlabel="tokens of an iteration", ylabel="s", title="time against tokens (exponents)")
    right.set(xlabel="length or size", ylabel="us a token", title="at a fixed token budget", ylim=(0, None))
    for part in (left, right):
        part.legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return str(path)
