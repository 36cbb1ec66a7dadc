"""The over-optimisation view: its numbers against HF's own, training untouched, resumed, refused where it cannot be."""

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from offline_runs import data as offline_data
from offline_runs import fit as offline_fit
from offline_runs import module as offline_module
from ppo_runs import ppo, ppo_objective
from tiny_runs import curve, even, fit, gap, grpo, prompts, trainer, weights
from transformers import AutoModelForCausalLM
from two_processes import train_in_two

from lit_posttrain.algorithms.sampling import SamplingModule
from lit_posttrain.callbacks import CheckpointEvery
from lit_posttrain.checkpoint import newest_checkpoint
from lit_posttrain.policy import LoraConfig
from lit_posttrain.reference import ReferenceConfig
from lit_posttrain.report.overoptimisation import OverOptimisation
from lit_posttrain.rewards import LearnedReward, PythonReward

EVERY = {"limit_val_batches": 1.0, "val_check_interval": 1, "check_val_every_n_epoch": None, "max_steps": 3}


def odd(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [1.0 - x for x in even(completion_ids)]


def watched(gold: Any = odd, prompts: int = 5) -> OverOptimisation:
    return OverOptimisation(gold and PythonReward(gold, timeout=10.0), prompts)


def held_out(model: Path, folder: Path) -> Any:
    return prompts(model, folder, held_out_percent=50, val_size=None)


def points(folder: Path) -> list[dict[str, float]]:
    (file,) = folder.rglob("overoptimisation.json")
    return json.loads(file.read_text())


@pytest.mark.parametrize("make", [ppo, grpo])
def test_a_point_before_training_and_after_each_validation(make: Any, tiny_model: Path, tmp_path: Path) -> None:
    fit(make(tiny_model, lr=2.0), held_out(tiny_model, tmp_path), tmp_path, watched(), **EVERY)
    found = points(tmp_path)
    assert [p["step"] for p in found] == [0, 1, 2, 3]
    assert found[0]["kl"] == pytest.approx(0.0, abs=1e-6)
    assert found[-1]["kl"] > 1e-3
    for p in found:
        assert p["sqrt_kl"] == pytest.approx(math.sqrt(p["kl"]))
        assert p["proxy"] + p["gold"] == pytest.approx(1.0)
    for name in ("kl", "sqrt_kl", "proxy", "gold"):
        logged = curve(tmp_path, f"eval/overoptimisation/{name}")
        assert logged == pytest.approx([p[name] for p in found], rel=1e-5, abs=1e-7)
    (picture,) = tmp_path.rglob("overoptimisation.png")
    assert picture.stat().st_size > 5000


def test_the_kl_is_that_of_whole_answers(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same answers through HF's networks: sum over an answer of exp(-d) - 1 + d, mean over answers."""
    seen: list[Any] = []
    inner = OverOptimisation._kl

    def spy(self: Any, module: Any, asked: Any, completions: Any) -> float:
        kl = inner(self, module, asked, completions)
        state = {n: p.detach().clone() for n, p in module.built_policy().model.named_parameters()}
        seen.append((kl, list(asked), list(completions), state))
        return kl

    monkeypatch.setattr(OverOptimisation, "_kl", spy)
    fit(ppo(tiny_model, lr=2.0, token_budget=16), held_out(tiny_model, tmp_path), tmp_path, watched(), **EVERY)
    kl, asked, completions, state = seen[-1]
    initial, trained = (AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32) for _ in range(2))
    trained.load_state_dict(state, strict=False)
    total = 0.0
    for prompt, completion in zip(asked, completions, strict=True):
        ids = torch.tensor([[*prompt.token_ids, *completion.token_ids]])
        n = len(completion.token_ids)
        with torch.no_grad():
            ours, theirs = (
                m(ids).logits[0, -n - 1 : -1].log_softmax(-1).gather(-1, ids[0, -n:, None])[:, 0]
                for m in (trained, initial)
            )
        total += float(((theirs - ours).exp() - 1 + ours - theirs).sum())
    assert kl == pytest.approx(total / len(asked), rel=1e-4)
    assert len(asked) == 5


@pytest.mark.parametrize("lora", [False, True])
def test_training_is_the_same_with_and_without(lora: bool, tiny_model: Path, tmp_path: Path) -> None:
    policy = {"lora": LoraConfig(r=2, alpha=4)} if lora else {}
    final = []
    for name, callbacks in (("with", [watched()]), ("without", [])):
        torch.manual_seed(5)
        module = ppo(tiny_model, policy=policy, objective=ppo_objective(kl=0.2))
        fit(module, held_out(tiny_model, tmp_path / name), tmp_path / name, *callbacks, **EVERY)
        final.append(weights(module))
    assert gap(*final) == 0.0
    assert points(tmp_path / "with")[0]["kl"] == pytest.approx(0.0, abs=1e-6)
    assert points(tmp_path / "with")[-1]["kl"] > 0


@pytest.mark.parametrize(("kl", "refresh", "shared"), [(0.2, None, True), (0.2, 2, False), (0.0, None, False)])
def test_the_reference_is_not_loaded_twice(
    kl: float, refresh: Any, shared: bool, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    inner = OverOptimisation._kl

    def spy(self: Any, module: Any, *rest: Any) -> float:
        seen.append(self._initial is module.reference)
        return inner(self, module, *rest)

    monkeypatch.setattr(OverOptimisation, "_kl", spy)
    module = ppo(tiny_model, objective=ppo_objective(kl=kl), reference=ReferenceConfig(refresh_every=refresh))
    fit(module, held_out(tiny_model, tmp_path), tmp_path, watched(), **EVERY)
    assert set(seen) == {shared}
    assert points(tmp_path)[0]["kl"] == pytest.approx(0.0, abs=1e-6)


def test_no_gold_and_a_gold_that_fails(tiny_model: Path, tmp_path: Path) -> None:
    def broken(completions: list[str], **_: Any) -> list[float]:
        raise RuntimeError("no verdict today")

    for name, gold in (("none", None), ("broken", broken)):
        fit(ppo(tiny_model), held_out(tiny_model, tmp_path / name), tmp_path / name, watched(gold), **EVERY)
        assert all("proxy" in p and "gold" not in p for p in points(tmp_path / name))


def test_a_resumed_run_goes_on_after_its_points(tiny_model: Path, tmp_path: Path) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    fit(ppo(tiny_model), held_out(tiny_model, whole), whole, watched(), CheckpointEvery(1), **EVERY)
    fit(ppo(tiny_model), held_out(tiny_model, run), run, watched(), CheckpointEvery(1), **{**EVERY, "max_steps": 2})
    found = newest_checkpoint(run / "version_0", report=pytest.fail)
    assert found is not None
    again = trainer(run, watched(), CheckpointEvery(1), **EVERY)
    again.fit(ppo(tiny_model), held_out(tiny_model, run), ckpt_path=str(found.state))
    assert points(run) == points(whole)


def test_what_cannot_be_watched(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"OverOptimisation\.prompts: must be at least 1"):
        OverOptimisation(prompts=0)
    with pytest.raises(ValueError, match=r"needs held-out prompts; see data\.init_args\.val_size"):
        fit(ppo(tiny_model), prompts(tiny_model, tmp_path), tmp_path, watched())
    with pytest.raises(ValueError, match=r"OverOptimisation watches PPO and GRPO; SFT samples nothing"):
        offline_fit(offline_module("sft", tiny_model), offline_data("sft", tiny_model, tmp_path), tmp_path, watched())
    assert not issubclass(type(offline_module("sft", tiny_model)), SamplingModule)


@pytest.mark.parametrize("strategy", ["fsdp2", "ddp"])
def test_two_processes_measure_what_one_does(tiny_model: Path, tmp_path: Path, strategy: str) -> None:
    """Sharded reference and policy; one process writes the file."""

    def run(folder: Path, **more: Any) -> None:
        module = ppo(tiny_model, lr=0.5, objective=ppo_objective(kl=0.0), token_budget=40, log_samples_every=0)
        data = prompts(tiny_model, tmp_path, held_out_percent=50, val_size=None)
        fit(module, data, folder, watched(), **{**EVERY, **more})

    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    prompts(tiny_model, tmp_path)  # writes the questions before the processes part
    run(tmp_path / "one")
    train_in_two(strategy, lambda over: run(tmp_path / "two", strategy=over, devices=2))
    single, both = points(tmp_path / "one"), points(tmp_path / "two")
    assert [p["step"] for p in both] == [0, 1, 2, 3]
    assert single[-1]["kl"] > 1e-3
    for mine, theirs in zip(single, both, strict=True):
        assert theirs == pytest.approx(mine, rel=1e-3, abs=1e-6)


def test_gold_that_would_be_calibrated_is_refused() -> None:
    with pytest.raises(ValueError, match=r"OverOptimisation\.gold\.init_args\.calibration"):
        OverOptimisation(gold=LearnedReward("somewhere", calibration=4))


def test_a_missing_gold_model_is_named_as_gold(tiny_model: Path, tmp_path: Path) -> None:
    watching = OverOptimisation(gold=LearnedReward(str(tmp_path / "nowhere")))
    with pytest.raises(ValueError, match=r"OverOptimisation\.gold\.init_args\.model: there is no folder"):
        fit(ppo(tiny_model), held_out(tiny_model, tmp_path), tmp_path, watching, **EVERY)


def test_what_is_short_or_missing_is_said(tiny_model: Path, tmp_path: Path) -> None:
    def never(completions: list[str], **_: Any) -> list[float | None]:
        return [None] * len(completions)

    watching = OverOptimisation(gold=PythonReward(never, timeout=10.0), prompts=500)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer(tmp_path, watching, **EVERY).fit(ppo(tiny_model), held_out(tiny_model, tmp_path))
    texts = [str(w.message) for w in said]
    assert any("OverOptimisation.prompts: 500, but only" in t for t in texts)
    assert any("no answer has a valid gold reward" in t for t in texts)
