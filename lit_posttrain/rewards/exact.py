"""Answers that are compared as text or as integers."""

from typing import Literal

from lit_posttrain.rewards.base import Verifier
from lit_posttrain.rewards.extraction import ExtractFrom, sample_answer
from lit_posttrain.rewards.normalise import MAX_DIGITS, parse_integer, unwrap
from lit_posttrain.types import Sample, Verdict


class ExactAnswer(Verifier):
    r"""1 if the answer is the gold answer, as an integer or as text; else 0.

    Args:
        kind: ``integer`` compares values (``025`` is 25, ``1,234`` is 1234, at most 4,000 digits); ``text`` compares
            characters, runs of whitespace counting as one space.
        extract_from: ``answer_tag``: only ``<answer>..</answer>``; ``boxed``: only the last ``\boxed{..}``; ``auto``:
            the tag, else the box, else ``the answer is ..`` or ``#### ..``.
        minimum: Smallest integer allowed, of gold and answers; null for none. Only for ``integer``.
        maximum: Largest integer allowed; null for none. The default range is AIME's. Only for ``integer``.
        ignore_case: Whether upper and lower case are the same. Only for ``text``.
        weight: Factor of this function's score in the reward of a sample.
        name: Name in logs. Default: the class name.
    """

    def __init__(
        self,
        kind: Literal["text", "integer"] = "text",
        extract_from: ExtractFrom = "auto",
        minimum: int | None = 0,
        maximum: int | None = 999,
        ignore_case: bool = True,
        weight: float = 1.0,
        name: str | None = None,
    ):
        super().__init__(weight, name)
        if minimum is not None and maximum is not None and minimum > maximum:
            raise ValueError(f"ExactAnswer: minimum {minimum} is above maximum {maximum}; swap or drop one (null)")
        self.kind = kind
        self.extract_from: ExtractFrom = extract_from
        self.minimum = minimum
        self.maximum = maximum
        self.ignore_case = ignore_case

    def extract(self, sample: Sample) -> str | None:
        """The answer normalised: an integer within the range without leading zeros, or text.

        Args:
            sample: Whose completion is read.
        """
        answer = sample_answer(sample, self.extract_from)
        return self._normalise(answer) if answer is not None else None

    def score(self, sample: Sample) -> Verdict:
        """1, or 0 with a reason.

        Args:
            sample: What to judge.
        """
        if sample.answer is None:
            return Verdict(0.0, "not_applicable", "no_gold_answer")
        gold = self._normalise(sample.answer)
        if gold is None:
            return Verdict(0.0, "invalid", "gold_unusable")
        if sample.stop_reason != "stop":
            return Verdict(0.0, reason="truncated")
        answer = sample_answer(sample, self.extract_from)
        if answer is None:
            return Verdict(0.0, reason="no_answer")
        given = self._normalise(answer)
        if given is None:
            return Verdict(0.0, reason="unparsable")
        return Verdict(1.0) if given == gold else Verdict(0.0, reason="wrong")

    def check_answer(self, answer: str | None) -> None:
        """Stops at a gold answer that nothing could equal.

        Args:
            answer: The gold answer.

        Raises:
            ValueError: It is missing, empty, or (``integer``) no integer within the range.
        """
        if answer is None or not answer.strip():
            raise ValueError("ExactAnswer needs a gold answer, and this row has none (see data: answer column)")
        if self._normalise(answer) is None:
            what = "empty when normalised" if self.kind == "text" else (
                f"no integer from {self.minimum} to {self.maximum} of at most {MAX_DIGITS} digits; "
                f"set minimum and maximum, or kind: text"
            )  # fmt: skip
            raise ValueError(f"ExactAnswer: gold answer {answer[:200]!r} is {what}")

    def _normalise(self, text: str) -> str | None:
        if self.kind == "integer":
            value = parse_integer(text)
            if value is None or not (self.minimum is None or value >= self.minimum):
                return None
            return str(value) if self.maximum is None or value <= self.maximum else None
        text = " ".join(unwrap(text).split())
        return (text.casefold() if self.ignore_case else text) or None
