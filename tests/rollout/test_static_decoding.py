"""The static cache and the replayed steps, on a CPU: a tape of operations stands in for the CUDA graph."""

import gc
import random
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from architectures.zoo import WINDOW, write_architecture
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lit_posttrain.policy import Policy, PolicyConfig, load_tokenizer
from lit_posttrain.rollout import (
    NativeEngine,
    ReferenceEngine,
    RolloutEngine,
    SamplingParams,
    inference,
    native,
    static,
)
from lit_posttrain.rollout.graphs import Capture, GraphDecoder
from lit_posttrain.types import SamplingKey

CPU = torch.device("cpu")
VOCABULARY = 258
PROMPTS = [
    [40, 41, 42], [7], list(range(60, 61 + 3 * WINDOW)), [40, 41, 42], [90, 1, 91, 1], list(range(120, 120 + WINDOW)),
    [7], [7, 8], list(range(60, 61 + 3 * WINDOW)), [5], [40, 41, 42], [200, 3], [9] * 11, [7], [1],
]  # fmt: skip
# Drawn often: completions end at different times.
STOPS = list(range(0, VOCABULARY, 16))


class Tape(TorchDispatchMode, Capture):
    """Replays what a CUDA graph would: the same operations on the same memory, with the host's numbers of that time."""

    def __init__(self):
        super().__init__()
        self.steps = self.resets = 0
        self.operations: list[tuple[Callable, tuple, dict, object]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.is_nonzero.default, torch.ops.aten.item.default, torch.ops.aten.nonzero.default):
            raise RuntimeError("operation not permitted when stream is capturing")
        out = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, out))
        return out

    def __call__(self, step: Callable[[], None]) -> Callable[[], None]:
        step()
        self.operations = []
        with self:
            step()
        operations = self.operations
        self.steps += 1

        def replay() -> None:
            for func, args, kwargs, out in operations:
                for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                    if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)

        return replay

    def reset(self) -> None:
        self.resets += 1


@pytest.fixture(autouse=True)
def _narrow_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(static, "COLUMNS", 8)


def policy_of(folder: Path) -> Policy:
    return Policy(PolicyConfig(model=str(folder), compute_dtype="float32"))


def ready(engine: RolloutEngine, policy: Policy) -> RolloutEngine:
    engine.bind(load_tokenizer(policy.config))
    engine.sync(policy)
    return engine


def engine_with(tape: Tape | None, rows: int = 9) -> NativeEngine:
    engine = NativeEngine(max_rows=rows)
    engine.decoder = GraphDecoder(tape, CPU)
    return engine


def drawn(
    engine: RolloutEngine, prompts: list[list[int]] = PROMPTS, n: int = 24, seed: int = 1, stops: list[int] = STOPS
) -> list[tuple[list[int], str]]:
    keys = [SamplingKey(seed, "rollout", 0, i, 0) for i in range(len(prompts))]
    made = engine.generate(prompts, SamplingParams(max_new_tokens=n, stop_token_ids=stops), keys)
    return [(c.token_ids, c.stop_reason) for c in made]


# --- the same tokens --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "architecture", ["llama", "qwen3", "mistral", "gemma3_text", "gemma2", "gpt2", "gpt_neox", "phi3", "opt"]
)
@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.trap(6)
def test_it_draws_what_the_reference_engine_draws(architecture_folder, architecture: str, graphs: bool) -> None:
    """Rows wait, leave and move; the columns grow several times in the first call and are there in the second."""
    policy = policy_of(architecture_folder(architecture))
    tape = Tape() if graphs else None
    engine, reference = engine_with(tape), ReferenceEngine()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ready(engine, policy)
        ready(reference, policy)
        for seed in (1, 2):
            assert drawn(engine, seed=seed) == drawn(reference, seed=seed)
    assert engine.fallback is None
    assert engine.decoder is not None
    assert engine.decoder.cache is not None
    assert engine.decoder.cache.version >= 3, "the columns never grew"
    assert tape is None or tape.steps >= 4


@pytest.mark.parametrize("rows", [1, 3, 70])
def test_any_number_of_rows(tiny_model: Path, rows: int) -> None:
    policy = policy_of(tiny_model)
    prompts = PROMPTS * (5 if rows > 9 else 1)
    expected = drawn(ready(ReferenceEngine(), policy), prompts, 6)
    assert drawn(ready(engine_with(Tape(), rows), policy), prompts, 6) == expected


@pytest.mark.parametrize("seed", range(3))
def test_calls_of_any_size_one_after_the_other(tiny_model: Path, seed: int) -> None:
    """More rows or longer ones than before, or fewer, in the memory that earlier calls left."""
    policy, choice = policy_of(tiny_model), random.Random(seed)
    engine, reference = ready(engine_with(Tape(), 20), policy), ready(ReferenceEngine(), policy)
    for _ in range(5):
        prompts = [[choice.randrange(VOCABULARY)] * choice.randint(1, 40) for _ in range(choice.randint(1, 25))]
        n = choice.randint(1, 20)
        assert drawn(engine, prompts, n, seed) == drawn(reference, prompts, n, seed)


def test_up_to_the_networks_last_position(architecture_folder) -> None:
    """Rows that only fill the batch up count no positions past it."""
    policy = policy_of(architecture_folder("gpt2"))
    prompts = [[i % VOCABULARY for i in range(n)] for n in (108, 1, 108, 2, 108, 3, 5, 8, 2, 1, 9, 4)]
    expected = drawn(ready(ReferenceEngine(), policy), prompts, 20, stops=[])
    assert drawn(ready(engine_with(Tape(), 3), policy), prompts, 20, stops=[]) == expected


def test_after_diverged_weights_nothing_of_them_is_left(tiny_model: Path) -> None:
    policy = policy_of(tiny_model)
    engine = ready(engine_with(None), policy)
    expected = drawn(engine)
    saved = {k: v.clone() for k, v in policy.state_dict().items()}
    with torch.no_grad():
        policy.decode_network().base_model.layers[0].self_attn.v_proj.weight.fill_(torch.nan)
    engine.sync(policy)
    with pytest.raises(FloatingPointError):
        drawn(engine, [list(range(5, 45))])
    policy.load_state_dict(saved)
    engine.sync(policy)
    assert drawn(engine) == expected


def test_what_tick_raises_leaves_nothing_behind(tiny_model: Path) -> None:
    policy = policy_of(tiny_model)
    engine = ready(engine_with(Tape()), policy)
    expected, ticks = drawn(engine), iter(range(5))
    keys = [SamplingKey(1, "rollout", 0, i, 0) for i in range(len(PROMPTS))]
    with pytest.raises(StopIteration):
        engine.generate(PROMPTS, SamplingParams(max_new_tokens=24), keys, lambda finished: next(ticks))
    assert drawn(engine) == expected


def test_rows_that_only_fill_the_batch_up_stand_at_its_beginning() -> None:
    """Where a finished row ended there may be no column left to write to."""
    like = {0: (torch.zeros(2, 7, 4), torch.zeros(2, 7, 4))}
    cache = static.StaticKVCache(like)
    cache.restart(4, 7, 16, 1e6)
    cache.put(slice(0, 3), like, slice(0, 7))
    positions = cache.begin(3, 4)
    assert positions.tolist() == [7, 7, 7, 0]
    cache.finish()
    cache.move(torch.tensor([2]), torch.tensor([0]))
    assert cache.begin(2, 4).tolist() == [8, 8, 0, 0]
    assert (cache.columns, cache.width, cache.version) == (16, 16, 2)


# --- what is captured, and for how long -------------------------------------------------------------------------------


@pytest.fixture
def in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: the engine's weights are the policy's own."""
    real = native.inference_view
    monkeypatch.setattr(native, "inference_view", lambda network, name, own: real(network, name, own=False))
    monkeypatch.setattr(inference, "packs", lambda weight: False)


@pytest.mark.usefixtures("in_place")
def test_captures_outlive_calls_and_syncs_and_follow_the_weights(tiny_model: Path) -> None:
    policy, tape = policy_of(tiny_model), Tape()
    engine, reference = ready(engine_with(tape), policy), ready(ReferenceEngine(), policy)
    first = drawn(engine, stops=[])  # nothing stops, so that all calls compute the same shapes
    assert drawn(engine, stops=[]) == first
    steps, resets = tape.steps, tape.resets
    saved = {k: v.clone() for k, v in policy.state_dict().items()}
    with torch.no_grad():
        for _, p in policy.trainable():
            p.mul_(1.3)
    engine.sync(policy)
    changed = drawn(engine, stops=[])
    assert changed != first
    assert changed == drawn(reference, stops=[])
    policy.load_state_dict(saved)
    engine.sync(policy)
    assert drawn(engine, stops=[]) == first
    assert (tape.steps, tape.resets) == (steps, resets)


@pytest.mark.usefixtures("in_place")
def test_each_shape_is_captured_once(tiny_model: Path) -> None:
    tape = Tape()
    engine = ready(engine_with(tape, 20), policy_of(tiny_model))
    drawn(engine, [[5]] * 20, 30, stops=[])  # the columns grow to what the call needs
    before, prompts = tape.steps, [[5]] * 20
    drawn(engine, prompts, 30, stops=[])
    drawn(engine, prompts, 30, stops=[])
    assert tape.steps - before == 2, "of 8, 16 and 32 columns the first call left the last"
    assert engine.decoder is not None
    assert set(engine.decoder.replays) == {(24, 8), (24, 16), (24, 32)}
    drawn(engine, prompts[:7], 5, stops=[])
    assert set(engine.decoder.replays) == {(24, 8), (24, 16), (24, 32), (8, 8)}


@pytest.mark.usefixtures("in_place")
@pytest.mark.parametrize("change", ["moved", "other"])
def test_weights_elsewhere_are_captured_anew(tiny_model: Path, architecture_folder, change: str) -> None:
    policy, tape = policy_of(tiny_model), Tape()
    engine = ready(engine_with(tape), policy)
    drawn(engine)
    resets, steps = tape.resets, tape.steps
    if change == "moved":
        p = policy.trainable()[-1][1]
        p.data = p.data * 1.5
    else:
        policy = policy_of(architecture_folder("gpt2"))
    engine.sync(policy)
    assert tape.resets == resets + 1
    assert drawn(engine) == drawn(ready(ReferenceEngine(), policy))
    assert tape.steps > steps


@pytest.mark.usefixtures("in_place")
def test_buffers_are_brought_up_to_date(tiny_model: Path) -> None:
    """The engine's view copies them, so those that were captured are not the policy's."""
    policy, tape = policy_of(tiny_model), Tape()
    engine = ready(engine_with(tape), policy)
    before = drawn(engine, stops=[])
    drawn(engine, stops=[])
    steps = tape.steps
    policy.decode_network().base_model.rotary_emb.inv_freq.mul_(3)
    engine.sync(policy)
    after = drawn(engine, stops=[])
    assert after != before
    assert after == drawn(ready(ReferenceEngine(), policy), stops=[])
    assert tape.steps == steps


def test_a_network_that_asks_the_host_goes_on_without(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    policy = policy_of(write_architecture("llama", tmp_path, rope_parameters=rope))
    engine = engine_with(Tape())
    with pytest.warns(UserWarning, match=r"no CUDA graphs for LlamaForCausalLM \(operation not permitted"):
        ready(engine, policy)
    assert engine.fallback is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine.sync(policy)
        assert drawn(engine) == drawn(ready(ReferenceEngine(), policy))


# --- memory -----------------------------------------------------------------------------------------------------------


def test_a_limit_on_memory_is_kept_whatever_came_before(tiny_model: Path) -> None:
    """Rows of one call times columns of another would exceed it."""
    policy = policy_of(tiny_model)
    engine, reference = ready(engine_with(None, 16), policy), ready(ReferenceEngine(), policy)
    column = 2 * 2 * 2 * 8 * 4  # layers, keys and values, heads, head size, bytes
    engine.max_cache_gib = 16 * 32 * column / 2**30
    assert engine.decoder is not None
    for prompts, n in (([[5]] * 16, 20), ([[5] * 30], 30), ([[6]] * 16, 30), ([[6] * 30] * 16, 90)):
        assert drawn(engine, prompts, n, stops=[]) == drawn(reference, prompts, n, stops=[])
        cache = engine.decoder.cache
        assert cache is not None
        held = sum(x.numel() * x.element_size() for pair in cache.layers.values() for x in pair)
        assert held == cache.rows * cache.columns * column <= engine.max_cache_gib * 2**30


def test_close_lets_go_of_everything_and_sync_starts_again(tiny_model: Path) -> None:
    policy = policy_of(tiny_model)
    engine = ready(engine_with(Tape()), policy)
    expected = drawn(engine)
    assert engine.decoder is not None
    assert engine.decoder.cache is not None
    held = [weakref.ref(engine.decoder.logits), weakref.ref(engine.network), weakref.ref(engine.decoder.cache)]
    engine.close()
    gc.collect()
    assert [r() for r in held] == [None] * 3
    engine.sync(policy)
    assert drawn(engine) == expected


# --- buckets ----------------------------------------------------------------------------------------------------------


def test_buckets_are_the_narrowest_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(static, "COLUMNS", 256)
    rows = [*range(8, 65, 8), *range(96, 513, 32)]
    columns = [256 * 2**k for k in range(8)]
    assert [static.row_bucket(n) for n in range(1, 513)] == [min(r for r in rows if r >= n) for n in range(1, 513)]
    for n in range(1, 5000):
        assert static.column_bucket(n) == min(c for c in columns if c >= n)
