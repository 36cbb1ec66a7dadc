"""One exact draw a row from a softmax by inverse CDF: one uniform a token, no sort of the vocabulary."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

CHUNK = 256


class Draw(NamedTuple):
    """A sampled token of each row and its log-probability at the sampling temperature (fp32)."""

    tokens: Int[Tensor, " b"]
    log_probs: Float[Tensor, " b"]


def draw(logits: Float[Tensor, "b v"], uniforms: Float[Tensor, " b"], temperature: float) -> Draw:
    """Token ``min {j : CDF(j) > u}`` of softmax(logits / temperature), and its log-probability.

    The CDF is searched in two levels: first among chunks of 256 tokens, then inside the chunk. Each row is
    computed from its own logits alone, so the batch around it changes nothing.

    Args:
        logits: Next-token logits; a row with NaN or +inf gives some token and a log-probability that is not finite.
        uniforms: One number in [0, 1) a row, float64.
        temperature: At least 0; 0 takes the likeliest token, its log-probability being that at temperature 1.
    """
    peak = logits.amax(-1, keepdim=True).float()
    shifted = logits.float() - peak
    if temperature == 0:
        tokens = logits.argmax(-1)
        return Draw(tokens, shifted.gather(1, tokens[:, None])[:, 0] - shifted.exp_().sum(-1).log())
    if temperature != 1:
        shifted /= temperature
    rows, vocabulary = shifted.shape
    mass = torch.nn.functional.pad(shifted.exp(), (0, -vocabulary % CHUNK)).view(rows, -1, CHUNK)
    # Converted first: a sum that widens as it goes is several times slower on a CPU.
    below = mass.double().sum(-1).cumsum(-1)
    point = uniforms.to(below.device, torch.float64)[:, None] * below[:, -1:]
    chunk = torch.searchsorted(below, point, right=True).clamp_(max=below.shape[1] - 1)
    start = torch.where(chunk > 0, below.gather(1, (chunk - 1).clamp_min(0)), torch.zeros_like(point))
    inside = mass.gather(1, chunk[:, :, None].expand(-1, 1, CHUNK))[:, 0].double().cumsum(-1)
    offset = torch.searchsorted(inside, point - start, right=True)
    # Rounding can push the point past the chunk's end: take the last token that has any mass there.
    last = CHUNK - 1 - (inside.diff(prepend=torch.zeros_like(point)) > 0).flip(-1).int().argmax(-1, keepdim=True)
    # Logits that are NaN or +inf can lead past the vocabulary; the caller sees it by the log-probability.
    tokens = (chunk * CHUNK + torch.minimum(offset, last))[:, 0].clamp_(max=vocabulary - 1)
    return Draw(tokens, (shifted.gather(1, tokens[:, None])[:, 0].double() - below[:, -1].log()).float())
