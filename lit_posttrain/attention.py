"""Attention for packed rows in which the samples of a group share their prompt, registered with transformers.

The prompt's tokens go through the network once, forward and backward, however many completions follow it.
"""

from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lit_posttrain.batching import Group

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
    layout: list[Group] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each prompt, and of each completion over its prompt and itself.

    Without a ``layout`` it is transformers' own SDPA attention.

    Args:
        module: The attention layer.
        query: ``[1, heads, n, d]``.
        key: ``[1, key heads, n, d]``.
        value: Likewise.
        attention_mask: Not read where there is a layout.
        scaling: Of the scores; 1 / sqrt(d) by default.
        layout: The groups of the packed row.
        kwargs: What else the architecture hands over.

    Raises:
        ValueError: The architecture asks for something this attention does not do.
    """
    if layout is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    window = kwargs.get("sliding_window")
    if any(kwargs.get(name) is not None for name in _UNSUPPORTED):
        raise ValueError(f"{type(module).__name__} hands over one of {_UNSUPPORTED}, which packed rows do not know")
    if window is not None and any(g.prompt + g.width > window for g in layout):
        raise ValueError(f"{type(module).__name__} has a sliding window of {window} tokens, shorter than a sequence")
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    parts = []
    for group in layout:
        middle, end = group.start + group.prompt, group.start + group.prompt + group.rows * group.width
        prompt = [x[:, :, group.start : middle] for x in (query, key, value)]
        parts.append(scaled_dot_product_attention(prompt[0], prompt[1], prompt[2], is_causal=True, scale=scaling))
        own = [_by_completion(x[:, :, middle:end], group) for x in (query, key, value)]
        keys, values = (
            torch.cat((shared.expand(group.rows, -1, -1, -1), mine), 2)
            for shared, mine in zip(prompt[1:], own[1:], strict=True)
        )
        seen = _seen(group, query.device)
        out = scaled_dot_product_attention(own[0], keys, values, attn_mask=seen, scale=scaling)
        parts.append(out.transpose(0, 1).flatten(1, 2)[None])
    return torch.cat(parts, 2).transpose(1, 2).contiguous(), None


def _by_completion(x: Tensor, group: Group) -> Tensor:
    """``[1, heads, rows * width, d]`` as ``[rows, heads, width, d]``."""
    return x[0].unflatten(1, (group.rows, group.width)).transpose(0, 1)


def _seen(group: Group, device: torch.device) -> Bool[Tensor, "w n"]:
    """A completion's token sees the whole prompt and its own sequence up to itself."""
    total = group.prompt + group.width
    return torch.ones(group.width, total, dtype=torch.bool, device=device).tril(group.prompt)


AttentionInterface.register(NAME, shared_prompt_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def window_of(network: PreTrainedModel) -> int | None:
    """The shortest sliding window of any layer, None where every token sees all before it."""
    config = network.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and "sliding_attention" not in kinds:
        return None
    return getattr(config, "sliding_window", None)
