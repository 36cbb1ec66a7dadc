"""Log-probs and entropy of sampled tokens from hidden states, a few positions at a time: never b x s x v.

The only place where tokens are shifted by one: result position *i* scores token *i + 1*.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from lit_posttrain.functional.products import add_widened_, has_avx2_alone, pack, packed_product, packs

# Bytes of logits that exist at one time. Products gain from many positions at once, the fp32 sum of the weight's
# gradient is touched once a chunk, and backward does not make the first chunk again.
CHUNK_BYTES = 2**27
# On a CPU the passes of the softmax are fastest where the cache holds what they read.
CPU_CACHE_ELEMENTS = 2**20
# From this many positions on, a product is worth the time it takes to reorder the weight: where bf16 or wide vectors
# multiply, and in fp32 on a CPU with AVX2 alone (there 560 positions gain nothing and 1,076 an eighth).
PACKED_FROM, PACKED_FROM_AVX2 = 256, 1024
# An attribute that a weight may have: the parameter whose gradient, where there is one, backward adds the weight's to.
# Autograd then gets none of it, and no array of its size is made.
GATHERED_IN = "_lit_posttrain_gathered_in"


class TokenLogProbs(NamedTuple):
    """What one scoring pass gives.

    Attributes:
        log_probs: log pi(token i + 1 | tokens up to i), fp32 (fp64 for fp64 input), with gradient; 0 outside the mask.
        entropy: Entropy in nats of the distribution each of those tokens was drawn from, without gradient unless that
            is asked for; 0 outside the mask. None unless asked for.
        likeliest: 1 where the token is the likeliest one, else 0. None unless entropy is asked for.
        mean_logits: Mean over the vocabulary of the logits, likewise.
    """

    log_probs: Float[Tensor, "b t"]
    entropy: Float[Tensor, "b t"] | None
    likeliest: Float[Tensor, "b t"] | None = None
    mean_logits: Float[Tensor, "b t"] | None = None


class _Head(NamedTuple):
    """The map from states to logits: softcap * tanh(scale * (h W^T + bias) / softcap) / temperature."""

    temperature: float
    softcap: float | None
    scale: float | None

    def logits(self, logits: Float[Tensor, "n v"], bias: Float[Tensor, " v"] | None) -> Float[Tensor, "n v"]:
        """Logits from h W^T in the accumulation dtype, in place."""
        if bias is not None:
            logits += bias
        if self.scale is not None:
            logits *= self.scale
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits.div_(self.temperature) if self.temperature != 1 else logits

    def chain_(self, grad: Float[Tensor, "n v"], logits: Float[Tensor, "n v"]) -> None:
        """Turn the gradient of ``logits`` into that of h W^T + bias, in place; ``logits`` is used up."""
        if self.temperature != 1:
            grad /= self.temperature
        if self.softcap is not None:
            slope = logits.mul_(self.temperature / self.softcap).square_().neg_().add_(1.0)  # tanh' = 1 - tanh^2
            grad *= slope
        if self.scale is not None:
            grad *= self.scale


class _Product:
    """h W^T of stretches of positions, the weight reordered first where enough of them are to be computed.

    Args:
        weight: W.
        states: h.
        ahead: Positions to be computed.
    """

    def __init__(self, weight: Float[Tensor, "v d"], states: Float[Tensor, "n d"], ahead: int):
        self.weight, self.states = weight, states
        plain = weight.dtype == torch.float32 and has_avx2_alone()
        worth_it = ahead >= (PACKED_FROM_AVX2 if plain else PACKED_FROM)
        self.packed = pack(weight) if worth_it and packs(weight) else None

    def __call__(self, where: slice, place: Float[Tensor, "n v"], *, keep: bool) -> Float[Tensor, "n v"]:
        """In ``place`` if it is to be kept there, else where it costs least."""
        if self.packed is None:
            return torch.mm(self.states[where], self.weight.T, out=place)
        product = packed_product(self.states[where], self.packed)
        return place.copy_(product) if keep else product


class _ChunkedLogProbs(torch.autograd.Function):
    """log softmax(logits)[target]; backward makes the logits again instead of keeping them, but for one chunk.

    The first chunk's h W^T waits in the memory that its gradient will take, so that keeping it costs none.
    """

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
        keep: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probs and entropy ``[n]``, and ``[2, n]`` of whether the target is the likeliest and the mean logit."""
        product = _Product(weight.to(states.dtype), states, len(states))
        first, *others = stretches = _stretches(len(states), chunk)
        place = states.new_empty(first.stop, len(weight))
        spare = states.new_empty(others[0].stop - others[0].start if others else 0, len(weight)) if keep else place
        dtype = _accumulation_dtype(states.dtype)
        log_probs, normaliser = (torch.empty(len(states), dtype=dtype, device=states.device) for _ in range(2))
        entropy = torch.zeros(len(states) if with_entropy else 0, dtype=dtype, device=states.device)
        measured = torch.zeros(2, len(entropy), dtype=dtype, device=states.device)
        for stretch in stretches:
            kept = keep and stretch is first
            room = (place if stretch is first else spare)[: stretch.stop - stretch.start]
            together = product(stretch, room, keep=kept)
            for part, logits in _logits(head, together, bias, stretch, copy=kept):
                at_target = logits.gather(1, targets[part, None])[:, 0]
                peak = logits.amax(-1)
                if with_entropy:
                    measured[0, part], measured[1, part] = at_target == peak, logits.mean(-1)
                shifted = logits.sub_(peak[:, None])
                mass = shifted.exp()
                total = mass.sum(-1)
                normaliser[part] = total.log().add_(peak)
                log_probs[part] = at_target - normaliser[part]
                if with_entropy:  # log Z - E[logit]
                    entropy[part] = total.log() - mass.mul_(shifted).sum(-1) / total
        ctx.save_for_backward(states, weight, bias, targets, normaliser, entropy)
        ctx.head, ctx.chunk, ctx.kept = head, chunk, place if keep else None
        ctx.owner = getattr(weight, GATHERED_IN, None)
        ctx.mark_non_differentiable(measured)
        ctx.set_materialize_grads(False)
        return log_probs, entropy, measured

    @staticmethod
    @once_differentiable
    @torch.autocast("cpu", enabled=False)
    @torch.autocast("cuda", enabled=False)
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]: torch names ctx positionally
        ctx: Any, *grad_outputs: Any
    ) -> tuple[Tensor | None, ...]:
        states, weight, bias, targets, normaliser, entropy = ctx.saved_tensors
        grad = normaliser.new_zeros(len(states)) if grad_outputs[0] is None else grad_outputs[0]
        for_entropy = grad_outputs[1]
        head, dtype = ctx.head, normaliser.dtype
        kept, ctx.kept = ctx.kept, None  # used up: a second backward makes it again
        first, *_ = stretches = _stretches(len(states), ctx.chunk)
        product = _Product(weight.to(states.dtype), states, len(states) - (0 if kept is None else first.stop))
        place = states.new_empty(first.stop, len(weight)) if kept is None else kept
        for_states, for_weight, for_bias = ctx.needs_input_grad[:3]
        d_states = torch.empty_like(states) if for_states else None
        gathered = None if ctx.owner is None else ctx.owner.grad
        d_weight = gathered
        d_bias = torch.zeros(weight.shape[0], dtype=dtype, device=weight.device) if for_bias else None
        for stretch in stretches:
            d_product = place[: stretch.stop - stretch.start]
            known = kept is not None and stretch is first
            together = d_product if known else product(stretch, d_product, keep=False)
            for part, logits in _logits(head, together, bias, stretch):
                d_logits = logits.sub(normaliser[part, None]).exp_().mul_(-grad[part, None])  # g (1[target] - softmax)
                d_logits.scatter_add_(1, targets[part, None], grad[part, None])
                if for_entropy is not None:  # dH / dlogit = -p (log p + H)
                    log_p = logits - normaliser[part, None]
                    d_logits -= for_entropy[part, None] * log_p.exp() * (log_p + entropy[part, None])
                head.chain_(d_logits, logits)
                if d_bias is not None:
                    d_bias += d_logits.sum(0)
                d_product[part.start - stretch.start : part.stop - stretch.start] = d_logits
            if d_states is not None:
                torch.mm(d_product, product.weight, out=d_states[stretch])
            if for_weight:
                more = stretch is not stretches[-1]
                d_weight = _with_weight_gradient(d_weight, d_product, states[stretch], more=more)
        if for_weight and d_weight is None:
            d_weight = torch.zeros_like(weight)
        return (
            d_states,
            None if d_weight is None or gathered is not None else d_weight.to(weight.dtype),
            None if d_bias is None or bias is None else d_bias.to(bias.dtype),
            *(None,) * 5,
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
    entropy_gradient: bool = False,
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
        chunk: Positions whose logits exist at one time. None fits 128 MiB of logits.
        with_entropy: Whether the same pass also gives the entropy and what comes with it.
        entropy_gradient: Whether gradients flow through the entropy.

    Raises:
        ValueError: The temperature is not positive, or ``chunk`` is below 1.
    """
    if not temperature > 0:
        raise ValueError(f"sampling.temperature: must be above 0 to score tokens, got {temperature}")
    b, s, d = hidden.shape
    if chunk is None:
        chunk = max(1, CHUNK_BYTES // (hidden.element_size() * weight.shape[0]))
    if chunk < 1:
        raise ValueError(f"chunk: must be at least 1 position, got {chunk}")
    if mask is None:
        mask = torch.ones(b, s - 1, dtype=torch.bool, device=ids.device)
    rows, positions = mask.nonzero(as_tuple=True)
    states = hidden.reshape(b * s, d).index_select(0, rows * s + positions)
    targets = ids.reshape(b * s).index_select(0, rows * s + positions + 1).long()  # the shift
    head = _Head(temperature, softcap, scale)
    keep = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    scored, entropy, measured = _ChunkedLogProbs.apply(  # type: ignore[misc]
        states, weight, bias, targets, head, chunk, with_entropy, keep
    )
    entropy = entropy if entropy_gradient else entropy.detach()

    def spread(values: Tensor) -> Tensor:
        return values.new_zeros(b * (s - 1)).index_copy(0, rows * (s - 1) + positions, values).view(b, s - 1)

    return TokenLogProbs(spread(scored), *(map(spread, (entropy, *measured)) if with_entropy else (None,)))


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _with_weight_gradient(total: Tensor | None, d_product: Tensor, states: Tensor, *, more: bool) -> Tensor:
    """``total`` plus a chunk's gradient of W: fp32 over the chunks, since bf16 would lose what every further one adds.

    Args:
        total: Of earlier chunks, if there are any; changed in place.
        d_product: Gradient of the chunk's h W^T.
        states: The chunk's h.
        more: Whether chunks follow.
    """
    dtype = _accumulation_dtype(states.dtype)
    if total is None:
        first = d_product.T @ states
        return first.to(dtype) if more else first
    if total.dtype == states.dtype:  # in place: the sum then costs no pass of its own
        return torch.addmm(total, d_product.T, states, out=total)
    return add_widened_(total, d_product.T @ states)


def _logits(
    head: _Head, product: Float[Tensor, "n v"], bias: Tensor | None, stretch: slice, *, copy: bool = False
) -> Iterator[tuple[slice, Float[Tensor, "m v"]]]:
    """The logits of a stretch of positions, as many at a time as is fastest; ``product`` is used up, or copied."""
    step = max(1, len(product))
    if product.device.type == "cpu":
        step = max(1, CPU_CACHE_ELEMENTS // product.shape[1])
    dtype = _accumulation_dtype(product.dtype)
    for part in _parts(stretch.start, stretch.stop, step):
        piece = product[part.start - stretch.start : part.stop - stretch.start]
        yield part, head.logits(piece.to(dtype, copy=copy), bias)


def _stretches(positions: int, chunk: int) -> list[slice]:
    """Positions whose logits exist together: a chunk, which may be kept, and then halves of one."""
    return [slice(0, min(chunk, positions)), *_parts(chunk, positions, max(1, chunk // 2))]


def _parts(start: int, stop: int, step: int) -> list[slice]:
    return [slice(i, min(i + step, stop)) for i in range(start, stop, step)]
