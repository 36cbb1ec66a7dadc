"""Evaluation of several samples a prompt, as torchmetrics: right across batches and ranks."""

from collections import Counter
from collections.abc import Sequence
from math import comb
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat


def pass_at_k(n: int, correct: int, k: int) -> float:
    """1 - C(n - c, k) / C(n, k): the chance that k of n samples hold a right one, unbiased (2107.03374 Eq. 1).

    Args:
        n: Samples drawn.
        correct: How many of them are right.
        k: At most ``n``.

    Raises:
        ValueError: ``k`` is above ``n``.
    """
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs at least {k} samples a prompt, got {n}")
    return 1.0 - comb(n - correct, k) / comb(n, k)


def consensus(votes: Sequence[str | None], correct: Sequence[bool]) -> float:
    """Expected accuracy of the plurality answer under a uniform tie-break (self-consistency, 2203.11171).

    Args:
        votes: Each sample's answer; None does not vote.
        correct: Whether that answer is right.
    """
    counts = Counter(v for v in votes if v is not None)
    if not counts:
        return 0.0
    top = max(counts.values())
    winners = [v for v, n in counts.items() if n == top]
    # Two texts of one answer may be judged apart only by a faulty verifier; the share of right ones decides then.
    right = [_share([c for v, c in zip(votes, correct, strict=True) if v == winner]) for winner in winners]
    return sum(right) / len(right)


def calibration_error(confidence: Float[Tensor, " n"], correct: Bool[Tensor, " n"], bins: int = 10) -> float:
    """ECE = sum_bins n_bin / n |mean confidence - accuracy| over equal bins of [0, 1] (Guo et al., 1706.04599).

    Args:
        confidence: Probability given to what was predicted, 0.5 to 1 for a comparison.
        correct: Whether that came true.
        bins: How many.
    """
    place = (confidence * bins).long().clamp(0, bins - 1)
    gaps = [(confidence[place == b] - correct[place == b].float()).sum().abs() for b in range(bins)]
    return float(sum(gaps)) / max(1, len(confidence))


def share_interval(successes: Float[Tensor, " n"], trials: Float[Tensor, " n"]) -> tuple[float, float]:
    """95% interval of sum(successes) / sum(trials), where the trials of one prompt hang together.

    Wilson's (1927), the number of trials scaled by p (1 - p) / variance, the variance that of the ratio over prompts
    (linearised; Cochran, Sampling Techniques, 1977, section 6.4). NaN without trials.

    Args:
        successes: Of each prompt, in double precision; a tie may count half.
        trials: Of each prompt.
    """
    count = float(trials.sum())
    if not count:
        return float("nan"), float("nan")
    p = float(successes.sum()) / count
    spread, variance = p * (1 - p), float((successes - p * trials).square().sum()) / count**2
    # At least the plain interval where all outcomes are alike: nothing is then known of their variance.
    size = spread / variance if variance > 0 else count
    z2 = 1.959964**2
    centre = (p + z2 / (2 * size)) / (1 + z2 / size)
    half = (z2 * (spread / size + z2 / (4 * size**2))) ** 0.5 / (1 + z2 / size)
    return centre - half, centre + half


def _share(values: Sequence[bool]) -> float:
    return sum(values) / len(values)


class _MeanOverPrompts(Metric):
    full_state_update = False
    total: Tensor
    prompts: Tensor

    def __init__(self):
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("prompts", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def _add(self, value: float) -> None:
        self.total += value
        self.prompts += 1

    def compute(self) -> Tensor:
        """Mean over all prompts of all ranks; NaN without any."""
        return (self.total / self.prompts).float()


class PassAtK(_MeanOverPrompts):
    """Mean over prompts of the unbiased pass@k.

    Args:
        k: Samples that may be tried.
    """

    def __init__(self, k: int):
        super().__init__()
        self.k = k

    def update(self, correct: Bool[Tensor, " n"]) -> None:
        """Add one prompt's samples, at least ``k``."""
        self._add(pass_at_k(len(correct), int(correct.sum()), self.k))


class ConsensusAtK(_MeanOverPrompts):
    """Mean over prompts of the accuracy of the plurality answer among the first k samples (maj@k).

    Args:
        k: Samples that vote.
    """

    def __init__(self, k: int):
        super().__init__()
        self.k = k

    def update(self, votes: list[str | None], correct: Bool[Tensor, " n"]) -> None:
        """Add one prompt's samples, at least ``k``."""
        if len(votes) < self.k:
            raise ValueError(f"maj@{self.k} needs at least {self.k} samples a prompt, got {len(votes)}")
        self._add(consensus(votes[: self.k], correct[: self.k].tolist()))


class WinRate(Metric):
    """Share of prompts on which A is preferred to B, a tie counting half; each pair is judged in both orders.

    Attributes:
        outcomes: One number a prompt: the mean of A's wins in the two orders.
    """

    full_state_update = False
    outcomes: list[Tensor]

    def __init__(self, **kwargs: Any):
        """As torchmetrics' own.

        Args:
            **kwargs: ``sync_on_compute=False`` where every process has all outcomes already.
        """
        super().__init__(**kwargs)
        self.add_state("outcomes", default=[], dist_reduce_fx="cat")

    def update(self, outcomes: Float[Tensor, " n"]) -> None:
        """Add prompts."""
        self.outcomes.append(outcomes.double())

    def compute(self) -> dict[str, Tensor]:
        """The rate, its 95% interval over prompts, and the shares of wins, ties and losses; NaN without prompts.

        Ties and disagreements make the variance of the outcomes, and with it the interval, smaller than a coin's.
        """
        # A list of batches, or after a sync one tensor.
        values = dim_zero_cat(self.outcomes) if len(self.outcomes) else torch.zeros(0, dtype=torch.float64)
        low, high = share_interval(values, torch.ones_like(values))
        return {
            "win_rate": values.mean(),
            "win_rate_low": values.new_tensor(low),
            "win_rate_high": values.new_tensor(high),
            "wins": (values > 0.5).double().mean(),
            "ties": (values == 0.5).double().mean(),
            "losses": (values < 0.5).double().mean(),
        }
