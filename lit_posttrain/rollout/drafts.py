"""Completions while they are drawn: what every engine keeps of them, and when each one ends."""

import math
from collections.abc import Iterable

from transformers import PreTrainedTokenizerBase

from lit_posttrain.policy import Policy
from lit_posttrain.rollout.engine import SamplingParams
from lit_posttrain.rollout.stops import StopRule
from lit_posttrain.types import Completion


class Drafts:
    """Tokens and log-probabilities of ``count`` completions so far.

    Args:
        count: How many.
        sampling: Their limit and stops.
        policy: Whose end tokens stop them where ``sampling`` names none.
        tokenizer: For stop strings.
    """

    def __init__(self, count: int, sampling: SamplingParams, policy: Policy, tokenizer: PreTrainedTokenizerBase | None):
        self.limit = sampling.max_new_tokens
        self.stop = StopRule(sampling.stop_ids(policy.stop_token_ids), sampling.stop_strings, tokenizer)
        self.tokens: list[list[int]] = [[] for _ in range(count)]
        self.log_probs: list[list[float]] = [[] for _ in range(count)]
        self.stopped = [False] * count

    def add(self, rows: Iterable[int], tokens: Iterable[int], log_probs: Iterable[float]) -> int:
        """One more token for each of these completions; how many of them it ends.

        Raises:
            FloatingPointError: A log-probability is not finite.
        """
        ended = 0
        for row, token, log_prob in zip(rows, tokens, log_probs, strict=True):
            if not math.isfinite(log_prob):
                raise FloatingPointError(
                    f"the policy's logits are not finite (log-probability {log_prob} at token {len(self.tokens[row])} "
                    "of a completion): its weights have diverged, or compute_dtype overflows"
                )
            self.tokens[row].append(token)
            self.log_probs[row].append(log_prob)
            self.stopped[row] = self.stop.stopped(self.tokens[row])
            ended += self.ended(row)
        return ended

    def ended(self, row: int) -> bool:
        """Whether a completion takes no further token."""
        return self.stopped[row] or len(self.tokens[row]) == self.limit

    def completions(self, weight_version: int) -> list[Completion]:
        """All of them, in order."""
        return [
            Completion(tokens, log_probs, "stop" if stopped else "length", weight_version)
            for tokens, log_probs, stopped in zip(self.tokens, self.log_probs, self.stopped, strict=True)
        ]
