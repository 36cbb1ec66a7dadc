"""The policy against HF's own logits, and what loading, padding, checkpointing, adapters and saving must not change."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from architectures.zoo import ARCHITECTURES
from tiny import byte_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from lit_posttrain.dropout import disable_dropout
from lit_posttrain.policy import LoraConfig, Policy, PolicyConfig, load_network, load_tokenizer
from lit_posttrain.types import Sequences

EOS = 1
PROMPT_LENGTHS = [3, 1, 9, 3]
LENGTHS = [12, 2, 20, 9]


def policy_of(folder: Path, **arguments) -> Policy:
    return Policy(PolicyConfig(model=str(folder), **{"compute_dtype": "float32", **arguments}))


def hf(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def rows(width: int = 20, padding: int | None = None, seed: int = 0) -> Sequences:
    """Rows with end tokens in prompts and completions, each ending with one; random ids or ``padding`` after them.

    The first and the last share their prompt.
    """
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, 258, (4, 20), generator=generator)
    ids[0, 1] = ids[2, 4] = ids[2, 12] = EOS
    ids[3, :3] = ids[0, :3]
    junk = torch.randint(0, 258, (4, width), generator=torch.Generator().manual_seed(seed))
    full = junk if padding is None else torch.full((4, width), padding)
    for i, n in enumerate(LENGTHS):
        full[i, :n] = ids[i, :n]
        full[i, n - 1] = EOS
    return Sequences(full, torch.tensor(PROMPT_LENGTHS), torch.tensor(LENGTHS))


def score(policy: Policy, sequences: Sequences, temperature: float = 1.0, **arguments):
    return policy(sequences, sequences.completion_mask(), temperature, **arguments)


def gradients(policy: Policy, sequences: Sequences) -> dict[str, torch.Tensor]:
    policy.zero_grad()
    weights = torch.linspace(-1, 1, 19).expand(4, 19)  # a signed sum, so that nothing cancels by symmetry
    log_probs = score(policy, sequences).log_probs[:, :19]
    (log_probs * weights).sum().backward()
    return {name: p.grad.clone() for name, p in policy.trainable() if p.grad is not None}


# --- log-probs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.trap(1)
@pytest.mark.trap(2)
@pytest.mark.trap(6)
@pytest.mark.trap(7)
@pytest.mark.trap(8)
def test_log_probs_are_hf_log_softmax_of_each_row_alone(
    architecture_folder: Callable[[str], Path], architecture: str
) -> None:
    """End tokens are scored like any other, wherever they are, and 0 stands outside the completion."""
    folder, sequences = architecture_folder(architecture), rows()
    policy, network = policy_of(folder), hf(folder)
    for temperature in (0.6, 1.0, 1.7):
        scored = score(policy, sequences, temperature, with_entropy=True)
        assert scored.log_probs.dtype == torch.float32
        for i, (p, n) in enumerate(zip(PROMPT_LENGTHS, LENGTHS, strict=True)):
            every = (network(input_ids=sequences.ids[i : i + 1, :n]).logits[0].double() / temperature).log_softmax(-1)
            expected = torch.zeros(19, dtype=torch.float64)
            entropy = torch.zeros(19, dtype=torch.float64)
            for position in range(p, n):  # token `position` is predicted one earlier
                expected[position - 1] = every[position - 1, sequences.ids[i, position]]
                entropy[position - 1] = -(every[position - 1].exp() * every[position - 1]).sum()
            assert expected[n - 2] != 0  # the closing end token
            torch.testing.assert_close(scored.log_probs[i].double(), expected, atol=1e-4, rtol=1e-4)
            assert scored.entropy is not None
            torch.testing.assert_close(scored.entropy[i].double(), entropy, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_prompt_tokens_can_be_scored_too(architecture_folder, architecture: str) -> None:
    """A mask over prompt and completion alike, as for pretraining text."""
    folder, sequences = architecture_folder(architecture), rows()
    policy, network = policy_of(folder), hf(folder)
    mask = sequences.attention_mask()[:, 1:]
    scored = policy(sequences, mask, 1.0).log_probs
    for i, n in enumerate(LENGTHS):
        every = network(input_ids=sequences.ids[i : i + 1, :n]).logits[0].log_softmax(-1)
        expected = every[:-1].gather(1, sequences.ids[i, 1:n, None])[:, 0]
        torch.testing.assert_close(scored[i, : n - 1], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3_text"])
@pytest.mark.trap(1)
@pytest.mark.trap(6)
@pytest.mark.trap(10)
def test_padding_changes_neither_log_probs_nor_gradients(architecture_folder, architecture: str) -> None:
    policy = policy_of(architecture_folder(architecture))
    plain = rows(padding=EOS)  # padding that equals the end token
    expected, expected_gradients = score(policy, plain).log_probs, gradients(policy, plain)
    for other in (rows(seed=1), rows(seed=2), rows(width=33, seed=3), rows(width=27, padding=EOS), rows(padding=0)):
        actual = score(policy, other).log_probs
        torch.testing.assert_close(actual[:, :19], expected, atol=2e-5, rtol=1e-5)
        assert not actual[:, 19:].any()
        for name, gradient in gradients(policy, other).items():
            torch.testing.assert_close(gradient, expected_gradients[name], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.trap(11)
@pytest.mark.trap(12)
def test_dropout_of_the_config_is_off_in_training_mode(architecture_folder, architecture: str) -> None:
    """Scoring twice in training mode gives the same bits, so the ratio of a first update is exactly 1."""
    folder = architecture_folder(architecture)
    told = json.loads((folder / "config.json").read_text())
    assert any(isinstance(v, float) and v > 0 for k, v in told.items() if "drop" in k)
    policy, sequences = policy_of(folder), rows()
    assert all(m.training for m in policy.modules())
    first = score(policy, sequences).log_probs
    for _ in range(3):
        assert torch.equal(score(policy, sequences).log_probs, first)


def test_noise_of_routers_is_off_and_thresholds_stay() -> None:
    router = torch.nn.Module()
    names = ("jitter_noise", "input_jitter_noise", "moe_jitter_eps", "router_jitter_noise")  # Mixtral, Phi, DBRX, Phi
    for name in names:
        setattr(router, name, 0.01)
    disable_dropout(torch.nn.Sequential(router))
    assert [getattr(router, name) for name in names] == [0.0, 0.0, 0.0, 0.01]


@pytest.mark.trap(12)
def test_evaluation_mode_scores_the_same(tiny_model: Path) -> None:
    policy, sequences = policy_of(tiny_model), rows()
    training = score(policy, sequences).log_probs
    assert torch.equal(score(policy.eval(), sequences).log_probs, training)


@pytest.mark.parametrize(
    ("architecture", "lora"),
    [("llama", None), ("llama", LoraConfig(r=4)), ("gpt2", None), ("gemma3_text", None), ("gpt_neox", None)],
)
@pytest.mark.trap(12)
def test_gradient_checkpointing_gives_the_same_gradients(architecture_folder, architecture: str, lora) -> None:
    folder, sequences = architecture_folder(architecture), rows()
    calls = {}
    for checkpointing in (False, True):
        torch.manual_seed(0)  # adapters start at random
        policy = policy_of(folder, gradient_checkpointing=checkpointing, lora=lora)
        ran = []
        first = next(m for m in policy.modules() if type(m).__name__ in policy.decode_network()._no_split_modules)
        # The checkpoint lies around the block's forward, so it is a part of the block that is seen to run again.
        next(first.children()).register_forward_pre_hook(lambda *_, ran=ran: ran.append(1))
        calls[checkpointing] = gradients(policy, sequences), len(ran)
    (plain, once), (again, twice) = calls[False], calls[True]
    assert (once, twice) == (1, 2)  # the block really was recomputed
    assert plain.keys() == again.keys()
    assert plain
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, atol=1e-6, rtol=1e-5)


def test_next_logits_are_fp32_at_any_compute_dtype(tiny_model: Path) -> None:
    from transformers.cache_utils import DynamicCache

    policy = policy_of(tiny_model, compute_dtype="bfloat16")
    ids, ones = torch.tensor([[5, 6, 7]]), torch.ones(1, 3, dtype=torch.long)
    with policy.decoding():
        logits = policy.next_logits(ids, torch.arange(3)[None], ones, DynamicCache(config=policy.hf_config))
    assert policy.training
    assert logits.shape == (1, 258)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, hf(tiny_model)(ids).logits[:, -1], atol=0.2, rtol=0.05)


# --- adapters ---------------------------------------------------------------------------------------------------------


def adapted(folder: Path, **arguments) -> Policy:
    """Adapters away from their start, at which they do nothing."""
    torch.manual_seed(0)
    policy = policy_of(folder, lora=LoraConfig(r=4, alpha=8), **arguments)
    with torch.no_grad():
        for _, p in policy.trainable():
            p.add_(0.1 * torch.randn_like(p))
    policy.sync()
    return policy


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_without_its_adapters_the_policy_is_the_base_bit_for_bit(tiny_model: Path, compute_dtype: str) -> None:
    base, policy, sequences = policy_of(tiny_model, compute_dtype=compute_dtype), adapted(tiny_model), rows()
    if compute_dtype == "bfloat16":
        policy = adapted(tiny_model, compute_dtype="bfloat16")
    expected = score(base, sequences).log_probs
    with_adapters = score(policy, sequences).log_probs
    assert (with_adapters - expected).abs().max() > 0.01
    assert torch.equal(score(policy, sequences, adapters=False).log_probs, expected)
    assert torch.equal(score(policy, sequences).log_probs, with_adapters)  # they are on again
    assert gradients(policy, sequences)  # and still train


def test_fresh_adapters_do_nothing_and_only_adapters_train(tiny_model: Path) -> None:
    policy, sequences = policy_of(tiny_model, lora=LoraConfig(r=4)), rows()
    assert torch.equal(score(policy, sequences).log_probs, score(policy_of(tiny_model), sequences).log_probs)
    names = [name for name, _ in policy.trainable()]
    assert names
    assert all("lora_" in name for name in names)
    layers = {name.split(".lora_")[0].rsplit(".", 1)[1] for name in names}
    assert layers == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert all(p.dtype == torch.float32 for _, p in policy.trainable())
    assert gradients(policy, sequences).keys() == set(names)
    assert all(p.grad is None for name, p in policy.model.named_parameters() if name not in names)


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_adapters_are_merged_when_saved(tiny_model: Path, tmp_path: Path, compute_dtype: str) -> None:
    """In fp32, even where the base the adapters sit on is bf16: a small adapter would round away in it."""
    policy, sequences = adapted(tiny_model, compute_dtype=compute_dtype), rows()
    before = {k: v.clone() for k, v in policy.state_dict().items()}
    policy.save_pretrained(tmp_path)
    assert all(torch.equal(v, before[k]) for k, v in policy.state_dict().items())
    merged = load_network(str(tmp_path)).state_dict()
    name = "model.layers.0.mlp.up_proj"
    prefix = f"model.base_model.model.{name}"
    a, b = (before[f"{prefix}.lora_{half}.default.weight"].double() for half in "AB")
    expected = before[f"{prefix}.base_layer.weight"].double() + 8 / 4 * b @ a
    torch.testing.assert_close(merged[f"{name}.weight"].double(), expected, atol=1e-6, rtol=1e-6)
    if compute_dtype == "float32":
        reloaded = score(policy_of(tmp_path), sequences).log_probs
        torch.testing.assert_close(reloaded, score(policy, sequences).log_probs, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings")
@pytest.mark.parametrize(
    "target", [["lm_head"], "lm_head", ".*(lm_head|q_proj)", ["q_proj", "embed_tokens"], ["nowhere"]]
)
def test_adapters_where_they_cannot_be_are_refused(tiny_model: Path, target: str | list[str]) -> None:
    with pytest.raises(ValueError, match=r"model\.init_args\.policy\.lora"):
        policy_of(tiny_model, lora=LoraConfig(target_modules=target))


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt2"])
def test_a_saved_policy_is_the_same_when_loaded(architecture_folder, tmp_path: Path, architecture: str) -> None:
    policy, sequences = policy_of(architecture_folder(architecture)), rows()
    with torch.no_grad():
        for _, p in policy.trainable():
            p.mul_(1.01)
    policy.save_pretrained(tmp_path)
    assert torch.equal(score(policy_of(tmp_path), sequences).log_probs, score(policy, sequences).log_probs)


@pytest.mark.trap(14)
def test_a_bf16_folder_is_loaded_into_fp32_parameters(tiny_model: Path, tmp_path: Path) -> None:
    hf(tiny_model).bfloat16().save_pretrained(tmp_path)
    policy = policy_of(tmp_path, compute_dtype="bfloat16")
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    policy.sync()
    assert {p.dtype for _, p in policy.trainable()} == {torch.float32}
    policy.save_pretrained(tmp_path / "again")
    assert {p.dtype for p in AutoModelForCausalLM.from_pretrained(tmp_path / "again").parameters()} == {torch.float32}


def test_end_tokens_are_the_generation_configs_then_the_models(tiny_model: Path, tmp_path: Path) -> None:
    assert policy_of(tiny_model).stop_token_ids == [EOS]
    folder = shutil.copytree(tiny_model, tmp_path / "several")
    generation = folder / "generation_config.json"
    generation.write_text(json.dumps({**json.loads(generation.read_text()), "eos_token_id": [EOS, 7]}))
    assert policy_of(folder).stop_token_ids == [EOS, 7]
    generation.unlink()
    assert policy_of(folder).stop_token_ids == [EOS]


def test_the_context_length_is_the_configs(architecture_folder, tiny_model: Path) -> None:
    assert policy_of(tiny_model).context_length == 512
    assert policy_of(architecture_folder("gpt2")).context_length == 128


def test_the_tokenizer_is_the_models_or_the_one_named(tiny_model: Path, tmp_path: Path) -> None:
    own = load_tokenizer(PolicyConfig(model=str(tiny_model)))
    assert own.encode("ab") == byte_tokenizer().encode("ab")
    bare = tmp_path / "bare"
    hf(tiny_model).save_pretrained(bare)
    with pytest.raises(ValueError, match=r"policy\.model: no tokenizer in"):
        load_tokenizer(PolicyConfig(model=str(bare)))
    named = load_tokenizer(PolicyConfig(model=str(bare), tokenizer=str(tiny_model)))
    assert named.encode("ab") == own.encode("ab")
    with pytest.raises(ValueError, match=r"policy\.tokenizer"):
        load_tokenizer(PolicyConfig(model=str(tiny_model), tokenizer=str(bare)))


def test_weights_that_the_files_lack_are_not_invented(tiny_model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(tiny_model, tmp_path / "partial")
    tensors = load_file(folder / "model.safetensors")
    lacking = "model.layers.1.mlp.up_proj.weight"
    save_file({k: v for k, v in tensors.items() if k != lacking}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"policy.model.*{lacking}"):
        policy_of(folder)


@pytest.mark.parametrize("damage", ["truncated", "wrong shape", "unknown type"])
def test_damaged_folders_are_a_sentence_that_names_the_key(tiny_model: Path, tmp_path: Path, damage: str) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "damaged")
    weights, config = folder / "model.safetensors", folder / "config.json"
    told = json.loads(config.read_text())
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif damage == "wrong shape":
        config.write_text(json.dumps({**told, "intermediate_size": 128}))
    else:
        config.write_text(json.dumps({**told, "model_type": "no_such_type"}))
    with pytest.raises(ValueError, match=r"model\.init_args\.policy\.model: .*damaged"):
        policy_of(folder)


@pytest.mark.parametrize(
    ("model_type", "named"),
    [("bert", "BertLMHeadModel computes its logits"), ("bloom", "BloomForCausalLM takes no position_ids")],
)
def test_an_architecture_that_cannot_be_scored_is_refused_by_name(tmp_path: Path, model_type: str, named: str) -> None:
    """BERT's head has a transform of its own between hidden states and vocabulary; Bloom has no positions to give."""
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "vocab_size": 258}
    extra = {"intermediate_size": 16, "is_decoder": True} if model_type == "bert" else {}
    AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes, **extra)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"model\.init_args\.policy\.model: {named}"):
        policy_of(tmp_path)


@pytest.mark.parametrize("lost", ["final_logit_softcapping", "logit_scale", "logits_scaling"])
def test_a_logit_transform_that_went_unseen_is_refused(architecture_folder, monkeypatch, lost: str) -> None:
    """The check at load compares with HF's logits, so a transform that the head does not know of cannot slip by."""
    from lit_posttrain import scoring

    name = {"final_logit_softcapping": "gemma2", "logit_scale": "cohere", "logits_scaling": "granite"}[lost]
    monkeypatch.setattr(scoring, "_logit_transform", lambda config: {"softcap": None, "scale": None})
    with pytest.raises(ValueError, match="does not reproduce"):
        policy_of(architecture_folder(name))
