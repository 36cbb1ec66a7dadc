"""Products with a weight as a CPU multiplies fastest: up to twice the speed of a plain product. No gradients."""

import torch
from torch import Tensor

# oneDNN chooses the layout for this many rows; other numbers work too.
_ROWS = 64
# Outputs up to which a turned product is worth it; a vocabulary head has more, and gains by packing.
_TURNED_OUTPUTS = 2**14
# Numbers that are widened at a time when they are added up on a CPU: as many as a core's cache holds.
_WIDENED = 2**18


def packs(weight: Tensor) -> bool:
    """Whether this machine multiplies by a prepacked ``weight``."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32


def turns(weight: Tensor) -> bool:
    """Whether this machine multiplies few rows by ``weight`` faster as W x^T than by its packed form.

    MKL in fp32 on a CPU with AVX2 alone: layers up to a tenth faster with 32 to 128 rows, a step of decoding 3%.
    """
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or len(weight) > _TURNED_OUTPUTS:
        return False
    return torch.backends.mkl.is_available() and has_avx2_alone()


def has_avx2_alone() -> bool:
    """Whether the CPU's widest vectors are AVX2's."""
    capable = torch.cpu.get_capabilities()
    return bool(capable.get("avx2")) and not capable.get("avx512_f")


def turned_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + b`` for ``x`` ``[..., in]``, outputs before rows in memory: what follows keeps that order."""
    rows = x.reshape(-1, x.shape[-1]).t()
    product = weight @ rows if bias is None else torch.addmm(bias[:, None], weight, rows)
    return product.t().unflatten(0, x.shape[:-1])


def pack(weight: Tensor) -> Tensor:
    """A reordered copy of ``weight`` ``[out, in]``, opaque to everything but ``packed_product``."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), _ROWS)


def packed_product(x: Tensor, packed: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + b`` for ``x`` ``[..., in]``, W being the weight that ``packed`` was made from."""
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


def add_widened_(total: Tensor, part: Tensor) -> Tensor:
    """``total += part`` for a ``part`` of lower precision; returns ``total``.

    torch widens all of ``part`` first; on a CPU that is an array that leaves the cache and comes back, and this adds in
    pieces that stay in it: the same sums, five times as fast.
    """
    if total.device.type != "cpu" or total.dtype == part.dtype or not (total.is_contiguous() and part.is_contiguous()):
        return total.add_(part)
    for sums, summands in zip(total.view(-1).split(_WIDENED), part.view(-1).split(_WIDENED), strict=True):
        sums.add_(summands)
    return total
