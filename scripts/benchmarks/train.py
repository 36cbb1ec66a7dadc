"""Section ``train``: forward and backward over the same ragged sequences every time."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from .rows import Rows, say
from .settings import Bench
from .workers import Worker, interleaved

OURS, HF = "ours", "hf padded"
CASE = "ragged"
# Log-normal lengths of completions, cut at new_tokens: with 128, a mean of about 60.
MEDIAN_SHARE, SIGMA = 0.4, 0.6


def sequences(bench: Bench) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts, and completions one after another: random tokens, lengths log-normal."""
    args, prompts = bench.args, bench.prompts("fixed")
    draw = random.Random(args.seed + 1)
    vocabulary = [token for prompt in prompts for token in prompt]
    completions = []
    for _ in range(args.prompts * args.samples):
        length = round(draw.lognormvariate(0.0, SIGMA) * MEDIAN_SHARE * args.new_tokens)
        completions.append([draw.choice(vocabulary) for _ in range(min(args.new_tokens, max(2, length)))])
    return prompts, completions


def micro_batches(bench: Bench, prompts: list[list[int]], completions: list[list[int]]) -> list[list[list[int]]]:
    """Whole groups as ``[prompt, *completions]`` in tokens, as many as the token budget holds."""
    each = bench.args.samples
    groups = [
        [len(prompt), *(len(c) for c in completions[i * each : (i + 1) * each])] for i, prompt in enumerate(prompts)
    ]
    return filled(groups, bench.setup()["token_budget"], lambda group: group[0] + len(group[1:]) * max(group[1:]))


def filled(groups: Sequence[list[int]], budget: int, size: Callable[[list[int]], int]) -> list[list[list[int]]]:
    """Groups in their order, as many together as the budget holds by their size; one beyond it goes alone."""
    batches: list[list[list[int]]] = []
    full = 0
    for group in groups:
        if not batches or full + size(group) > budget:
            batches.append([])
            full = 0
        batches[-1].append(group)
        full += size(group)
    return batches


def run(bench: Bench) -> dict[str, Any]:
    """Ours, and with ``--peer trl`` what any trainer on Hugging Face's forward does: padding, all logits, autocast."""
    prompts, completions = sequences(bench)
    useful = sum(len(p) for p in prompts) * bench.args.samples + sum(map(len, completions))
    request = {**bench.request("fixed"), "prompts": prompts, "completions": completions}
    rows, tried = Rows("train"), {}
    with ExitStack() as stack:
        hf = None
        if bench.args.peer == "trl":
            setup = bench.setup(task="train")
            hf = stack.enter_context(Worker(HF, "peer_hf", setup, bench.env, bench.peer_python, wait=False))
        ours = stack.enter_context(Worker(OURS, "ours_grpo", bench.setup(engine="given"), bench.env))
        best = None
        if hf is not None:
            hf.ready()
            best = select(bench, hf, request, tried)
        for _ in range(2):
            ours.request(**request)
        for worker in interleaved([ours, hf] if hf else [ours], bench.args.repeats):
            measure(rows, worker, {**request, "micro_batch": best}, useful)
    say("\n" + rows.table())
    result: dict[str, Any] = {"ours": rows.summary(CASE, OURS), "speedup_vs_hf": None, "hf": None}
    if bench.args.peer == "trl":
        result |= {"hf": rows.summary(CASE, HF), "speedup_vs_hf": rows.speedup(CASE, OURS, HF)}
    result["tokens_per_s"] = result["ours"]["tokens_per_s"]["median"]
    floor = bench.floor("train_floor_tok_s")
    result["fraction_of_floor"] = None if floor is None else result["tokens_per_s"] / floor
    return {**result, "useful_tokens": useful, "micro_batches": tried, "order": rows.order()}


def measure(rows: Rows, worker: Worker, request: dict[str, Any], useful: int) -> None:
    """One row; of our update only the forward and backward passes count, as of the peer's."""
    answer = worker.request(**request)
    if worker.name == OURS:
        answer["seconds"] = answer["phases"]["forward_backward"]
    rows.add(CASE, worker.name, {**answer, "tokens": useful})


def select(bench: Bench, hf: Worker, request: dict[str, Any], tried: dict[str, float]) -> int:
    """The peer's fastest micro-batch size; this is its warm-up too."""
    for size in bench.args.micro_batches:
        answer = hf.request(**request, micro_batch=size)
        tried[str(size)] = answer["tokens"] / answer["seconds"]
        say(f"train select  {HF} micro-batch {size:3d}: {answer['seconds']:8.3f} s {tried[str(size)]:10.1f} tok/s")
    return int(max(tried, key=lambda size: tried[size]))
