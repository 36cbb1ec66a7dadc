"""Verification of mathematical answers."""

import importlib.util
from collections.abc import Sequence

from lit_posttrain.rewards.base import Verifier, invalid
from lit_posttrain.rewards.compare import Question, compare, is_decided_by_text
from lit_posttrain.rewards.extraction import ExtractFrom, sample_answer
from lit_posttrain.rewards.normalise import normalise
from lit_posttrain.rewards.pool import Outcome, WorkerPool
from lit_posttrain.types import Sample, Verdict


class MathVerifier(Verifier):
    r"""1 if the answer equals the gold answer mathematically, else 0.

    The answer is what the completion commits to: ``<answer>..</answer>`` after ``</think>``, else the last
    ``\boxed{..}``, else ``the answer is ..`` or ``#### ..``; never the last number. Different boxes count only with an
    explicit correction between them. Numbers are compared exactly in this process; everything else by ``math-verify``
    in a worker process that is killed at its limit. An answer over its limit scores 0; a lost or starved worker makes
    the sample invalid.

    Args:
        extract_from: ``auto`` as above; ``answer_tag`` or ``boxed`` accept only that form.
        timeout: CPU seconds for one comparison, above 0. The net of wall-clock time is five times that.
        memory_mb: Address space of a worker in MiB, at least 256.
        workers: Processes that compare at the same time, at least 1.
        weight: Factor of this function's score in the reward of a sample.
        name: Name in logs. Default: the class name.

    Raises:
        ValueError: ``math-verify`` is not installed, or a limit is out of range.
    """

    def __init__(
        self,
        extract_from: ExtractFrom = "auto",
        timeout: float = 3.0,
        memory_mb: int = 1024,
        workers: int = 1,
        weight: float = 1.0,
        name: str | None = None,
    ):
        super().__init__(weight, name)
        if importlib.util.find_spec("math_verify") is None:
            raise ValueError("MathVerifier needs math-verify; install it: pip install 'lit-posttrain[tasks]'")
        self.extract_from: ExtractFrom = extract_from
        self.pool = WorkerPool("math", workers, timeout, memory_mb)

    def extract(self, sample: Sample) -> str | None:
        """The answer in one spelling (numbers as exact fractions), or None.

        Args:
            sample: Whose completion is read.
        """
        answer = sample_answer(sample, self.extract_from)
        return (normalise(answer).vote() or None) if answer else None

    def score(self, sample: Sample) -> Verdict:
        """1, 0 with a reason, or invalid.

        Args:
            sample: What to judge.
        """
        return self([sample])[0]

    def __call__(self, samples: Sequence[Sample]) -> list[Verdict]:
        """Judges all samples, each distinct pair of gold and answer once.

        Args:
            samples: What to judge.
        """
        findings = [self._by_text(sample) for sample in samples]
        questions = list(dict.fromkeys(found for found in findings if isinstance(found, Question)))
        outcomes = self.pool.run([(question.gold, list(question.answers)) for question in questions])
        answers = {q: self._by_algebra(outcome) for q, outcome in zip(questions, outcomes, strict=True)}
        return [answers[found] if isinstance(found, Question) else found for found in findings]

    def check_answer(self, answer: str | None) -> None:
        """Stops at a gold answer that is missing or that math-verify cannot read.

        Args:
            answer: The gold answer.

        Raises:
            ValueError: Nothing could ever equal it.
        """
        if answer is None or not normalise(answer).core:
            raise ValueError("MathVerifier needs a gold answer, and this row has none (see data: answer column)")
        if is_decided_by_text(answer):
            return
        core = normalise(answer).core
        outcome = self.pool.run([(core, [core])])[0]
        if outcome.kind in ("lost", "starved"):
            outcome = self.pool.run([(core, [core])])[0]
        if outcome.value is None or not outcome.value.get("known"):
            why = "math-verify cannot read it" if outcome.kind == "done" else f"reading it ended with: {outcome.kind}"
            raise ValueError(f"MathVerifier: gold answer {answer[:200]!r} is unusable: {why}")

    def close(self) -> None:
        """Kills the workers."""
        self.pool.close()

    def _by_text(self, sample: Sample) -> Verdict | Question:
        if sample.answer is None:
            return Verdict(0.0, "not_applicable", "no_gold_answer")
        answer = sample_answer(sample, self.extract_from)
        if answer is None:
            return Verdict(0.0, reason="truncated" if sample.stop_reason != "stop" else "no_answer")
        try:
            found = compare(sample.answer, answer)
        except Exception as error:  # untrusted text meets our own code: a fault of ours is no fault of the answer
            self.complain_once(type(error).__name__, f"comparing raised {type(error).__name__}: {error}")
            return invalid(type(error).__name__)
        if isinstance(found, Question):
            return found
        return Verdict(1.0) if found else Verdict(0.0, reason="wrong")

    @staticmethod
    def _by_algebra(outcome: Outcome) -> Verdict:
        value = outcome.value
        if value is None:
            return outcome.verdict()
        if value.get("equal") is True:
            return Verdict(1.0)
        if value.get("known") is False:
            return invalid("gold_unreadable")
        return Verdict(0.0, reason="wrong" if value.get("read") else "unparsable")
