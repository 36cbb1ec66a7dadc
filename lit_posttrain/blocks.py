"""How a network's blocks run in training: compiled, or keeping only the activations that are dear to compute."""

import shutil
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

from lit_posttrain.sharding import decoder_layers

# What is too dear to make again. Other operations in an MLP go through its tokens once, number by number.
_PRODUCTS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.baddbmm.default,
    torch.ops.aten._grouped_mm.default,
}


def recompute_elementwise(network: nn.Module) -> None:
    """Make norms, and what stands between the products of an MLP, again in backward; in place.

    Of a gated MLP's four wide activations two are kept, and of a norm its input alone (RMS norms of HF keep two or
    three copies of it). Every number stays the same, bit for bit, since the same operations make it. Modules are known
    by HF's names: ``...RMSNorm`` classes, and children called ``mlp``; others stay as they are.
    """
    for name, module in network.named_modules():
        if "forward" in vars(module):  # done already
            continue
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = partial(_lean, module.forward, {})
        elif name.rsplit(".", 1)[-1] == "mlp":
            module.forward = partial(_lean, module.forward, {"context_fn": _products_kept})


def _lean(forward: Callable[..., Any], how: dict[str, Any], *arguments: Any, **named: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*arguments, **named)
    # Dropout is off and nothing else is drawn; shapes are not compared again.
    how = {"use_reentrant": False, "preserve_rng_state": False, "determinism_check": "none", **how}
    return checkpoint(forward, *arguments, **how, **named)


def _products_kept() -> Any:
    return create_selective_checkpoint_contexts(_kept)


def _kept(_: Any, operation: Any, *arguments: Any, **__: Any) -> CheckpointPolicy:
    if operation not in _PRODUCTS:
        return CheckpointPolicy.PREFER_RECOMPUTE
    # An MLP's last product narrows again. Backward does not need what it gives, so that it is neither kept nor made.
    weight = arguments[-1]
    narrows = weight.dim() == 2 and weight.shape[0] > weight.shape[1]
    return CheckpointPolicy.PREFER_RECOMPUTE if narrows else CheckpointPolicy.MUST_SAVE


def compile_layers(network: PreTrainedModel, device: torch.device) -> None:
    """Compile the forward pass of every decoder layer, in place, for any number of tokens.

    The method is replaced, not the module: hooks that gather sharded parameters stay outside.

    Raises:
        ValueError: A CPU without a C++ compiler.
    """
    if device.type == "cpu" and not any(shutil.which(name) for name in ("g++", "clang++", "c++")):
        raise ValueError(
            "model.init_args.policy.compile_layers: no C++ compiler (g++ or clang++) is on the path; install one, or "
            "set it to false"
        )
    for layer in decoder_layers(network):
        layer.forward = torch.compile(layer.forward, dynamic=True)
