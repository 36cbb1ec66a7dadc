"""PPO-ptx over two processes gives what one gives: same losses, same policy, critic and average (fp32)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ppo_runs import ppo, ppo_objective
from test_ptx import ptx
from tiny import write_tiny_model
from tiny_runs import Recorder, even, fit, prompts, trainer, write_questions
from two_processes import train_in_two

from lit_posttrain.callbacks import CheckpointEvery
from lit_posttrain.checkpoint import newest_checkpoint
from lit_posttrain.critic import CriticConfig
from lit_posttrain.objective import KLConfig
from lit_posttrain.policy import LoraConfig
from lit_posttrain.ppo_objective import GAEConfig
from lit_posttrain.sharding import ShardedStrategy, full_tensor

STEPS = 3


def train(kind: str, model: Path, out: Path, strategy: Any, devices: int) -> None:
    objective = ppo_objective(
        gae=GAEConfig(gamma=1.0, lam=0.95, whiten_advantages=True, whiten_rewards=True),
        kl=KLConfig(estimator="k1", placement="reward", coef=0.2, target=0.05, horizon=100.0),
    )
    # One update a rollout: the critic's values then come with it.
    updates = 1 if kind == "once" else 2
    module = ppo(
        model, even, lr=0.1, objective=objective, critic=CriticConfig(shared=kind == "shared", warmup=1),
        num_minibatches=updates, num_epochs=updates, ema_decay=0.8, ptx=ptx(out.parent, 0.5), token_budget=60,
        log_samples_every=0,
    )  # fmt: skip
    recorder, measured, measure = Recorder(module), [], module.measure
    module.measure = lambda *a: (measured.append(measure(*a)), measured[-1])[1]  # type: ignore[method-assign]
    fit(module, prompts(model, out.parent), out, devices=devices, strategy=strategy, max_steps=STEPS, logger=False,
        default_root_dir=str(out))  # fmt: skip
    weights = {n: full_tensor(p.detach()).clone() for n, p in module.named_parameters()}
    results = [(r.metrics, r.grad_norm) for r in recorder.results]
    measured = [{n: v for n, v in m.items() if n != "eps"} for m in measured]
    state = {
        "measured": measured,
        "weights": weights,
        "results": results,
        "kl_coef": module.kl_coef,
        "episodes": module.episodes,
    }
    torch.save(state, out / f"rank{module.trainer.global_rank}.pt")


@pytest.mark.trap(15)
@pytest.mark.trap(22)
@pytest.mark.trap(43)
@pytest.mark.parametrize(
    ("kind", "strategy"), [("own", "fsdp2"), ("once", "fsdp2"), ("shared", "fsdp2"), ("own", "ddp")]
)
def test_two_processes_train_as_one(tiny_model: Path, tmp_path: Path, kind: str, strategy: str) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    ptx(tmp_path)
    write_questions(tmp_path / "questions.jsonl")
    train(kind, tiny_model, one, "auto", 1)
    train_in_two(strategy, lambda over: train(kind, tiny_model, two, over, 2))
    single = torch.load(one / "rank0.pt", weights_only=True)
    for rank in range(2):
        got = torch.load(two / f"rank{rank}.pt", weights_only=True)
        assert got["kl_coef"] == pytest.approx(single["kl_coef"], rel=1e-6)
        assert got["episodes"] == single["episodes"]
        for one_by, two_by in zip(single["measured"], got["measured"], strict=True):
            assert two_by == pytest.approx(one_by, rel=2e-3, abs=2e-4)
        for (mine, norm), (theirs, other) in zip(single["results"], got["results"], strict=True):
            assert other == pytest.approx(norm, rel=1e-3)
            assert theirs.keys() == mine.keys()
            for name, value in mine.items():
                assert theirs[name] == pytest.approx(value, rel=2e-3, abs=2e-4), name
        assert got["weights"].keys() == single["weights"].keys()
        for name, weight in single["weights"].items():
            torch.testing.assert_close(got["weights"][name], weight, rtol=2e-5, atol=2e-5)


def begin_and_go_on(model: Path, out: Path, strategy: Callable[[], Any]) -> None:
    """An iteration with adapters whose average stays the policy; a larger critic from its checkpoint; and its own."""

    def run(steps: int, critic: CriticConfig, path: str | None = None) -> Any:
        module = ppo(
            model, even, policy={"lora": LoraConfig(r=2, alpha=4)}, ema_decay=0.8, critic=critic, log_samples_every=0
        )
        options = {"strategy": strategy(), "devices": 2, "default_root_dir": str(out), "max_steps": steps}
        trainer(out, CheckpointEvery(1), **options).fit(module, prompts(model, out), ckpt_path=path)
        return module

    first = run(1, CriticConfig(warmup=9))
    for mine, theirs in zip(first.average.parameters(), first.built_policy().parameters(), strict=True):
        assert torch.equal(full_tensor(mine.detach()), full_tensor(theirs.detach()))
    found = newest_checkpoint(out / "version_0")
    assert found is not None
    with pytest.raises(ValueError, match=r"^model\.init_args\.critic\.model: the checkpoint is of a run with Llama"):
        run(2, CriticConfig(model=str(out / "larger")), found.state)
    then = run(2, CriticConfig(warmup=9), found.state)
    for mine, theirs in zip(then.built_policy().parameters(), first.built_policy().parameters(), strict=True):
        assert torch.equal(full_tensor(mine.detach()), full_tensor(theirs.detach()))


def test_with_adapters_the_average_begins_at_the_policy_and_a_resume_at_the_checkpoint(
    tiny_model: Path, tmp_path: Path
) -> None:
    """Another critic is refused before the weights are filled, which would fail at the first that does not fit."""
    write_tiny_model(tmp_path / "larger", hidden_size=48)
    write_questions(tmp_path / "questions.jsonl")
    sharded = lambda: ShardedStrategy(process_group_backend="gloo", timeout_seconds=30.0)  # noqa: E731
    train_in_two("fsdp2", lambda _: begin_and_go_on(tiny_model, tmp_path, sharded))
