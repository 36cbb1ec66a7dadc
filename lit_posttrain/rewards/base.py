"""What a reward function is, and the verdict rules that hold for all of them.

What the *answer* caused (unparsable, wrong, over its limit, crash) scores 0 and is counted by reason. What the
*infrastructure* caused (worker lost, reward code raised, NaN) is ``invalid``: asked for once more, then left out of
mean, std and loss. Nothing is ever invented, and nothing is ever a silent 0.
"""

import logging
import math
import numbers
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lit_posttrain.types import Sample, Verdict, VerdictStatus

logger = logging.getLogger(__name__)

NO_FUNCTION = "no_function_applies"
_LARGEST = torch.finfo(torch.float32).max  # which rewards are stored in
KEY = "model.init_args.rewards.init_args"


class RewardError(RuntimeError):
    """A reward function broke its contract in a way that no sample can be blamed for; the run stops."""


class RewardFunction(ABC):
    """Judges samples.

    Args:
        weight: Factor of this function's score in the reward of a sample; any finite number.
        name: Name in logs; must differ between the functions of a run. Default: the class name.
    """

    key = KEY  # where the YAML holds its arguments, for messages; whoever owns it may know better

    def __init__(self, weight: float = 1.0, name: str | None = None):
        if not math.isfinite(weight):
            raise ValueError(f"weight: {weight} of {name or type(self).__name__} is not a finite number; give one")
        self.weight = weight
        self.name = name or type(self).__name__
        self._complained: set[str] = set()

    @abstractmethod
    def __call__(self, samples: Sequence[Sample]) -> list[Verdict]:
        """One verdict a sample, in order.

        Args:
            samples: What to judge; any number of them, also across groups.
        """

    def check_answer(self, answer: str | None) -> None:
        """Stops when a gold answer could never be matched; called while data is loaded, before any model is.

        Args:
            answer: The gold answer as text, or None where the row has none.

        Raises:
            ValueError: The answer is unusable; the message says why.
        """
        return None

    def check_prompt(self, prompt: str | list[dict[str, str]]) -> None:
        """Stops when a prompt could never be judged; called after ``place``, before anything is sampled.

        Args:
            prompt: As samples hold it.

        Raises:
            ValueError: The message says why.
        """
        return None

    def begin_iteration(self, iteration: int) -> None:
        """Told before each rollout is judged; only functions whose score depends on training progress care.

        Args:
            iteration: Number of the iteration, from 0.
        """
        return None

    def place(self, device: Any) -> None:
        """Told once where the policy is, before the first samples; only functions with a network care.

        Args:
            device: A ``torch.device``.
        """
        return None

    def state(self) -> dict[str, Any]:
        """What a checkpoint has to hold so that a resumed run judges alike."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Takes over what ``state`` returned.

        Args:
            state: Of the same function when the checkpoint was written.
        """
        return None

    def warn_uncalibrated(self) -> None:
        """Told where ``restore`` had nothing to take over; only functions that count from something learned care."""
        return None

    def close(self) -> None:
        """Ends what the function started (processes, files); calling it twice is harmless."""
        return None

    def complain_once(self, kind: str, message: str) -> None:
        """Logs a warning the first time that something of this kind happens.

        Args:
            kind: What must be new for the message to be shown.
            message: What to show.
        """
        if kind not in self._complained:
            self._complained.add(kind)
            logger.warning("reward function %s: %s (said once)", self.name, message)


class PerSampleReward(RewardFunction):
    """Judges each sample by itself: subclasses give ``score``.

    Args:
        weight: Factor of this function's score in the reward of a sample.
        name: Name in logs. Default: the class name.
    """

    @abstractmethod
    def score(self, sample: Sample) -> float | Verdict:
        """The raw score of one sample, before weighting, or a whole verdict.

        Args:
            sample: What to judge.
        """

    def __call__(self, samples: Sequence[Sample]) -> list[Verdict]:
        """Scores one by one; a sample whose scoring raises is ``invalid`` and the others are unharmed.

        Args:
            samples: What to judge.
        """
        return [self._guarded(sample) for sample in samples]

    def _guarded(self, sample: Sample) -> Verdict:
        try:
            value = self.score(sample)
        except RewardError:
            raise
        except Exception as error:  # untrusted text meets a verifier: whatever happens is this sample's alone
            return raised(self, error)
        return invalid("wrong_type:NoneType") if value is None else to_verdict(value)


class Verifier(PerSampleReward):
    """Decides whether an answer is right: a score of 1.0 means right, 0.0 wrong.

    Args:
        weight: Factor of this function's score in the reward of a sample.
        name: Name in logs. Default: the class name.
    """

    @abstractmethod
    def extract(self, sample: Sample) -> str | None:
        """The answer that the completion gives, normalised: its vote in majority voting; None is no vote.

        Args:
            sample: Whose completion is read.
        """


class Judgement(NamedTuple):
    """What ``judge`` found. Dims: ``b`` samples, ``f`` functions.

    Attributes:
        names: Name of each function.
        scores: Raw scores before weighting; NaN where the function did not score.
        rewards: Sum of weight x score over the functions that scored; 0 where the sample is invalid.
        valid: No applicable function with a weight is invalid, and at least one of them scored.
        reasons: Per function, how often each reason was given.
        verdicts: ``verdicts[i][j]`` is the word of function *j* on sample *i*.
    """

    names: list[str]
    scores: Float[Tensor, "b f"]
    rewards: Float[Tensor, " b"]
    valid: Bool[Tensor, " b"]
    reasons: list[dict[str, int]]
    verdicts: list[list[Verdict]]


def invalid(reason: str) -> Verdict:
    """A verdict that blames the infrastructure; reasons are counted in the logs, so few different ones."""
    return Verdict(0.0, "invalid", reason)


def raised(function: RewardFunction, error: Exception) -> Verdict:
    """The verdict on a sample whose scoring raised; what it raised is logged once a class."""
    kind = type(error).__name__
    function.complain_once(kind, f"raised {kind}: {error}")
    return invalid(kind)


def to_verdict(value: Any) -> Verdict:
    """Reads what reward code returned for one sample.

    Args:
        value: None (does not apply), a real number, a one-element array or tensor, or a ``Verdict``.
            NaN, what fp32 cannot hold, and everything else become ``invalid``.
    """
    if value is None:
        return Verdict(0.0, "not_applicable")
    if isinstance(value, Verdict):
        if value.status not in get_args(VerdictStatus):
            return invalid(f"wrong_status:{str(value.status)[:40]}")
        if value.status != "scored":
            return Verdict(0.0, value.status, value.reason)
        number = to_verdict(value.score) if value.score is not None else invalid("wrong_type:NoneType")
        return number._replace(reason=value.reason or number.reason) if number.status == "scored" else number
    kind = type(value).__name__
    if not isinstance(value, numbers.Real) and getattr(value, "shape", None) in ((), (1,)):  # numpy and torch scalars
        value = value.item()
    if not isinstance(value, numbers.Real):
        return invalid(f"wrong_type:{kind}")
    try:
        number = float(value)
    except OverflowError:
        return invalid("not_finite")
    return Verdict(number) if abs(number) <= _LARGEST else invalid("not_finite")


def ask(function: RewardFunction, samples: Sequence[Sample]) -> list[Verdict]:
    """Calls a function once and reads what comes back, whatever it is.

    Args:
        function: Whom to ask.
        samples: What to judge.

    Raises:
        RewardError: The wrong number of verdicts came back.
    """
    try:
        answers = function(samples)
    except RewardError:
        raise
    except Exception as error:
        return [raised(function, error)] * len(samples)
    if not isinstance(answers, list | tuple) or isinstance(answers, Verdict):
        return [invalid(f"wrong_type:{type(answers).__name__}")] * len(samples)
    if len(answers) != len(samples):
        raise RewardError(
            f"reward function {function.name} returned {len(answers)} values for {len(samples)} samples; "
            f"expected {len(samples)}, got {len(answers)}"
        )
    return [to_verdict(v) if isinstance(v, Verdict) else invalid(f"wrong_type:{type(v).__name__}") for v in answers]


def ask_twice(function: RewardFunction, samples: Sequence[Sample]) -> list[Verdict]:
    """``ask``, and once more about the samples that came back invalid."""
    verdicts = ask(function, samples)
    again = [i for i, verdict in enumerate(verdicts) if verdict.status == "invalid"]
    if again:
        for i, verdict in zip(again, ask(function, [samples[i] for i in again]), strict=True):
            verdicts[i] = verdict
    return verdicts


def require_names(functions: Sequence[RewardFunction], key: str) -> None:
    """There is a function, and no two have the same name.

    Args:
        functions: Of a run, or of a judge.
        key: The YAML key that lists them.

    Raises:
        ValueError: None, or two of the same name.
    """
    if not functions:
        raise ValueError(f"{key}: name at least one reward function")
    names = [function.name for function in functions]
    if twice := next((name for i, name in enumerate(names) if name in names[:i]), None):
        raise ValueError(
            f"{key}: two functions are called {twice!r}; give one of them another name ({key}.init_args.name)"
        )


def deciding(functions: Sequence[RewardFunction]) -> list[int]:
    """Numbers of the functions that are learned from: those with a weight, or all where none has one.

    Args:
        functions: Of a run.
    """
    weighted = [i for i, function in enumerate(functions) if function.weight]
    return weighted or list(range(len(functions)))


def judge(functions: Sequence[RewardFunction], samples: Sequence[Sample]) -> Judgement:
    """Asks every function about every sample and adds up: reward = sum of weight x score.

    A function of weight 0 is watched: what it says, or fails to say, changes neither rewards nor which samples count.

    Args:
        functions: At least one; their names differ.
        samples: What to judge.

    Raises:
        ValueError: No function, or two of the same name.
        RewardError: A function returned the wrong number of values.
    """
    require_names(functions, "rewards")
    names = [function.name for function in functions]
    columns = [ask_twice(function, samples) for function in functions] if samples else [[] for _ in functions]
    rows = [list(row) for row in zip(*columns, strict=True)]
    for row in rows:
        if all(verdict.status == "not_applicable" for verdict in row):
            row[:] = [Verdict(0.0, "not_applicable", NO_FUNCTION) for _ in row]
    scored = [[verdict.status == "scored" for verdict in row] for row in rows]
    counts = deciding(functions)
    totals = [sum(f.weight * v.score for f, v in zip(functions, row, strict=True)) for row in rows]
    valid = [
        any(s[j] for j in counts) and all(row[j].status != "invalid" for j in counts) and abs(total) <= _LARGEST
        for s, row, total in zip(scored, rows, totals, strict=True)
    ]
    scores = [[v.score if v.status == "scored" else math.nan for v in row] for row in rows]
    return Judgement(
        names=names,
        scores=torch.tensor(scores, dtype=torch.float32).reshape(len(rows), len(names)),
        rewards=torch.tensor([t if ok else 0.0 for t, ok in zip(totals, valid, strict=True)], dtype=torch.float32),
        valid=torch.tensor(valid, dtype=torch.bool),
        reasons=[count_reasons([row[j] for row in rows]) for j in range(len(names))],
        verdicts=rows,
    )


def count_reasons(verdicts: Sequence[Verdict]) -> dict[str, int]:
    """How often each reason was given; a plain score without a reason is not counted."""
    reasons = (v.reason or ("" if v.status == "scored" else v.status) for v in verdicts)
    return dict(Counter(reason for reason in reasons if reason))
