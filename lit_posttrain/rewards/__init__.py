"""Reward functions and verifiers; any of them, and any class or callable of a user's, is named by its dotted path."""

from lit_posttrain.rewards.base import (
    Judgement,
    PerSampleReward,
    RewardError,
    RewardFunction,
    Verifier,
    judge,
)
from lit_posttrain.rewards.callables import PythonReward
from lit_posttrain.rewards.constraints import LengthPenalty, OverlongPenalty
from lit_posttrain.rewards.exact import ExactAnswer
from lit_posttrain.rewards.format import ThinkFormat
from lit_posttrain.rewards.gym import ReasoningGymReward
from lit_posttrain.rewards.learned import LearnedReward
from lit_posttrain.rewards.math import MathVerifier

__all__ = [
    "ExactAnswer",
    "Judgement",
    "LearnedReward",
    "LengthPenalty",
    "MathVerifier",
    "OverlongPenalty",
    "PerSampleReward",
    "PythonReward",
    "ReasoningGymReward",
    "RewardError",
    "RewardFunction",
    "ThinkFormat",
    "Verifier",
    "judge",
]
