"""The native engine on a GPU: with and without graphs the reference engine's tokens, and memory given back."""

import gc
import warnings
from pathlib import Path

import pytest
import torch
from architectures.zoo import WINDOW, write_architecture

from lit_posttrain.batching import pad_sequences
from lit_posttrain.gates import MISMATCH_TOLERANCE
from lit_posttrain.policy import Policy, PolicyConfig, load_tokenizer
from lit_posttrain.rollout import NativeEngine, ReferenceEngine, RolloutEngine, SamplingParams, static
from lit_posttrain.types import Completion, SamplingKey

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
VOCABULARY = 258
DISTINCT = [[40, 41, 42], [7], list(range(60, 61 + 3 * WINDOW)), [90, 1, 91, 1], list(range(120, 120 + WINDOW))]
PROMPTS = [DISTINCT[i] for i in (0, 1, 2, 3, 4, 0, 2, 2, 1, 0, 4, 0, 3, 2, 0, 4, 1)]
STOPS = list(range(0, VOCABULARY, 16))


@pytest.fixture(autouse=True)
def _narrow_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(static, "COLUMNS", 16)


def policy_of(folder: Path, dtype: str = "float32") -> Policy:
    return Policy(PolicyConfig(model=str(folder), compute_dtype=dtype)).to("cuda")


def ready(engine: RolloutEngine, policy: Policy) -> RolloutEngine:
    engine.bind(load_tokenizer(policy.config))
    engine.sync(policy)
    return engine


def generate(engine: RolloutEngine, stops: list[int] = STOPS, n: int = 24, seed: int = 1) -> list[Completion]:
    keys = [SamplingKey(seed, "rollout", 0, i, 0) for i in range(len(PROMPTS))]
    return engine.generate(PROMPTS, SamplingParams(max_new_tokens=n, stop_token_ids=stops), keys)


def drawn(engine: RolloutEngine, **arguments) -> list[tuple[list[int], str]]:
    return [(c.token_ids, c.stop_reason) for c in generate(engine, **arguments)]


def captured(engine: NativeEngine) -> set[tuple[int, int]]:
    assert engine.fallback is None
    assert engine.decoder is not None
    return set(engine.decoder.replays)


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize(
    "architecture", ["llama", "qwen3", "mistral", "gemma3_text", "gemma2", "gpt2", "gpt_neox", "phi3", "opt"]
)
@pytest.mark.trap(6)
def test_it_draws_what_the_reference_engine_draws(architecture_folder, architecture: str, graphs: bool) -> None:
    policy = policy_of(architecture_folder(architecture))
    engine, reference = NativeEngine(max_rows=9, cuda_graphs=graphs), ready(ReferenceEngine(), policy)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(CUDA graphs|reference engine).*")
        ready(engine, policy)
        for seed in (1, 2):
            assert drawn(engine, seed=seed) == drawn(reference, seed=seed)
    assert bool(captured(engine)) == graphs
    engine.close()


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.trap(13)
def test_bfloat16_log_probs_are_the_trainers_up_to_rounding(tiny_model: Path, graphs: bool) -> None:
    policy = policy_of(tiny_model, "bfloat16")
    engine = ready(NativeEngine(max_rows=9, cuda_graphs=graphs), policy)
    completions = generate(engine)
    sequences = pad_sequences(PROMPTS, [c.token_ids for c in completions])
    sequences = type(sequences)(*(x.cuda() for x in sequences))
    mask = sequences.completion_mask()
    sampled = torch.tensor([p for c in completions for p in c.log_probs], device="cuda")
    with torch.no_grad():
        gaps = [float((policy(sequences, mask, t).log_probs[mask] - sampled).abs().mean()) for t in (1.0, 2.0)]
    assert gaps[0] < MISMATCH_TOLERANCE[torch.bfloat16] < gaps[1]
    assert bool(captured(engine)) == graphs
    engine.close()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_graphs_follow_the_weights(tiny_model: Path, dtype: str) -> None:
    policy = policy_of(tiny_model, dtype)
    engine = ready(NativeEngine(max_rows=9), policy)
    drawn(engine, stops=[])
    first = drawn(engine, stops=[])  # the columns have grown, and every shape is captured
    assert engine.decoder is not None
    replays = dict(engine.decoder.replays)
    saved = {k: v.clone() for k, v in policy.state_dict().items()}
    with torch.no_grad():
        for _, p in policy.trainable():
            p.mul_(1.3)
    policy.sync()
    engine.sync(policy)
    changed = drawn(engine, stops=[])
    assert changed != first
    if dtype == "float32":
        assert changed == drawn(ready(ReferenceEngine(), policy), stops=[])
    policy.load_state_dict(saved)
    policy.sync()
    engine.sync(policy)
    assert drawn(engine, stops=[]) == first
    assert engine.decoder.replays == replays
    engine.close()


def test_a_network_that_asks_the_host_goes_on_without(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    policy = policy_of(write_architecture("llama", tmp_path, rope_parameters=rope))
    engine, stream = NativeEngine(max_rows=9), torch.cuda.current_stream()
    with pytest.warns(UserWarning, match="no CUDA graphs for LlamaForCausalLM"):
        ready(engine, policy)
    assert not captured(engine)
    assert torch.cuda.current_stream() == stream
    assert torch.cuda.get_sync_debug_mode() == 0
    assert drawn(engine) == drawn(ready(ReferenceEngine(), policy))
    engine.close()


def test_each_token_waits_for_the_device_once(tiny_model: Path) -> None:
    engine = ready(NativeEngine(max_rows=32), policy_of(tiny_model))
    for _ in range(2):
        drawn(engine, stops=[])
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            drawn(engine, stops=[])
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert 1 <= sum("synchronizing CUDA operation" in str(w.message) for w in seen) <= 24


@pytest.mark.parametrize("graphs", [False, True])
def test_close_gives_the_memory_back(tiny_model: Path, graphs: bool) -> None:
    policy = policy_of(tiny_model)

    def allocated() -> int:
        gc.collect()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    levels = []
    for _ in range(3):
        engine = ready(NativeEngine(max_rows=9, cuda_graphs=graphs), policy)
        drawn(engine)
        held = allocated()
        engine.close()
        levels.append(allocated())
        assert levels[-1] < held
    # The first time libraries take workspaces, which stay.
    assert levels[1] == levels[2]
