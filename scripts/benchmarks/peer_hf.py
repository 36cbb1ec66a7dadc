"""Worker: Hugging Face by itself, as a competent user would call it. Knows nothing of lit_posttrain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig

from .protocol import Channel, Clock, begin, useful_tokens


def main() -> None:
    """Load once, then sample or train as often as asked."""
    channel = Channel()
    setup = channel.receive()
    begin(setup)
    clock = Clock(setup["device"])
    # For sampling, weights in the precision that is computed in: autocast would cast them anew in every step. For
    # training fp32 weights, since bf16 ones lose small updates.
    weights = torch.float32 if setup["task"] == "train" else getattr(torch, setup["dtype"])
    network = AutoModelForCausalLM.from_pretrained(setup["model"], dtype=weights, attn_implementation="sdpa")
    network.to(setup["device"]).eval()
    channel.reply()
    while True:
        request = channel.receive()
        if setup["task"] == "train":
            channel.reply(**train(request, network, clock, setup["dtype"]))
        else:
            channel.reply(**sample(request, network, clock, setup["stops"]))


@torch.no_grad()
def sample(request: dict[str, Any], network: Any, clock: Clock, stops: Sequence[int]) -> dict[str, Any]:
    """One call of ``generate``: all rows at once, left-padded, dynamic cache, full vocabulary at temperature 1."""
    rows = [ids for ids in request["prompts"] for _ in range(request["samples"])]
    width = max(map(len, rows))
    device = network.device
    pad = stops[0] if stops else 0
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    ends = list(stops) if request["kind"] == "ragged" else []
    greedy = request["kind"] == "greedy"
    chosen: dict[str, Any] = (
        {"do_sample": False} if greedy else {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    )
    config = GenerationConfig(
        max_new_tokens=request["new_tokens"],
        eos_token_id=ends or None,
        pad_token_id=pad,
        disable_compile=True,
        **chosen,
    )
    # generate fills what is None from the model's own config, so the stop tokens have to go there too.
    network.generation_config.eos_token_id = ends or None
    clock.start()
    out = network.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    measured = clock.stop()
    return {**measured, "tokens": useful_tokens(out[:, width:], ends)}


def train(request: dict[str, Any], network: Any, clock: Clock, dtype: str) -> dict[str, Any]:
    """Forward and backward of all rows, padded within micro-batches, all logits at once, under autocast."""
    prompts, completions, size = request["prompts"], request["completions"], request["micro_batch"]
    each = len(completions) // len(prompts)
    rows = [prompts[i // each] + c for i, c in enumerate(completions)]
    total = sum(map(len, completions))
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))  # alike in length, so little padding
    network.train()
    network.zero_grad(set_to_none=True)
    clock.start()
    for first in range(0, len(order), size):
        chosen = order[first : first + size]
        width = max(len(rows[i]) for i in chosen)
        ids = torch.tensor([rows[i] + [0] * (width - len(rows[i])) for i in chosen], device=network.device)
        mask = torch.tensor([[j < len(rows[i]) for j in range(width)] for i in chosen], device=network.device).long()
        scored = torch.tensor(
            [[len(prompts[i // each]) - 1 <= j < len(rows[i]) - 1 for j in range(width - 1)] for i in chosen],
            device=network.device,
        )
        with torch.autocast(network.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            logits = network(input_ids=ids, attention_mask=mask, use_cache=False).logits
        (-token_log_probs(logits, ids)[scored].sum() / total).backward()
    return {**clock.stop(), "tokens": sum(map(len, rows))}


def token_log_probs(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probability of each token after the first, in fp32."""
    return logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]


if __name__ == "__main__":
    main()
