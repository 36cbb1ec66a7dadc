"""How a network's blocks run in training: compiled, or keeping only the activations that are dear to compute."""

import shutil
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from lit_posttrain.sharding import decoder_layers
from lit_posttrain.stash import Stash, taken

# What is too dear to make again. Other operations in an MLP go through its tokens once, number by number.
_PRODUCTS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.baddbmm.default,
    torch.ops.aten._grouped_mm.default,
}


def recompute_elementwise(decoder: nn.Module) -> Stash:
    """Make norms, and what stands between the products of an MLP, again in backward; in place.

    Of a gated MLP's four wide activations two are kept, and of a norm its input alone: what it gives, and what an RMS
    norm of HF keeps on the way, is made from that. On a CPU what is kept is copied into a ``Stash``. Every number stays
    the same, bit for bit, since the same operations make it. Modules are known by HF's names: ``...RMSNorm`` classes,
    and children called ``mlp``; others stay as they are.

    Args:
        decoder: The network below its vocabulary head.

    Returns:
        Where it is kept.
    """
    if isinstance(done := vars(decoder).get("forward"), partial):
        return done.args[1]
    stash = Stash()
    for name, module in decoder.named_modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = partial(_norm, module.forward, stash)
        elif name.rsplit(".", 1)[-1] == "mlp":
            module.forward = partial(_mlp, module.forward, stash)
    decoder.forward = partial(_kept_apart, decoder.forward, stash)
    return stash


def _kept_apart(forward: Callable[..., Any], stash: Stash, *arguments: Any, **named: Any) -> Any:
    with stash.keeping():
        return forward(*arguments, **named)


def _norm(forward: Callable[..., Any], stash: Stash, *arguments: Any, **named: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*arguments, **named)
    out = _checkpoint(forward, *arguments, **named)
    if len(arguments) == 1 and not named and isinstance(out, Tensor):
        stash.remake(out, _Again(forward, stash.keep(arguments[0])).numbers)
    return out


class _Again:
    """What a norm gave, made again when backward first needs it, and once for all that need it."""

    def __init__(self, forward: Callable[..., Tensor], x: Any):
        self.forward, self.x = forward, x
        self.made: Tensor | None = None

    @torch.no_grad()
    def numbers(self) -> Tensor:
        if self.made is None:
            self.made = self.forward(taken(self.x)).view(-1)
        return self.made


def _mlp(forward: Callable[..., Any], stash: Stash, *arguments: Any, **named: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*arguments, **named)
    products: deque[Any] = deque()
    return _checkpoint(forward, *arguments, context_fn=lambda: (_Keeping(stash, products), _Given(products)), **named)


# Dropout is off and nothing else is drawn; shapes are not compared again.
_checkpoint = partial(checkpoint, use_reentrant=False, preserve_rng_state=False, determinism_check="none")


class _Keeping(TorchDispatchMode):
    """Keeps what dear products give."""

    def __init__(self, stash: Stash, products: deque[Any]):
        super().__init__()
        self.stash, self.products = stash, products

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if _is_kept(func, args):
            # Detached: autograd makes of the tensor itself the result, whose graph holds these products.
            kept = self.stash.keep(out.detach())
            # A copy, since the MLP may change its product in place (HF's experts do).
            self.products.append(kept.clone() if isinstance(kept, Tensor) else kept)
        return out


class _Given(TorchDispatchMode):
    """Gives it instead of the products, in the same order."""

    def __init__(self, products: deque[Any]):
        super().__init__()
        self.products = products

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return taken(self.products.popleft()) if _is_kept(func, args) else func(*args, **(kwargs or {}))


def _is_kept(operation: Any, arguments: Any) -> bool:
    if operation not in _PRODUCTS:
        return False
    # An MLP's last product narrows again. Backward does not need what it gives, so that it is neither kept nor made.
    weight = arguments[-1]
    return not (weight.dim() == 2 and weight.shape[0] > weight.shape[1])


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
