"""Rewards of reasoning-gym's procedurally generated tasks."""

import importlib.util
from collections.abc import Sequence
from typing import Any

from lit_posttrain.rewards.base import Verifier, invalid, raised
from lit_posttrain.rewards.extraction import ExtractFrom, sample_answer
from lit_posttrain.rewards.normalise import unwrap
from lit_posttrain.rewards.pool import Outcome, WorkerPool
from lit_posttrain.types import Sample, Verdict


class ReasoningGymReward(Verifier):
    r"""1 if the scorer of the task's generator gives the answer at least ``threshold``, else 0.

    Which generator it is stands in the row: ``columns["metadata"]["source_dataset"]``. Only the extracted answer goes
    to the scorer, in a worker process that is killed at its limit: some scorers credit any text that contains the
    answer, some raise. The nine scorers that execute the answer's text are refused.

    Args:
        threshold: Least score that counts as right, above 0 and at most 1. Many scorers give partial credit, some
            even to garbage.
        extract_from: ``answer_tag``: only ``<answer>..</answer>``; ``boxed``: only the last ``\boxed{..}``; ``auto``:
            the tag, else the box, else ``the answer is ..`` or ``#### ..``.
        timeout: CPU seconds for one answer, above 0. The net of wall-clock time is five times that.
        memory_mb: Address space of a worker in MiB, at least 256.
        workers: Processes that score at the same time, at least 1.
        weight: Factor of this function's score in the reward of a sample.
        name: Name in logs. Default: the class name.

    Raises:
        ValueError: ``reasoning-gym`` is not installed, or an argument is out of range.
    """

    def __init__(
        self,
        threshold: float = 1.0,
        extract_from: ExtractFrom = "auto",
        timeout: float = 10.0,
        memory_mb: int = 2048,
        workers: int = 1,
        weight: float = 1.0,
        name: str | None = None,
    ):
        super().__init__(weight, name)
        if importlib.util.find_spec("reasoning_gym") is None:
            raise ValueError("ReasoningGymReward needs reasoning-gym; install it: pip install 'lit-posttrain[tasks]'")
        if not 0 < threshold <= 1:
            raise ValueError(f"ReasoningGymReward: threshold {threshold} must be above 0 and at most 1")
        self.threshold = threshold
        self.extract_from: ExtractFrom = extract_from
        self.pool = WorkerPool("gym", workers, timeout, memory_mb)

    def check_source(self, name: str) -> None:
        """Stops at a generator whose answers cannot be scored.

        Args:
            name: reasoning-gym's name of the generator.

        Raises:
            ValueError: Unknown, or its scorer executes the model's text.
        """
        from lit_posttrain.data.gym_names import refuse_executing

        refuse_executing(name)
        from reasoning_gym.factory import DATASETS

        if name not in DATASETS or name == "composite":
            raise ValueError(f"{name!r} is no reasoning-gym task; see reasoning_gym.factory.DATASETS")

    def extract(self, sample: Sample) -> str | None:
        """The answer's text without marks around it, runs of blanks kept: some tasks are about layout.

        Args:
            sample: Whose completion is read.
        """
        answer = sample_answer(sample, self.extract_from)
        return (unwrap(answer) or None) if answer else None

    def score(self, sample: Sample) -> Verdict:
        """1, 0 with a reason, or invalid.

        Args:
            sample: What to judge.
        """
        return self([sample])[0]

    def __call__(self, samples: Sequence[Sample]) -> list[Verdict]:
        """Scores all samples.

        Args:
            samples: What to judge.
        """
        findings = [self._job(sample) for sample in samples]
        jobs = [found for found in findings if not isinstance(found, Verdict)]
        outcomes = iter(self.pool.run(jobs))
        return [found if isinstance(found, Verdict) else self._verdict(next(outcomes)) for found in findings]

    def close(self) -> None:
        """Kills the workers."""
        self.pool.close()

    def _job(self, sample: Sample) -> Verdict | tuple[Any, ...]:
        metadata = sample.columns.get("metadata")
        source = metadata.get("source_dataset") if isinstance(metadata, dict) else None
        if not isinstance(source, str):
            return Verdict(0.0, "not_applicable", "no_source_dataset")
        try:
            self.check_source(source)
        except ValueError as error:
            return raised(self, error)._replace(reason=f"refused:{source[:40]}")
        answer = self.extract(sample)
        if answer is None:
            return Verdict(0.0, reason="truncated" if sample.stop_reason != "stop" else "no_answer")
        question = sample.columns.get("question")
        return source, answer, {"question": question, "answer": sample.answer, "metadata": metadata}

    def _verdict(self, outcome: Outcome) -> Verdict:
        if outcome.value is None:
            return outcome.verdict()
        score, error = outcome.value.get("score"), outcome.value.get("error")
        if isinstance(error, str):  # the scorer stumbled over the answer's text
            return Verdict(0.0, reason=f"scorer_raised:{error[:40]}")
        if not isinstance(score, float):
            return invalid("worker_failed")
        # A NaN compares false: 0.
        return Verdict(1.0) if score >= self.threshold else Verdict(0.0, reason="wrong")
