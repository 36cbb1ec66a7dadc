"""Who decides which of two answers is better: a reward model, reward functions, or any callable."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, final

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lit_posttrain.model_files import model_folder
from lit_posttrain.policy import PolicyConfig
from lit_posttrain.precision import ComputeDtype
from lit_posttrain.rewards.base import RewardError, RewardFunction, judge, require_names, to_verdict
from lit_posttrain.rewards.scorers import Row, fitted
from lit_posttrain.scalar_heads import Scorer
from lit_posttrain.types import Sample, StopReason

KEY = "judge.init_args"


class Answer(NamedTuple):
    """One answer to a prompt.

    Attributes:
        prompt_ids: Tokens it was conditioned on.
        ids: Its tokens, the end token included.
        prompt: The prompt as text.
        text: The answer as text, without the end token.
        messages: The prompt as a conversation, where it is one.
        stop_reason: Whether it ended or was cut.
    """

    prompt_ids: list[int]
    ids: list[int]
    prompt: str
    text: str
    messages: list[dict[str, str]] | None = None
    stop_reason: StopReason = "stop"


class Judge(ABC):
    """Compares answers."""

    @abstractmethod
    def compare(self, first: Sequence[Answer], second: Sequence[Answer]) -> list[float]:
        """For each pair 1.0 if the first is better, 0.0 if the second is, 0.5 for a tie.

        A judge may favour a position; whoever asks, asks in both orders.
        """

    def place(self, device: torch.device, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        """Load what is needed where the policy is, before anything is sampled.

        Args:
            device: The policy's.
            tokenizer: Whose ids answers hold.
        """
        return None

    def close(self) -> None:
        """End what was started."""
        return None


def by_score(first: Sequence[float | None], second: Sequence[float | None], who: str = "the judge") -> list[float]:
    """1, 0.5 or 0 by which score is higher; without a score an answer ties, and a warning counts such pairs."""
    pairs = list(zip(first, second, strict=True))
    missing = sum(a is None or b is None for a, b in pairs)
    if missing:
        warnings.warn(f"{missing} of {len(pairs)} comparisons are ties for want of a score by {who}", stacklevel=2)
    return [0.5 if a is None or b is None or a == b else float(a > b) for a, b in pairs]


def _sample(answer: Answer) -> Sample:
    """As reward functions read it."""
    return Sample(answer.messages or answer.prompt, answer.text, answer.ids, answer.stop_reason, None, {})


@final
class RewardModelJudge(Judge):
    """The answer that a reward model scores higher is better.

    Args:
        model: Folder of an exported reward model whose tokenizer is the policy's.
        token_budget: Most tokens in one forward pass.
        compute_dtype: As of the policy.
    """

    def __init__(self, model: str, token_budget: int = 4096, compute_dtype: ComputeDtype = "auto"):
        if token_budget < 1:
            raise ValueError(f"{KEY}.token_budget: must be at least 1, is {token_budget}")
        self.config, self.token_budget = PolicyConfig(model=model, compute_dtype=compute_dtype), token_budget
        self.scorer: Scorer | None = None
        self.device = torch.device("cpu")

    def place(self, device: torch.device, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        """Load the model onto the device, once.

        Raises:
            ValueError: It is no reward model, or reads other tokens than the policy writes.
        """
        self.device = device
        if self.scorer is not None:
            return
        if tokenizer is not None:
            self._check_tokens(tokenizer)
        self.scorer = Scorer(self.config, device, self.token_budget, f"{KEY}.model")

    def _check_tokens(self, tokenizer: PreTrainedTokenizerBase) -> None:
        folder = model_folder(self.config.model, f"{KEY}.model", weights=True)
        try:
            own = AutoTokenizer.from_pretrained(folder).get_vocab()
        except (OSError, ValueError) as error:
            raise ValueError(f"{KEY}.model: there is no tokenizer in {folder} ({error})") from error
        if any(own.get(token) != i for token, i in tokenizer.get_vocab().items()):
            raise ValueError(
                f"{KEY}.model: the tokenizer in {folder} is not the policy's; let RewardJudge judge by a "
                "LearnedReward, which reads text"
            )

    def scores(self, answers: Sequence[Answer]) -> list[float | None]:
        """Of each answer, read at its last token; None for one that does not fit into the model."""
        self.place(self.device)
        assert self.scorer is not None
        limit = self.scorer.network.context_length
        rows = [fitted(a.prompt_ids, a.ids, limit) for a in answers]
        fitting = [row for row in rows if isinstance(row, Row)]
        found = iter(self.scorer([r.prompt for r in fitting], [r.answer for r in fitting]) if fitting else [])
        return [next(found) if isinstance(row, Row) else None for row in rows]

    def compare(self, first: Sequence[Answer], second: Sequence[Answer]) -> list[float]:
        """By score; each answer is scored once, and one without a score ties with every other."""
        return by_score(self.scores(first), self.scores(second), f"reward model {self.config.model}")


@final
class RewardJudge(Judge):
    """The answer with the higher reward is better; an answer without a valid verdict ties with every other.

    Args:
        rewards: Judge the answers; their weighted scores add up.
    """

    def __init__(self, rewards: list[RewardFunction]):
        require_names(rewards, f"{KEY}.rewards")
        for function in rewards:
            function.key = f"{KEY}.rewards.init_args"
        self.rewards = rewards

    def place(self, device: torch.device, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        """Load the networks among the rewards."""
        for function in self.rewards:
            function.place(device)

    def compare(self, first: Sequence[Answer], second: Sequence[Answer]) -> list[float]:
        """By reward.

        Raises:
            RewardError: No answer has a valid verdict.
        """
        answers = (*first, *second)
        out = judge(self.rewards, [_sample(answer) for answer in answers])
        if answers and not out.valid.any():
            given = ", ".join(f"{name}: {reasons}" for name, reasons in zip(out.names, out.reasons, strict=True))
            raise RewardError(f"{KEY}.rewards: no answer has a valid verdict ({given}), so nothing can be compared")
        rewards = [r if ok else None for r, ok in zip(out.rewards.tolist(), out.valid.tolist(), strict=True)]
        return by_score(rewards[: len(first)], rewards[len(first) :], f"rewards {out.names} {out.reasons}")

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
        found = self.function([a.prompt for a in first], [a.text for a in first], [b.text for b in second])
        if not isinstance(found, Iterable):
            raise ValueError(f"{KEY}.function: returned a {type(found).__name__}, not a list of verdicts")
        verdicts = list(found)
        if len(verdicts) != len(first):
            raise ValueError(f"{KEY}.function: {len(verdicts)} verdicts for {len(first)} pairs")
        return [self._value(verdict) for verdict in verdicts]

    def _value(self, verdict: Any) -> float:
        named = {"first": 1.0, "second": 0.0, "tie": 0.5, None: 0.5}
        if isinstance(verdict, str) or verdict is None:
            if verdict in named:
                return named[verdict]
        else:
            read = to_verdict(verdict)  # numbers of numpy and torch too
            if read.status == "scored" and 0 <= read.score <= 1:
                return read.score
        raise ValueError(f"{KEY}.function: {verdict!r} is none of 'first', 'second', 'tie' or a number from 0 to 1")
