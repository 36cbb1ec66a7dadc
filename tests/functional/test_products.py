"""Sums that are widened piece by piece are the sums that torch makes at once; turned products are linear layers."""

import pytest
import torch

from lit_posttrain.functional import products
from lit_posttrain.functional.products import add_widened_, turned_product, turns


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


@pytest.mark.parametrize("rows", [(1,), (1, 5), (3, 4)])
@pytest.mark.parametrize("biased", [False, True])
def test_a_turned_product_is_the_linear_layer(rows: tuple[int, ...], biased: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(7, 6, generator=generator), torch.randn(7, generator=generator) if biased else None
    x = torch.randn(*rows, 6, generator=generator)
    exact = torch.einsum("...i,oi->...o", x.double(), weight.double()) + (0.0 if bias is None else bias.double())
    for given in (x, x.transpose(0, -1).contiguous().transpose(0, -1)):  # however its numbers lie in memory
        torch.testing.assert_close(turned_product(given, weight, bias).double(), exact, atol=1e-5, rtol=1e-5)
    # A product of a product, whose numbers lie the other way round.
    twice = turned_product(turned_product(x, weight, bias), weight.T.contiguous())
    torch.testing.assert_close(twice.double(), exact @ weight.double(), atol=1e-4, rtol=1e-5)


def test_products_are_turned_where_they_were_measured_to_be_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, head = torch.zeros(576, 1536), torch.empty(49152, 1)
    for found, expected in (({"avx2": True}, True), ({"avx2": True, "avx512_f": True}, False), ({}, False)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=found: found)
        assert turns(weight) == (expected and torch.backends.mkl.is_available())
        assert not turns(head)
        assert not turns(weight.bfloat16())
        assert not turns(weight.to("meta"))
