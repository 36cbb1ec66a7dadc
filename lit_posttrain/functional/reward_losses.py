"""Losses of scalar heads; unreduced terms, one a pair or a label."""

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid


def bradley_terry(
    winners: Float[Tensor, " p"], losers: Float[Tensor, " p"], margins: Float[Tensor, " p"] | None = None
) -> Float[Tensor, " p"]:
    """-log sigma(r_w - r_l - m) (InstructGPT, 2203.02155 Eq. 1; the margin as in Llama 2, 2307.09288 Eq. 2).

    Args:
        winners: Scores of the preferred completions.
        losers: Of the others.
        margins: By how much the first should win at least.
    """
    gap = winners - losers
    return -logsigmoid(gap if margins is None else gap - margins)


def binary_loss(logits: Float[Tensor, " n"], labels: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """-l log sigma(r) - (1 - l) log sigma(-r).

    Args:
        logits: Scores r.
        labels: l, 0 or 1.
    """
    return binary_cross_entropy_with_logits(logits, labels, reduction="none")
