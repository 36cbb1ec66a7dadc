"""What makes the native engine fast, as counts: tokens computed, rows in each step, memory moved, weights packed."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lit_posttrain.policy import Policy, PolicyConfig
from lit_posttrain.rollout import NativeEngine, ReferenceEngine, SamplingParams, inference, kv_cache, native
from lit_posttrain.rollout.inference import PackedLinear
from lit_posttrain.rollout.kv_cache import KVCache, Prefill
from lit_posttrain.types import Completion, SamplingKey

STOPS = list(range(0, 258, 12))


@pytest.fixture(scope="module")
def policy(tiny_model: Path) -> Policy:
    return Policy(PolicyConfig(model=str(tiny_model), compute_dtype="float32"))


def synced(policy: Policy, **arguments: Any) -> NativeEngine:
    engine = NativeEngine(**arguments)
    engine.sync(policy)
    assert engine.fallback is None
    return engine


def groups(lengths: list[int], size: int) -> list[list[int]]:
    """Prompts of these lengths, ``size`` samples of each, samples of one prompt far apart."""
    return [[10 * i + j for j in range(n)] for _ in range(size) for i, n in enumerate(lengths)]


def generate(engine: Any, prompts: list[list[int]], max_new_tokens: int = 20, **arguments: Any) -> list[Completion]:
    keys = [SamplingKey(1, "rollout", 0, i, 0) for i in range(len(prompts))]
    params = SamplingParams(max_new_tokens=max_new_tokens, **{"stop_token_ids": STOPS, **arguments})
    return engine.generate(prompts, params, keys)


def expected_tokens(policy: Policy, prompts: list[list[int]], *arguments: Any, **options: Any) -> list[list[int]]:
    reference = ReferenceEngine()
    reference.sync(policy)
    return tokens(generate(reference, prompts, *arguments, **options))


def tokens(completions: list[Completion]) -> list[list[int]]:
    return [c.token_ids for c in completions]


class Calls:
    """Tokens of each forward pass of the engine's network: ``prompts`` and ``steps``."""

    def __init__(self, engine: NativeEngine, monkeypatch: pytest.MonkeyPatch):
        self.prompts: list[int] = []
        self.steps: list[int] = []
        network = engine.network
        assert network is not None
        forward = network.forward

        def counted(*arguments: Any, **options: Any) -> Any:
            calls = self.prompts if isinstance(options["layout"], Prefill) else self.steps
            calls.append(options["input_ids"].numel())
            return forward(*arguments, **options)

        monkeypatch.setattr(network, "forward", counted)


class Rows:
    """Before each step: live rows, completions taken in so far, the cache, and where its keys are."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.live: list[int] = []
        self.taken: list[int] = []
        self.free_when_taken: list[int] = []
        self.columns: list[int] = []
        self.ends: list[int] = []
        self.places: list[int] = []
        self.bytes: list[int] = []
        began, put = KVCache.begin, KVCache.put
        total, fresh = 0, True

        def begin(cache: KVCache, live: int, rows: int) -> torch.Tensor:
            nonlocal fresh
            result = began(cache, live, rows)
            fresh = True
            self.live.append(live)
            self.taken.append(total)
            self.columns.append(cache.columns)
            self.ends.append(cache.end)
            self.places.append(cache.layers[0][0].data_ptr())
            self.bytes.append(sum(x.numel() * x.element_size() for pair in cache.layers.values() for x in pair))
            return result

        def taking(cache: KVCache, rows: slice, *arguments: Any) -> None:
            nonlocal total, fresh
            total += rows.stop - rows.start
            if fresh:
                self.free_when_taken.append(rows.start)  # rows already live
            fresh = False
            put(cache, rows, *arguments)

        monkeypatch.setattr(KVCache, "begin", begin)
        monkeypatch.setattr(KVCache, "put", taking)


# --- prompts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("max_rows", "size"), [(1, 3), (5, 1), (5, 8), (64, 8)])
def test_each_prompt_is_computed_once(policy: Policy, monkeypatch, max_rows: int, size: int) -> None:
    lengths = [3, 9, 1, 6]
    engine = synced(policy, max_rows=max_rows)
    calls = Calls(engine, monkeypatch)
    generate(engine, groups(lengths, size))
    assert sum(calls.prompts) == sum(lengths)
    if max_rows == 64:
        assert calls.prompts == [sum(lengths)], "all at once"


def test_prompts_go_through_in_limited_portions(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """One longer than the limit goes alone."""
    lengths = [3, 30, 4, 6, 7, 1]
    prompts = groups(lengths, 2)
    expected = expected_tokens(policy, prompts)
    engine = synced(policy)
    calls = Calls(engine, monkeypatch)
    monkeypatch.setattr(native, "PREFILL_TOKENS", 12)
    assert tokens(generate(engine, prompts)) == expected
    assert calls.prompts == [3, 30, 10, 8]


def test_no_prompts_no_forward_pass(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = synced(policy)
    calls = Calls(engine, monkeypatch)
    assert generate(engine, []) == []
    assert calls.prompts == calls.steps == []


# --- rows -------------------------------------------------------------------------------------------------------------


def test_finished_rows_leave_the_batch(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step computes one token for each unfinished completion, filled up to a multiple of 8, and no more."""
    engine = synced(policy)
    calls = Calls(engine, monkeypatch)
    lengths = [len(c.token_ids) for c in generate(engine, groups([3, 9, 1, 6, 2], 8))]
    unfinished = [sum(n > step for n in lengths) for step in range(1, max(lengths))]
    assert calls.steps == [-(-n // 8) * 8 for n in unfinished]
    assert len(set(calls.steps)) > 3


@pytest.mark.parametrize("max_rows", [8, 24])
def test_the_batch_stays_full(policy: Policy, monkeypatch: pytest.MonkeyPatch, max_rows: int) -> None:
    prompts = groups([3, 9, 1, 6, 2], 20)
    engine = synced(policy, max_rows=max_rows)
    calls, rows = Calls(engine, monkeypatch), Rows(monkeypatch)
    lengths = [len(c.token_ids) for c in generate(engine, prompts)]
    assert rows.taken[-1] == len(prompts)
    for step in range(1, len(rows.live)):
        # Those taken in may leave again at their first token: only the next step is full then.
        idle = rows.live[step] <= max_rows * 7 / 8 and rows.taken[step - 1] == rows.taken[step] < len(prompts)
        assert not idle, "an eighth is free and nobody is taken in"
    # Each arrival is a forward pass or a copy of its own, so single free rows are left alone.
    last = len(prompts) - rows.taken[0]
    assert all(max_rows - live >= min(max_rows / 8, last) for live in rows.free_when_taken[1:])
    assert len(rows.free_when_taken) > 2
    fewest = -(-sum(n - 1 for n in lengths) // max_rows)
    assert len(calls.steps) <= fewest * 8 / 7 + max(lengths)
    assert max(calls.steps) == max_rows


# --- the cache --------------------------------------------------------------------------------------------------------


def test_the_cache_is_made_once(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, rows = synced(policy), Rows(monkeypatch)
    generate(engine, groups([3, 9, 1], 4), 40, stop_token_ids=[])
    assert len(rows.live) == 39
    assert len(set(rows.places)) == 1
    assert set(rows.columns) == {9 + 40}


@pytest.mark.parametrize("architecture", ["mistral", "gpt2", "gemma3_text"])
def test_a_cache_that_shifts_and_grows(architecture_folder, monkeypatch: pytest.MonkeyPatch, architecture: str) -> None:
    policy = Policy(PolicyConfig(model=str(architecture_folder(architecture)), compute_dtype="float32"))
    prompts = groups([3, 25, 1, 6, 2], 4)
    expected = expected_tokens(policy, prompts, 50)
    engine = synced(policy, max_rows=6)
    monkeypatch.setattr(kv_cache, "columns_for", functools.partial(kv_cache.columns_for, step=2))
    rows = Rows(monkeypatch)
    assert tokens(generate(engine, prompts, 50)) == expected
    assert len(set(rows.columns)) > 1
    assert any(b < a for a, b in zip(rows.ends, rows.ends[1:], strict=False)), "no shift"
    assert max(rows.columns) <= kv_cache.most_columns(25, 50)


def test_a_long_limit_does_not_take_its_memory_at_once() -> None:
    assert kv_cache.columns_for(40, 100) == 140
    assert kv_cache.columns_for(40, 8000) == kv_cache.columns_for(40, 16000) < 400


@pytest.mark.parametrize("fitting", [0, 3, 9])
def test_the_bound_on_memory_holds(policy: Policy, monkeypatch: pytest.MonkeyPatch, fitting: int) -> None:
    """However many completions pass through; at least one row is always decoded."""
    prompts = groups([3, 25, 1, 6], 5)
    expected = expected_tokens(policy, prompts, 12)
    config = policy.hf_config
    per_column = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    limit = fitting * kv_cache.most_columns(25, 12) * per_column / 2**30
    engine = synced(policy, max_rows=64, max_cache_gib=limit + 1e-9)
    rows = Rows(monkeypatch)
    assert tokens(generate(engine, prompts, 12)) == expected
    assert max(rows.live) == max(1, fitting)
    assert fitting == 0 or max(rows.bytes) <= limit * 2**30


# --- weights ----------------------------------------------------------------------------------------------------------


def linears(network: nn.Module | None, kind: type) -> set[str]:
    assert network is not None
    return {name for name, m in network.named_modules() if isinstance(m, kind)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_linears_are_packed(tiny_model: Path, dtype) -> None:
    if dtype == "bfloat16" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this CPU does not multiply bfloat16")
    policy = Policy(PolicyConfig(model=str(tiny_model), compute_dtype=dtype))
    engine = synced(policy)
    assert linears(engine.network, PackedLinear) == linears(policy.decode_network(), nn.Linear)
    assert len(linears(engine.network, PackedLinear)) == 2 * 7 + 1
    assert not linears(engine.network, nn.Linear)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_those_of_the_last_sync(tiny_model: Path, dtype) -> None:
    """All of them: packed ones, embeddings and norms."""
    policy = Policy(PolicyConfig(model=str(tiny_model), compute_dtype=dtype))
    prompts = groups([3, 9], 2)
    engine = synced(policy)
    before = tokens(generate(engine, prompts))
    for part in ("q_proj", "embed_tokens", "norm"):
        chosen = [p for name, p in policy.trainable() if part in name]
        saved = [p.detach().clone() for p in chosen]
        with torch.no_grad():
            for p in chosen:
                p.mul_(2.0).add_(0.2)
        policy.sync()
        assert tokens(generate(engine, prompts)) == before, f"{part} follows without a sync"
        engine.sync(policy)
        changed = tokens(generate(engine, prompts))
        assert changed != before, f"{part} does not follow a sync"
        with torch.no_grad():
            for p, old in zip(chosen, saved, strict=True):
                p.copy_(old)
        policy.sync()
        engine.sync(policy)
        assert tokens(generate(engine, prompts)) == before


def test_turned_weights_are_those_of_the_last_sync(tiny_model: Path, monkeypatch) -> None:
    monkeypatch.setattr(inference, "turns", lambda weight: True)
    policy = Policy(PolicyConfig(model=str(tiny_model), compute_dtype="float32"))
    prompts, engine = groups([3, 9], 2), synced(policy)
    before = tokens(generate(engine, prompts))
    with torch.no_grad():
        for _, p in policy.trainable():
            p.mul_(2.0).add_(0.2)
    policy.sync()
    assert tokens(generate(engine, prompts)) == before
    engine.sync(policy)
    assert tokens(generate(engine, prompts)) != before


@pytest.mark.parametrize("turned", [True, False])
def test_biases_are_those_of_the_last_sync(architecture_folder, monkeypatch, turned: bool) -> None:
    monkeypatch.setattr(inference, "turns", lambda weight: turned)
    policy = Policy(PolicyConfig(model=str(architecture_folder("qwen2")), compute_dtype="float32"))
    prompts, engine = groups([3, 9], 2), synced(policy)
    before = tokens(generate(engine, prompts))
    biases = [p for name, p in policy.trainable() if name.endswith("v_proj.bias")]
    assert biases
    with torch.no_grad():
        for p in biases:
            p.add_(torch.linspace(-3.0, 3.0, len(p)))
    policy.sync()
    assert tokens(generate(engine, prompts)) == before
    engine.sync(policy)
    assert tokens(generate(engine, prompts)) != before


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi3", "gemma3_text"])
def test_turned_packed_and_plain_linears_give_the_same_tokens(
    architecture_folder, monkeypatch, architecture: str
) -> None:
    policy = Policy(PolicyConfig(model=str(architecture_folder(architecture)), compute_dtype="float32"))
    prompts = groups([3, 9, 1], 4)
    packed = tokens(generate(synced(policy), prompts))
    for turned in (True, False):
        monkeypatch.setattr(inference, "turns", lambda weight, turned=turned: turned)
        engine = synced(policy)
        assert engine.fallback is None
        assert tokens(generate(engine, prompts)) == packed
    monkeypatch.setattr(inference, "packs", lambda weight: False)
    engine = synced(policy)
    assert not linears(engine.network, PackedLinear)
    assert tokens(generate(engine, prompts)) == packed
