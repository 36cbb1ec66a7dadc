"""Section ``rollout``: the engine beside Hugging Face's ``generate``."""

from __future__ import annotations

from typing import Any

from .rows import Rows, median, say
from .settings import Bench
from .workers import Worker, interleaved

OURS, HF = "ours", "hf generate"
WARMUP_TOKENS = 8


def run(bench: Bench) -> dict[str, Any]:
    """Fixed length, natural stops and greedy, A B A B.

    ``fixed`` has no stop token; ``ragged`` compares useful tokens a second, those up to and including the stop.
    """
    rows = Rows("rollout")
    hf = Worker(HF, "peer_hf", bench.setup(task="rollout"), bench.env, bench.peer_python, wait=False)
    with hf, Worker(OURS, "ours_rollout", bench.setup(engine=bench.args.engine), bench.env) as ours:
        hf.ready()
        for worker in (ours, hf):
            for kind in ("fixed", "ragged"):
                worker.request(**bench.request(kind, new_tokens=min(WARMUP_TOKENS, bench.args.new_tokens)))
        for kind in ("fixed", "ragged", "greedy"):
            for worker in interleaved((ours, hf), bench.args.repeats if kind != "greedy" else 1):
                rows.add(kind, worker.name, worker.request(**bench.request(kind)))
    say("\n" + rows.table())
    result: dict[str, Any] = {
        "speedup_vs_hf": rows.speedup("fixed", OURS, HF),
        "speedup_vs_hf_ragged": rows.speedup("ragged", OURS, HF),
        "speedup_vs_hf_greedy": rows.speedup("greedy", OURS, HF),
        "tokens_per_s": median(row.rate for row in rows.of("fixed", OURS)),
        "hf_tokens_per_s": median(row.rate for row in rows.of("fixed", HF)),
        "sync_s": median(row.answer["sync_seconds"] for row in rows.rows if row.contender == OURS),
    }
    for kind in ("fixed", "ragged", "greedy"):
        result[kind] = {"ours": rows.summary(kind, OURS), "hf": rows.summary(kind, HF)}
    floor = bench.floor("rollout_floor_tok_s")
    result["fraction_of_floor"] = None if floor is None else result["tokens_per_s"] / floor
    return {**result, "order": rows.order()}
