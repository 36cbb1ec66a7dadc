"""Every attention of packed rows against softmax over a dense mask, forward and backward."""

import inspect
from collections.abc import Callable

import pytest
import torch
import torch.nn.attention.varlen as torch_varlen
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import Module
from torch.utils._python_dispatch import TorchDispatchMode

from lit_posttrain.attention import _has_varlen_flash, by_group, shared_prompt_attention, varlen
from lit_posttrain.batching import Group
from lit_posttrain.cascade import cascade
from lit_posttrain.layout import Layout, blocks_of, layout_of, ragged_of

SIGNATURE = inspect.signature(torch_varlen.varlen_attn)
CPU = torch.device("cpu")
MIXED = [(4, (5, 2, 7, 6, 1)), (1, (3, 3)), (6, (9,)), (3, ())]
SHAPES = st.lists(st.tuples(st.integers(1, 7), st.lists(st.integers(1, 9), max_size=5)), min_size=1, max_size=3)
HEADS = st.sampled_from([(1, 1), (2, 2), (4, 2), (6, 2), (3, 1)])


def groups_of(shape: list) -> list[Group]:
    groups, start = [], 0
    for prompt, completions in shape:
        groups.append(Group(start, prompt, tuple(completions)))
        start += prompt + sum(completions)
    return groups


def visible(shape: list) -> torch.Tensor:
    """Token i sees token j: by which sequence of which group each belongs to, and where in it."""
    labels = [
        (g, c, place)
        for g, (prompt, completions) in enumerate(shape)
        for c, length in enumerate([prompt, *completions])
        for place in range(length)
    ]
    return torch.tensor(
        [
            [g == h and ((c == d and j <= i) or (d == 0 and c > 0)) for (h, d, j) in labels]
            for (g, c, i) in labels
        ]
    )  # fmt: skip


def dense(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, shape: list, scale: float) -> torch.Tensor:
    repeats = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeats, 1) for x in (key, value))
    scores = (query @ key.transpose(2, 3) * scale).masked_fill(~visible(shape), -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


def inputs(
    shape: list, heads: tuple[int, int], size: int = 4, dtype: torch.dtype = torch.float64
) -> list[torch.Tensor]:
    """Query, key, value in the memory order of a network, and the gradient of the output."""
    n, generator = sum(p + sum(c) for p, c in shape), torch.Generator().manual_seed(0)
    q, k, v, g = (
        torch.randn(1, n, h, size, generator=generator, dtype=torch.float64) for h in (*heads, heads[1], heads[0])
    )
    return [*(x.to(dtype).transpose(1, 2).requires_grad_() for x in (q, k, v)), g.to(dtype)]


def results(attend: Callable, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    *leaves, grad = tensors
    out = attend(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def reference_varlen(*args, **kwargs) -> torch.Tensor:
    """What the kernel documents, one sequence after another; called as the real one would have to be."""
    call = SIGNATURE.bind(*args, **kwargs)
    call.apply_defaults()
    given = call.arguments
    assert given["window_size"] == (-1, 0)
    assert given["cu_seq_q"].dtype == given["cu_seq_k"].dtype == torch.int32
    query, repeats = given["query"], given["query"].shape[1] // given["key"].shape[1]
    assert given["enable_gqa"] or repeats == 1
    key, value = (given[name].repeat_interleave(repeats, 1) for name in ("key", "value"))
    parts, queries, keys = [], given["cu_seq_q"].tolist(), given["cu_seq_k"].tolist()
    assert (queries[-1], keys[-1]) == (len(query), len(key))
    for i in range(len(queries) - 1):
        q = query[queries[i] : queries[i + 1]].transpose(0, 1)
        k, v = (x[keys[i] : keys[i + 1]].transpose(0, 1) for x in (key, value))
        m, n = q.shape[1], k.shape[1]
        assert m <= given["max_q"]
        assert n <= given["max_k"]
        seen = torch.ones(m, n, dtype=torch.bool).tril(n - m)
        scores = (q @ k.transpose(1, 2) * given["scale"]).masked_fill(~seen, -torch.inf)
        parts.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(parts)


def by_varlen(query, key, value, groups: list[Group], scale: float) -> torch.Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_varlen, "varlen_attn", reference_varlen)
        return varlen(query, key, value, ragged_of(groups, CPU), scale)


KINDS: dict[str, Callable] = {
    "cascade": lambda q, k, v, groups, scale: cascade(q, k, v, layout_of(groups, CPU), scale),
    "by group": by_group,
    "varlen": by_varlen,
}


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40)
@given(shape=SHAPES, heads=HEADS)
def test_equals_dense_masked_attention(kind: str, shape: list, heads: tuple[int, int]) -> None:
    tensors, groups = inputs(shape, heads), groups_of(shape)
    expected = results(lambda q, k, v: dense(q, k, v, shape, 0.7), tensors)
    actual = results(lambda q, k, v: KINDS[kind](q, k, v, groups, 0.7), tensors)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("slack", [0, 1, 100])
def test_how_stretches_are_batched_changes_nothing(slack: int) -> None:
    tensors, groups = inputs(MIXED, (4, 2)), groups_of(MIXED)
    layout = Layout(groups, blocks_of(groups, slack), None)
    assert len(layout.blocks) == {0: 8, 1: 5, 100: 1}[slack]
    expected = results(lambda q, k, v: dense(q, k, v, MIXED, 0.7), tensors)
    for a, b in zip(results(lambda q, k, v: cascade(q, k, v, layout, 0.7), tensors), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_gradients_by_finite_differences() -> None:
    shape = [(2, (1, 3)), (1, (2,))]
    query, key, value, _ = inputs(shape, (2, 1), size=2)
    layout = layout_of(groups_of(shape), CPU)
    assert torch.autograd.gradcheck(lambda *x: cascade(*x, layout, 0.7), (query, key, value))


def test_scores_far_apart_leave_gradients_finite() -> None:
    """Padding whose scores its log-sum-exp does not cover overflows to inf, and inf times a zero gradient is nan."""
    shape = [(1, (9, 9, 8, 7))]
    tensors, groups = inputs(shape, (2, 1), dtype=torch.float32), groups_of(shape)
    tensors[0] = (100 * tensors[0].detach()).requires_grad_()
    layout = Layout(groups, blocks_of(groups, 100), None)
    expected = results(lambda q, k, v: dense(q, k, v, shape, 0.7), tensors)
    for a, b in zip(results(lambda q, k, v: cascade(q, k, v, layout, 0.7), tensors), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 8e-3)])
def test_precision_is_that_of_the_inputs(dtype: torch.dtype, tolerance: float) -> None:
    """Nothing is rounded between the parts: bf16 errs by the rounding of what goes in and comes out, 2^-8."""
    shape = [(40, (30, 31, 60, 5, 12, 33, 44, 20))]
    tensors, groups = inputs(shape, (6, 2), size=16, dtype=dtype), groups_of(shape)
    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in tensors]
    expected = results(lambda q, k, v: dense(q, k, v, shape, 0.25), exact)
    actual = results(lambda q, k, v: cascade(q, k, v, layout_of(groups, CPU), 0.25), tensors)
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == dtype
        assert (a.double() - b).norm() < tolerance * b.norm()


class _Calls(TorchDispatchMode):
    """Shapes of query and key of every flash call, and elements of the largest tensor made."""

    def __init__(self) -> None:
        super().__init__()
        self.forward, self.backward = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__
        if "flash_attention_for_cpu" in name:
            q, k = args[1:3] if "backward" in name else args[:2]
            (self.backward if "backward" in name else self.forward).append((tuple(q.shape), tuple(k.shape)))
        return func(*args, **(kwargs or {}))


def test_a_prompts_keys_are_read_by_one_call_for_all_its_completions() -> None:
    shape = [(20, (30, 50, 10)), (5, (70,))]
    tensors, layout = inputs(shape, (4, 2), dtype=torch.bfloat16), layout_of(groups_of(shape), CPU)
    with _Calls() as calls:
        results(lambda q, k, v: cascade(q, k, v, layout, 0.5), tensors)
    # [key heads, query heads of each, tokens, size]; a lone completion is one text with its prompt
    alone = [((2, 2, n, 4), (2, 2, n, 4)) for n in (75, 50, 30, 20, 10)]
    assert calls.forward == calls.backward == [*alone, ((2, 2, 90, 4), (2, 2, 20, 4))]


def test_kept_for_backward_are_the_inputs_the_output_and_one_number_a_query() -> None:
    tensors, layout = inputs(MIXED, (4, 2), dtype=torch.bfloat16), layout_of(groups_of(MIXED), CPU)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        out = cascade(*tensors[:3], layout, 0.5)
    pointers = {x.data_ptr() for x in (*tensors[:3], out)}
    others = [x for x in kept if x.data_ptr() not in pointers]
    assert len(kept) == 5
    assert [x.numel() for x in others] == [out.numel() // out.shape[-1]]


def test_without_gradients_the_same_values() -> None:
    tensors, layout = inputs(MIXED, (4, 2)), layout_of(groups_of(MIXED), CPU)
    with torch.no_grad():
        out = cascade(*tensors[:3], layout, 0.7)
    assert not out.requires_grad
    assert torch.equal(out, cascade(*tensors[:3], layout, 0.7))


@pytest.mark.parametrize("sizes", [(6, 4), (4, 6)])
def test_values_may_be_of_another_size_than_keys(sizes: tuple[int, int]) -> None:
    query, key, _, _ = inputs(MIXED, (2, 2), size=sizes[0])
    _, _, value, grad = inputs(MIXED, (2, 2), size=sizes[1])
    layout = layout_of(groups_of(MIXED), CPU)
    expected = results(lambda q, k, v: dense(q, k, v, MIXED, sizes[0] ** -0.5), [query, key, value, grad])
    attend: Callable = lambda q, k, v: shared_prompt_attention(Module(), q, k, v, None, layout=layout)[0]  # noqa: E731
    for a, b in zip(results(attend, [query, key, value, grad]), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@settings(max_examples=60)
@given(shape=SHAPES, slack=st.integers(0, 9))
def test_every_token_is_in_one_causal_stretch_and_padding_repeats_a_last_token(shape: list, slack: int) -> None:
    seen: list[int] = []
    for block in blocks_of(groups_of(shape), slack):
        if block.tokens is None:
            seen += range(block.start, block.start + block.width)
            continue
        assert block.real is not None
        rows, real = block.tokens.view(block.rows, block.width), torch.zeros(block.rows * block.width, dtype=torch.bool)
        real[block.real] = True
        for row, mask in zip(rows.tolist(), real.view(block.rows, -1).tolist(), strict=True):
            length = sum(mask)
            assert block.width - length <= slack
            assert row == [row[0] + min(i, length - 1) for i in range(block.width)]
            seen += row[:length]
    assert sorted(seen) == list(range(sum(p + sum(c) for p, c in shape)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_elsewhere_than_on_a_cpu_takes_the_padded_way_without_flash(dtype: torch.dtype) -> None:
    tensors, groups = inputs(MIXED, (4, 2), size=8, dtype=dtype), groups_of(MIXED)
    assert not _has_varlen_flash(tensors[0])
    layout = Layout(groups, [], ragged_of(groups, CPU))
    out, _ = shared_prompt_attention(Module(), *tensors[:3], None, scaling=0.3, layout=layout)  # type: ignore[arg-type]
    torch.testing.assert_close(out, by_group(*tensors[:3], groups, 0.3), rtol=0, atol=0)
