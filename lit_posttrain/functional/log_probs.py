"""Log-probs and entropy of sampled tokens from hidden states, a few positions at a time: never b x s x v.

The only place where tokens are shifted by one: result position *i* scores token *i + 1*.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

CPU_CHUNK_ELEMENTS = 2**22
ACCELERATOR_CHUNK_ELEMENTS = 2**26


class TokenLogProbs(NamedTuple):
    """What one scoring pass gives.

    Attributes:
        log_probs: log pi(token i + 1 | tokens up to i), fp32 (fp64 for fp64 input), with gradient; 0 outside the mask.
        entropy: Entropy in nats of the distribution each of those tokens was drawn from, *without* gradient; 0
            outside the mask. None unless asked for.
    """

    log_probs: Float[Tensor, "b t"]
    entropy: Float[Tensor, "b t"] | None


class _Head(NamedTuple):
    """The map from states to logits: softcap * tanh(scale * (h W^T + bias) / softcap) / temperature."""

    temperature: float
    softcap: float | None
    scale: float | None

    def logits(
        self, states: Float[Tensor, "n d"], weight: Float[Tensor, "v d"], bias: Float[Tensor, " v"] | None
    ) -> Float[Tensor, "n v"]:
        """Logits in the accumulation dtype; the matrix product runs in the dtype of the states."""
        logits = (states @ weight.T).to(_accumulation_dtype(states.dtype))
        if bias is not None:
            logits += bias
        if self.scale is not None:
            logits *= self.scale
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits.div_(self.temperature)

    def chain_(self, grad: Float[Tensor, "n v"], logits: Float[Tensor, "n v"]) -> None:
        """Turn the gradient of ``logits`` into that of h W^T + bias, in place; ``logits`` is used up."""
        grad /= self.temperature
        if self.softcap is not None:
            slope = logits.mul_(self.temperature / self.softcap).square_().neg_().add_(1.0)  # tanh' = 1 - tanh^2
            grad *= slope
        if self.scale is not None:
            grad *= self.scale


class _ChunkedLogProbs(torch.autograd.Function):
    """log softmax(logits)[target]; backward makes each chunk's logits again instead of keeping them."""

    @staticmethod
    @torch.autocast("cpu", enabled=False)
    @torch.autocast("cuda", enabled=False)
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        head: _Head,
        chunk: int,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        compute_weight = weight.to(states.dtype)
        dtype = _accumulation_dtype(states.dtype)
        log_probs, normaliser = (torch.empty(len(states), dtype=dtype, device=states.device) for _ in range(2))
        entropy = torch.zeros(len(states) if with_entropy else 0, dtype=dtype, device=states.device)
        for part in _parts(len(states), chunk):
            logits = head.logits(states[part], compute_weight, bias)
            normaliser[part] = logits.logsumexp(-1)
            log_probs[part] = logits.gather(1, targets[part, None])[:, 0] - normaliser[part]
            if with_entropy:
                logits -= normaliser[part, None]
                entropy[part] = -(logits.exp() * logits).sum(-1)
        ctx.save_for_backward(states, weight, bias, targets, normaliser)
        ctx.head, ctx.chunk = head, chunk
        ctx.mark_non_differentiable(entropy)
        return log_probs, entropy

    @staticmethod
    @once_differentiable
    @torch.autocast("cpu", enabled=False)
    @torch.autocast("cuda", enabled=False)
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]: torch names ctx positionally
        ctx: Any, *grad_outputs: Any
    ) -> tuple[Tensor | None, ...]:
        grad = grad_outputs[0]
        states, weight, bias, targets, normaliser = ctx.saved_tensors
        head, dtype = ctx.head, normaliser.dtype
        compute_weight = weight.to(states.dtype)
        for_states, for_weight, for_bias = ctx.needs_input_grad[:3]
        d_states = torch.empty_like(states) if for_states else None
        # fp32 over the chunks: bf16 would lose what every further chunk adds.
        d_weight = torch.zeros(weight.shape, dtype=dtype, device=weight.device) if for_weight else None
        d_bias = torch.zeros(weight.shape[0], dtype=dtype, device=weight.device) if for_bias else None
        for part in _parts(len(states), ctx.chunk):
            logits = head.logits(states[part], compute_weight, bias)
            d_logits = (logits - normaliser[part, None]).exp_().mul_(-grad[part, None])  # g (1[target] - softmax)
            d_logits.scatter_add_(1, targets[part, None], grad[part, None])
            head.chain_(d_logits, logits)
            if d_bias is not None:
                d_bias += d_logits.sum(0)
            d_logits = d_logits.to(states.dtype)
            if d_states is not None:
                d_states[part] = d_logits @ compute_weight
            if d_weight is not None:
                d_weight += d_logits.T @ states[part]
        return (
            d_states,
            None if d_weight is None else d_weight.to(weight.dtype),
            None if d_bias is None or bias is None else d_bias.to(bias.dtype),
            *(None,) * 4,
        )


def token_log_probs(
    hidden: Float[Tensor, "b s d"],
    weight: Float[Tensor, "v d"],
    ids: Int[Tensor, "b s"],
    temperature: float,
    *,
    mask: Bool[Tensor, "b t"] | None = None,
    bias: Float[Tensor, " v"] | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    chunk: int | None = None,
    with_entropy: bool = False,
) -> TokenLogProbs:
    """Log softmax(logits_i / temperature)[token i + 1], the softmax in fp32 and never more than ``chunk`` x v at once.

    Args:
        hidden: States after the final norm. bf16 states multiply in bf16; fp64 stays fp64 throughout.
        weight: The unembedding, cast to the dtype of ``hidden`` for the product; its gradient accumulates in fp32.
        ids: Token ids; those that ``mask`` leaves out may be anything.
        temperature: The sampling temperature, > 0, which divides the logits: the same for policy, old and reference.
        mask: True at the positions to score (position *i* scores token *i + 1*); the others cost nothing and give 0.
            None scores all.
        bias: Of the unembedding.
        softcap: Final soft cap c: c tanh(logits / c) before the temperature (Gemma).
        scale: Multiplies the logits before the soft cap (Cohere's ``logit_scale``, 1 / ``logits_scaling`` of Granite).
        chunk: Positions whose logits exist at one time. None fits about 4 million logits on a CPU (its cache), 64
            million elsewhere.
        with_entropy: Whether the same pass also gives the entropy.

    Raises:
        ValueError: The temperature is not positive, or ``chunk`` is below 1.
    """
    if not temperature > 0:
        raise ValueError(f"sampling.temperature: must be above 0 to score tokens, got {temperature}")
    b, s, d = hidden.shape
    if chunk is None:
        elements = CPU_CHUNK_ELEMENTS if hidden.device.type == "cpu" else ACCELERATOR_CHUNK_ELEMENTS
        chunk = max(1, elements // weight.shape[0])
    if chunk < 1:
        raise ValueError(f"chunk: must be at least 1 position, got {chunk}")
    if mask is None:
        mask = torch.ones(b, s - 1, dtype=torch.bool, device=ids.device)
    rows, positions = mask.nonzero(as_tuple=True)
    states = hidden.reshape(b * s, d).index_select(0, rows * s + positions)
    targets = ids.reshape(b * s).index_select(0, rows * s + positions + 1).long()  # the shift
    head = _Head(temperature, softcap, scale)
    scored, entropy = _ChunkedLogProbs.apply(states, weight, bias, targets, head, chunk, with_entropy)  # type: ignore[misc]

    def spread(values: Tensor) -> Tensor:
        return values.new_zeros(b * (s - 1)).index_copy(0, rows * (s - 1) + positions, values).view(b, s - 1)

    return TokenLogProbs(spread(scored), spread(entropy) if with_entropy else None)


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _parts(n: int, chunk: int) -> list[slice]:
    return [slice(i, min(i + chunk, n)) for i in range(0, n, chunk)]
