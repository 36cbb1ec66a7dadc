"""Compute precision: a low-precision view made from the fp32 parameters that ``Policy`` owns.

Checkpoints, the optimizer and export see fp32; forward passes see the view. In bfloat16 an update of 1e-6
falls below a weight's resolution and is lost, so training in bfloat16 parameters would not train.
"""

import copy
from typing import Literal

import torch
from torch import nn

from lit_posttrain.functional.products import add_widened_

ComputeDtype = Literal["auto", "float32", "bfloat16"]


def resolve_dtype(choice: ComputeDtype, device: torch.device) -> torch.dtype:
    """What ``policy.compute_dtype`` means on this hardware.

    ``auto`` is bfloat16 only where the hardware multiplies it: CUDA from compute capability 8.0, CPUs with AMX or
    AVX512-BF16. Elsewhere it would be many times slower than float32.
    """
    if choice != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[choice]
    return torch.bfloat16 if multiplies_bfloat16(device) else torch.float32


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the device has a bfloat16 matrix unit."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


def require_full_precision(trainer: str) -> None:
    """See that the trainer leaves parameters in fp32.

    Raises:
        ValueError: Its precision is another.
    """
    if trainer not in ("32-true", "32"):
        raise ValueError(
            f"trainer.precision: must be 32-true, is {trainer}; parameters stay fp32, and "
            "model.init_args.policy.compute_dtype says what forward passes compute in"
        )


def describe_hardware(device: torch.device) -> str:
    """One line: what was found and which precision ``auto`` means on it."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return f"{name}, auto precision {'bfloat16' if multiplies_bfloat16(device) else 'float32'}"
    capabilities = torch.cpu.get_capabilities()
    units = [k for k in ("amx_bf16", "avx512_bf16", "avx512_f", "avx2") if capabilities.get(k)]
    precision = "bfloat16" if multiplies_bfloat16(device) else "float32"
    known = ", ".join(units) or "no vector unit known"
    return f"CPU with {torch.get_num_threads()} threads ({known}), auto precision {precision}"


class ComputeView:
    """``network`` in ``dtype``: the network itself in float32, otherwise a copy whose gradients land on the masters.

    Not an ``nn.Module``, so it stays out of ``state_dict``. Each low-precision gradient is added to its fp32
    master's as soon as autograd finishes it, so micro-batches accumulate in fp32. Frozen parameters share one
    low-precision storage with the master (a LoRA base exists once).
    """

    def __init__(self, network: nn.Module, dtype: torch.dtype):
        self.dtype = dtype
        self.pairs: list[tuple[nn.Parameter, nn.Parameter]] = []
        if dtype == torch.float32:
            self.module = network
            return
        self.module = copy.deepcopy(network)
        # Tied weights appear once in parameters(), and deepcopy keeps them tied.
        for master, low in zip(network.parameters(), self.module.parameters(), strict=True):
            # Only parameters are cast: rotary inverse frequencies are buffers and must keep float32.
            low.data = low.data.to(dtype)
            self.pairs.append((master, low))
            if master.requires_grad:
                low.register_post_accumulate_grad_hook(lambda low, master=master: _move_grad(master, low))
            else:
                master.data = low.data

    def master(self, parameter: nn.Parameter) -> nn.Parameter:
        """What the optimizer owns of a parameter of ``module``."""
        return next((master for master, low in self.pairs if low is parameter), parameter)

    @torch.no_grad()
    def sync(self) -> None:
        """Re-make the view from the masters; call after every change of them."""
        for master, low in self.pairs:
            if master.requires_grad:
                low.copy_(master)


def _move_grad(master: nn.Parameter, low: nn.Parameter) -> None:
    grad, low.grad = low.grad, None
    if grad is None:  # it was gathered
        return
    if master.grad is None:
        master.grad = grad.float()
    elif grad.is_sparse:
        master.grad.index_add_(0, grad._indices()[0], grad._values().to(master.dtype))
    else:
        add_widened_(master.grad, grad)
