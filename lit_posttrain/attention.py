"""Attention for packed rows in which the samples of a group share their prompt, registered with transformers.

The prompt's tokens go through the network once, forward and backward, however many completions follow it. A
completion's queries see two sets of keys, the prompt's and its own. On a CPU each set is one flash call and the two
are merged by their log-sum-exps; with CUDA's variable-length flash attention the whole row is one call.
"""

from importlib.util import find_spec
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lit_posttrain.batching import Group
from lit_posttrain.cascade import cascade
from lit_posttrain.layout import Layout, Ragged

NAME = "lit_posttrain_shared_prompt"
# What some architectures hand to their attention function, and this one cannot honour.
_UNSUPPORTED = ("softcap", "s_aux", "position_bias")


def shared_prompt_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    layout: Layout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each prompt, and of each completion over its prompt and itself.

    Without a ``layout`` it is transformers' own SDPA attention.

    Args:
        module: The attention layer.
        query: ``[1, heads, n, d]``.
        key: ``[1, key heads, n, d]``.
        value: Likewise; its last dimension may differ.
        attention_mask: Not read where there is a layout.
        scaling: Of the scores; 1 / sqrt(d) by default.
        layout: Of the packed row.
        kwargs: What else the architecture hands over.

    Raises:
        ValueError: The architecture asks for something this attention does not do.
    """
    if layout is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    window = kwargs.get("sliding_window")
    if any(kwargs.get(name) is not None for name in _UNSUPPORTED):
        raise ValueError(f"{type(module).__name__} hands over one of {_UNSUPPORTED}, which packed rows do not know")
    if window is not None and any(g.prompt + max(g.completions, default=0) > window for g in layout.groups):
        raise ValueError(f"{type(module).__name__} has a sliding window of {window} tokens, shorter than a sequence")
    if layout.keys is not None:
        layout.keys[module] = key, value
    if (absent := layout.absent) is not None:
        keys, values = zip(*(keys[module] for keys in absent.keys), strict=True)
        # Nobody reads what an absent prompt's queries would give.
        unread = [query.new_zeros(1, query.shape[1], n, query.shape[3]) for n in absent.lengths]
        query, key, value = (absent.filled(x, ps, 2) for x, ps in ((query, unread), (key, keys), (value, values)))
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    # The flash kernels want one head size; zeros change neither a score nor an output.
    own, size = value.shape[-1], max(query.shape[-1], value.shape[-1])
    query, key, value = (x if x.shape[-1] == size else pad(x, (0, size - x.shape[-1])) for x in (query, key, value))
    if layout.ragged is None:
        out = cascade(query, key, value, layout, scale)
    elif _has_varlen_flash(query):
        out = varlen(query, key, value, layout.ragged, scale)
    else:
        out = by_group(query, key, value, layout.groups, scale)
    if absent is not None:
        out = absent.without(out, 1)
    return out if own == size else out[..., :own].contiguous(), None


def _has_varlen_flash(query: Tensor) -> bool:
    """From Ampere on, in half precision, from torch 2.10 on."""
    if query.dtype not in (torch.bfloat16, torch.float16) or query.shape[-1] > 256 or query.shape[-1] % 8:
        return False
    if not query.is_cuda or torch.cuda.get_device_capability(query.device) < (8, 0):
        return False
    return find_spec("torch.nn.attention.varlen") is not None


def varlen(
    query: Float[Tensor, "1 h n d"],
    key: Float[Tensor, "1 k n d"],
    value: Float[Tensor, "1 k n d"],
    ragged: Ragged,
    scale: float,
) -> Float[Tensor, "1 n h d"]:
    """The same by one call of variable-length flash attention; a prompt's keys are gathered for each completion."""
    from torch.nn.attention.varlen import varlen_attn

    # Indexing, not index_select: its backward adds up a prompt token's gradients in fp32 and in a fixed order.
    keys, values = (x[0].transpose(0, 1)[ragged.keys] for x in (key, value))
    out = varlen_attn(
        query[0].transpose(0, 1),
        keys,
        values,
        ragged.query_ends,
        ragged.key_ends,
        ragged.most_queries,
        ragged.most_keys,
        scale=scale,
        window_size=(-1, 0),  # causal: a sequence's last query sees its last key
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(out, Tensor)
    return out[None]


def by_group(
    query: Float[Tensor, "1 h n d"],
    key: Float[Tensor, "1 k n d"],
    value: Float[Tensor, "1 k n d"],
    groups: list[Group],
    scale: float,
) -> Float[Tensor, "1 n h d"]:
    """The same by PyTorch's own attention, each group's completions padded: for accelerators without varlen flash."""
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    parts = []
    for group in groups:
        middle = group.start + group.prompt
        prompt = [x[:, :, group.start : middle] for x in (query, key, value)]
        parts.append(scaled_dot_product_attention(prompt[0], prompt[1], prompt[2], is_causal=True, scale=scale)[0])
        if not group.completions:
            continue
        lengths = torch.tensor(group.completions, device=query.device)
        width, total = max(group.completions), sum(group.completions)
        real = torch.arange(width, device=query.device) < lengths[:, None]
        own = [_rows(x[0, :, middle : middle + total], real) for x in (query, key, value)]
        keys, values = (
            torch.cat((shared.expand(len(lengths), -1, -1, -1), mine), 2)
            for shared, mine in zip(prompt[1:], own[1:], strict=True)
        )
        seen = torch.ones(width, group.prompt + width, dtype=torch.bool, device=query.device).tril(group.prompt)
        out = scaled_dot_product_attention(own[0], keys, values, attn_mask=seen, scale=scale)
        parts.append(out.transpose(1, 2)[real].transpose(0, 1))
    return torch.cat(parts, 1).transpose(0, 1)[None]


def _rows(x: Float[Tensor, "h m d"], real: Bool[Tensor, "r w"]) -> Float[Tensor, "r h w d"]:
    """Stretches that follow one another as right-padded rows."""
    rows = x.new_zeros(*real.shape, x.shape[0], x.shape[2])
    return rows.masked_scatter(real[..., None, None], x.transpose(0, 1)).transpose(1, 2)


# Its sizes differ from row to row: compiled layers call it, but it is not compiled with them.
AttentionInterface.register(NAME, torch.compiler.disable(shared_prompt_attention))
AttentionMaskInterface.register(NAME, sdpa_mask)


def window_of(network: PreTrainedModel) -> int | None:
    """The shortest sliding window of any layer, None where every token sees all before it."""
    config = network.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and "sliding_attention" not in kinds:
        return None
    return getattr(config, "sliding_window", None)
