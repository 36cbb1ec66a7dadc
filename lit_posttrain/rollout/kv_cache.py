"""Keys and values of rows that are decoded together, and the attention over them.

All rows write the same column: a row's tokens end at the last column and begin wherever its prompt's length puts
them. So the write is a slice, a sliding window is a slice, and rows of any age share a batch. The model sees
positions within each row, never columns.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from lit_posttrain.functional.products import has_avx2_alone

NAME = "lit_posttrain_decode"
# Share of the columns that a shift must free, so that it pays; otherwise the cache grows.
SLACK = 1 / 4
# What some architectures hand to their attention function, and this one cannot honour.
_UNSUPPORTED = ("s_aux", "position_bias")


class Scores(NamedTuple):
    """How scores are made from queries and keys.

    Attributes:
        scale: Multiplies them; None is 1 / sqrt(d).
        window: Tokens that a query sees, itself included; None sees all before it.
        softcap: Scores s become softcap * tanh(s / softcap).
    """

    scale: float | None
    window: int | None
    softcap: float | None


class Layout(ABC):
    """Where the tokens of one forward pass stand, and what they see."""

    @abstractmethod
    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
        """Keep ``key`` and ``value`` ``[1, kv heads, n, d]``; the attention output ``[1, n, heads, d]``."""


def decode_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    layout: Layout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that ``transformers`` calls in the engine's view of a network.

    Raises:
        ValueError: The architecture asks for something this attention does not do.
    """
    if layout is None:
        raise ValueError(f"{type(module).__name__} does not pass the layout of its rows on to attention")
    if any(kwargs.get(name) is not None for name in _UNSUPPORTED):
        raise ValueError(f"{type(module).__name__} hands over one of {_UNSUPPORTED}")
    if getattr(module, "layer_idx", None) is None:
        raise ValueError(f"{type(module).__name__} does not know the number of its layer")
    scores = Scores(scaling, kwargs.get("sliding_window"), kwargs.get("softcap"))
    return layout.attend(int(module.layer_idx), query, key, value, scores), None  # pyright: ignore[reportArgumentType]


AttentionInterface.register(NAME, decode_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


class Prefill(Layout):
    """Whole prompts next to each other in one row; holds their keys and values afterwards.

    Args:
        lengths: Tokens of each prompt.
    """

    def __init__(self, lengths: Sequence[int]):
        ends = torch.tensor(list(lengths)).cumsum(0).tolist()
        self.spans = [slice(end - length, end) for end, length in zip(ends, lengths, strict=True)]
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}
        self.windows: set[int | None] = set()

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
        """Causal attention within each prompt; see ``Layout``."""
        self.layers[layer] = key[0], value[0]
        self.windows.add(scores.window)
        groups = query.shape[1] // key.shape[1]
        if groups > 1:
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        out = [_causal(query[:, :, s], key[:, :, s], value[:, :, s], scores) for s in self.spans]
        return torch.cat(out, 2).transpose(1, 2)


def _causal(query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
    n = query.shape[2]
    if scores.softcap is None and (scores.window is None or n <= scores.window):
        return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scores.scale)
    seen = torch.ones(n, n, dtype=torch.bool, device=query.device).tril()
    if scores.window is not None:
        seen = seen.triu(1 - scores.window)
    mask = torch.zeros(n, n, dtype=query.dtype, device=query.device).masked_fill_(~seen, -torch.inf)
    return attention(query, key, value, mask, scores)


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scores: Scores) -> Tensor:
    """Attention ``[..., n, d]`` of queries ``[..., n, d]`` under a mask that is added to the scores."""
    if scores.softcap is None:
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scores.scale)
    scale = query.shape[-1] ** -0.5 if scores.scale is None else scores.scale
    raw = (query @ key.transpose(-1, -2)).float() * scale
    capped = (raw / scores.softcap).tanh() * scores.softcap
    if mask is not None:
        capped = capped + mask
    return capped.softmax(-1).to(value.dtype) @ value


def attention_by_products(
    query: Float[Tensor, "b h r d"],
    key: Float[Tensor, "b h s d"],
    value: Float[Tensor, "b h s e"],
    mask: Float[Tensor, "b 1 1 s"] | None,
    scale: float | None,
) -> Float[Tensor, "b h r e"]:
    """Attention as two batched products around a softmax in fp32: for a few queries a head."""
    (b, h, r, d), s = query.shape, key.shape[2]
    scaled = (query * (d**-0.5 if scale is None else scale)).reshape(b * h, r, d)
    if query.dtype == torch.float32:
        scores = torch.bmm(scaled, key.flatten(0, 1).transpose(1, 2))
    else:  # keys times queries: the other way round, rows of one or three would keep the product from being fast
        raw = torch.bmm(key.flatten(0, 1), scaled.transpose(1, 2))
        scores = torch.empty(b * h, r, s, device=query.device).copy_(raw.transpose(1, 2))
    if mask is not None:
        scores.view(b, h * r, s).add_(mask[:, 0])
    return torch.bmm(scores.softmax(-1).to(value.dtype), value.flatten(0, 1)).view(b, h, r, -1)


def products_are_faster(x: Tensor) -> bool:
    """Whether decoding attends by products.

    bf16 is a tenth faster a step where a CPU has AVX512-BF16 but no AMX; of fp32 on a CPU with AVX2 alone, attention
    takes a tenth to nearly half less time with 64 rows, most with short contexts.
    """
    if x.device.type != "cpu":
        return False
    if x.dtype == torch.bfloat16:
        capable = torch.cpu.get_capabilities()
        return bool(capable.get("avx512_bf16")) and not capable.get("amx_bf16")
    return x.dtype == torch.float32 and has_avx2_alone()


class KVCache(Layout):
    """Keys and values of the rows being decoded; ``attend`` serves one step of the first of them.

    Args:
        rows: Most rows.
        first: Column that the first token after a prompt is written to; at least the longest prompt.
        columns: Columns to begin with.
        most: Columns it may grow to; at least ``most_columns`` of what its rows hold.
        like: Keys and values of each layer, for their shapes.
    """

    def __init__(self, rows: int, first: int, columns: int, most: int, like: dict[int, tuple[Tensor, Tensor]]):
        self.end = first
        self.longest_prompt = first
        self.columns = columns
        self.most = most
        self.layers = {
            layer: (zeros(rows, columns, keys), zeros(rows, columns, values)) for layer, (keys, values) in like.items()
        }
        device = next(iter(like.values()))[0].device
        self.starts = torch.zeros(rows, dtype=torch.long, device=device)
        self.lowest = 0
        self.mask: Tensor | None = None
        self.by_products = products_are_faster(next(iter(like.values()))[0])

    def put(self, rows: slice, layers: dict[int, tuple[Tensor, Tensor]], span: slice) -> None:
        """Give rows a prompt: its keys and values stand before the present column."""
        start = self.end - (span.stop - span.start)
        for layer, (keys, values) in self.layers.items():
            prompt_keys, prompt_values = layers[layer]
            keys[rows, :, start : self.end] = prompt_keys[:, span]
            values[rows, :, start : self.end] = prompt_values[:, span]
        self.starts[rows] = start

    def move(self, sources: Int[Tensor, " n"], targets: Int[Tensor, " n"]) -> None:
        """Rows ``targets`` become rows ``sources``; both on the CPU."""
        # Not from ``lowest``: rows taken in since the last step may begin before it.
        used = slice(int(self.starts[sources].min()), self.end)
        for pair in self.layers.values():
            for x in pair:
                x[targets, :, used] = x[sources, :, used]
        self.starts[targets] = self.starts[sources]

    def begin(self, live: int, rows: int) -> Int[Tensor, " rows"]:
        """Get ready for one more token in each of the first ``live`` rows; returns the tokens' positions.

        The rows from there up to ``rows`` only fill the batch up.
        """
        # Rows that others left would hold on to old columns, and count positions past the network's last.
        self.starts[live:rows] = self.starts[0]
        if self.end == self.columns:
            self._make_room(rows)
        starts = self.starts[:rows]
        self.lowest = int(starts.min())
        self.mask = None
        if int(starts.max()) > self.lowest:
            column = torch.arange(self.lowest, self.end + 1, device=starts.device)
            dtype = next(iter(self.layers.values()))[0].dtype
            self.mask = torch.zeros(rows, 1, 1, len(column), dtype=dtype, device=starts.device)
            self.mask.masked_fill_((column < starts[:, None])[:, None, None], -torch.inf)
        return self.end - starts

    def finish(self) -> None:
        """The column is written in every layer."""
        self.end += 1

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
        """Attention of one new token a row over its own tokens; see ``Layout``."""
        keys, values = self.layers[layer]
        heads, live, size = query.shape[1:]
        # Query heads that share a key head are the rows of one product: keys are not repeated.
        grouped = query[0].transpose(0, 1).reshape(live, key.shape[1], heads // key.shape[1], size)
        keys[:live, :, self.end], values[:live, :, self.end] = key[0].transpose(0, 1), value[0].transpose(0, 1)
        low = self.lowest if scores.window is None else max(self.lowest, self.end + 1 - scores.window)
        seen = slice(low, self.end + 1)
        mask = None if self.mask is None else self.mask[..., low - self.lowest :]
        keys, values = keys[:live, :, seen], values[:live, :, seen]
        if self.by_products and scores.softcap is None:
            out = attention_by_products(grouped, keys, values, mask, scores.scale)
        else:
            out = attention(grouped, keys, values, mask, scores)
        return out.reshape(1, live, heads, out.shape[-1])

    def _make_room(self, rows: int) -> None:
        """Drop leading columns that no row uses any more; where that frees too little, double the columns."""
        unused = min(int(self.starts[:rows].min()), self.end - self.longest_prompt)
        kept = self.end - unused
        grown = self.columns if kept <= self.columns * (1 - SLACK) else min(2 * self.columns, self.most)
        for layer, pair in self.layers.items():
            fresh = [zeros(len(x), grown, x[0]) if grown > self.columns else x for x in pair]
            for new, old in zip(fresh, pair, strict=True):
                # A copy in between: the two ranges may overlap.
                new[:rows, :, :kept] = old[:rows, :, unused : self.end].clone()
            self.layers[layer] = fresh[0], fresh[1]
        self.starts.sub_(unused).clamp_(min=0)
        self.end, self.columns = kept, grown


def bytes_per_column(like: dict[int, tuple[Tensor, Tensor]]) -> int:
    """Bytes that one token of one row takes in the cache, all layers together."""
    return sum(x.shape[0] * x.shape[-1] * x.element_size() for pair in like.values() for x in pair)


def columns_for(longest_prompt: int, max_new_tokens: int, step: int = 256) -> int:
    """Columns to begin with: room for short completions; long ones let the cache grow."""
    return longest_prompt + min(max_new_tokens, step)


def most_columns(longest_prompt: int, max_new_tokens: int) -> int:
    """Columns that the cache never exceeds, however many completions pass through it."""
    return math.ceil((longest_prompt + max_new_tokens) / (1 - SLACK))


def zeros(rows: int, columns: int, like: Float[Tensor, "h n d"]) -> Float[Tensor, "r h c d"]:
    """Memory for so many rows and columns of what ``like`` holds."""
    return torch.zeros(rows, like.shape[0], columns, like.shape[-1], dtype=like.dtype, device=like.device)
