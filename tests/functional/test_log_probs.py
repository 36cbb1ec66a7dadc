import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from lit_posttrain.functional import log_probs as log_probs_module
from lit_posttrain.functional.log_probs import TokenLogProbs, token_log_probs

B, S, D, V = 3, 6, 5, 11
HEADS: list[dict[str, float]] = [{}, {"softcap": 3.0}, {"scale": 0.6}, {"softcap": 2.0, "scale": 1.7}]


class Inputs:
    """Random states, head, ids and mask in float64, gradients on."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float64) -> None:
        g = torch.Generator().manual_seed(seed)
        self.hidden = torch.randn(B, S, D, generator=g, dtype=dtype).requires_grad_()
        self.weight = torch.randn(V, D, generator=g, dtype=dtype).requires_grad_()
        self.bias = torch.randn(V, generator=g, dtype=dtype).requires_grad_()
        self.ids = torch.randint(0, V, (B, S), generator=g)
        self.mask = torch.rand(B, S - 1, generator=g) < 0.6

    def naive(self, temperature: float, softcap: float | None = None, scale: float | None = None) -> Tensor:
        """All logits at once, [b, t, v]; the textbook that the chunked function must equal."""
        logits = (self.hidden @ self.weight.T + self.bias) * (scale or 1.0)
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        return torch.log_softmax(logits / temperature, -1)[:, :-1]

    def grads(self) -> list[Tensor]:
        out = []
        for x in (self.hidden, self.weight, self.bias):
            assert x.grad is not None
            out.append(x.grad)
            x.grad = None
        return out


@pytest.mark.trap(7)
@pytest.mark.trap(8)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("temperature", [1.0, 0.3, 2.5])
@pytest.mark.parametrize(("chunk", "cached"), [(1, 9), (4, 9), (100, 9), (100, 2), (5, 2)])
def test_value_and_gradient_equal_the_full_softmax(
    head: dict[str, float], temperature: float, chunk: int, cached: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_probs_module, "CPU_CACHE_ELEMENTS", cached * V)  # positions in one pass of the softmax
    x = Inputs()
    upstream = torch.randn(B, S - 1, dtype=torch.float64)
    want = x.naive(temperature, **head).gather(2, x.ids[:, 1:, None])[..., 0] * x.mask
    (want * upstream).sum().backward()
    want_grads = x.grads()
    got = token_log_probs(
        x.hidden, x.weight, x.ids, temperature, mask=x.mask, bias=x.bias, chunk=chunk, **head
    ).log_probs
    (got * upstream).sum().backward()
    torch.testing.assert_close(got, want, atol=1e-13, rtol=0)
    for ours, theirs in zip(x.grads(), want_grads, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


@pytest.mark.parametrize("head", [HEADS[0], HEADS[3]])
def test_gradcheck(head: dict[str, float]) -> None:
    x = Inputs(1)

    def f(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return token_log_probs(hidden, weight, x.ids, 0.7, mask=x.mask, bias=bias, chunk=4, **head).log_probs

    assert torch.autograd.gradcheck(f, (x.hidden, x.weight, x.bias))


@pytest.mark.parametrize("head", HEADS)
def test_entropy_is_that_of_the_tempered_distribution_and_has_no_gradient(head: dict[str, float]) -> None:
    x = Inputs(2)
    want = torch.distributions.Categorical(logits=x.naive(0.7, **head).detach()).entropy() * x.mask
    out = token_log_probs(x.hidden, x.weight, x.ids, 0.7, mask=x.mask, bias=x.bias, chunk=4, with_entropy=True, **head)
    assert out.entropy is not None
    torch.testing.assert_close(out.entropy, want, atol=1e-13, rtol=0)
    assert not out.entropy.requires_grad
    out.log_probs.sum().backward()
    with_entropy = x.grads()
    plain = token_log_probs(x.hidden, x.weight, x.ids, 0.7, mask=x.mask, bias=x.bias, chunk=4, **head)
    assert plain.entropy is None
    assert torch.equal(plain.log_probs, out.log_probs)
    plain.log_probs.sum().backward()
    assert all(map(torch.equal, with_entropy, x.grads()))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), chunk=st.integers(1, 20))
def test_no_chunk_size_matters(seed: int, chunk: int) -> None:
    x = Inputs(seed)
    results = []
    for size in (chunk, B * S):
        out = token_log_probs(x.hidden, x.weight, x.ids, 0.9, mask=x.mask, bias=x.bias, chunk=size)
        out.log_probs.square().sum().backward()
        results.append([out.log_probs, *x.grads()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


@pytest.mark.trap(8)
def test_position_i_scores_token_i_plus_one() -> None:
    ids = torch.tensor([[3, 1, 4, 1, 2]])
    knows_next = torch.nn.functional.one_hot(
        torch.tensor([[1, 4, 1, 2, 0]]), 6
    ).float()  # state i points at token i + 1
    log_probs = token_log_probs(knows_next, 50 * torch.eye(6), ids, 1.0).log_probs
    assert log_probs.shape == (1, 4)
    assert log_probs.abs().max().item() < 1e-6


@pytest.mark.parametrize("garbage", [math.nan, math.inf])
def test_states_and_ids_outside_the_mask_are_never_read(garbage: float) -> None:
    x = Inputs(3)
    clean = token_log_probs(x.hidden, x.weight, x.ids, 1.0, mask=x.mask, bias=x.bias, with_entropy=True)
    clean.log_probs.sum().backward()
    clean_grads = x.grads()
    state_used = torch.cat([x.mask, torch.zeros(B, 1, dtype=torch.bool)], 1)
    id_used = torch.cat([torch.zeros(B, 1, dtype=torch.bool), x.mask], 1)
    with torch.no_grad():
        x.hidden[~state_used] = garbage
    ids = x.ids.where(id_used, torch.tensor(-100))
    dirty = token_log_probs(x.hidden, x.weight, ids, 1.0, mask=x.mask, bias=x.bias, with_entropy=True)
    dirty.log_probs.sum().backward()
    assert torch.equal(clean.log_probs, dirty.log_probs)
    assert all(map(torch.equal, clean_grads, x.grads()))
    assert dirty.log_probs[~x.mask].eq(0).all()
    assert dirty.entropy is not None
    assert dirty.entropy[~x.mask].eq(0).all()


def test_rows_padding_and_order() -> None:
    x = Inputs(4)
    want = token_log_probs(x.hidden, x.weight, x.ids, 1.0, mask=x.mask).log_probs
    hidden = torch.cat([x.hidden, torch.full((B, 2, D), math.nan)], 1)
    ids = torch.cat([x.ids, torch.zeros(B, 2, dtype=torch.long)], 1)
    mask = torch.cat([x.mask, torch.zeros(B, 2, dtype=torch.bool)], 1)
    order = torch.tensor([2, 0, 1])
    got = token_log_probs(hidden[order], x.weight, ids[order], 1.0, mask=mask[order]).log_probs
    torch.testing.assert_close(got[:, : S - 1], want[order], atol=1e-14, rtol=0)


@pytest.mark.trap(17)
def test_nothing_to_score_is_a_zero_with_a_graph() -> None:
    x = Inputs(5)
    out = token_log_probs(x.hidden, x.weight, x.ids, 1.0, mask=torch.zeros_like(x.mask), bias=x.bias, with_entropy=True)
    out.log_probs.sum().backward()
    assert out.log_probs.eq(0).all()
    assert all(grad.eq(0).all() for grad in x.grads())


def test_without_a_mask_every_position_is_scored() -> None:
    x = Inputs(6)
    everything = token_log_probs(x.hidden, x.weight, x.ids, 1.0, mask=torch.ones_like(x.mask)).log_probs
    assert torch.equal(token_log_probs(x.hidden, x.weight, x.ids, 1.0).log_probs, everything)
    assert everything.lt(0).all()


class LargestOutput(TorchDispatchMode):
    """Records the most elements that any operation's result held."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(x.numel() for x in tree_leaves(out) if isinstance(x, Tensor))])
        return out


def big(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 65, 8, generator=g).to(dtype).requires_grad_()
    weight = torch.randn(1000, 8, generator=g).to(dtype).requires_grad_()
    mask = torch.rand(4, 64, generator=g) < 0.5
    return hidden, weight, torch.randint(0, 1000, (4, 65), generator=g), mask


@pytest.mark.parametrize("head", [{}, {"softcap": 30.0, "scale": 0.5, "bias": torch.zeros(1000)}])
def test_no_result_ever_holds_more_than_a_chunk_of_logits(head: dict[str, Any]) -> None:
    hidden, weight, ids, mask = big()
    chunk = 16
    with LargestOutput() as ours:
        out = token_log_probs(hidden, weight, ids, 1.0, mask=mask, chunk=chunk, with_entropy=True, **head)
        out.log_probs.sum().backward()
    assert weight.grad is not None
    assert ours.numel == chunk * 1000
    with LargestOutput() as naive:  # the counter does see what it is looking for
        torch.log_softmax(hidden @ weight.T, -1).sum().backward()
    assert naive.numel == 4 * 65 * 1000


def kept_products(scored: Tensor) -> Tensor | None:
    """What the graph behind log-probs holds of h W^T."""
    waiting = [scored.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and "ChunkedLogProbs" in node.name():
            return node.kept  # type: ignore[attr-defined]
        waiting += [] if node is None else [n for n, _ in node.next_functions]
    raise AssertionError("no head in the graph")


def test_one_chunk_with_a_vocabulary_dimension_is_kept_for_backward_and_used_up_there() -> None:
    hidden, weight, ids, mask = big()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (saved.append(x), x)[1], lambda x: x):
        out = token_log_probs(hidden, weight, ids, 1.0, mask=mask, chunk=16)
    kept = [x for x in saved if x is not weight and x.data_ptr() != weight.data_ptr()]
    assert kept
    assert max(x.numel() for x in kept) <= hidden.numel()
    products = kept_products(out.log_probs)
    assert products is not None
    assert products.shape == (16, 1000)
    out.log_probs.sum().backward()
    assert kept_products(out.log_probs) is None


def test_a_frozen_network_keeps_no_products() -> None:
    hidden, weight, ids, mask = big()
    bias = torch.zeros(1000, requires_grad=True)
    out = token_log_probs(hidden.detach(), weight.detach(), ids, 1.0, mask=mask, chunk=16, bias=bias)
    assert kept_products(out.log_probs) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("chunk", [16, 1000])
@pytest.mark.parametrize("head", [{}, {"softcap": 30.0, "scale": 0.5, "bias": torch.ones(1000)}])
def test_a_second_backward_gives_the_same(dtype: torch.dtype, chunk: int, head: dict[str, Any]) -> None:
    hidden, weight, ids, mask = big(dtype)
    out = token_log_probs(hidden, weight, ids, 0.7, mask=mask, chunk=chunk, with_entropy=True, **head)
    first, second = (torch.autograd.grad(out.log_probs.sum(), (hidden, weight), retain_graph=True) for _ in range(2))
    for x, y in zip(first, second, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("chunk", [16, 1000])
def test_work_is_proportional_to_the_scored_positions(chunk: int) -> None:
    hidden, weight, ids, mask = big()
    scored = int(mask.sum())
    counter = FlopCounterMode(display=False)
    with counter:
        out = token_log_probs(hidden, weight, ids, 1.0, mask=mask, chunk=chunk)
        forward = counter.get_total_flops()
        out.log_probs.sum().backward()
    a_position = 2 * 8 * 1000
    assert forward == scored * a_position
    # Backward: one product a gradient, and the logits again but for the first chunk's.
    again = max(0, scored - chunk)
    assert counter.get_total_flops() == (3 * scored + again) * a_position


@pytest.mark.trap(13)
def test_bfloat16_multiplies_low_and_normalises_high() -> None:
    hidden, weight, ids, mask = big(torch.bfloat16)
    out = token_log_probs(hidden, weight, ids, 1.0, mask=mask, chunk=16, with_entropy=True)
    logits = (hidden @ weight.T).float()[:, :-1]
    want = torch.log_softmax(logits, -1).gather(2, ids[:, 1:, None])[..., 0] * mask
    torch.testing.assert_close(out.log_probs, want, atol=1e-5, rtol=0)
    assert out.log_probs.dtype == torch.float32
    assert out.entropy is not None
    assert out.entropy.dtype == torch.float32
    out.log_probs.sum().backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16


@pytest.mark.trap(14)
def test_the_weight_gradient_accumulates_in_float32() -> None:
    # 2,000 equal shares of 1/2: a bf16 sum stops growing at 256 shares, where one is half a unit in the last place.
    n = 2000
    hidden = torch.ones(1, n + 1, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    token_log_probs(hidden, weight, torch.zeros(1, n + 1, dtype=torch.long), 1.0, chunk=1).log_probs.sum().backward()
    assert weight.grad is not None
    assert weight.grad.flatten().tolist() == pytest.approx([n / 2, -n / 2], rel=0.01)


def test_mixed_dtypes_and_frozen_weights() -> None:
    x = Inputs(7, torch.float32)
    hidden = x.hidden.detach().bfloat16().requires_grad_()
    out = token_log_probs(hidden, x.weight, x.ids, 1.0, mask=x.mask)
    out.log_probs.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.bfloat16
    assert x.weight.grad is not None
    assert x.weight.grad.dtype == torch.float32
    frozen = x.weight.detach()
    token_log_probs(x.hidden, frozen, x.ids, 1.0, mask=x.mask, bias=x.bias).log_probs.sum().backward()
    assert x.hidden.grad is not None
    assert x.bias.grad is not None
    with torch.no_grad():
        assert not token_log_probs(x.hidden, x.weight, x.ids, 1.0).log_probs.requires_grad


def test_an_outer_autocast_changes_nothing() -> None:
    x = Inputs(8, torch.float32)

    def run() -> tuple[TokenLogProbs, list[Tensor]]:
        out = token_log_probs(x.hidden, x.weight, x.ids, 1.0, bias=x.bias)
        out.log_probs.sum().backward()
        return out, x.grads()

    plain, plain_grads = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast, cast_grads = run()
    assert torch.equal(plain.log_probs, cast.log_probs)
    assert all(map(torch.equal, plain_grads, cast_grads))


@pytest.mark.trap(7)
@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_scoring_needs_a_positive_temperature(temperature: float) -> None:
    x = Inputs()
    with pytest.raises(ValueError, match=r"sampling\.temperature"):
        token_log_probs(x.hidden, x.weight, x.ids, temperature)


def test_chunk_must_be_positive() -> None:
    x = Inputs()
    with pytest.raises(ValueError, match="chunk"):
        token_log_probs(x.hidden, x.weight, x.ids, 1.0, chunk=0)


@pytest.mark.parity
def test_matches_trl() -> None:
    utils = pytest.importorskip("trl.trainer.utils")
    x = Inputs(9, torch.float32)
    with torch.no_grad():
        logits = (x.hidden @ x.weight.T + x.bias)[:, :-1]
        ours = token_log_probs(x.hidden, x.weight, x.ids, 0.8, bias=x.bias, with_entropy=True)
        theirs, entropy = utils.selective_log_softmax_and_entropy(logits, x.ids[:, 1:], temperature=0.8)
    torch.testing.assert_close(ours.log_probs, theirs, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.entropy, entropy, atol=1e-5, rtol=0)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_the_entropys_gradient_is_autograds(softcap: float | None) -> None:
    """Through temperature, soft cap and the mask, beside the gradient of the log-probs; and none unless asked for."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((2, 5, 4), (7, 4)))
    ids = torch.randint(0, 7, (2, 5), generator=generator)
    mask = torch.rand(2, 4, generator=generator) < 0.7
    weights = torch.randn(2, 4, generator=generator, dtype=torch.float64)
    gradients = []
    for ours in (True, False):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if ours:
            out = token_log_probs(
                h, w, ids, 0.7, mask=mask, softcap=softcap, with_entropy=True, entropy_gradient=True, chunk=2
            )
            log_probs, entropy = out.log_probs, out.entropy
            assert entropy is not None
        else:
            logits = h @ w.T
            logits = (logits if softcap is None else softcap * torch.tanh(logits / softcap)) / 0.7
            every = logits.log_softmax(-1)[:, :-1]
            log_probs = every.gather(-1, ids[:, 1:, None])[..., 0].where(mask, 0.0)
            entropy = -(every.exp() * every).sum(-1).where(mask, 0.0)
        ((log_probs + 2 * entropy) * weights).sum().backward()
        gradients.append((h.grad, w.grad))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-9)
    plain = token_log_probs(hidden.requires_grad_(), weight, ids, 0.7, mask=mask, with_entropy=True).entropy
    assert plain is not None
    assert not plain.requires_grad
