"""Worker: lit_posttrain's rollout engine by itself."""

from __future__ import annotations

import time
from typing import Any

import torch

from lit_posttrain import rollout
from lit_posttrain.policy import Policy, PolicyConfig, load_tokenizer
from lit_posttrain.rollout import RolloutEngine, SamplingParams
from lit_posttrain.types import SamplingKey

from .protocol import Channel, Clock, begin


def make_engine(name: str) -> RolloutEngine:
    """The engine called ``native`` or ``reference``, as the package builds it by default."""
    return getattr(rollout, {"native": "NativeEngine", "reference": "ReferenceEngine"}[name])()


def main() -> None:
    """Load once, then sample as often as asked."""
    channel = Channel()
    setup = channel.receive()
    begin(setup)
    clock = Clock(setup["device"])
    config = PolicyConfig(model=setup["model"], compute_dtype=setup["dtype"])
    device = torch.device(setup["device"])
    policy = Policy(config).to(device)
    policy.build_view(device, sharded=False)
    policy.sync()
    engine = make_engine(setup["engine"])
    engine.bind(load_tokenizer(config))
    channel.reply()
    number = 0
    while True:
        channel.reply(**sample(channel.receive(), policy, engine, clock, setup["seed"], number))
        number += 1


def sample(
    request: dict[str, Any], policy: Policy, engine: RolloutEngine, clock: Clock, seed: int, number: int
) -> dict[str, Any]:
    """One rollout; taking over the weights is timed apart, since the peer has no such step."""
    started = time.perf_counter()
    engine.sync(policy)
    clock.synchronize()
    sync = time.perf_counter() - started
    prompts = [ids for ids in request["prompts"] for _ in range(request["samples"])]
    keys = [
        SamplingKey(seed, "bench", number, i, j)
        for i in range(len(request["prompts"]))
        for j in range(request["samples"])
    ]
    stops = [] if request["kind"] != "ragged" else None
    sampling = SamplingParams(
        max_new_tokens=request["new_tokens"],
        temperature=0.0 if request["kind"] == "greedy" else 1.0,
        stop_token_ids=stops,
    )
    clock.start()
    completions = engine.generate(prompts, sampling, keys)
    return {**clock.stop(), "tokens": sum(len(c.token_ids) for c in completions), "sync_seconds": sync}


if __name__ == "__main__":
    main()
