"""Architectures whose layers are not all attention, or not as others have it: sampled as they score, or refused."""

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_posttrain.batching import pad_sequences
from lit_posttrain.gates import GateError
from lit_posttrain.policy import Policy, PolicyConfig
from lit_posttrain.rollout import NativeEngine, ReferenceEngine, SamplingParams
from lit_posttrain.types import SamplingKey

PROMPTS = [[5, 6, 7, 8, 9], [5, 6, 7, 8, 9], [10, 11], [12, 13, 14], [12, 13, 14]]
KEYS = [SamplingKey(3, "other", 0, i, 0) for i in range(len(PROMPTS))]
# Most rows end early, so that others have to be picked out of the cache.
SAMPLING = SamplingParams(max_new_tokens=12, stop_token_ids=list(range(0, 200)))


def policy(folder: Any) -> Policy:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*padded")
        made = Policy(PolicyConfig(model=str(folder), compute_dtype="float32"))
    made.sync()
    return made


# And why the native engine cannot serve them.
FALLING_BACK = {
    "qwen3_next": "log-probabilities are off",
    "gpt_oss": "s_aux",
    "falcon": "call no attention function",
}


def test_the_readme_says_which_fall_back() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    assert set(re.findall(r"^\| `(\w+)`[^|]*\| reference engine \| padded \|$", readme, re.M)) == set(FALLING_BACK)


@pytest.mark.parametrize(("architecture", "reason"), FALLING_BACK.items())
def test_the_reference_engine_takes_over(architecture_folder: Any, architecture: str, reason: str) -> None:
    network = policy(architecture_folder(architecture))
    assert not network.shares_prompts
    engine = NativeEngine()
    with pytest.warns(UserWarning, match=f"{reason}.*reference engine"):
        engine.sync(network)
    drawn = engine.generate(PROMPTS, SAMPLING, KEYS)
    assert len({len(c.token_ids) for c in drawn}) > 1
    sequences = pad_sequences(PROMPTS, [c.token_ids for c in drawn])
    mask = sequences.completion_mask()
    with torch.no_grad():
        expected = network(sequences, mask, 1.0).log_probs[mask]
    torch.testing.assert_close(torch.tensor([p for c in drawn for p in c.log_probs]), expected, atol=1e-4, rtol=1e-4)
    for i, completion in enumerate(drawn):  # each as by itself
        (alone,) = engine.generate(PROMPTS[i : i + 1], SAMPLING, KEYS[i : i + 1])
        assert alone.token_ids == completion.token_ids


@pytest.mark.parametrize("engine", [NativeEngine, ReferenceEngine])
def test_a_cache_of_its_own_is_refused_before_anything_is_sampled(architecture_folder: Any, engine: Any) -> None:
    network = policy(architecture_folder("minimax"))
    with pytest.raises(GateError, match=r"policy\.model: MiniMaxForCausalLM cannot be sampled .*past_key_values"):
        engine().sync(network)


def test_an_encoder_is_refused(architecture_folder: Any) -> None:
    with pytest.raises(ValueError, match=r"policy\.model: BertGenerationDecoder reads later tokens"):
        policy(architecture_folder("bert-generation"))
