"""Sections ``sft``, ``rm`` and ``dpo``: whole steps on fixed examples beside TRL's trainers."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from . import offline_data as data
from .grpo import OURS, memory, trl_name
from .rows import Rows, say
from .settings import Bench
from .train import filled
from .workers import BenchError, OutOfMemory, Worker, interleaved

# Gates look closely at the first two steps, which then cost more; the peer makes as many, so that steps correspond.
WARMUPS = 2
# Learning rates, of both sides alike.
RATES = {"sft": 1e-5, "rm": 9e-6, "dpo": 1e-6}
# What both sides say of a step, under the same names, and how far apart in bf16 the first step may be, relatively: a
# norm adds up the noise of every gradient, and a ranking's loss that of differences. DPO's loss begins at log 2
# whatever the data are, so its log-probs are compared too.
CHECKED: dict[str, dict[str, float]] = {
    "sft": {"loss": 0.01, "grad_norm": 0.1},
    "rm": {"loss": 0.03, "grad_norm": 0.1},
    "dpo": {"loss": 0.03, "grad_norm": 0.1, "logps/chosen": 0.005, "logps/rejected": 0.005},
}
FP32_SHARE = 0.1  # of these, where both sides compute in fp32
PACKED = "packed"


class Comparison(NamedTuple):
    """What is compared.

    Attributes:
        data: Name of the examples, of ``offline_data.SHAPES``.
        bf16: Whether the peer's weights are bf16; ours are computed in bf16 from fp32 masters either way.
        cached: Whether the reference's log-probs are known before the first step.
    """

    data: str
    bf16: bool = False
    cached: bool = False


VARIANTS: dict[str, dict[str, Comparison]] = {
    "sft": {"masters": Comparison("sft"), "bf16": Comparison("sft", bf16=True)},
    "rm": {"masters": Comparison("rm"), "bf16": Comparison("rm", bf16=True), "pairs": Comparison("pairs")},
    "dpo": {
        "masters": Comparison("dpo"),
        "bf16": Comparison("dpo", bf16=True),
        "cached": Comparison("dpo", cached=True),
    },
}


def run(task: str, bench: Bench) -> dict[str, Any]:
    """One comparison after another: ours and TRL alternate, so that no more than two models are in memory."""
    rows, tried, firsts, floors = Rows(task), {}, {}, {}
    trl = bench.args.peer == "trl"
    for variant in bench.variants(VARIANTS[task]):
        comparison = VARIANTS[task][variant]
        if comparison.bf16 and (bench.dtype != "bfloat16" or not bench.found["multiplies_bfloat16"]):
            say(f"{task}: bf16 left out: this machine, or --dtype, does not multiply bfloat16")
            continue
        if not trl and comparison.bf16:
            continue
        layout = best_layout(bench, task, comparison, tried) if trl else None
        firsts[variant] = measure(bench, task, variant, layout, rows)
        floors[variant] = floor(bench, task, comparison)
    more = {"micro_batches": tried, "order": rows.order(), "settings": {"token_budget": token_budget(bench, task)}}
    result = {**summary(bench, task, rows, firsts, floors), **more}
    say("\n" + table(task, rows, result))
    return result


def setup(bench: Bench, task: str, comparison: Comparison) -> dict[str, Any]:
    """What both sides are told."""
    offline = bench.found["offline"]
    return bench.setup(
        task=task,
        model=offline["classifier"] if task == "rm" else bench.model,
        examples=offline["examples"][comparison.data],
        token_budget=token_budget(bench, task),
        rate=RATES[task],
        checked=list(CHECKED[task]),
    )


def token_budget(bench: Bench, task: str) -> int:
    """Of our micro-batches: what was asked for, or the algorithm's default."""
    return bench.args.token_budget or bench.found["token_budget" if task == "sft" else "together_budget"]


def start_ours(bench: Bench, task: str, comparison: Comparison) -> Worker:
    """Ours, not yet loaded."""
    cache = str(Path(bench.folder) / "references") if comparison.cached else None
    return Worker(
        OURS, "ours_offline", {**setup(bench, task, comparison), "reference_cache": cache}, bench.env, wait=False
    )


def start_peer(bench: Bench, task: str, comparison: Comparison, layout: dict[str, Any]) -> Worker:
    """TRL, not yet loaded."""
    told = {
        **setup(bench, task, comparison),
        **layout,
        "padding": bench.found["offline"]["padding"],
        "cached": comparison.cached,
        "weights": "bfloat16" if comparison.bf16 else "float32",
        "autocast": bench.dtype == "bfloat16" and not comparison.bf16,
    }
    return Worker(trl_name(bench, comparison.bf16), "peer_offline", told, bench.env, bench.peer_python, wait=False)


def layouts(bench: Bench, task: str, comparison: Comparison) -> dict[str, dict[str, Any]]:
    """How TRL may split the step: padded micro-batches of so many sequences; packed rows where its trainer has them.

    Raises:
        BenchError: No size divides the step, and a mean over unequal micro-batches would be another loss.
    """
    examples = bench.found["offline"]["examples"][comparison.data]
    sizes = bench.args.micro_batches
    if task == "sft":
        # Its loss is a sum divided by the step's tokens, so the last micro-batch may be smaller.
        padded = {str(n): {"rows_at_once": min(n, len(examples)), "packed": False} for n in sizes}
        return {**padded, PACKED: {"rows_at_once": 1, "packed": True}}
    pairs = data.pairs(examples)
    fitting = [n for n in sizes if n % 2 == 0 and pairs % (n // 2) == 0]
    if not fitting:
        raise BenchError(f"--micro_batches: none of {sizes} is even and divides the 2 * {pairs} sequences of {task}")
    return {str(n): {"rows_at_once": n // 2, "packed": False} for n in fitting}


def best_layout(bench: Bench, task: str, comparison: Comparison, tried: dict[str, Any]) -> dict[str, Any]:
    """The fastest of TRL's layouts at its last warm-up step. Each is alone in memory, since some need much of it."""
    candidates = layouts(bench, task, comparison)
    if len(candidates) == 1:
        return next(iter(candidates.values()))
    rates = {}
    useful = data.useful_tokens(bench.found["offline"]["examples"][comparison.data])
    for name, layout in candidates.items():
        with start_peer(bench, task, comparison, layout) as worker:
            what = f"{task} select   {comparison.data:8s} {worker.name:22s} micro-batch {name:6s}: "
            try:
                worker.ready()
                answer = warm_up(worker)[-1]
            except OutOfMemory:
                say(f"{what}out of memory")
                continue
            rates[name] = useful / answer["seconds"]
            peak = answer["peak_bytes"] / 2**30
            say(f"{what}{answer['seconds']:8.3f} s {rates[name]:10.1f} tok/s  peak {peak:5.2f} GiB")
    if not rates:
        raise OutOfMemory(f"--micro_batches: TRL has no memory for any of {list(candidates)}")
    key = f"{trl_name(bench, comparison.bf16)}, {comparison.data}{', cached' if comparison.cached else ''}"
    tried[key] = rates
    return candidates[max(rates, key=lambda name: rates[name])]


def warm_up(worker: Worker) -> list[dict[str, Any]]:
    """The first steps."""
    return [worker.request() for _ in range(WARMUPS)]


def measure(
    bench: Bench, task: str, variant: str, layout: dict[str, Any] | None, rows: Rows
) -> dict[str, dict[str, float]]:
    """Interleaved steps; what both sides said of the first one.

    Raises:
        BenchError: Both sides do not compute the same.
    """
    comparison = VARIANTS[task][variant]
    tokens = data.useful_tokens(bench.found["offline"]["examples"][comparison.data])
    with ExitStack() as stack:
        workers = [stack.enter_context(start_ours(bench, task, comparison))]
        if layout is not None:
            workers.append(stack.enter_context(start_peer(bench, task, comparison, layout)))
        for worker in workers:
            worker.ready()
        firsts = {worker.name: warm_up(worker)[0]["metrics"] for worker in workers}
        if layout is not None:
            bench.found["machine"]["versions"]["trl"] = workers[1].hello["trl"]
            check(task, variant, bench.dtype, *firsts.values())
        for worker in interleaved(workers, bench.args.repeats):
            rows.add(variant, worker.name, {**worker.request(), "tokens": tokens})
    return firsts


def floor(bench: Bench, task: str, comparison: Comparison) -> float:
    """Seconds of a step's products and attention alone, every prompt once: what no implementation of ours undercuts."""
    examples = bench.found["offline"]["examples"][comparison.data]
    groups = [[len(e["prompt"]), *map(len, e["completions"])] for e in examples]
    batches = filled(groups, token_budget(bench, task), sum)
    with Worker("limits", "limits_worker", bench.setup(), bench.env) as worker:
        seconds = sum(worker.request(what="training", batches=batches, head=task != "rm").values())
        if task == "dpo" and not comparison.cached:
            seconds += sum(worker.request(what="training", batches=batches, backward=False).values())
    return seconds


def check(task: str, variant: str, dtype: str, ours: dict[str, float], peer: dict[str, float]) -> None:
    """Print the first step of both sides, and see that it is the same.

    Raises:
        BenchError: It is not, beyond the precision's rounding.
    """
    what, share = f"{task} {variant}", 1.0 if dtype == "bfloat16" else FP32_SHARE
    for name, limit in CHECKED[task].items():
        value, other = ours[name], peer[name]
        gap = abs(value - other) / max(abs(value), abs(other), 1e-12)
        say(f"{what:14s} first step, {name:14s}: ours {value:10.4f}  trl {other:10.4f}  {gap:.2%} apart")
        if not gap <= share * limit:
            raise BenchError(
                f"{what}: {name} of the first step is {value:.5g} here and {other:.5g} there, {gap:.2%} apart: the two "
                "sides do not compute the same, so their times say nothing"
            )


def summary(
    bench: Bench, task: str, rows: Rows, firsts: dict[str, dict[str, dict[str, float]]], floors: dict[str, float]
) -> dict[str, Any]:
    """Ratios per useful token, what they are made of, and every row."""
    result: dict[str, Any] = {}
    for variant, metrics in firsts.items():
        names = list(metrics)
        sides = {"ours" if n == OURS else "trl": n for n in names}
        result[variant] = {
            side: {**rows.summary(variant, n), **memory(rows, variant, n), "first_step": metrics[n]}
            for side, n in sides.items()
        }
        examples = bench.found["offline"]["examples"][VARIANTS[task][variant].data]
        result[variant]["data"] = data.described(examples)
        result[variant]["floor_s"] = floors[variant]
        result[variant]["fraction_of_floor"] = floors[variant] / result[variant]["ours"]["seconds"]["median"]
        if "trl" in sides:
            result[variant]["speedup_at_floor"] = result[variant]["trl"]["seconds"]["median"] / floors[variant]
            ours, peer = result[variant]["ours"], result[variant]["trl"]
            result[variant] |= {
                "speedup": rows.speedup(variant, OURS, sides["trl"]),
                "peak_memory_vs_trl": ours["peak_bytes"] / peer["peak_bytes"],
                "activation_memory_vs_trl": ours["activation_bytes"] / peer["activation_bytes"],
            }
        result["speedup_vs_trl" if variant == "masters" else f"speedup_vs_trl_{variant}"] = result[variant].get(
            "speedup"
        )
    result["rows"] = [
        {
            "variant": row.case,
            "contender": row.contender,
            "seconds": row.seconds,
            "tokens": row.tokens,
            "peak_bytes": row.answer["peak_bytes"],
            "loss": row.answer["metrics"]["loss"],
        }
        for row in rows.rows
    ]
    return result


def table(task: str, rows: Rows, result: dict[str, Any]) -> str:
    """Every comparison and contender once, and below it what each was given."""
    head = ("contender", "s/step", "tok/s", "ratio", "peak", "activations", "loss")
    lines = [f"{task:8s} {{:22s}} {{:>9s}} {{:>10s}} {{:>6s}} {{:>10s}} {{:>11s}} {{:>8s}}".format(*head)]
    notes = []
    for variant in dict.fromkeys(row.case for row in rows.rows):
        found = result[variant]
        for contender in dict.fromkeys(row.contender for row in rows.rows if row.case == variant):
            side = found["ours" if contender == OURS else "trl"]
            ratio = f"{found['speedup']:.2f}" if contender == OURS and "speedup" in found else ""
            lines.append(
                f"{variant:8s} {contender:22s} {side['seconds']['median']:9.3f} {side['tokens_per_s']['median']:10.1f} "
                f"{ratio:>6s} {side['peak_bytes'] / 2**30:6.2f} GiB {side['activation_bytes'] / 2**30:7.2f} GiB "
                f"{side['first_step']['loss']:8.4f}"
            )
        notes.append(f"{variant}: {note(task, found['data'])}")
        least = f"products and attention alone take {found['floor_s']:.2f} s, {found['fraction_of_floor']:.0%} of ours"
        most = f"; at that the ratio would be {found['speedup_at_floor']:.2f}" if "speedup" in found else ""
        notes.append(f"{variant}: {least}{most}")
    return "\n".join([*lines, *notes])


def note(task: str, given: dict[str, Any]) -> str:
    """What a comparison's data are, and in which form each side has them."""
    examples, each, pairs = given["examples"], given["completions_each"], given["pairs"]
    useful = f"{given['useful_tokens']} useful tokens, every prompt and completion counted once for both"
    if task == "sft":
        return f"{examples} demonstrations, loss on completions; {useful}"
    if each == 2:
        return f"{pairs} pairs on both sides; {useful}"
    return (
        f"ours: {examples} prompts with {each} ranked completions; trl: the same {pairs} comparisons as {pairs} pairs, "
        f"{2 * pairs} sequences, since its trainer knows pairs alone; {useful}"
    )
