"""Reductions over the positions that count; what stands in the others (nan and inf included) changes nothing."""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Aggregation = Literal["sequence_mean", "token_mean", "constant"]


class Totals(NamedTuple):
    """Counts over the WHOLE optimizer step and all ranks; a micro-batch's own counts would change the objective.

    Attributes:
        sequences: Rows with at least one True in their mask.
        tokens: True positions.
    """

    sequences: float
    tokens: float


def masked_mean(x: Float[Tensor, "*dims"], mask: Bool[Tensor, "*dims"]) -> Float[Tensor, ""]:
    """sum_i m_i x_i / sum_i m_i over all positions; 0, still attached to the graph, where nothing counts.

    Args:
        x: Values.
        mask: True where a value counts.
    """
    return x.where(mask, 0.0).sum() / mask.sum().clamp(min=1)


def masked_variance(x: Float[Tensor, "*dims"], mask: Bool[Tensor, "*dims"], ddof: int = 0) -> Float[Tensor, ""]:
    """sum_i m_i (x_i - mean)^2 / (sum_i m_i - ddof); 0 where no more than ``ddof`` positions count.

    Args:
        x: Values.
        mask: True where a value counts.
        ddof: 0 for the population variance (PPO's whitening), 1 for the sample variance (torch's default).
    """
    centred = (x - masked_mean(x, mask)).where(mask, 0.0)
    return centred.square().sum() / (mask.sum() - ddof).clamp(min=1)


def masked_whiten(
    x: Float[Tensor, "*dims"], mask: Bool[Tensor, "*dims"], shift_mean: bool = True, eps: float = 1e-8
) -> Float[Tensor, "*dims"]:
    """(x - mean) / sqrt(var + eps), *population* variance (Ziegler et al. 2019, 1909.08593, released code).

    Args:
        x: Values.
        mask: True where a value counts; the result is 0 elsewhere.
        shift_mean: Whether the mean is removed; False adds it back (rewards).
        eps: Added to the variance.
    """
    return whiten(x, mask, masked_mean(x, mask), masked_variance(x, mask), shift_mean, eps)


def whiten(
    x: Float[Tensor, "*dims"],
    mask: Bool[Tensor, "*dims"],
    mean: Float[Tensor, ""],
    variance: Float[Tensor, ""],
    shift_mean: bool = True,
    eps: float = 1e-8,
) -> Float[Tensor, "*dims"]:
    """The same with moments from elsewhere, so that they can be those of all ranks."""
    white = (x.where(mask, 0.0) - mean) * torch.rsqrt(variance + eps)
    return (white if shift_mean else white + mean).where(mask, 0.0)


def aggregate(
    per_token: Float[Tensor, "b t"],
    mask: Bool[Tensor, "b t"],
    mode: Aggregation,
    totals: Totals,
    constant_length: int | None = None,
) -> Float[Tensor, ""]:
    """This micro-batch's share of the step's mean: 1/N sum_i 1/|o_i| sum_t, 1/sum_i|o_i| sum, or 1/(N L) sum.

    In order: ``sequence_mean`` (GRPO, 2402.03300 Eq. 3), ``token_mean`` (DAPO, 2503.14476 Eq. 8) and ``constant``
    (Dr. GRPO, 2503.20783). Shares add up over micro-batches and ranks to the value of the undivided batch.

    Args:
        per_token: Unreduced terms.
        mask: True where a term counts. A row without any adds nothing and is not in ``totals``.
        mode: How tokens and rows are weighed.
        totals: Counts of the whole optimizer step over all ranks.
        constant_length: L of ``constant``, in tokens: never the padded width, which depends on the batch.

    Returns:
        A scalar; 0, still attached to the graph, where nothing counts.
    """
    kept = per_token.where(mask, 0.0)  # where, not a product: 0 * nan is nan
    if mode == "sequence_mean":
        return (kept.sum(-1) / mask.sum(-1).clamp(min=1)).sum() / max(totals.sequences, 1.0)
    if mode == "token_mean":
        return kept.sum() / max(totals.tokens, 1.0)
    if mode == "constant":
        if constant_length is None or constant_length < 1:
            raise ValueError(
                f"constant_length: needs a positive number of tokens under 'constant', got {constant_length}"
            )
        return kept.sum() / (max(totals.sequences, 1.0) * constant_length)
    raise ValueError(f"aggregation: {mode!r} is none of 'sequence_mean', 'token_mean', 'constant'")
