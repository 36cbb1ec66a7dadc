"""Who decides which of two answers is better: a reward model, reward functions, or any callable."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, final

import torch

from lit_posttrain.policy import PolicyConfig
from lit_posttrain.rewards.base import RewardFunction, judge
from lit_posttrain.scalar_heads import Scorer
from lit_posttrain.types import Sample

KEY = "judge.init_args"


class Answer(NamedTuple):
    """One answer to a prompt.

    Attributes:
        prompt_ids: Tokens it was conditioned on.
        ids: Its tokens, the end token included.
        prompt: The prompt as text.
        text: The answer as text, without the end token.
    """

    prompt_ids: list[int]
    ids: list[int]
    prompt: str
    text: str


class Judge(ABC):
    """Compares answers."""

    @abstractmethod
    def compare(self, first: Sequence[Answer], second: Sequence[Answer]) -> list[float]:
        """For each pair 1.0 if the first is better, 0.0 if the second is, 0.5 for a tie.

        A judge may favour a position; whoever asks, asks in both orders.
        """

    def place(self, device: torch.device) -> None:
        """Go where the policy is."""
        return None

    def close(self) -> None:
        """End what was started."""
        return None


def by_score(first: Sequence[float], second: Sequence[float]) -> list[float]:
    """1, 0.5 or 0 by which score is higher."""
    return [0.5 if a == b else float(a > b) for a, b in zip(first, second, strict=True)]


@final
class RewardModelJudge(Judge):
    """The answer that a reward model scores higher is better.

    Args:
        model: Folder of an exported reward model whose tokenizer is the policy's.
        token_budget: Most tokens in one forward pass.
    """

    def __init__(self, model: str, token_budget: int = 4096):
        self.model, self.token_budget = model, token_budget
        self.scorer: Scorer | None = None
        self.device = torch.device("cpu")

    def place(self, device: torch.device) -> None:
        """Load the model onto the device, once."""
        self.device = device
        if self.scorer is None:
            self.scorer = Scorer(PolicyConfig(model=self.model), device, self.token_budget)

    def scores(self, answers: Sequence[Answer]) -> list[float]:
        """Of each answer, read at its last token."""
        self.place(self.device)
        assert self.scorer is not None
        return self.scorer([a.prompt_ids for a in answers], [a.ids for a in answers])

    def compare(self, first: Sequence[Answer], second: Sequence[Answer]) -> list[float]:
        """By score; each answer is scored once."""
        return by_score(self.scores(first), self.scores(second))


@final
class RewardJudge(Judge):
    """The answer with the higher reward is better; an answer without a valid verdict ties with every other.

    Args:
        rewards: Judge the answers; their weighted scores add up.
    """

    def __init__(self, rewards: list[RewardFunction]):
        if not rewards:
            raise ValueError(f"{KEY}.rewards: name at least one reward function")
        self.rewards = rewards

    def compare(self, first: Sequence[Answer], second: Sequence[Answer]) -> list[float]:
        """By reward."""
        samples = [Sample(a.prompt, a.text, a.ids, "stop", None, {}) for a in (*first, *second)]
        out = judge(self.rewards, samples)
        rewards, valid, n = out.rewards.tolist(), out.valid.tolist(), len(first)
        wins = by_score(rewards[:n], rewards[n:])
        return [w if a and b else 0.5 for w, a, b in zip(wins, valid[:n], valid[n:], strict=True)]

    def close(self) -> None:
        """End what the rewards started."""
        for function in self.rewards:
            function.close()


@final
class PythonJudge(Judge):
    """Any callable.

    Args:
        function: Dotted path of ``f(prompts, first, second) -> list`` over three lists of texts, with one verdict a
            pair: 1 or ``"first"``, 0 or ``"second"``, 0.5 or ``"tie"`` or None.
    """

    def __init__(self, function: Callable[..., Any]):
        self.function = function

    def compare(self, first: Sequence[Answer], second: Sequence[Answer]) -> list[float]:
        """What the callable says.

        Raises:
            ValueError: It returned another number of verdicts, or one that is none.
        """
        verdicts = list(self.function([a.prompt for a in first], [a.text for a in first], [b.text for b in second]))
        if len(verdicts) != len(first):
            raise ValueError(f"{KEY}.function: {len(verdicts)} verdicts for {len(first)} pairs")
        return [self._value(verdict) for verdict in verdicts]

    def _value(self, verdict: Any) -> float:
        named = {"first": 1.0, "second": 0.0, "tie": 0.5, None: 0.5}
        if isinstance(verdict, str) or verdict is None:
            if verdict in named:
                return named[verdict]
        elif isinstance(verdict, int | float) and 0 <= verdict <= 1:
            return float(verdict)
        raise ValueError(f"{KEY}.function: {verdict!r} is none of 'first', 'second', 'tie' or a number from 0 to 1")
