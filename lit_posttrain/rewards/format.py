"""Rewards for the shape of a completion, whatever it says."""

from lit_posttrain.rewards.base import PerSampleReward
from lit_posttrain.types import Sample, Verdict

TAGS = ("<think>", "</think>", "<answer>", "</answer>")


class ThinkFormat(PerSampleReward):
    """1 if the whole completion is ``<think>..</think> <answer>..</answer>``, else 0 (DeepSeek-R1 2.2, 2501.12948).

    Each of the four tags stands exactly once and in this order; only whitespace may stand before, between and after
    the two blocks. The completion is read with the template's prefill in front of it.

    Args:
        require_stop: A completion cut off at the length limit scores 0 even if it happens to look complete.
        weight: Factor of this function's score in the reward of a sample.
        name: Name in logs. Default: the class name.
    """

    def __init__(self, require_stop: bool = True, weight: float = 1.0, name: str | None = None):
        super().__init__(weight, name)
        self.require_stop = require_stop

    def score(self, sample: Sample) -> Verdict:
        """1 or 0, with the first rule that was broken as the reason.

        Args:
            sample: What to judge.
        """
        if self.require_stop and sample.stop_reason != "stop":
            return Verdict(0.0, reason="truncated")
        text = sample.completion
        if any(text.count(tag) != 1 for tag in TAGS):
            return Verdict(0.0, reason="tag_missing_or_repeated")
        think, end_think, answer, end_answer = (text.index(tag) for tag in TAGS)
        if not think < end_think < answer < end_answer:
            return Verdict(0.0, reason="tags_out_of_order")
        # The trap is a regular expression with MULTILINE: its $ matches at any line end, so text may follow.
        outside = (text[:think], text[end_think + len(TAGS[1]) : answer], text[end_answer + len(TAGS[3]) :])
        if any(part.strip() for part in outside):
            return Verdict(0.0, reason="text_outside_tags")
        return Verdict(1.0)
