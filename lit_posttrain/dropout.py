"""No dropout at all, or residual dropout for any architecture: on what attention and feed-forward add to the stream."""

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import dropout
from transformers import PreTrainedModel

from lit_posttrain.sharding import decoder_layers

# Noise of experts' routers. Not Phi's ``router_jitter_noise``, which is a threshold that evaluation reads too.
_NOISE = ("jitter_noise", "input_jitter_noise", "moe_jitter_eps")
_BRANCHES = ("self_attn", "attn", "attention", "mlp", "feed_forward")


def add_residual_dropout(network: PreTrainedModel, p: float) -> None:
    """Drop each element of every branch's output with probability ``p`` in training mode (1706.03762, section 5.4).

    Most present architectures read no such setting, so it is a hook on each branch.

    Args:
        network: Changed in place, before it is copied or sharded.
        p: Probability, 0 <= p < 1.

    Raises:
        ValueError: ``p`` is out of range, or no branch is known by name.
    """
    if not 0 <= p < 1:
        raise ValueError(f"model.init_args.dropout: must be at least 0 and below 1, is {p}")
    if p == 0:
        return
    hook = _Dropout(p)
    branches = [b for layer in decoder_layers(network) for n, b in layer.named_children() if n in _BRANCHES]
    if not branches:
        raise ValueError(
            f"model.init_args.dropout: the layers of {type(network).__name__} have no branch called "
            f"{' or '.join(_BRANCHES)}; set it to 0"
        )
    for branch in branches:
        branch.register_forward_hook(hook)


def disable_dropout(network: nn.Module) -> None:
    """Set every dropout probability to 0, those that functions read from attributes too, and layer drop and noise."""
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and ("drop" in name or name in _NOISE):
                setattr(module, name, 0.0)


class _Dropout:
    """A plain class: the compute view copies it with the network."""

    def __init__(self, p: float):
        self.p = p

    def __call__(self, module: nn.Module, arguments: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return dropout(output, self.p, module.training)
        return (dropout(output[0], self.p, module.training), *output[1:])
