"""What stops a run in its first iterations, each in a real run that could not have learned anything."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import even, fit, grpo, objective, prompts, scalars, trainer

from lit_posttrain.gates import GateError
from lit_posttrain.policy import LoraConfig
from lit_posttrain.rewards import PythonReward
from lit_posttrain.rollout import ReferenceEngine, SamplingParams
from lit_posttrain.types import Completion


def stops(model: Path, folder: Path, message: str, module: Any, **options: Any) -> Any:
    """The run ends with this message and has not finished an iteration."""
    with pytest.raises(GateError, match=message):
        fit(module, prompts(model, folder), folder, **options)
    return module


class Frozen(torch.optim.SGD):
    """Owns the parameters and never moves them."""

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        return None if closure is None else closure()


def test_nothing_changed_although_there_was_a_gradient(tiny_model: Path, tmp_path: Path) -> None:
    module = grpo(tiny_model, optimizer=lambda params: Frozen(params, lr=0.1))
    stops(tiny_model, tmp_path, "no parameter changed although the learning rate is 0.1 and the gradient norm", module)
    assert "train/reward" not in scalars(tmp_path), "an iteration that a gate stops is not logged"


def test_a_first_step_that_is_left_out_is_no_fault(tiny_model: Path, tmp_path: Path) -> None:
    """Its gradient overflows, so that nothing moves; the optimizer is not to blame."""
    module = grpo(tiny_model)
    loss = module.loss

    def too_steep(*arguments: Any) -> Any:
        out = loss(*arguments)
        return out._replace(loss=out.loss * (1e30 if module.trainer.global_step == 0 else 1.0))

    module.loss = too_steep  # type: ignore[method-assign]
    assert fit(module, prompts(tiny_model, tmp_path), tmp_path).trainer.global_step == 2
    assert scalars(tmp_path)["train/skipped_updates"][0][1] == 1.0


def test_a_learning_rate_of_zero_is_no_fault(tiny_model: Path, tmp_path: Path) -> None:
    """A warm-up begins at 0."""
    warm_up = lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: min(step, 1))  # noqa: E731
    assert fit(grpo(tiny_model, scheduler=warm_up), prompts(tiny_model, tmp_path), tmp_path).trainer.global_step == 2


def test_an_optimizer_over_other_parameters(tiny_model: Path, tmp_path: Path) -> None:
    other = torch.nn.Linear(2, 2)
    module = grpo(tiny_model, optimizer=lambda params: torch.optim.SGD(other.parameters(), lr=0.1))
    stops(tiny_model, tmp_path, "no parameter is trainable: the optimizer would own nothing", module)


def test_a_policy_without_trainable_parameters(tiny_model: Path, tmp_path: Path) -> None:
    module = grpo(tiny_model)
    prepare = module.prepare_policy
    module.prepare_policy = lambda policy: prepare(policy.requires_grad_(False))  # type: ignore[method-assign]
    stops(tiny_model, tmp_path, "no parameter is trainable", module)


class Distorted(ReferenceEngine):
    """An engine with a fault."""

    def __init__(self, fault: str):
        super().__init__()
        self.fault = fault

    def generate(self, prompts: Sequence[Sequence[int]], sampling: SamplingParams, *rest: Any) -> list[Completion]:
        if self.fault == "temperature":
            return super().generate(prompts, replace(sampling, temperature=1.1), *rest)
        if self.fault == "prompt":
            return super().generate([p[1:] for p in prompts], sampling, *rest)
        out = super().generate(prompts, sampling, *rest)
        if self.fault == "shift":
            return [c._replace(log_probs=[*c.log_probs[1:], c.log_probs[0]]) for c in out]
        return [c._replace(log_probs=[float("nan"), *c.log_probs[1:]]) for c in out]


@pytest.mark.trap(7)
@pytest.mark.trap(8)
@pytest.mark.parametrize("fault", ["temperature", "prompt", "shift", "nan"])
def test_an_engine_that_samples_from_another_policy(tiny_model: Path, tmp_path: Path, fault: str) -> None:
    message = "the rollout engine's log-probabilities differ from the trainer's"
    stops(tiny_model, tmp_path, message, grpo(tiny_model, engine=Distorted(fault)))


def test_an_engine_left_behind_by_the_first_update(tiny_model: Path, tmp_path: Path) -> None:
    """The second iteration is looked at as well: stale weights show only then."""
    import copy

    class Stale(ReferenceEngine):
        def sync(self, policy: Any) -> None:
            if self.policy is None:
                super().sync(copy.deepcopy(policy))

    module = stops(tiny_model, tmp_path, "differ from the trainer's", grpo(tiny_model, engine=Stale(), lr=5.0))
    assert module.trainer.global_step == 2
    assert len(scalars(tmp_path)["train/reward"]) == 1


@pytest.mark.trap(11)
@pytest.mark.parametrize("lora", [False, True])
def test_a_reference_that_is_not_the_policy_at_the_start(tiny_model: Path, tmp_path: Path, lora: bool) -> None:
    module = grpo(tiny_model, objective=objective(kl=0.1), policy={"lora": LoraConfig(r=2)} if lora else None)
    start = module.on_fit_start

    def disturbed() -> None:
        start()
        with torch.no_grad():
            for _, p in module.built_policy().trainable():
                p.add_(0.05)
        module.built_policy().sync()

    module.on_fit_start = disturbed  # type: ignore[method-assign]
    stops(tiny_model, tmp_path, "the reference is configured to equal the policy at the start", module)


def test_a_reference_that_is_configured_to_differ_is_no_fault(tiny_model: Path, tmp_path: Path) -> None:
    from tiny import write_tiny_model

    from lit_posttrain.reference import ReferenceConfig

    other = write_tiny_model(tmp_path / "other", seed=5)
    module = grpo(tiny_model, objective=objective(kl=0.01), reference=ReferenceConfig(model=str(other)))
    fit(module, prompts(tiny_model, tmp_path), tmp_path)
    assert scalars(tmp_path)["train/kl"][0][1] > 0.01


def raising(completions: list[str], **_: Any) -> list[float]:
    raise ConnectionError("the scorer is gone")


def nan(completions: list[str], **_: Any) -> list[float]:
    return [float("nan")] * len(completions)


@pytest.mark.trap(19)
@pytest.mark.parametrize(("function", "reason"), [(raising, "ConnectionError"), (nan, "not_finite")])
def test_a_reward_that_only_fails(tiny_model: Path, tmp_path: Path, function: Any, reason: str) -> None:
    """Also beside one that works: it is named, with the reason, and nothing is updated."""
    moved: list[bool] = []
    module = grpo(tiny_model, [PythonReward(even), PythonReward(function, name="scorer")])
    module.optimize = lambda *a, **k: moved.append(True)  # type: ignore[method-assign]
    stops(tiny_model, tmp_path, f"reward function scorer gave only invalid verdicts .*{reason}", module)
    assert not moved


def test_a_reward_that_fails_late(tiny_model: Path, tmp_path: Path) -> None:
    calls = [0]

    def later(completion_ids: list[list[int]], **_: Any) -> list[float]:
        calls[0] += 1
        return even(completion_ids) if calls[0] <= 3 else nan([""] * len(completion_ids))

    module = stops(tiny_model, tmp_path, "later gave only invalid verdicts", grpo(tiny_model, later), max_steps=9)
    assert module.trainer.global_step == 3


def test_rewards_that_apply_to_nothing(tiny_model: Path, tmp_path: Path) -> None:
    module = grpo(tiny_model, lambda completions, **_: [None] * len(completions))
    stops(tiny_model, tmp_path, "no sample of this iteration has a reward", module)


def heard(model: Path, folder: Path, module: Any, **options: Any) -> str:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(folder, **options).fit(module, prompts(model, folder))
    return "\n".join(str(w.message) for w in caught)


def test_warnings_when_there_is_nothing_to_learn(tiny_model: Path, tmp_path: Path) -> None:
    """Only in the first iterations, and only where it is so."""
    constant = grpo(tiny_model, lambda completions, **_: [1.0] * len(completions))
    said = heard(tiny_model, tmp_path / "constant", constant)
    assert "no group has mixed rewards" in said
    assert "no completion ended by itself: all 8 were truncated at sampling.max_new_tokens" in said
    mixed = grpo(tiny_model, sampling=SamplingParams(max_new_tokens=6, stop_token_ids=list(range(0, 258, 3))))
    said = heard(tiny_model, tmp_path / "mixed", mixed)
    assert "mixed rewards" not in said
    assert "ended by itself" not in said
