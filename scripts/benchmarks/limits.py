"""Section ``limits``: the machine's peaks and what the model's products and attention alone would allow."""

from __future__ import annotations

from typing import Any

from .rows import say
from .settings import Bench
from .train import micro_batches, sequences
from .workers import Worker

ROWS = (1, 8, 32, 64, 128)
CONTEXTS = (64, 128, 192)


def run(bench: Bench) -> dict[str, Any]:
    """Two floors, in tokens a second as ``rollout`` (fixed length) and ``train`` count them.

    Decoding: linear layers, prepacked where that is faster, and attention over the mean context, for all rows at once.
    Training: every product of forward and backward, and attention, of the packed micro-batches.
    """
    args = bench.args
    rows = args.prompts * args.samples
    prompts = bench.prompts("fixed")
    context = round(sum(map(len, prompts)) / len(prompts) + args.new_tokens / 2)
    with Worker("limits", "limits_worker", bench.setup(), bench.env) as worker:
        peaks = worker.request(what="peaks", copy_mib=8 if bench.args.quick else 512)
        for name, value in peaks.items():
            say(f"limits  {name:24s} {value:10.1f}")
        linears = {}
        for n in sorted({*ROWS, rows}):
            answer = worker.request(what="linears", rows=n)
            linears[str(n)] = {**answer, "tok_s": n / fastest(answer)}
            packed = "not packed" if answer["packed"] is None else f"packed {answer['packed'] * 1e3:8.2f} ms"
            rate = f"{n / fastest(answer):9.0f} tok/s"
            turned = f"turned {answer['turned'] * 1e3:8.2f} ms"
            say(f"limits  linears {n:4d} rows: plain {answer['plain'] * 1e3:8.2f} ms  {packed}  {turned}  {rate}")
        attention = {}
        for length in sorted({*CONTEXTS, context}):
            attention[str(length)] = worker.request(what="attention", rows=rows, context=length)["seconds"]
            say(f"limits  attention {rows} rows, context {length:4d}: {attention[str(length)] * 1e3:8.2f} ms a step")
        given, completions = sequences(bench)
        batches = micro_batches(bench, given, completions)
        training = worker.request(what="training", batches=batches)
        say(f"limits  training: linears {training['linears']:.3f} s, attention {training['attention']:.3f} s")
    step = fastest(linears[str(rows)]) + attention[str(context)]
    useful = sum(len(p) for p in given) * args.samples + sum(map(len, completions))
    result = {
        "rollout_floor_tok_s": rows / step,
        "train_floor_tok_s": useful / sum(training.values()),
    }
    for name, value in result.items():
        say(f"limits  {name:24s} {value:10.1f}")
    return {
        **result,
        "peaks": peaks,
        "rows": rows,
        "mean_context": context,
        "linears_s": linears,
        "attention_s": attention,
        "training_s": training,
    }


def fastest(linears: dict[str, Any]) -> float:
    """Seconds of the fastest way."""
    return min(v for k, v in linears.items() if k in ("plain", "packed", "turned") and v is not None)
