"""What every rollout engine must do, held against HF's ``generate``, a full forward and truncation by hand.

An engine is added by its factory in ``ENGINES``; it must then pass everything here.
"""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from architectures.zoo import ARCHITECTURES, WINDOW
from transformers import AutoModelForCausalLM

from lit_posttrain.batching import pad_sequences
from lit_posttrain.policy import Policy, PolicyConfig, load_tokenizer
from lit_posttrain.rollout import NativeEngine, ReferenceEngine, RolloutEngine, SamplingParams
from lit_posttrain.types import Completion, SamplingKey

EOS = 1
# From a limit on the rows decoded together to an engine.
ENGINES: dict[str, Callable[[int], RolloutEngine]] = {
    "reference": lambda rows: ReferenceEngine(max_rows=rows),
    "native": lambda rows: NativeEngine(max_rows=rows),
}
# Unequal lengths, shorter and longer than every sliding window, end tokens inside, one prompt twice.
PROMPTS = [
    [40, 41, 42],
    [7],
    list(range(60, 60 + 3 * WINDOW + 1)),
    [90, EOS, 91, EOS],
    [40, 41, 42],
    [EOS],
    list(range(120, 120 + WINDOW)),
]
KEYS = [SamplingKey(seed=1, purpose="rollout", iteration=0, prompt_id=i, sample=0) for i in range(len(PROMPTS))]


@pytest.fixture(params=ENGINES)
def factory(request: pytest.FixtureRequest) -> Callable[[int], RolloutEngine]:
    return ENGINES[request.param]


@pytest.fixture(scope="module")
def policy(tiny_model: Path) -> Policy:
    return Policy(PolicyConfig(model=str(tiny_model), compute_dtype="float32"))


@pytest.fixture
def engine(factory: Callable[[int], RolloutEngine], policy: Policy) -> RolloutEngine:
    return ready(factory(64), policy)


def ready(engine: RolloutEngine, policy: Policy) -> RolloutEngine:
    engine.bind(load_tokenizer(policy.config))
    engine.sync(policy)
    return engine


def sampling(max_new_tokens: int = 12, temperature: float = 1.0, **stops) -> SamplingParams:
    return SamplingParams(max_new_tokens=max_new_tokens, temperature=temperature, **stops)


def tokens(completions: list[Completion]) -> list[list[int]]:
    return [c.token_ids for c in completions]


def truncated(free: list[list[int]], ends: Callable[[list[int]], bool]) -> list[tuple[list[int], str]]:
    """Completions that nothing stopped, cut by hand after the first token that ends them."""
    result = []
    for row in free:
        n = next((i + 1 for i in range(len(row)) if ends(row[: i + 1])), None)
        result.append((row, "length") if n is None else (row[:n], "stop"))
    return result


# --- every architecture -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.trap(6)
def test_greedy_equals_generate_of_each_prompt_alone(factory, architecture_folder, architecture: str) -> None:
    folder = architecture_folder(architecture)
    engine = ready(factory(64), Policy(PolicyConfig(model=str(folder), compute_dtype="float32")))
    completions = engine.generate(PROMPTS, sampling(temperature=0.0), KEYS)
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        ids = torch.tensor([prompt])
        expected = network.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12, eos_token_id=EOS
        )
        assert completion.token_ids == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("temperature", [0.7, 1.3])
@pytest.mark.trap(6)
@pytest.mark.trap(7)
@pytest.mark.trap(8)
def test_log_probs_are_those_of_a_full_forward(
    factory, architecture_folder, architecture: str, temperature: float
) -> None:
    folder = architecture_folder(architecture)
    policy = Policy(PolicyConfig(model=str(folder), compute_dtype="float32"))
    engine = ready(factory(4), policy)
    completions = engine.generate(PROMPTS, sampling(temperature=temperature), KEYS)
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    sequences = pad_sequences(PROMPTS, tokens(completions))
    trainer = policy(sequences, sequences.completion_mask(), temperature).log_probs
    for row, (prompt, completion) in enumerate(zip(PROMPTS, completions, strict=True)):
        ids = torch.tensor([prompt + completion.token_ids])
        every = (network(input_ids=ids).logits[0].double() / temperature).log_softmax(-1)
        first, n = len(prompt) - 1, len(completion.token_ids)
        expected = every[first : first + n].gather(1, ids[0, first + 1 :, None])[:, 0]
        actual = torch.tensor(completion.log_probs, dtype=torch.float64)
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)
        torch.testing.assert_close(trainer[row, first : first + n].double(), expected, atol=1e-4, rtol=0)


# --- keys and layout --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 2, 3, 7])
def test_rows_decoded_together_change_nothing(factory, policy: Policy, rows: int) -> None:
    whole = ready(factory(64), policy).generate(PROMPTS, sampling(), KEYS)
    split = ready(factory(rows), policy).generate(PROMPTS, sampling(), KEYS)
    assert tokens(split) == tokens(whole)
    for a, b in zip(split, whole, strict=True):
        assert a.log_probs == pytest.approx(b.log_probs, abs=1e-4)
        assert a.stop_reason == b.stop_reason


def test_order_and_company_change_nothing(engine: RolloutEngine) -> None:
    whole = tokens(engine.generate(PROMPTS, sampling(), KEYS))
    order = [4, 2, 6, 0, 5, 1, 3]
    shuffled = tokens(engine.generate([PROMPTS[i] for i in order], sampling(), [KEYS[i] for i in order]))
    assert shuffled == [whole[i] for i in order]
    for i in range(len(PROMPTS)):
        assert tokens(engine.generate([PROMPTS[i]], sampling(), [KEYS[i]])) == [whole[i]]


@pytest.mark.trap(20)
@pytest.mark.trap(43)
def test_the_key_alone_tells_samples_of_one_prompt_apart(engine: RolloutEngine) -> None:
    keys = [KEYS[0]] + [KEYS[0]._replace(**{name: value}) for name, value in
            (("seed", 2), ("purpose", "evaluate"), ("iteration", 1), ("prompt_id", 9), ("sample", 1))]  # fmt: skip
    drawn = tokens(engine.generate([PROMPTS[0]] * 7, sampling(), [*keys, KEYS[0]]))
    assert drawn[0] == drawn[-1]
    assert len({tuple(t) for t in drawn[:-1]}) == len(keys)


def test_global_random_state_is_neither_read_nor_moved(engine: RolloutEngine) -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = tokens(engine.generate(PROMPTS, sampling(), KEYS))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert tokens(engine.generate(PROMPTS, sampling(), KEYS)) == first


def test_no_prompts_no_completions(engine: RolloutEngine) -> None:
    assert engine.generate([], sampling(), []) == []


def test_prompts_are_left_as_they_are(engine: RolloutEngine) -> None:
    prompts = copy.deepcopy(PROMPTS)
    engine.generate(prompts, sampling(), KEYS)
    assert prompts == PROMPTS


# --- where a completion ends ------------------------------------------------------------------------------------------


@pytest.fixture
def free(engine: RolloutEngine) -> list[list[int]]:
    """Completions of 30 tokens that nothing stops."""
    completions = engine.generate(PROMPTS, sampling(30, stop_token_ids=[]), KEYS)
    assert all(len(c.token_ids) == 30 and c.stop_reason == "length" for c in completions)
    return tokens(completions)


def test_a_lower_limit_gives_a_prefix(engine: RolloutEngine, free: list[list[int]]) -> None:
    for limit in (1, 7):
        completions = engine.generate(PROMPTS, sampling(limit, stop_token_ids=[]), KEYS)
        assert tokens(completions) == [row[:limit] for row in free]
        assert {c.stop_reason for c in completions} == {"length"}
        assert all(len(c.log_probs) == limit for c in completions)


@pytest.mark.parametrize("picks", [[(0, 4)], [(0, 4), (2, 9)], [(1, 0), (3, 11), (6, 29)]])
@pytest.mark.trap(17)
@pytest.mark.trap(2)
def test_stop_token_ids(engine: RolloutEngine, free: list[list[int]], picks: list[tuple[int, int]]) -> None:
    """Each of several ids stops and is kept; the same ids inside a prompt stop nothing."""
    ids = [free[row][position] for row, position in picks]
    prompts = [[*p[:-1], ids[0], p[-1]] for p in PROMPTS] if len(picks) == 2 else PROMPTS
    unstopped = tokens(engine.generate(prompts, sampling(30, stop_token_ids=[]), KEYS))
    expected = truncated(unstopped, lambda row: row[-1] in ids)
    completions = engine.generate(prompts, sampling(30, stop_token_ids=ids), KEYS)
    assert [(c.token_ids, c.stop_reason) for c in completions] == expected
    assert all(len(c.log_probs) == len(c.token_ids) for c in completions)
    if len(picks) != 2:
        assert {reason for _, reason in expected} >= {"stop"}


@pytest.mark.trap(1)
@pytest.mark.trap(17)
@pytest.mark.trap(33)
def test_the_models_own_end_token_stops_and_is_kept(factory, policy: Policy) -> None:
    """Raise the end token's logit, so that it is drawn; it is also the padding token, and kept all the same.

    No completion is kept from ending: the end token has the probability that the trainer scores it with.
    """
    eager = copy.deepcopy(policy)
    with torch.no_grad():
        eager.model.get_input_embeddings().weight[EOS] *= 2.5  # tied to the head
    engine = ready(factory(64), eager)
    prompts, keys = PROMPTS * 6, [k._replace(sample=i) for i in range(6) for k in KEYS]
    unstopped = tokens(engine.generate(prompts, sampling(20, stop_token_ids=[]), keys))
    completions = engine.generate(prompts, sampling(20), keys)
    assert [(c.token_ids, c.stop_reason) for c in completions] == truncated(unstopped, lambda row: row[-1] == EOS)
    stopped = [c for c in completions if c.stop_reason == "stop"]
    assert len(stopped) >= 3
    assert all(c.token_ids.index(EOS) == len(c.token_ids) - 1 for c in stopped)
    rows = [row for row, c in enumerate(completions) if c.stop_reason == "stop"]
    sequences = pad_sequences([prompts[row] for row in rows], tokens(stopped))
    scored = eager(sequences, sequences.completion_mask(), 1.0).log_probs
    ends = scored.gather(1, sequences.lengths[:, None] - 2)[:, 0].tolist()
    assert [c.log_probs[-1] for c in stopped] == pytest.approx(ends, abs=1e-4)


def test_stop_strings_across_tokens_stay_in_the_completion(engine: RolloutEngine, policy: Policy, free) -> None:
    """Every token is one byte, so each of these strings spans tokens."""
    tokenizer = load_tokenizer(policy.config)
    texts = [[tokenizer.decode([t]) for t in row] for row in free]
    pairs = [
        "".join(text[i : i + 2])
        for text in texts
        for i in range(3, 29)
        if all(t.isascii() and t.isprintable() for t in text[i : i + 2])
    ]
    strings = [pairs[0], pairs[-1]]
    expected = truncated(free, lambda row: any(s in tokenizer.decode(row) for s in strings))
    completions = engine.generate(PROMPTS, sampling(30, stop_token_ids=[], stop_strings=strings), KEYS)
    assert [(c.token_ids, c.stop_reason) for c in completions] == expected
    stopped = [c for c in completions if c.stop_reason == "stop"]
    assert stopped
    assert all(any(tokenizer.decode(c.token_ids).endswith(s) for s in strings) for c in stopped)


def test_a_stop_string_in_the_prompt_stops_nothing(engine: RolloutEngine, policy: Policy) -> None:
    tokenizer = load_tokenizer(policy.config)
    prompt = tokenizer.encode("question: stop", add_special_tokens=False)
    alone = tokens(engine.generate([prompt], sampling(stop_token_ids=[]), KEYS[:1]))
    stopping = sampling(stop_token_ids=[], stop_strings=["stop"])
    assert tokens(engine.generate([prompt], stopping, KEYS[:1])) == alone


# --- weights, progress, failure ---------------------------------------------------------------------------------------


def test_sync_takes_over_changed_weights_and_restored_ones(factory, policy: Policy) -> None:
    changing = copy.deepcopy(policy)
    engine = ready(factory(64), changing)
    before = engine.generate(PROMPTS, sampling(), KEYS)
    saved = {k: v.clone() for k, v in changing.state_dict().items()}
    with torch.no_grad():
        for _, p in changing.trainable():
            p.mul_(1.3)
    changing.sync()
    engine.sync(changing)
    changed = engine.generate(PROMPTS, sampling(), KEYS)
    assert tokens(changed) != tokens(before)
    changing.load_state_dict(saved)
    changing.sync()
    engine.sync(changing)
    restored = engine.generate(PROMPTS, sampling(), KEYS)
    assert [c[:3] for c in restored] == [c[:3] for c in before]
    assert [{c.weight_version for c in made} for made in (before, changed, restored)] == [{1}, {2}, {3}]


def test_sampling_leaves_the_policy_as_it_was(engine: RolloutEngine, policy: Policy) -> None:
    before = {k: v.clone() for k, v in policy.state_dict().items()}
    modes = [m.training for m in policy.modules()]
    completions = engine.generate(PROMPTS, sampling(), KEYS)
    assert [m.training for m in policy.modules()] == modes
    assert all(torch.equal(v, before[k]) for k, v in policy.state_dict().items())
    assert all(p.grad is None for p in policy.parameters())
    sequences = pad_sequences(PROMPTS, tokens(completions))
    assert policy(sequences, sequences.completion_mask(), 1.0).log_probs.requires_grad


@pytest.mark.parametrize("rows", [3, 64])
def test_tick_counts_every_completion_once(factory, policy: Policy, free: list[list[int]], rows: int) -> None:
    """Those that stop and those that are cut, and it is called for steps at which none finishes too."""
    engine, calls = ready(factory(rows), policy), []
    stopping = sampling(30, stop_token_ids=[free[0][4]])
    engine.generate(PROMPTS, stopping, KEYS, calls.append)
    assert sum(calls) == len(PROMPTS)
    assert 0 in calls


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mistral"])
@pytest.mark.trap(12)
def test_gradient_checkpointing_does_not_reach_sampling(factory, architecture_folder, architecture: str) -> None:
    """In training mode it drops the cache, and every token would be drawn as if nothing stood before it."""
    folder = str(architecture_folder(architecture))
    made = []
    for checkpointing in (False, True):
        config = PolicyConfig(model=folder, compute_dtype="float32", gradient_checkpointing=checkpointing)
        policy = Policy(config)
        made.append(ready(factory(64), policy).generate(PROMPTS, sampling(), KEYS))
        assert all(m.training for m in policy.modules())
    assert made[0] == made[1]


def test_what_tick_raises_aborts_and_the_engine_goes_on(engine: RolloutEngine) -> None:
    expected = tokens(engine.generate(PROMPTS, sampling(), KEYS))

    def interrupt(finished: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate(PROMPTS, sampling(), KEYS, interrupt)
    assert tokens(engine.generate(PROMPTS, sampling(), KEYS)) == expected


def test_weights_that_are_not_finite_are_an_error(factory, policy: Policy) -> None:
    broken = copy.deepcopy(policy)
    with torch.no_grad():
        broken.trainable()[-1][1].fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="not finite"):
        ready(factory(64), broken).generate(PROMPTS, sampling(), KEYS)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"max_new_tokens": 0}, "sampling.max_new_tokens"),
        ({"max_new_tokens": 1, "temperature": -0.1}, "sampling.temperature"),
        ({"max_new_tokens": 1, "stop_strings": ["a", ""]}, "sampling.stop_strings"),
    ],
)
def test_impossible_sampling_names_the_key(arguments: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        SamplingParams(**arguments)


def test_a_batch_of_no_rows_names_the_key() -> None:
    with pytest.raises(ValueError, match="max_rows"):
        ReferenceEngine(max_rows=0)
