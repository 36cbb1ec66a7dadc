"""Attention of a packed row on a CPU, forward and backward: flash calls whose parts are merged by log-sum-exp.

Softmax over two sets of keys is the mean of the softmaxes over each, weighted by their normalisers; so is its
gradient: a flash backward that is given the *merged* output and log-sum-exp yields exactly the share of its own keys
(2205.14135, section 3.1 and appendix B.4; 2402.05099 for shared prefixes).

bf16 is computed in fp32, which is both more exact and two to three times faster: on CPUs, bf16 products of this size
do not pay.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from lit_posttrain.batching import Group
from lit_posttrain.layout import Block, Layout

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def cascade(
    query: Float[Tensor, "1 h n d"],
    key: Float[Tensor, "1 k n d"],
    value: Float[Tensor, "1 k n d"],
    layout: Layout,
    scale: float,
) -> Float[Tensor, "1 n h d"]:
    """Causal attention within each prompt, and of each completion over its prompt and itself.

    Args:
        query: Of the row; query heads of one key head are neighbours.
        key: Of the row.
        value: Of the row.
        layout: With blocks.
        scale: Of the scores.
    """
    return _Cascade.apply(query, key, value, layout, scale)  # type: ignore[return-value]


# Inside, a query is [key heads, tokens, query heads of the key head, d] and a key [key heads, tokens, d]: the key
# heads, times the stretches of a block, are the batch of a flash call, and the query heads read the same keys.


class _Cascade(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float) -> Tensor:
        q, k, v = _queries(query.transpose(1, 2), key.shape[1]), _keys(key), _keys(value)
        out, lse = _empty_like(q), q.new_empty(q.shape[:-1])
        for block in layout.blocks:
            part, normaliser = _attend(*(_take(x, block) for x in (q, k, v)), causal=True, scale=scale)
            _put(out, block, part)
            _put(lse, block, normaliser)
        for prompt, own in _shared(layout.groups):
            part, normaliser = _attend(q[:, own], k[:, prompt], v[:, prompt], causal=False, scale=scale)
            out[:, own].lerp_(part, (normaliser - lse[:, own]).sigmoid_()[..., None])
            lse[:, own] = normaliser.logaddexp(lse[:, own])
        result = _row(out, query.dtype)
        ctx.save_for_backward(query, key, value, result, lse)
        ctx.layout, ctx.scale = layout, scale
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]: torch names ctx positionally
        query, key, value, result, lse = ctx.saved_tensors
        heads, scale = key.shape[1], ctx.scale
        q, k, v = _queries(query.transpose(1, 2), heads), _keys(key), _keys(value)
        out, grad = _queries(result, heads), _queries(grad_outputs[0], heads)
        d_q, d_k, d_v = (_empty_like(x) for x in (q, k, v))
        if ctx.layout.absent:  # nobody asks for what their prompts' own keys get
            d_k.zero_()
            d_v.zero_()
        for block in ctx.layout.blocks:
            g = _take(grad, block)
            if block.padding is not None:
                g.view(heads, -1, *g.shape[2:]).index_fill_(1, block.padding, 0.0)
            kept = [_take(x, block) for x in (q, k, v, out, lse)]
            parts = _attend_backward(g, *kept, causal=True, scale=scale)
            for whole, part in zip((d_q, d_k, d_v), parts, strict=True):
                _put(whole, block, part)
        for prompt, own in _shared(ctx.layout.groups):
            kept = q[:, own], k[:, prompt], v[:, prompt], out[:, own], lse[:, own]
            parts = _attend_backward(grad[:, own], *kept, causal=False, scale=scale)
            for whole, part in zip((d_q[:, own], d_k[:, prompt], d_v[:, prompt]), parts, strict=True):
                whole += part
        grads = [_row(x, query.dtype).transpose(1, 2) for x in (d_q, d_k[:, :, None], d_v[:, :, None])]
        return *grads, None, None


def _shared(groups: list[Group]) -> list[tuple[slice, slice]]:
    """Of each prompt that completions attend to apart from themselves: where it stands, and where they do."""
    middles = [group.start + group.prompt for group in groups]
    return [
        (slice(group.start, middle), slice(middle, group.start + group.tokens))
        for group, middle in zip(groups, middles, strict=True)
        if group.shares and group.completions  # a flash call without queries divides by zero
    ]


def _attend(
    q: Float[Tensor, "b t r d"], k: Float[Tensor, "b s d"], v: Float[Tensor, "b s d"], *, causal: bool, scale: float
) -> tuple[Float[Tensor, "b t r d"], Float[Tensor, "b t r"]]:
    """Output and log-sum-exp of the scores."""
    heads = q.shape[2]
    out, lse = _forward(q.transpose(1, 2), _every(k, heads), _every(v, heads), 0.0, causal, scale=scale)
    return out.transpose(1, 2), lse.transpose(1, 2)


def _attend_backward(
    grad: Float[Tensor, "b t r d"],
    q: Float[Tensor, "b t r d"],
    k: Float[Tensor, "b s d"],
    v: Float[Tensor, "b s d"],
    out: Float[Tensor, "b t r d"],
    lse: Float[Tensor, "b t r"],
    *,
    causal: bool,
    scale: float,
) -> tuple[Float[Tensor, "b t r d"], Float[Tensor, "b s d"], Float[Tensor, "b s d"]]:
    """Gradients of q, k and v through these keys alone; ``out`` and ``lse`` are those over all keys."""
    heads = q.shape[2]
    grad, q, out, lse = (x.transpose(1, 2) for x in (grad, q, out, lse))
    d_q, d_k, d_v = _backward(grad, q, _every(k, heads), _every(v, heads), out, lse, 0.0, causal, scale=scale)
    return d_q.transpose(1, 2), d_k.sum(1), d_v.sum(1)


def _every(x: Float[Tensor, "b s d"], heads: int) -> Float[Tensor, "b r s d"]:
    return x[:, None].expand(-1, heads, -1, -1)


def _take(x: Tensor, block: Block) -> Tensor:
    """``[key heads, tokens, ...]`` as ``[key heads * rows, width, ...]``."""
    if block.tokens is None:
        return x[:, block.start : block.start + block.width]
    return x.index_select(1, block.tokens).view(-1, block.width, *x.shape[2:])


def _put(whole: Tensor, block: Block, part: Tensor) -> None:
    """The way back, padding left out."""
    if block.tokens is None or block.real is None:
        whole[:, block.start : block.start + block.width] = part
        return
    part = part.reshape(len(whole), -1, *whole.shape[2:])
    whole.index_copy_(1, block.tokens[block.real], part.index_select(1, block.real))


def _queries(x: Tensor, heads: int) -> Tensor:
    """``[1, n, h, d]`` as ``[key heads, n, h / key heads, d]`` in the precision of the computation."""
    return _exact(x[0].unflatten(1, (heads, -1)).transpose(0, 1))


def _keys(x: Tensor) -> Tensor:
    return _exact(x[0])


def _exact(x: Tensor) -> Tensor:
    x = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    return x if x.stride(-1) == 1 else x.contiguous()  # flash reads heads and tokens wherever they lie


def _empty_like(x: Tensor) -> Tensor:
    """As a row has it: token by token in memory."""
    return x.new_empty((x.shape[1], x.shape[0], *x.shape[2:])).transpose(0, 1)


def _row(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Back to ``[1, n, h, d]``."""
    return x.transpose(0, 1).flatten(1, 2)[None].to(dtype)
