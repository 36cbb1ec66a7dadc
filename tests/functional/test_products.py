"""Sums that are widened piece by piece are the sums that torch makes at once."""

import pytest
import torch

from lit_posttrain.functional import products
from lit_posttrain.functional.products import add_widened_


@pytest.mark.parametrize("shape", [(7, 5), (64,), (1, 1), (3, 4, 11)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_in_pieces_as_at_once(shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_WIDENED", 8)
    generator = torch.Generator().manual_seed(0)
    total, part = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator).to(dtype)
    expected = total + part.float()
    got = add_widened_(total, part)
    assert got is total
    assert torch.equal(total, expected)


def test_a_part_that_lies_otherwise_in_memory() -> None:
    total, part = torch.zeros(3, 5), torch.arange(15.0).view(5, 3).T.to(torch.bfloat16)
    assert torch.equal(add_widened_(total, part), part.float())
    total = torch.zeros(5, 3).T
    assert torch.equal(add_widened_(total, part.contiguous()), part.float())
