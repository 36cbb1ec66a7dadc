"""Rollout and trainer in bfloat16: fp32 log-probs, and a disagreement that rounding explains."""

from pathlib import Path

import pytest
import torch

from lit_posttrain.batching import pad_sequences
from lit_posttrain.gates import MISMATCH_TOLERANCE
from lit_posttrain.policy import Policy, PolicyConfig
from lit_posttrain.rollout import ReferenceEngine, SamplingParams
from lit_posttrain.types import SamplingKey

PROMPTS = [[5, 6, 7, 8], [9, 10, 11]]


@pytest.fixture(scope="module")
def policy(tiny_model: Path) -> Policy:
    return Policy(PolicyConfig(model=str(tiny_model), compute_dtype="bfloat16"))


@pytest.mark.trap(13)
def test_engine_and_trainer_differ_by_rounding_and_no_more(policy: Policy) -> None:
    engine = ReferenceEngine()
    engine.sync(policy)
    keys = [SamplingKey(1, "test", 0, i % 2, i) for i in range(16)]
    drawn = engine.generate(
        [PROMPTS[i % 2] for i in range(16)], SamplingParams(max_new_tokens=12, temperature=0.8), keys
    )
    sequences = pad_sequences([PROMPTS[i % 2] for i in range(16)], [c.token_ids for c in drawn])
    mask = sequences.completion_mask()
    trainer = policy(sequences, mask, 0.8).log_probs
    assert trainer.dtype == torch.float32
    sampled = torch.tensor([p for c in drawn for p in c.log_probs])
    gap = (trainer[mask] - sampled).abs()
    assert 0 < gap.mean() < MISMATCH_TOLERANCE[torch.bfloat16]
    wrong = policy(sequences, mask, 1.6).log_probs
    assert (wrong[mask] - sampled).abs().mean() > MISMATCH_TOLERANCE[torch.bfloat16]


@pytest.mark.trap(13)
def test_log_probs_are_summed_in_fp32(policy: Policy) -> None:
    sequences = pad_sequences(PROMPTS, [[20, 21, 22], [23, 24]])
    mask = sequences.completion_mask()
    network = policy.decode_network()
    hidden = network.base_model(input_ids=sequences.ids, use_cache=False).last_hidden_state
    logits = torch.nn.functional.linear(hidden, network.get_output_embeddings().weight)
    assert logits.dtype == torch.bfloat16
    exact = (logits.double() / 0.05).log_softmax(-1)[:, :-1].gather(-1, sequences.ids[:, 1:, None])[..., 0]
    packs, policy.shares_prompts = policy.shares_prompts, False
    ours = policy(sequences, mask, 0.05).log_probs
    policy.shares_prompts = packs
    torch.testing.assert_close(ours[mask].double(), exact[mask], rtol=1e-5, atol=1e-5)
    assert not torch.equal(ours[mask], ours[mask].bfloat16().float())
