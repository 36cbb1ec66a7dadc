"""A moving average of the policy's fp32 weights."""

import torch

from lit_posttrain.policy import Policy
from lit_posttrain.sharding import reshard


@torch.no_grad()
def begin_average(average: Policy, policy: Policy) -> None:
    """Begin at the policy: adapters, and a head beside the network's, are drawn anew for every network.

    Args:
        average: Changed in place; sharded like the policy.
        policy: As it is at the start.
    """
    for mine, theirs in zip(average.parameters(), policy.parameters(), strict=True):
        mine.copy_(theirs)


@torch.no_grad()
def move_average(average: Policy, policy: Policy, decay: float) -> None:
    """theta_avg <- decay theta_avg + (1 - decay) theta, in fp32 (InstructGPT, 2203.02155, appendix C.4: 0.992).

    Args:
        average: Changed in place; sharded like the policy.
        policy: As it is after an iteration's updates.
        decay: 0 to 1.
    """
    reshard(policy)
    trained = dict(policy.trainable())
    for name, parameter in average.model.named_parameters():
        if name in trained:
            parameter.lerp_(trained[name].detach(), 1.0 - decay)
