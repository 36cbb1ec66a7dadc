"""Reward functions that are plain Python callables with TRL's signature."""

import asyncio
import inspect
import threading
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

from lit_posttrain.rewards.base import RewardError, RewardFunction, invalid, raised, to_verdict
from lit_posttrain.types import Sample, Verdict

_OURS = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")


class PythonReward(RewardFunction):
    """Scores a whole batch with a callable of TRL's reward signature, unchanged.

    It is called with keyword arguments ``prompts``, ``completions`` (texts, or one-message lists where the prompts
    are messages), ``completion_ids``, every dataset column as a list (``answer`` is the gold answer where no column
    has that name), ``trainer_state`` (with ``global_step``), ``log_extra(column, values)`` and
    ``log_metric(name, value)``; without ``**kwargs`` only with those it names. It may be ``async``. It returns one
    value a sample: a number; None where it does not apply. NaN, infinities, other types and exceptions make samples
    invalid.

    Args:
        function: Dotted path of the callable.
        timeout: Wall-clock seconds for one call, above 0. A call that takes longer makes its samples invalid; an
            ``async`` function is cancelled, but a thread that hangs cannot be ended and stays until the process ends
            (and one that never lets go of the interpreter lock, in C code, blocks everything).
        weight: Factor of this function's score in the reward of a sample.
        name: Name in logs. Default: the callable's name.
    """

    def __init__(
        self, function: Callable[..., Any], timeout: float = 60.0, weight: float = 1.0, name: str | None = None
    ):
        super().__init__(weight, name or getattr(function, "__name__", type(function).__name__))
        if not timeout > 0:
            raise ValueError(f"PythonReward: timeout {timeout} of {self.name} must be above 0 seconds")
        self.function = function
        self.timeout = timeout
        self.trainer_state = SimpleNamespace(global_step=0)
        self._metrics: dict[str, list[float]] = {}
        self._extras: dict[str, list[Any]] = {}

    def begin_iteration(self, iteration: int) -> None:
        """Sets what the callable reads as ``trainer_state.global_step``.

        Args:
            iteration: Number of the iteration, from 0.
        """
        self.trainer_state.global_step = iteration

    def pop_logs(self) -> tuple[dict[str, float], dict[str, list[Any]]]:
        """Means of what ``log_metric`` got and lists of what ``log_extra`` got since the last call."""
        metrics = {name: sum(values) / len(values) for name, values in self._metrics.items()}
        extras, self._metrics, self._extras = self._extras, {}, {}
        return metrics, extras

    def __call__(self, samples: Sequence[Sample]) -> list[Verdict]:
        """One call of the callable about all samples.

        Args:
            samples: What to judge.

        Raises:
            RewardError: It returned the wrong number of values, or wants an argument that no column provides.
        """
        if not samples:
            return []
        arguments = self._select(self._arguments(samples))
        outcome: list[Any] = []
        thread = threading.Thread(target=self._call, args=(arguments, outcome), daemon=True, name=f"reward {self.name}")
        thread.start()
        thread.join(self.timeout)
        if not outcome:
            self.complain_once("timeout", f"did not return within {self.timeout} s; its thread is left behind")
            return [invalid("timeout")] * len(samples)
        result, error = outcome[0]
        if isinstance(error, TimeoutError):
            return [invalid("timeout")] * len(samples)
        if isinstance(error, Exception):
            return [raised(self, error)] * len(samples)
        if error is not None:
            raise error  # KeyboardInterrupt, SystemExit
        return self._verdicts(result, len(samples))

    def _call(self, arguments: dict[str, Any], outcome: list[Any]) -> None:
        try:
            result = self.function(**arguments)
            if inspect.isawaitable(result):
                result = asyncio.run(_bounded(result, self.timeout))
        except BaseException as error:
            outcome.append((None, error))
        else:
            outcome.append((result, None))

    def _verdicts(self, result: Any, count: int) -> list[Verdict]:
        if hasattr(result, "tolist") and getattr(result, "ndim", 0) >= 1:  # numpy arrays and tensors
            result = result.tolist()
        if not isinstance(result, list | tuple) or isinstance(result, Verdict):
            kind = type(result).__name__
            self.complain_once(kind, f"returned {kind} instead of a list with one value a sample")
            return [invalid(f"wrong_type:{kind}")] * count
        if len(result) != count:
            raise RewardError(
                f"reward function {self.name} returned {len(result)} values for {count} samples; "
                f"expected {count}, got {len(result)}"
            )
        return [to_verdict(value) for value in result]

    def _arguments(self, samples: Sequence[Sample]) -> dict[str, Any]:
        columns = list(dict.fromkeys(name for sample in samples for name in sample.columns))
        arguments: dict[str, Any] = {"answer": [sample.answer for sample in samples]}
        arguments |= {name: [sample.columns.get(name) for sample in samples] for name in columns}
        arguments.pop("prompt", None)
        arguments.pop("completion", None)
        return arguments | {
            "prompts": [sample.prompt for sample in samples],
            "completions": [_completion(sample) for sample in samples],
            "completion_ids": [sample.token_ids for sample in samples],
            "trainer_state": self.trainer_state,
            "log_extra": self._log_extra,
            "log_metric": self._log_metric,
        }

    def _select(self, arguments: dict[str, Any]) -> dict[str, Any]:
        try:
            parameters = inspect.signature(self.function).parameters.values()
        except (TypeError, ValueError):  # some callables written in C do not tell
            return arguments
        missing = [
            p.name for p in parameters
            if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name not in arguments
        ]  # fmt: skip
        if missing:
            columns = sorted(set(arguments) - set(_OURS))
            raise RewardError(
                f"reward function {self.name} needs {', '.join(missing)}, which is no column of the data; "
                f"there are: {', '.join(columns)} (rename with data: column_map)"
            )
        if any(p.kind is p.VAR_KEYWORD for p in parameters):
            return arguments
        named = {p.name for p in parameters}
        return {name: value for name, value in arguments.items() if name in named}

    def _log_metric(self, name: str, value: float) -> None:
        self._metrics.setdefault(name, []).append(float(value))

    def _log_extra(self, column: str, values: list[Any]) -> None:
        self._extras.setdefault(column, []).extend(values)


async def _bounded(awaitable: Any, timeout: float) -> Any:
    return await asyncio.wait_for(awaitable, timeout)


def _completion(sample: Sample) -> str | list[dict[str, str]]:
    if isinstance(sample.prompt, str):
        return sample.completion
    return [{"role": "assistant", "content": sample.completion}]
