"""Compiled decoder layers compute what eager ones do, for any layout, and nothing else uses them."""

from pathlib import Path

import pytest
import torch
from tiny_runs import GROUP, fit, grpo, prompts

from lit_posttrain import blocks
from lit_posttrain.batching import pad_sequences
from lit_posttrain.policy import Policy, PolicyConfig
from lit_posttrain.rollout import NativeEngine, SamplingParams
from lit_posttrain.types import SamplingKey


def policy(folder: Path, **arguments) -> Policy:
    return Policy(PolicyConfig(model=str(folder), compute_dtype="float32", **arguments))


def gradients(policy: Policy, prompts: list[list[int]], completions: list[list[int]]) -> list[torch.Tensor]:
    policy.zero_grad()
    sequences = pad_sequences(prompts, completions)
    policy(sequences, sequences.completion_mask(), 1.0).log_probs.sum().backward()
    return [p.grad.clone() for _, p in policy.trainable() if p.grad is not None]


def test_compiled_equals_eager_and_is_compiled_once(tiny_model: Path) -> None:
    eager, compiled = policy(tiny_model), policy(tiny_model, compile_layers=True)
    layouts = [([[5, 6, 7]] * 3, [[8, 9], [10], [11, 12, 13]]), ([[5], [6, 7]], [[8] * 9, [9]]), ([[5, 6]], [[7, 8]])]
    torch._dynamo.utils.counters.clear()
    for i, layout in enumerate(layouts):
        for a, b in zip(gradients(compiled, *layout), gradients(eager, *layout), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        if i == 0:
            graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs > 0


def test_a_run_with_compiled_layers_samples_and_trains(tiny_model: Path, tmp_path: Path) -> None:
    module = grpo(tiny_model, policy={"compile_layers": True})
    before = {name: p.detach().clone() for name, p in Policy(module.policy_config).model.named_parameters()}
    fit(module, prompts(tiny_model, tmp_path), tmp_path, max_steps=2)
    assert isinstance(module.engine, NativeEngine)
    assert module.engine.fallback is None
    assert any(not torch.equal(p, before[name]) for name, p in module.built_policy().model.named_parameters())


def test_the_engines_view_does_not_run_compiled_layers(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(forward, **_):
        def compiled(*args, **kwargs):
            raise AssertionError("a compiled layer was called")

        return compiled

    compiled = policy(tiny_model, compile_layers=True)
    monkeypatch.setattr(torch, "compile", refuse)
    compiled.build_view(torch.device("cpu"), sharded=False)
    engine = NativeEngine()
    engine.policy = compiled  # known, so that no self-test scores with the policy
    engine.sync(compiled)
    keys = [SamplingKey(0, "test", 0, 0, i) for i in range(GROUP)]
    assert len(engine.generate([[5, 6]] * GROUP, SamplingParams(max_new_tokens=3), keys)) == GROUP


def test_no_compiler_is_said_before_anything_runs(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match=r"policy\.compile_layers.*g\+\+"):
        policy(tiny_model, compile_layers=True).build_view(torch.device("cpu"), sharded=False)
