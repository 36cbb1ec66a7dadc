"""Rewards for keeping within limits of length, counted in sampled tokens (the end token included)."""

from typing import Literal

from lit_posttrain.rewards.base import PerSampleReward
from lit_posttrain.types import Sample


class LengthPenalty(PerSampleReward):
    """score = -min(per_token x e, maximum), e = tokens beyond ``target`` on the penalised side.

    Args:
        target: Length without a penalty, in tokens, at least 0.
        side: ``above`` penalises completions longer than the target (e = n - target), ``below`` shorter ones
            (e = target - n), ``both`` either (e = |n - target|).
        per_token: Penalty for each token beyond the target, above 0.
        maximum: Largest penalty, above 0; the score never falls below ``-maximum``.
        weight: Factor of this function's score in the reward of a sample.
        name: Name in logs. Default: the class name.
    """

    def __init__(
        self,
        target: int,
        side: Literal["above", "below", "both"] = "above",
        per_token: float = 0.001,
        maximum: float = 1.0,
        weight: float = 1.0,
        name: str | None = None,
    ):
        super().__init__(weight, name)
        if target < 0 or not per_token > 0 or not maximum > 0:
            raise ValueError(
                f"LengthPenalty: target {target}, per_token {per_token}, maximum {maximum}: target must be at least 0, "
                f"the other two above 0 (the penalty is subtracted by the function itself)"
            )
        self.target = target
        self.side = side
        self.per_token = per_token
        self.maximum = maximum

    def score(self, sample: Sample) -> float:
        """The negative penalty, in [-maximum, 0].

        Args:
            sample: What to judge.
        """
        beyond = len(sample.token_ids) - self.target
        excess = {"above": max(beyond, 0), "below": max(-beyond, 0), "both": abs(beyond)}[self.side]
        return 0.0 - min(self.per_token * excess, self.maximum)


class OverlongPenalty(PerSampleReward):
    """0 if n <= L - c; ((L - c) - n) / c if n <= L; -1 beyond: soft overlong punishment (DAPO Eq. 13, 2503.14476).

    Args:
        max_length: L, in tokens; the ``max_new_tokens`` of sampling, or less.
        cache: c, width of the zone before L in which the penalty grows, in tokens; 1 to ``max_length``.
        weight: Factor of this function's score in the reward of a sample.
        name: Name in logs. Default: the class name.
    """

    def __init__(self, max_length: int, cache: int, weight: float = 1.0, name: str | None = None):
        super().__init__(weight, name)
        if not 1 <= cache <= max_length:
            raise ValueError(f"OverlongPenalty: cache {cache} must lie between 1 and max_length {max_length}")
        self.max_length = max_length
        self.cache = cache

    def score(self, sample: Sample) -> float:
        """The penalty, in [-1, 0].

        Args:
            sample: What to judge.
        """
        length = len(sample.token_ids)
        if length > self.max_length:
            return -1.0
        return min((self.max_length - self.cache) - length, 0) / self.cache
