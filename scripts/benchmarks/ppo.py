"""Section ``ppo``: whole PPO iterations, beside our GRPO on the same tokens and beside TRL's PPOTrainer."""

from __future__ import annotations

from typing import Any

from .grpo import OURS, WARMUPS, memory, trl_name
from .rows import Rows, say
from .settings import Bench
from .workers import ROOT, BenchError, OutOfMemory, Worker, interleaved

OUR_GRPO = "ours grpo"
# Beside GRPO: fixed length, a checksum as reward, no KL. Beside TRL: a reward model, a reference, one answer a prompt.
VARIANTS = ("grpo", "headline", "bf16")
# The last TRL that has a PPOTrainer; scripts/env.sh puts it there.
PEERS = ROOT / ".venv" / "peers" / "trl-1.12"


def run(bench: Bench) -> dict[str, Any]:
    """One comparison after another."""
    rows, tried = Rows("ppo"), {}
    trl = bench.args.peer == "trl"
    for variant in bench.variants(VARIANTS):
        if variant == "grpo":
            beside_grpo(bench, rows)
        elif variant == "bf16" and (bench.dtype != "bfloat16" or not bench.found["multiplies_bfloat16"]):
            say("ppo: bf16 left out: this machine, or --dtype, does not multiply bfloat16")
        elif variant == "headline" or trl:
            beside_trl(bench, variant, rows, tried if trl else None)
    say("\n" + rows.table())
    return {**summary(rows), "micro_batches": tried, "order": rows.order()}


def beside_grpo(bench: Bench, rows: Rows) -> None:
    """The critic has the policy's size; everything else is equal."""
    setup = bench.setup(engine=bench.args.engine, full=False)
    with Worker(OURS, "ours_ppo", setup, bench.env) as ppo, Worker(OUR_GRPO, "ours_grpo", setup, bench.env) as grpo:
        workers = [ppo, grpo]
        for worker in workers:
            warm_up(worker, bench, "fixed")
        for worker in interleaved(workers, bench.args.repeats):
            rows.add("grpo", worker.name, worker.request(**bench.request("fixed")))


def warm_up(worker: Worker, bench: Bench, kind: str, **more: Any) -> None:
    """Two short iterations for the gates, and a whole one."""
    for _ in range(WARMUPS):
        worker.request(**{**bench.request(kind), **more, "new_tokens": max(2, bench.args.new_tokens // 8)})
    worker.request(**{**bench.request(kind), **more})


def beside_trl(bench: Bench, variant: str, rows: Rows, tried: dict[str, Any] | None) -> None:
    """Ours and TRL alternate."""
    found = bench.found["ppo"]
    more = {"prompts": found["prompts"], "samples": 1}
    shared = {"reward_model": found["classifier"], "stops": [found["eos"]]}
    peer = best_peer(bench, variant == "bf16", shared, tried) if tried is not None else None
    try:
        setup = bench.setup(engine=bench.args.engine, full=True, **{**shared, "samples": 1})
        with Worker(OURS, "ours_ppo", setup, bench.env) as ours:
            warm_up(ours, bench, "ragged", **more)
            for worker in interleaved([ours, peer] if peer else [ours], bench.args.repeats):
                rows.add(variant, worker.name, worker.request(**{**bench.request("ragged"), **more}))
    finally:
        if peer is not None:
            bench.found["machine"]["versions"]["trl (ppo)"] = peer.hello["trl"]
            peer.close()


def best_peer(bench: Bench, bf16: bool, shared: dict[str, Any], tried: dict[str, Any]) -> Worker:
    """TRL with the fastest of the micro-batch sizes, each alone in memory; then again, warm.

    Raises:
        BenchError: No size divides the iteration, or there is no TRL with PPO.
    """
    found = bench.found["ppo"]
    total = len(found["prompts"])
    sizes = [size for size in bench.args.micro_batches if total % size == 0]
    if not sizes:
        raise BenchError(f"--micro_batches: none of {bench.args.micro_batches} divides prompts * samples = {total}")
    if bench.peer_python is None and not PEERS.is_dir():
        raise BenchError(f"no TRL with PPO in {PEERS}; scripts/env.sh dev installs it, or name a --peer_python")
    name, rates = trl_name(bench, bf16), {}

    def start(size: int) -> Worker:
        setup = bench.setup(
            **shared,
            prompts=found["prompts"],
            padding=found["padding"],
            peers=str(PEERS) if bench.peer_python is None else None,
            micro_batch=size,
            weights="bfloat16" if bf16 else "float32",
            autocast=bench.dtype == "bfloat16" and not bf16,
        )
        return Worker(name, "peer_ppo", setup, bench.env, bench.peer_python)

    for size in sizes if len(sizes) > 1 else []:
        try:
            with start(size) as worker:
                answer = worker.request()
        except OutOfMemory:
            say(f"ppo select    {name:22s} micro-batch {size:3d}: out of memory")
            continue
        rates[str(size)] = answer["tokens"] / answer["seconds"]
        say(
            f"ppo select    {name:22s} micro-batch {size:3d}: {answer['seconds']:8.3f} s {answer['tokens']:7d} tok "
            f"{rates[str(size)]:10.1f} tok/s  peak {answer['peak_bytes'] / 2**30:5.2f} GiB"
        )
    tried[name] = rates
    if len(sizes) > 1 and not rates:
        raise OutOfMemory(f"--micro_batches: {name} has no memory for any of {sizes}")
    best = start(int(max(rates, key=lambda size: rates[size])) if rates else sizes[0])
    try:
        best.request()
    except BaseException:
        best.close()
        raise
    return best


def summary(rows: Rows) -> dict[str, Any]:
    """Ratios per useful token, and what they are made of."""
    result: dict[str, Any] = dict.fromkeys(
        ("step_vs_grpo", "speedup_vs_trl", "speedup_vs_trl_bf16", "activation_memory_vs_trl", "peak_memory_vs_trl")
    )
    for variant in VARIANTS:
        names = list(dict.fromkeys(row.contender for row in rows.rows if row.case == variant))
        if not names:
            continue
        sides = {OURS: "ppo" if variant == "grpo" else "ours", OUR_GRPO: "grpo"}
        result[variant] = {sides.get(n, "trl"): {**rows.summary(variant, n), **memory(rows, variant, n)} for n in names}
        if variant == "grpo":
            result["step_vs_grpo"] = rows.speedup(variant, OUR_GRPO, OURS)
        elif len(names) == 2:
            ours, peer = result[variant]["ours"], result[variant]["trl"]
            suffix = "" if variant == "headline" else "_bf16"
            result["speedup_vs_trl" + suffix] = rows.speedup(variant, OURS, names[1])
            if variant == "headline":
                result["activation_memory_vs_trl"] = ours["activation_bytes"] / peer["activation_bytes"]
                result["peak_memory_vs_trl"] = ours["peak_bytes"] / peer["peak_bytes"]
    return result
