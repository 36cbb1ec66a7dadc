"""One short file an algorithm: its loss and, online, its credit rule."""

from lit_posttrain.algorithms.dpo import DPO
from lit_posttrain.algorithms.grpo import GRPO
from lit_posttrain.algorithms.kto import KTO
from lit_posttrain.algorithms.ppo import PPO
from lit_posttrain.algorithms.reward_model import PointwiseRewardModel, ProcessRewardModel, RewardModel
from lit_posttrain.algorithms.sft import SFT
from lit_posttrain.algorithms.win_rate import WinRate, WinRateDuringTraining

__all__ = [
    "DPO",
    "GRPO",
    "KTO",
    "PPO",
    "SFT",
    "PointwiseRewardModel",
    "ProcessRewardModel",
    "RewardModel",
    "WinRate",
    "WinRateDuringTraining",
]
