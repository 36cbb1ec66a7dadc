"""Tasks that generate their own examples: pure functions of (seed, index), so neither order nor process matters."""

import inspect
import random
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from lit_posttrain import randomness
from lit_posttrain.data.gym_names import refuse_executing
from lit_posttrain.data.records import held_out
from lit_posttrain.data.sources import Row, nearest

KEY = "data.init_args.task"


class Task(ABC):
    """An endless supply of questions with answers.

    Subclass it and override :meth:`example`.

    Args:
        seed: Which questions. It does not depend on the run's seed, so that runs can share a held-out set.
    """

    def __init__(self, seed: int = 0):
        self.seed = seed

    @abstractmethod
    def example(self, index: int) -> dict[str, Any]:
        """Example ``index``: ``question`` (text), ``answer`` (text, number or None) and any further columns.

        A pure function of (seed, index): called in any order and in several processes.
        """


def distinct_examples(task: Task, train_size: int, val_size: int, held_out_percent: int) -> list[Row]:
    """The first examples of a task that give so many different training and held-out questions.

    Repeated questions stay in, to be counted and removed with those of other sources.

    Raises:
        ValueError: An example without a question, a task that answers the same index differently, or one that does not
            have so many different questions.
    """
    wanted = {False: train_size, True: val_size}
    seen: set[str] = set()
    rows: list[Row] = []
    share = held_out_percent / 100
    tries = 1000 + 20 * int(max(train_size / (1 - share), val_size / share if share else 0))
    for index in range(tries):
        origin = f"{type(task).__name__}.example({index})"
        example = task.example(index)
        question = example.get("question")
        if not isinstance(question, str) or "answer" not in example:
            raise ValueError(f"{KEY}: {origin} must have question (text) and answer, and has {example}")
        if index == 0 and [task.example(0).get(k) for k in ("question", "answer")] != [question, example["answer"]]:
            raise ValueError(f"{KEY}: {origin} differs from call to call; it must draw from the given rng alone")
        side = held_out(question, held_out_percent)
        if wanted[side] == 0:
            continue
        wanted[side] -= question not in seen
        seen.add(question)
        rows.append(Row(example, origin, index))
        if not any(wanted.values()):
            return rows
    raise ValueError(
        f"{KEY}: {tries} examples hold only {train_size - wanted[False]} different training questions of {train_size} "
        f"and {val_size - wanted[True]} held-out ones of {val_size}; lower data.init_args.train_size and val_size, or "
        "enlarge the task"
    )


class ReasoningGym(Task):
    """A generator of the reasoning-gym package (arXiv 2505.24760), by name.

    Columns are ``question``, ``answer`` (None where only the generator's own scorer can tell) and ``metadata``; the
    scorer takes all three.

    Args:
        name: The generator, such as ``chain_sum`` or ``leg_counting``. Those whose scorer executes the model's text
            are refused.
        seed: Which questions. Neighbouring seeds share none by construction, which is not so of reasoning-gym's own
            (its item *i* of seed *s* is item *i - 1* of seed *s + 1*).
        config: The generator's options; its default where an option is not given.
    """

    BLOCK = 1000
    """Items per dataset of reasoning-gym; some generators prepare them all at once and refuse an index beyond."""

    def __init__(self, name: str, seed: int = 0, config: dict[str, Any] | None = None):
        super().__init__(seed)
        refuse_executing(name)
        self.name = name
        self.config = config or {}
        for option in ("seed", "size"):
            if option in self.config:
                raise ValueError(f"{KEY}.init_args.config.{option}: remove it; set {KEY}.init_args.seed and train_size")
        self._block: tuple[int, Any] | None = None

    def example(self, index: int) -> dict[str, Any]:
        """Example ``index``; see :meth:`Task.example`."""
        number, item = divmod(index, self.BLOCK)
        if self._block is None or self._block[0] != number:
            self._block = number, self._create(number)
        entry = self._block[1][item]
        return {"question": entry["question"], "answer": entry["answer"], "metadata": entry["metadata"]}

    def _create(self, block: int) -> Any:
        try:
            import reasoning_gym
            from reasoning_gym.factory import DATASETS
        except ImportError as error:
            raise ValueError(
                f"{KEY}: ReasoningGym needs the package reasoning-gym: pip install 'lit-posttrain[tasks]'"
            ) from error
        if self.name not in DATASETS:
            raise ValueError(
                f"{KEY}.init_args.name: reasoning-gym has no {self.name!r}{nearest(self.name, DATASETS)}; it has "
                f"{', '.join(sorted(DATASETS))}"
            )
        options = [p for p in inspect.signature(DATASETS[self.name][1]).parameters if p not in ("seed", "size")]
        for option in self.config:
            if option not in options:
                raise ValueError(
                    f"{KEY}.init_args.config.{option}: {self.name} has no such option{nearest(option, options)}; "
                    f"it has {', '.join(options)}"
                )
        # 31 bits: one generator hands its seed plus index to numpy's global generator, which takes 32.
        seed = randomness.key(self.seed, "reasoning_gym", block) >> 32
        try:
            return reasoning_gym.create_dataset(self.name, seed=seed, size=self.BLOCK, **self.config)
        except (AssertionError, TypeError, ValueError) as error:
            raise ValueError(f"{KEY}.init_args.config: {self.name} refuses {self.config}: {error}") from error


class PythonTask(Task):
    """Questions from a function of yours, or one of :mod:`lit_posttrain.data.arithmetic`.

    Args:
        function: Dotted path of ``function(rng, **arguments) -> dict`` with ``question``, ``answer`` and any further
            columns. It must draw from ``rng`` (a ``random.Random``) and from nothing else.
        seed: Which questions; neighbouring seeds have nothing in common.
        arguments: Keyword arguments of the function.
    """

    def __init__(self, function: Callable[..., dict[str, Any]], seed: int = 0, arguments: dict[str, Any] | None = None):
        super().__init__(seed)
        self.function = function
        self.arguments = arguments or {}

    def example(self, index: int) -> dict[str, Any]:
        """Example ``index``; see :meth:`Task.example`."""
        name = getattr(self.function, "__qualname__", type(self.function).__qualname__)
        call = f"{self.function.__module__}.{name}(rng, **{self.arguments})"
        try:
            result = self.function(random.Random(randomness.key(self.seed, "task", index)), **self.arguments)
        except Exception as error:  # the user's code: whatever it raises, say whose it is and with what arguments
            raise ValueError(f"{KEY}: {call} raised {type(error).__name__} at index {index}: {error}") from error
        if not isinstance(result, dict):
            raise ValueError(f"{KEY}: {call} returned {type(result).__name__}, not a dict with question and answer")
        return result
