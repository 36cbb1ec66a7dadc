"""The cache and its attention against rows kept as plain lists, each attended to alone by the formula."""

import random

import pytest
import torch
from torch import Tensor

from lit_posttrain.rollout import kv_cache
from lit_posttrain.rollout.kv_cache import KVCache, Prefill, Scores

HEADS, KV_HEADS, SIZE, ROWS = 4, 2, 8, 8
SCORES = [Scores(None, None, None), Scores(0.3, 3, None), Scores(0.5, None, 2.0), Scores(None, 5, 1.0)]


def by_hand(query: Tensor, keys: Tensor, values: Tensor, scores: Scores) -> Tensor:
    """One query ``[heads, d]`` over its row's keys ``[kv heads, n, d]``, all of them its past, in float64."""
    repeats = query.shape[0] // keys.shape[0]
    keys, values = (x.double().repeat_interleave(repeats, 0)[:, -(scores.window or 10**6) :] for x in (keys, values))
    raw = torch.einsum("hd,hnd->hn", query.double(), keys) * (scores.scale or query.shape[-1] ** -0.5)
    if scores.softcap is not None:
        raw = scores.softcap * torch.tanh(raw / scores.softcap)
    return torch.einsum("hn,hnd->hd", raw.softmax(-1), values)


def states(generator: torch.Generator, n: int) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((1, HEADS, n, SIZE), (1, KV_HEADS, n, SIZE), (1, KV_HEADS, n, SIZE))
    query, key, value = (torch.randn(shape, generator=generator) for shape in shapes)
    return 2 * query, key, value


@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.trap(6)
def test_prompts_side_by_side_do_not_see_each_other(scores: Scores) -> None:
    lengths = [1, 7, 3]
    query, key, value = states(torch.Generator().manual_seed(0), sum(lengths))
    layout = Prefill(lengths)
    out = layout.attend(4, query, key, value, scores)
    start = 0
    for length in lengths:
        for i in range(start, start + length):
            expected = by_hand(query[0, :, i], key[0, :, start : i + 1], value[0, :, start : i + 1], scores)
            torch.testing.assert_close(out[0, i].double(), expected, atol=1e-5, rtol=1e-5)
        start += length
    assert torch.equal(layout.layers[4][0], key[0])
    assert torch.equal(layout.layers[4][1], value[0])
    assert layout.windows == {scores.window}


@pytest.mark.parametrize("seed", range(3))
def test_rows_that_come_and_go_see_their_own_tokens_alone(seed: int) -> None:
    """Random arrivals, steps and departures; few columns, so that shifts and growth happen all the time."""
    choice, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    longest, limit = 9, 12  # of a prompt, of new tokens
    prompts = Prefill([longest, 1, 4, 2])
    for layer in range(len(SCORES)):
        prompts.attend(layer, *states(generator, 16), SCORES[layer])
    most = kv_cache.most_columns(longest, limit)
    cache = KVCache(ROWS, longest, kv_cache.columns_for(longest, limit, step=2), most, prompts.layers)
    rows: list[list[tuple[Tensor, Tensor]]] = []  # of each live row and layer: its keys and values
    ages: list[int] = []
    columns, shifts, end = {cache.columns}, 0, cache.end
    layers = choice.choices(range(len(SCORES)), k=60)
    for step in range(60):
        while len(rows) < ROWS and choice.random() < 0.5:
            n = choice.randint(1, ROWS - len(rows))
            span = choice.choice(prompts.spans)
            cache.put(slice(len(rows), len(rows) + n), prompts.layers, span)
            rows += [[(k[:, span], v[:, span]) for k, v in prompts.layers.values()] for _ in range(n)]
            ages += [0] * n
        depart(cache, rows, ages, lambda age: age >= limit or choice.random() < 0.15)
        if not rows:
            continue
        padded = choice.randint(len(rows), ROWS)
        positions = cache.begin(len(rows), padded)
        assert positions[: len(rows)].tolist() == [row[0][0].shape[1] for row in rows]
        assert positions.max() < longest + limit, "a row that only fills up runs past the network's last position"
        shifts += cache.end < end
        end = cache.end
        columns.add(cache.columns)
        assert cache.columns <= most
        for layer, scores in enumerate(SCORES):
            query, key, value = states(generator, padded)
            out = cache.attend(layer, query, key, value, scores)
            assert out.shape == (1, padded, HEADS, SIZE)
            for i, row in enumerate(rows):
                keys, values = row[layer]
                row[layer] = torch.cat((keys, key[0, :, i, None]), 1), torch.cat((values, value[0, :, i, None]), 1)
            if layer == layers[step]:  # comparing is what takes time
                expected = torch.stack([by_hand(query[0, :, i], *row[layer], scores) for i, row in enumerate(rows)])
                torch.testing.assert_close(out[0, : len(rows)].double(), expected, atol=1e-5, rtol=1e-5)
        cache.finish()
        ages = [age + 1 for age in ages]
    assert len(columns) > 1
    assert shifts


def depart(cache: KVCache, rows: list, ages: list[int], leaves) -> None:
    """Rows that leave are overwritten by the last ones that stay."""
    gone = {i for i, age in enumerate(ages) if leaves(age)}
    kept = [i for i in range(len(rows)) if i not in gone]
    holes = [i for i in range(len(kept)) if i in gone]
    if holes:
        sources = kept[-len(holes) :]
        cache.move(torch.tensor(sources), torch.tensor(holes))
        for source, hole in zip(sources, holes, strict=True):
            rows[hole], ages[hole] = rows[source], ages[source]
    del rows[len(kept) :], ages[len(kept) :]


def test_no_mask_where_all_rows_are_of_one_age() -> None:
    """Rows that only fill the batch up must not bring one about: it costs time in every layer."""
    prompts = Prefill([3])
    prompts.attend(0, *states(torch.Generator().manual_seed(0), 3), SCORES[0])
    cache = KVCache(ROWS, 5, 9, 12, prompts.layers)
    cache.put(slice(0, 2), prompts.layers, prompts.spans[0])
    cache.begin(2, ROWS)
    assert cache.mask is None


def test_bytes_are_those_of_the_tensors() -> None:
    like = {0: (torch.zeros(2, 5, 8), torch.zeros(2, 5, 4)), 1: (torch.zeros(1, 5, 8, dtype=torch.bfloat16),) * 2}
    cache = KVCache(3, 5, 7, 7, like)
    held = sum(x.numel() * x.element_size() for pair in cache.layers.values() for x in pair)
    assert held == 3 * 7 * kv_cache.bytes_per_column(like)


@pytest.mark.parametrize(("heads", "queries"), [(1, 1), (2, 3), (4, 1)])
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("masked", [True, False])
def test_attention_by_products_is_attention(heads: int, queries: int, scale: float | None, masked: bool) -> None:
    """Against the formula in float64, over slices of a longer cache, as decoding reads them."""
    g = torch.Generator().manual_seed(3)
    q = torch.randn(5, heads, queries, 8, generator=g)
    k, v = (torch.randn(5, heads, 20, width, generator=g)[:, :, 4:17] for width in (8, 6))
    mask = torch.zeros(5, 1, 1, 13)
    if masked:
        mask[2, ..., :7] = mask[4, ..., :12] = -torch.inf
    raw = q.double() @ k.double().transpose(-1, -2) * (8**-0.5 if scale is None else scale) + mask
    expected = raw.softmax(-1) @ v.double()
    given = kv_cache.attention_by_products(q, k, v, mask if masked else None, scale)
    torch.testing.assert_close(given.double(), expected, atol=1e-6, rtol=1e-5)
    low = kv_cache.attention_by_products(q.bfloat16(), k.bfloat16(), v.bfloat16(), mask.bfloat16(), scale)
    torch.testing.assert_close(low.double(), expected, atol=0.05, rtol=0.05)


def test_products_replace_flash_where_they_were_measured_to_be_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    low, full = torch.zeros(1, dtype=torch.bfloat16), torch.zeros(1)
    for found, in_bf16, in_fp32 in (
        ({"avx2": True, "avx512_f": True, "avx512_bf16": True}, True, False),
        ({"avx2": True, "avx512_f": True, "avx512_bf16": True, "amx_bf16": True}, False, False),
        ({"avx2": True}, False, True),
        ({}, False, False),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=found: found)
        assert kv_cache.products_are_faster(low) == in_bf16
        assert kv_cache.products_are_faster(full) == in_fp32
    assert not kv_cache.products_are_faster(low.to("meta"))
