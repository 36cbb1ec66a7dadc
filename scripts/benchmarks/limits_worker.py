"""Worker: what the machine can do at best, and what the model's own matrix products and attention take alone."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention
from transformers import AutoConfig, AutoModelForCausalLM

from .protocol import Channel, begin

REPEATS = 5
PEAK_SHAPE = (2048, 2048, 2048)


class Shape(NamedTuple):
    """What of a model's shape the floors depend on.

    Attributes:
        linears: ``(out, in)`` of each linear layer, the vocabulary head last.
        layers: Attention layers.
        heads: Query heads.
        kv_heads: Key and value heads.
        width: Of a head.
    """

    linears: list[tuple[int, int]]
    layers: int
    heads: int
    kv_heads: int
    width: int


def main() -> None:
    """One kind of measurement a request."""
    channel = Channel()
    setup = channel.receive()
    begin(setup)
    meter = Meter(setup["device"], getattr(torch, setup["dtype"]), shape_of(setup["model"]))
    channel.reply(linears=len(meter.shape.linears))
    while True:
        request = channel.receive()
        measure = getattr(meter, request.pop("what"))
        channel.reply(**measure(**request))


def shape_of(model: str) -> Shape:
    """Read from the network itself, without weights."""
    config = AutoConfig.from_pretrained(model)
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(config)
    linears = [(m.out_features, m.in_features) for m in network.modules() if isinstance(m, nn.Linear)]
    text = config.get_text_config()
    heads = text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    return Shape(linears, text.num_hidden_layers, heads, getattr(text, "num_key_value_heads", None) or heads, width)


class Meter:
    """Times what it is asked to.

    Args:
        device: ``cpu`` or ``cuda``.
        dtype: What products are computed in.
        shape: The model's.
    """

    def __init__(self, device: str, dtype: torch.dtype, shape: Shape):
        self.device, self.dtype, self.shape = device, dtype, shape

    def random(self, *size: int) -> Tensor:
        """A tensor of the measured precision."""
        return torch.randn(*size, device=self.device).to(self.dtype)

    def seconds(self, call: Callable[[], Any], budget: float = 0.4) -> float:
        """Median time of one call, over loops long enough to be timed."""
        call()
        once = self._timed(call, 1)
        loops = max(1, int(budget / REPEATS / max(once, 1e-9)))
        return statistics.median(self._timed(call, loops) / loops for _ in range(REPEATS))

    def _timed(self, call: Callable[[], Any], loops: int) -> float:
        self._synchronize()
        started = time.perf_counter()
        for _ in range(loops):
            call()
        self._synchronize()
        return time.perf_counter() - started

    def _synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    @torch.no_grad()
    def peaks(self, copy_mib: int) -> dict[str, float]:
        """FLOP/s of a square product in each precision, and bytes a second of a copy, read and written."""
        result = {}
        m, k, n = PEAK_SHAPE
        for dtype in dict.fromkeys((torch.float32, self.dtype)):
            x, w = (torch.randn(size, device=self.device).to(dtype) for size in ((m, k), (n, k)))
            name = str(dtype).removeprefix("torch.")
            result[f"gemm_{name}_gflops"] = 2 * m * k * n / self.seconds(lambda x=x, w=w: linear(x, w)) / 1e9
        source, target = (torch.ones(copy_mib << 18, device=self.device) for _ in range(2))
        result["copy_gb_s"] = 2 * copy_mib * 2**20 / self.seconds(lambda: target.copy_(source)) / 1e9
        return result

    @torch.no_grad()
    def linears(self, rows: int) -> dict[str, float | None]:
        """Seconds to stream all linear layers for so many rows, each with its own weights, as in decoding."""
        weights = [self.random(*size) for size in self.shape.linears]
        inputs = [self.random(rows, size[1]) for size in self.shape.linears]
        plain = self.seconds(lambda: [linear(x, w) for x, w in zip(inputs, weights, strict=True)])
        packed = None
        if self._packs():
            ops = torch.ops.mkldnn
            own = [ops._reorder_linear_weight(w, rows) for w in weights]
            packed = self.seconds(
                lambda: [ops._linear_pointwise(x, w, None, "none", [], "") for x, w in zip(inputs, own, strict=True)]
            )
        turned = self.seconds(lambda: [w @ x.t() for x, w in zip(inputs, weights, strict=True)])
        return {"plain": plain, "packed": packed, "turned": turned}

    def _packs(self) -> bool:
        if self.device != "cpu" or not torch.backends.mkldnn.is_available():
            return False
        return self.dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()

    @torch.no_grad()
    def attention(self, rows: int, context: int) -> dict[str, float]:
        """Seconds of one decoding step's attention in all layers, each over keys and values of its own."""
        s = self.shape
        query = self.random(rows, s.kv_heads, s.heads // s.kv_heads, s.width)  # the heads of a group as query rows
        layers = [[self.random(rows, s.kv_heads, context, s.width) for _ in "kv"] for _ in range(s.layers)]
        return {"seconds": self.seconds(lambda: [scaled_dot_product_attention(query, k, v) for k, v in layers])}

    def training(
        self, batches: Sequence[Sequence[Sequence[int]]], *, head: bool = True, backward: bool = True
    ) -> dict[str, float]:
        """Seconds of all products and all attention of packed micro-batches.

        Args:
            batches: Micro-batches of groups, a group as ``[prompt, *completions]`` in tokens.
            head: Whether completions reach the vocabulary head.
            backward: Also backward.
        """
        products = attended = 0.0
        known: dict[tuple[int, int, int], float] = {}
        for groups in batches:
            # A prompt goes through the layers once; the head sees only what is scored.
            tokens = sum(map(sum, groups))
            scored = sum(sum(group[1:]) for group in groups)
            products += self._products(self.shape.linears[:-1], tokens, backward)
            products += self._products(self.shape.linears[-1:], scored, backward) if head else 0.0
            for prompt, *completions in groups:
                shape = prompt, len(completions), max(completions)
                if shape not in known:
                    known[shape] = self._group_attention(*shape, backward=backward)
                attended += known[shape]
        return {"linears": products, "attention": attended * self.shape.layers}

    @torch.no_grad()
    def _products(self, linears: Sequence[tuple[int, int]], rows: int, backward: bool) -> float:
        total = 0.0
        for (out, inner), count in Counter(linears).items():
            x, w, dy = self.random(rows, inner), self.random(out, inner), self.random(rows, out)

            def call(x: Tensor = x, w: Tensor = w, dy: Tensor = dy) -> Any:
                return (linear(x, w), dy @ w, dy.t() @ x) if backward else linear(x, w)

            total += count * self.seconds(call, 0.2)
        return total

    def _group_attention(self, prompt: int, completions: int, width: int, *, backward: bool) -> float:
        """Of one group in one layer: each sequence by itself, or the prompt once for all, whichever is faster."""
        apart = self._causal_attention([(completions, prompt + width, prompt + width)], backward)
        shared = self._causal_attention([(1, prompt, prompt), (completions, width, prompt + width)], backward)
        return min(apart, shared)

    def _causal_attention(self, parts: Sequence[tuple[int, int, int]], backward: bool) -> float:
        """Forward, and backward if asked for, of ``(rows, queries, keys)``: the queries are the last of the keys."""
        s = self.shape
        calls = []
        for rows, queries, keys in parts:
            q = self.random(rows, s.heads, queries, s.width).requires_grad_()
            k, v = (self.random(rows, s.heads, keys, s.width).requires_grad_() for _ in "kv")
            seen = None
            if queries < keys:
                seen = torch.ones(queries, keys, dtype=torch.bool, device=self.device).tril(keys - queries)
            calls.append((q, k, v, seen, torch.ones_like(q)))

        def call() -> None:
            for q, k, v, seen, gradient in calls:
                with torch.set_grad_enabled(backward):
                    out = scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=seen is None)
                if backward:
                    torch.autograd.grad(out, (q, k, v), gradient)

        return self.seconds(call, 0.1)


if __name__ == "__main__":
    main()
