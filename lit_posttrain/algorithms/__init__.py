"""One short file an algorithm: its loss and, online, its credit rule."""

from lit_posttrain.algorithms.grpo import GRPO

__all__ = ["GRPO"]
