"""Packed rows that share a prompt compute what padded rows compute, forward and backward."""

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from architectures.zoo import ARCHITECTURES
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_posttrain.batching import pack, pad_sequences, split
from lit_posttrain.policy import Policy, PolicyConfig
from lit_posttrain.types import Sequences


@pytest.fixture(scope="module")
def policy(tiny_model: Path) -> Policy:
    return Policy(PolicyConfig(model=str(tiny_model), compute_dtype="float32"))


def ragged(seed: int = 0) -> Sequences:
    """Two groups of three, a prompt of its own, and a completion of one token."""
    generator = torch.Generator().manual_seed(seed)
    prompts = [[5, 6, 7, 8]] * 3 + [[9, 10, 11, 12, 13, 14]] * 3 + [[5, 6]]
    lengths = [7, 1, 4, 9, 9, 2, 5]
    completions = [torch.randint(0, 200, (n,), generator=generator).tolist() for n in lengths]
    return pad_sequences(prompts, completions)


def gradients(policy: Policy, sequences: Sequences, packed: bool, temperature: float = 0.7) -> tuple:
    policy.shares_prompts = packed
    policy.zero_grad()
    mask = sequences.completion_mask()
    mask[2] = False  # a row that counts nowhere
    out = policy(sequences, mask, temperature, with_entropy=True)
    weights = torch.arange(mask.numel(), device=mask.device).view(mask.shape).sin()
    (out.log_probs * weights).sum().backward()
    policy.shares_prompts = True
    return out.log_probs.detach(), out.entropy, [p.grad.clone() for p in policy.model.parameters()]


def test_packed_equals_padded_forward_and_backward(policy: Policy) -> None:
    assert policy.shares_prompts
    sequences = ragged()
    padded, packed = gradients(policy, sequences, False), gradients(policy, sequences, True)
    torch.testing.assert_close(packed[0], padded[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(packed[1], padded[1], rtol=1e-5, atol=1e-5)
    for a, b in zip(packed[2], padded[2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 * float(b.abs().max()) + 1e-6)


@pytest.mark.parametrize("architecture", ["tiny", *ARCHITECTURES])
def test_gradients_are_those_of_padded_rows(
    architecture_folder: Callable[[str], Path], tiny_model: Path, architecture: str
) -> None:
    folder = tiny_model if architecture == "tiny" else architecture_folder(architecture)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        policy = Policy(PolicyConfig(model=str(folder), compute_dtype="float32"))
    if not policy.packs(0):
        pytest.skip("this architecture is padded")
    policy.window = None
    sequences = pad_sequences([[5, 6]] * 3 + [[9]], [[7, 8, 9, 1], [7], [20, 21, 22], [4, 5, 6]])  # within every window
    # fp32 rounds differently from CPU to CPU, more the more a network scales its states.
    padded, packed = (torch.cat([g.flatten() for g in gradients(policy, sequences, p)[2]]) for p in (False, True))
    assert (packed - padded).abs().max() < 1e-5 * padded.abs().max()


def single_sequences() -> Sequences:
    """As in fine-tuning: nothing but the first token is given, and for some it is the same."""
    return pad_sequences([[1], [1], [2], [3]], [[5, 6, 7, 8, 9], [5], [9, 8], [4, 4, 4]])


@pytest.mark.parametrize("alone", [False, True])
def test_plain_sequences_and_lone_completions(policy: Policy, alone: bool) -> None:
    sequences = single_sequences()
    if alone:
        sequences = Sequences(*(x[:1] for x in sequences))
    mask = sequences.completion_mask()
    logits = policy.model(input_ids=sequences.ids).logits.log_softmax(-1)[:, :-1]
    expected = logits.gather(-1, sequences.ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(policy(sequences, mask, 1.0).log_probs[mask], expected[mask], rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 5e-2)])
def test_on_cuda_packed_equals_padded(tiny_model: Path, dtype: str, tolerance: float) -> None:
    policy = Policy(PolicyConfig(model=str(tiny_model), compute_dtype=dtype)).cuda()
    policy.sync()
    sequences = Sequences(*(x.cuda() for x in ragged()))
    padded, packed = gradients(policy, sequences, False), gradients(policy, sequences, True)
    torch.testing.assert_close(packed[0], padded[0], rtol=tolerance, atol=tolerance)
    a, b = (torch.cat([g.flatten() for g in side[2]]) for side in (packed, padded))
    assert (a - b).norm() < tolerance * b.norm()


def test_a_prompt_is_computed_once_for_all_its_completions(policy: Policy) -> None:
    sequences = ragged()
    row = pack(sequences)
    assert row.ids.shape[1] == (4 + 6 + 0 + 3) + (6 + 8 + 8 + 1) + (2 + 4)
    seen: list[int] = []
    embedding = policy.model.get_input_embeddings()
    hook = embedding.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].numel()))
    policy(sequences, sequences.completion_mask(), 1.0)
    hook.remove()
    assert seen == [row.ids.shape[1]]


def test_no_completion_sees_another(policy: Policy) -> None:
    sequences = ragged()
    mask = sequences.completion_mask()
    before = policy(sequences, mask, 1.0).log_probs
    changed = sequences._replace(ids=sequences.ids.clone())
    changed.ids[0, 4:11] = 17
    after = policy(changed, mask, 1.0).log_probs
    torch.testing.assert_close(after[1:], before[1:], rtol=0, atol=1e-6)
    assert not torch.allclose(after[0], before[0])


def test_gradient_checkpointing_keeps_the_layout(tiny_model: Path, policy: Policy) -> None:
    other = Policy(PolicyConfig(model=str(tiny_model), compute_dtype="float32", gradient_checkpointing=True))
    for a, b in zip(gradients(other, ragged(), True)[2], gradients(policy, ragged(), True)[2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_sequence_longer_than_a_sliding_window_is_padded(policy: Policy) -> None:
    policy.window = 8
    try:
        assert policy.packs(8)
        assert not policy.packs(9)
    finally:
        policy.window = None


def test_an_attention_that_packed_rows_cannot_do_is_named_and_padded(tmp_path: Path) -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, attn_logit_softcapping=5.0, sliding_window=16,
    )  # fmt: skip
    network = Gemma2ForCausalLM(config)
    network.save_pretrained(tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        policy = Policy(PolicyConfig(model=str(tmp_path), compute_dtype="float32"))
    if not policy.shares_prompts:
        assert any("Gemma2ForCausalLM" in str(w.message) for w in caught)
    sequences = pad_sequences([[5, 6, 7]] * 2, [[8, 9], [10, 11, 12]])
    mask = sequences.completion_mask()
    logits = policy.model(input_ids=sequences.ids).logits.float().log_softmax(-1)[:, :-1]
    expected = logits.gather(-1, sequences.ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(policy(sequences, mask, 1.0).log_probs[mask], expected[mask], rtol=1e-4, atol=1e-4)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 9)), min_size=1, max_size=12),
    budget=st.integers(1, 60),
)
def test_splitting_by_prompt_keeps_every_row_once_and_the_budget(shape: list[tuple[int, int]], budget: int) -> None:
    prompts = [[[5], [5, 6], [7, 8, 9], [1, 2, 3, 4, 5]][kind] for kind, _ in shape]
    sequences = pad_sequences(prompts, [[3] * n for _, n in shape])
    mask = sequences.completion_mask()
    batches = split(sequences, mask, {"x": sequences.lengths}, budget, packed=True)
    assert sorted(row for b in batches for row in b.rows.tolist()) == list(range(len(shape)))
    for batch in batches:
        assert len(batch.rows) == 1 or pack(batch.sequences).ids.shape[1] <= budget
        assert torch.equal(batch.columns["x"], sequences.lengths[batch.rows])
