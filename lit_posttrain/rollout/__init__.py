"""Generating completions: the engine seam, the sampler, and how a rollout is put together."""

from lit_posttrain.rollout.engine import RolloutEngine, SamplingParams
from lit_posttrain.rollout.native import NativeEngine
from lit_posttrain.rollout.reference import ReferenceEngine

__all__ = ["NativeEngine", "ReferenceEngine", "RolloutEngine", "SamplingParams"]
