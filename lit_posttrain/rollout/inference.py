"""A view of the policy's network for generating: the same modules, with linears as the CPU multiplies fastest."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lit_posttrain.functional.products import pack, packed_product, packs, turned_product, turns

_HOOKS = [name for name in vars(nn.Module()) if name.endswith("_hooks")]


class PackedLinear(nn.Module):
    """A linear layer over a copy of its parameters, kept as this machine multiplies it fastest. Inference only.

    Args:
        weight: ``[out, in]``, fp32 or bf16, on a CPU; the copy does not follow later changes.
        bias: ``[out]`` or None; copied too.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        turned = turns(weight)
        self.product = turned_product if turned else packed_product
        # Packed, it is opaque to everything but its product; neither parameter nor buffer.
        self.weight = weight.detach().clone(memory_format=torch.contiguous_format) if turned else pack(weight)
        self.bias = None if bias is None else bias.detach().clone()

    def forward(self, x: Tensor) -> Tensor:
        """``x W^T + b``."""
        return self.product(x, self.weight, self.bias)


@torch.no_grad()
def inference_view(network: PreTrainedModel, attention: str, *, own: bool) -> PreTrainedModel:
    """``network`` in evaluation mode over the same weights, with packed linears and another attention function.

    Modules are copied, so the network itself, its hooks and its mode stay as they are; which modules it has does not
    matter. Packed weights and buffers are copies as of now; other parameters are shared unless ``own``.

    Args:
        network: A HF causal LM, adapters included; under sharding with its parameters gathered.
        attention: Name of a registered attention function.
        own: Copy what is not packed too, because the parameters will not stay where they are.
    """
    result = _Copy(attention, own).of(network)
    assert isinstance(result, PreTrainedModel)
    return result


class _Copy:
    """One copy of each module. A class: closures that call each other would keep the weights until the next sweep."""

    def __init__(self, attention: str, own: bool):
        self.attention, self.own = attention, own
        self.configs: dict[int, Any] = {}
        self.modules: dict[int, nn.Module] = {}

    def of(self, module: nn.Module) -> nn.Module:
        if id(module) not in self.modules:
            self.modules[id(module)] = _packed(module) or self._copied(module)
        return self.modules[id(module)]

    def _copied(self, module: nn.Module) -> nn.Module:
        # Not copy.copy: a sharded module's class would run its constructor again.
        kind = type(module).__mro__[2] if isinstance(module, FSDPModule) else type(module)
        new = object.__new__(kind)
        new.__dict__.update(vars(module))
        for name in _HOOKS:
            new.__dict__[name] = type(vars(module)[name])()
        new.__dict__["training"] = False
        new.__dict__.pop("forward", None)  # compiled for training, and bound to the original
        # Some rotary embeddings change their frequencies as sequences grow; the network's own must stay.
        new.__dict__["_buffers"] = {name: None if b is None else b.clone() for name, b in module._buffers.items()}
        new.__dict__["_modules"] = {name: m and self.of(m) for name, m in module._modules.items()}
        if self.own:
            new.__dict__["_parameters"] = {
                name: None if p is None else nn.Parameter(p.detach().clone(), requires_grad=False)
                for name, p in module._parameters.items()
            }
        if "config" in vars(module):
            new.__dict__["config"] = self._switched(module.config)
        return new

    def _switched(self, config: Any) -> Any:
        if id(config) not in self.configs:
            self.configs[id(config)] = copy.deepcopy(config)
            self.configs[id(config)]._attn_implementation = self.attention
        return self.configs[id(config)]


def _packed(module: nn.Module) -> nn.Module | None:
    """The packed form of a linear layer; None for any other module."""
    kind = type(module).__mro__[2] if isinstance(module, FSDPModule) else type(module)
    if kind not in (nn.Linear, Conv1D):
        return None
    weight, bias = module.weight, module.bias
    assert isinstance(weight, Tensor)
    if not packs(weight):
        return None
    # GPT-2 keeps its linears transposed.
    return PackedLinear(weight.t() if kind is Conv1D else weight, bias)  # pyright: ignore[reportArgumentType]
