"""The native engine against the reference engine: every architecture, adapters, precision, odd input, and fallback."""

import copy
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures.zoo import ARCHITECTURES, WINDOW, write_architecture

from lit_posttrain.batching import pad_sequences
from lit_posttrain.gates import MISMATCH_TOLERANCE
from lit_posttrain.policy import LoraConfig, Policy, PolicyConfig, load_tokenizer
from lit_posttrain.rollout import NativeEngine, ReferenceEngine, RolloutEngine, SamplingParams, kv_cache
from lit_posttrain.types import Completion, SamplingKey

EOS = 1
VOCABULARY = 258
# Architectures that the engine leaves to the reference engine.
FALLING_BACK: set[str] = set()
# Groups of unequal sizes whose samples are not next to each other; shorter and longer than every sliding window.
DISTINCT = [[40, 41, 42], [7], list(range(60, 60 + 3 * WINDOW + 1)), [90, EOS, 91, EOS], list(range(120, 120 + WINDOW))]
PROMPTS = [DISTINCT[i] for i in (0, 1, 2, 3, 4, 0, 2, 2, 1, 0, 4, 0, 3, 2, 0, 4, 1)]
# Drawn often: completions end at different times.
STOPS = list(range(0, VOCABULARY, 9))


def keys(n: int = len(PROMPTS), seed: int = 1) -> list[SamplingKey]:
    return [SamplingKey(seed, "rollout", 0, i, i % 3) for i in range(n)]


def policy_of(folder: Path, **arguments) -> Policy:
    return Policy(PolicyConfig(model=str(folder), **{"compute_dtype": "float32", **arguments}))


def ready(engine: RolloutEngine, policy: Policy) -> RolloutEngine:
    engine.bind(load_tokenizer(policy.config))
    engine.sync(policy)
    return engine


def native(policy: Policy, max_rows: int = 5) -> NativeEngine:
    engine = NativeEngine(max_rows)
    ready(engine, policy)
    return engine


def sampling(max_new_tokens: int = 14, **arguments) -> SamplingParams:
    return SamplingParams(max_new_tokens=max_new_tokens, **{"stop_token_ids": STOPS, **arguments})


def outcome(completions: list[Completion]) -> list[tuple[list[int], str]]:
    return [(c.token_ids, c.stop_reason) for c in completions]


def drawn(engine: RolloutEngine, prompts: list[list[int]] = PROMPTS, **arguments) -> list[tuple[list[int], str]]:
    return outcome(engine.generate(prompts, sampling(**arguments), keys(len(prompts))))


def scramble(policy: Policy, seed: int = 0) -> None:
    """Other weights; adapters, which begin at zero, come to matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, p in policy.trainable():
            p.add_(0.15 * torch.randn(p.shape, generator=generator))
    policy.sync()


@pytest.fixture(scope="module")
def policy(tiny_model: Path) -> Policy:
    return policy_of(tiny_model)


# --- every architecture -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.trap(6)
@pytest.mark.trap(7)
def test_every_architecture_draws_what_the_reference_engine_draws(architecture_folder, architecture: str) -> None:
    """With fewer rows than completions, so that prompts are taken in beside rows of any age."""
    policy = policy_of(architecture_folder(architecture))
    reference = ready(ReferenceEngine(), policy)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine = native(policy)
    assert (engine.fallback is not None) == (architecture in FALLING_BACK)
    lengths = set()
    for seed, temperature in enumerate((0.7, 1.0, 1.5)):
        params = sampling(temperature=temperature)
        expected = reference.generate(PROMPTS, params, keys(seed=seed))
        actual = engine.generate(PROMPTS, params, keys(seed=seed))
        assert outcome(actual) == outcome(expected)
        for a, b in zip(actual, expected, strict=True):
            assert a.log_probs == pytest.approx(b.log_probs, abs=1e-4)
        lengths |= {len(c.token_ids) for c in expected}
    assert len(lengths) > 4, "nothing ragged about it"


@pytest.mark.parametrize("architecture", ["gpt2", "opt"])
def test_nothing_counts_positions_past_the_networks_last(architecture_folder, architecture: str) -> None:
    """Prompts up to the last position, far more steps than positions, and rows that only fill the batch up."""
    policy = policy_of(architecture_folder(architecture))
    assert policy.context_length == 128
    prompts = [[i % VOCABULARY for i in range(n)] for n in (120, 1, 120, 2, 120, 3, 5, 8)]
    expected = drawn(ready(ReferenceEngine(), policy), prompts, max_new_tokens=8, stop_token_ids=[])
    engine = native(policy, 3)
    assert drawn(engine, prompts, max_new_tokens=8, stop_token_ids=[]) == expected
    short = [[5, 6, 7]] * 7  # 3 rounds of 60 steps
    expected = drawn(ready(ReferenceEngine(), policy), short, max_new_tokens=60, stop_token_ids=[])
    assert drawn(engine, short, max_new_tokens=60, stop_token_ids=[]) == expected


def test_a_long_prompt_beside_older_short_ones(architecture_folder) -> None:
    """It begins in columns that no older row uses, and moves to another row when it is one token old."""
    policy = policy_of(architecture_folder("llama"))
    prompts = [[9, i] for i in range(8)] + [[i] * 2 if i % 3 else [i] * 30 for i in range(100, 148)]
    expected = drawn(ready(ReferenceEngine(), policy), prompts, stop_token_ids=list(range(0, VOCABULARY, 3)))
    assert drawn(native(policy, 8), prompts, stop_token_ids=list(range(0, VOCABULARY, 3))) == expected


DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "rope_theta": 10000.0}


def frequencies(network: Any) -> torch.Tensor:
    return network.base_model.rotary_emb.inv_freq


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("llama", {"max_position_embeddings": 16, "rope_parameters": DYNAMIC}),
        ("phi3", {"original_max_position_embeddings": 16, "rope_parameters": LONGROPE}),
    ],
)
def test_frequencies_that_follow_the_length_stay_out_of_the_policy(tmp_path: Path, name: str, overrides: dict) -> None:
    """One replaces its table, the other writes into it."""
    policy = policy_of(write_architecture(name, tmp_path, **overrides))
    engine = native(policy)
    before = frequencies(policy.decode_network()).clone()
    drawn(engine, [list(range(30))], stop_token_ids=[])
    assert not torch.equal(frequencies(engine.network), before)
    assert torch.equal(frequencies(policy.decode_network()), before)
    assert not frequencies(policy.decode_network()).is_inference()


# --- precision and adapters -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [None, LoraConfig(r=4, alpha=8)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.trap(13)
def test_log_probs_are_the_trainers_up_to_rounding(tiny_model: Path, dtype, lora: LoraConfig | None) -> None:
    policy = policy_of(tiny_model, compute_dtype=dtype, lora=lora)
    scramble(policy)
    engine = native(policy)
    assert engine.fallback is None
    completions = engine.generate(PROMPTS, sampling(temperature=0.8), keys())
    sequences = pad_sequences(PROMPTS, [c.token_ids for c in completions])
    mask = sequences.completion_mask()
    sampled = torch.tensor([p for c in completions for p in c.log_probs])

    @torch.no_grad()
    def gap(temperature: float = 0.8, **arguments) -> float:
        return float((policy(sequences, mask, temperature, **arguments).log_probs[mask] - sampled).abs().mean())

    tolerance = MISMATCH_TOLERANCE[getattr(torch, dtype)]
    assert gap() < tolerance
    assert gap(1.6) > tolerance
    if lora is not None:
        assert gap(adapters=False) > tolerance


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_are_sampled_with_as_of_the_last_sync(tiny_model: Path, policy: Policy, dtype) -> None:
    adapted = policy_of(tiny_model, compute_dtype=dtype, lora=LoraConfig(r=4, alpha=8))
    engine = native(adapted)
    untrained = drawn(engine)
    if dtype == "float32":
        assert untrained == drawn(native(policy)), "fresh adapters add nothing"
    made = [untrained]
    for seed in range(2):
        scramble(adapted, seed)
        assert drawn(engine) == made[-1], "weights changed without a sync"
        engine.sync(adapted)
        made.append(drawn(engine))
        assert made[-1] != made[-2]
        if dtype == "float32":
            assert made[-1] == drawn(ready(ReferenceEngine(), adapted))


# --- the policy and its networks --------------------------------------------------------------------------------------


def trained_step(policy: Policy) -> tuple[torch.Tensor, list[torch.Tensor]]:
    sequences = pad_sequences(PROMPTS[:3], [[5, 6], [7], [8, 9, 10]])
    policy.zero_grad()
    log_probs = policy(sequences, sequences.completion_mask(), 1.0).log_probs
    log_probs.sum().backward()
    return log_probs.detach(), [p.grad.clone() for _, p in policy.trainable() if p.grad is not None]


def description(policy: Policy) -> list[object]:
    """Everything about the modules that an engine could leave changed."""
    network = policy.decode_network()
    modules = [
        (name, type(m), m.training, sorted(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks),
         getattr(getattr(m, "config", None), "_attn_implementation", None))
        for name, m in policy.named_modules()
    ]  # fmt: skip
    pointers = [(name, p.data_ptr(), p.requires_grad) for name, p in network.named_parameters()]
    return [modules, pointers, network.config.to_dict(), sorted(policy.state_dict())]


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"compute_dtype": "bfloat16"},
        {"lora": LoraConfig(r=4, alpha=8)},
        {"compute_dtype": "bfloat16", "lora": LoraConfig(r=4, alpha=8)},
        {"gradient_checkpointing": True, "lora": LoraConfig(r=4, alpha=8)},
    ],
)
@pytest.mark.trap(12)
def test_the_policy_is_left_as_it_was(tiny_model: Path, arguments: dict) -> None:
    policy = policy_of(tiny_model, **arguments)
    ran: list[int] = []
    embedding = policy.decode_network().get_input_embeddings()
    hook = embedding.register_forward_pre_hook(lambda *_: ran.append(1))
    log_probs, gradients = trained_step(policy)
    before = description(policy)
    engine = NativeEngine(max_rows=5)
    engine.sync(policy)
    ran.clear()
    drawn(engine)
    assert not ran, "a hook of the policy's ran in the engine"
    assert description(policy) == before
    again, gradients_again = trained_step(policy)
    assert ran
    assert torch.equal(again, log_probs)
    assert gradients
    assert all(torch.equal(a, b) for a, b in zip(gradients_again, gradients, strict=True))
    hook.remove()
    other = copy.deepcopy(policy)
    scramble(other)
    assert torch.equal(trained_step(policy)[0], log_probs)
    assert not torch.equal(trained_step(other)[0], log_probs)
    if policy.compute_dtype == torch.float32 and not policy.config.gradient_checkpointing:
        # Elsewhere functions defined inside functions hang on it, with or without an engine.
        unpickled = pickle.loads(pickle.dumps(policy))
        assert torch.equal(trained_step(unpickled)[0], log_probs)


def test_one_engine_serves_two_policies_in_turn(tiny_model: Path, architecture_folder) -> None:
    policies = [policy_of(tiny_model), policy_of(architecture_folder("gpt2"))]
    expected = [drawn(ready(ReferenceEngine(), p)) for p in policies]
    engine = NativeEngine(max_rows=5)
    for turn in (0, 1, 1, 0):
        engine.sync(policies[turn])
        assert drawn(engine) == expected[turn]
    assert expected[0] != expected[1]


# --- odd input --------------------------------------------------------------------------------------------------------


def test_all_stop_at_their_first_token(policy: Policy) -> None:
    engine, calls = native(policy, 3), []
    completions = engine.generate(PROMPTS, sampling(stop_token_ids=list(range(VOCABULARY))), keys(), calls.append)
    assert {len(c.token_ids) for c in completions} == {1}
    assert sum(calls) == len(PROMPTS)
    expected = ready(ReferenceEngine(), policy).generate(PROMPTS, sampling(1), keys())
    assert [c.token_ids for c in completions] == [c.token_ids for c in expected]


def test_stop_strings_while_rows_come_and_go(policy: Policy) -> None:
    reference, engine = ready(ReferenceEngine(), policy), native(policy, 3)
    tokenizer = load_tokenizer(policy.config)
    free = drawn(reference, stop_token_ids=[])
    strings = [tokenizer.decode(row[i : i + 2]) for (row, _), i in zip(free[:3], (2, 5, 9), strict=True)]
    arguments = {"stop_token_ids": [], "stop_strings": [s for s in strings if "\ufffd" not in s]}
    assert arguments["stop_strings"]
    expected = drawn(reference, **arguments)
    assert drawn(engine, **arguments) == expected
    assert {reason for _, reason in expected} == {"stop", "length"}


@pytest.mark.parametrize("call", [0, 3, 11])
def test_what_tick_raises_in_the_middle_leaves_nothing_behind(policy: Policy, call: int) -> None:
    engine, calls = native(policy, 3), []
    expected = drawn(engine)

    def interrupt(finished: int) -> None:
        calls.append(finished)
        if len(calls) > call:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate(PROMPTS, sampling(), keys(), interrupt)
    assert len(calls) == call + 1
    assert drawn(engine) == expected


def test_weights_that_become_nan_later_are_an_error(tiny_model: Path) -> None:
    policy = policy_of(tiny_model)
    engine = native(policy)
    drawn(engine)
    with torch.no_grad():
        policy.trainable()[1][1].fill_(float("nan"))
    policy.sync()
    engine.sync(policy)
    with pytest.raises(FloatingPointError, match="not finite"):
        drawn(engine)


@pytest.mark.parametrize(("arguments", "named"), [({"max_rows": 0}, "max_rows"), ({"max_cache_gib": 0.0}, "max_cache")])
def test_impossible_limits_name_the_key(arguments: dict, named: str) -> None:
    with pytest.raises(ValueError, match=rf"engine\.init_args\.{named}"):
        NativeEngine(**arguments)


# --- architectures it cannot serve ------------------------------------------------------------------------------------


def no_window_handed_over(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    policy.hf_config.sliding_window = WINDOW


def unknown_argument(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache, "_UNSUPPORTED", ("scaling_of_mars", "dropout"))


def wrong_numbers(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    attend = kv_cache.KVCache.attend

    def blind(self: kv_cache.KVCache, layer: int, query, key, value, scores) -> torch.Tensor:
        return attend(self, layer, query, key, value, scores) * 0.1

    monkeypatch.setattr(kv_cache.KVCache, "attend", blind)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (no_window_handed_over, "sliding windows"),
        (unknown_argument, "hands over"),
        (wrong_numbers, "log-probabilities are off by"),
    ],
)
def test_what_it_cannot_serve_the_reference_engine_generates(
    architecture_folder, monkeypatch: pytest.MonkeyPatch, spoil: Callable, reason: str
) -> None:
    policy = policy_of(architecture_folder("llama"))
    spoil(policy, monkeypatch)
    engine, reference = NativeEngine(max_rows=5), ready(ReferenceEngine(), policy)
    with pytest.warns(UserWarning, match=f"LlamaForCausalLM.*{reason}.*reference engine"):
        ready(engine, policy)
    assert engine.fallback is not None
    strings = {"stop_token_ids": [], "stop_strings": ["a", "e", "9"]}
    for version in (1, 2):
        completions = engine.generate(PROMPTS, sampling(), keys())
        assert outcome(completions) == drawn(reference)
        assert {c.weight_version for c in completions} == {version}
        assert drawn(engine, **strings) == drawn(reference, **strings)
        scramble(policy, version)
        with warnings.catch_warnings():  # said once, not at every sync
            warnings.simplefilter("error")
            engine.sync(policy)


def test_after_a_fallback_another_policy_is_native_again(policy: Policy, architecture_folder) -> None:
    engine, odd = NativeEngine(), policy_of(architecture_folder("llama"))
    odd.hf_config.sliding_window = WINDOW
    with pytest.warns(UserWarning, match="sliding windows"):
        ready(engine, odd)
    engine.sync(policy)
    assert engine.fallback is None
    assert drawn(engine) == drawn(ready(ReferenceEngine(), policy))
