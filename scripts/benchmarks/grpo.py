"""Section ``grpo``: whole iterations (rollout, rewards, update) beside TRL's GRPOTrainer."""

from __future__ import annotations

from typing import Any

from .rows import Rows, median, say
from .settings import Bench
from .workers import BenchError, OutOfMemory, Worker, interleaved

OURS = "ours"
# Gates look closely at the first two iterations, which then cost more.
WARMUPS = 2
# Name of a comparison: key of its speed-up, natural stops or fixed length, TRL with bf16 weights.
VARIANTS: dict[str, tuple[str, str, bool]] = {
    "headline": ("speedup_vs_trl", "ragged", False),
    "bf16": ("speedup_vs_trl_bf16", "ragged", True),
    "fixed": ("speedup_vs_trl_fixed", "fixed", False),
}


def run(bench: Bench) -> dict[str, Any]:
    """One pair after another: ours and TRL alternate, so that no more than two models are in memory."""
    rows, micro_batches = Rows("grpo"), {}
    trl = bench.args.peer == "trl"
    version = None
    for variant in bench.variants(VARIANTS):
        _, kind, bf16 = VARIANTS[variant]
        if bf16 and (bench.dtype != "bfloat16" or not bench.found["multiplies_bfloat16"]):
            say("grpo: bf16 left out: this machine, or --dtype, does not multiply bfloat16")
            continue
        if not trl and bf16:
            continue
        peer = best_peer(bench, kind, bf16, micro_batches) if trl else None
        with Worker(OURS, "ours_grpo", bench.setup(engine=bench.args.engine), bench.env) as ours:
            try:
                for _ in range(WARMUPS):
                    ours.request(**bench.request(kind, new_tokens=max(2, bench.args.new_tokens // 8)))
                ours.request(**bench.request(kind))
                for worker in interleaved([ours, peer] if peer else [ours], bench.args.repeats):
                    rows.add(variant, worker.name, worker.request(**bench.request(kind)))
            finally:
                if peer:
                    version = peer.hello["trl"]
                    peer.close()
    if version is not None:
        bench.found["machine"]["versions"]["trl"] = version
    say("\n" + rows.table())
    return {**summary(rows, trl), "micro_batches": micro_batches, "order": rows.order()}


def trl_name(bench: Bench, bf16: bool) -> str:
    """What rows call TRL in this precision."""
    if bf16:
        return "trl bf16 weights"
    return "trl fp32+autocast" if bench.dtype == "bfloat16" else "trl fp32"


def best_peer(bench: Bench, kind: str, bf16: bool, tried: dict[str, Any]) -> Worker:
    """TRL with the fastest of the micro-batch sizes: each has one step, which is also its warm-up."""
    total = bench.args.prompts * bench.args.samples
    sizes = [size for size in bench.args.micro_batches if total % size == 0]
    if not sizes:
        raise BenchError(f"--micro_batches: none of {bench.args.micro_batches} divides prompts * samples = {total}")
    name = trl_name(bench, bf16)
    best: tuple[float, Worker] | None = None
    try:
        for size in sizes:
            setup = bench.setup(
                kind=kind,
                micro_batch=size,
                prompts=bench.prompts(kind),
                weights="bfloat16" if bf16 else "float32",
                autocast=bench.dtype == "bfloat16" and not bf16,
            )
            worker = Worker(name, "peer_trl", setup, bench.env, bench.peer_python)
            try:
                answer = worker.request()
            except OutOfMemory:
                worker.close()
                say(f"grpo select   {kind:8s} {name:22s} micro-batch {size:3d}: out of memory")
                continue
            except BaseException:
                worker.close()
                raise
            rate = answer["tokens"] / answer["seconds"]
            say(
                f"grpo select   {kind:8s} {name:22s} micro-batch {size:3d}: {answer['seconds']:8.3f} s "
                f"{answer['tokens']:7d} tok {rate:10.1f} tok/s  peak {answer['peak_bytes'] / 2**30:5.2f} GiB"
            )
            tried.setdefault(f"{name}, {kind}", {})[str(size)] = rate
            if best is not None and best[0] >= rate:
                worker.close()
                continue
            if best is not None:
                best[1].close()
            best = rate, worker
    except BaseException:
        if best is not None:
            best[1].close()
        raise
    if best is None:
        raise OutOfMemory(f"--micro_batches: {name} has no memory for any of {sizes}")
    return best[1]


def summary(rows: Rows, trl: bool) -> dict[str, Any]:
    """Ratios per useful token, and what they are made of."""
    result: dict[str, Any] = {key: None for key, _, _ in VARIANTS.values()}
    result |= {"activation_memory_vs_trl": None, "peak_memory_vs_trl": None}
    for variant, (key, _, _) in VARIANTS.items():
        names = list(dict.fromkeys(row.contender for row in rows.rows if row.case == variant))
        if not names:
            continue
        result[variant] = {
            "ours" if n == OURS else "trl": {**rows.summary(variant, n), **memory(rows, variant, n)} for n in names
        }
        if len(names) == 2:
            result[key] = rows.speedup(variant, OURS, names[1])
    first = next((v for v in VARIANTS if v in result), None)
    if first is not None:
        ours = result[first]["ours"]
        result |= {"s_per_step": ours["seconds"]["median"], "tokens_per_s": ours["tokens_per_s"]["median"]}
    if trl and "trl" in result.get("headline", {}):
        ours, peer = result["headline"]["ours"], result["headline"]["trl"]
        result["trl_s_per_step"] = peer["seconds"]["median"]
        result["peak_memory_vs_trl"] = ours["peak_bytes"] / peer["peak_bytes"]
        result["activation_memory_vs_trl"] = ours["activation_bytes"] / peer["activation_bytes"]
    return result


def memory(rows: Rows, case: str, contender: str) -> dict[str, Any]:
    """What is left of the peak without parameters, gradients, optimizer state and the imports.

    Ours counts its fp32 masters and the compute view as parameters; the engine's packed weights stay in the rest.
    """
    answers = [row.answer for row in rows.of(case, contender)]
    static = answers[-1]["static_bytes"]
    rest = [a["peak_bytes"] - a["baseline_bytes"] - sum(static.values()) for a in answers]
    return {
        "activation_bytes": max(1, max(rest)),
        "static_bytes": static,
        "baseline_bytes": median(a["baseline_bytes"] for a in answers),
    }
