"""PPO-ptx that is killed anywhere goes on bit for bit: critic, KL controller, average, text, learned reward."""

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from kills import At, Tick, bits, ignore, record, saved, start
from ppo_runs import ppo, ppo_objective
from test_grpo_resume import TickingEngine
from test_ptx import text
from tiny_runs import child, even, prompts

from lit_posttrain import callbacks
from lit_posttrain.algorithms.pretraining import PtxConfig
from lit_posttrain.critic import CriticConfig
from lit_posttrain.data import SupervisedExamples
from lit_posttrain.data.mixture import Source
from lit_posttrain.objective import KLConfig
from lit_posttrain.policy import PolicyConfig
from lit_posttrain.rewards import LearnedReward, PythonReward
from lit_posttrain.scalar_heads import ScoreNetwork

STEPS = 5
KINDS = ("own", "shared")
LOGGED = (
    *("loss", "reward", "grad_norm", "grad_norm/rl", "grad_norm/ptx", "grad_norm/critic", "loss/ptx", "loss/value_avg"),
    *("objective/kl", "objective/kl_coef", "objective/scores", "episode", "num_tokens", "learning_rate"),
)


@pytest.fixture(scope="module")
def reward_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("rm") / "model"
    os.environ["PL_GLOBAL_SEED"] = "1"
    ScoreNetwork(PolicyConfig(model=str(tiny_model), compute_dtype="float32")).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


def build(kind: str, model: Path, reward_model: Path, folder: Path, tick: Tick, **overrides: Any) -> Any:
    sources = [
        Source(path=text(folder / f"{name}.jsonl", [f"{name * 3}{i}" for i in range(30)]), weight=weight)
        for name, weight in (("a", 2.0), ("b", 1.0))
    ]
    adaptive = KLConfig(estimator="k1", placement="reward", coef=0.2, target=0.05, horizon=100.0)
    streamed = {"streaming": True, "shuffle_buffer": 4} if kind == "own" else {}
    words = {"batch_size": 8, "held_out_percent": 0, "val_size": 0, "supervise": "all", **streamed}
    arguments: dict[str, Any] = {
        "objective": replace(ppo_objective(), kl=adaptive),
        "critic": CriticConfig(shared=kind == "shared", warmup=1, lr=2e-2),
        "num_minibatches": 2,
        "num_epochs": 2,
        "ema_decay": 0.8,
        "ptx": PtxConfig(coef=0.5, ratio=1.0, data=SupervisedExamples(datasets=sources, **words)),
        "optimizer": lambda params: torch.optim.AdamW(params, lr=1e-2),
        "scheduler": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 0.8**step),
    }
    learned = LearnedReward(str(reward_model), calibration=4, compute_dtype="float32")
    rewards = [PythonReward(even, timeout=10.0), learned]
    module = ppo(model, rewards, engine=TickingEngine(tick), **{**arguments, **overrides})
    record(module, folder, tick)
    return module


def attempt(kind: str, model: Path, reward_model: Path, folder: Path, tick: Tick, **overrides: Any) -> None:
    """One start of the program."""
    start(
        lambda: (build(kind, model, reward_model, folder, tick, **overrides), prompts(model, folder)),
        folder,
        tick,
        STEPS,
    )


def outcome(folder: Path) -> Any:
    """The curves of all attempts, and everything that the last checkpoint holds."""
    step, state, digest = saved(folder)
    return bits(folder, LOGGED), {name.split(".")[0] for name in state["state_dict"]}, step, digest


@pytest.fixture(scope="module")
def undisturbed(tiny_model: Path, reward_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    outcomes = {}
    for kind in KINDS:
        folder = tmp_path_factory.mktemp(kind)
        os.environ["PL_GLOBAL_SEED"] = "1"
        assert child(lambda folder=folder, kind=kind: attempt(kind, tiny_model, reward_model, folder, ignore)) == 0
        outcomes[kind] = outcome(folder)
    return outcomes


def test_the_undisturbed_runs(undisturbed: dict[str, Any]) -> None:
    for kind, (curves, names, last, _) in undisturbed.items():
        assert last == STEPS
        assert names == ({"policy", "critic", "average"} if kind == "own" else {"policy", "average"})
        for tag in ("loss/ptx", "objective/kl_coef", "loss/value_avg"):
            assert len({v for _, v in curves[tag]}) >= STEPS - 1, tag
        assert [float.fromhex(v) for _, v in curves["episode"]] == [8.0, 16.0, 24.0, 32.0, 40.0]


POINTS = [
    *(("own", "token", 0), ("own", "token", 3), ("own", "update", 1), ("own", "update", 3), ("own", "last update", 2)),
    *(("own", "between", 4), ("own", "before save", 3), ("shared", "update", 2), ("shared", "between", 3)),
]


@pytest.mark.trap(43)
@pytest.mark.trap(28)
@pytest.mark.parametrize(("kind", "name", "step"), POINTS)
def test_killed_and_started_again(
    tiny_model: Path, reward_model: Path, tmp_path: Path, undisturbed: dict[str, Any], kind: str, name: str, step: int
) -> None:
    assert child(lambda: attempt(kind, tiny_model, reward_model, tmp_path, At(name, step))) == -signal.SIGKILL
    assert child(lambda: attempt(kind, tiny_model, reward_model, tmp_path, ignore)) == 0
    assert outcome(tmp_path) == undisturbed[kind]


def test_other_text_is_refused(tiny_model: Path, reward_model: Path, tmp_path: Path) -> None:
    stopped = child(lambda: attempt("shared", tiny_model, reward_model, tmp_path, At("between", 2, signal.SIGTERM)))
    assert stopped == callbacks.STOPPED
    other = PtxConfig(
        coef=0.5,
        ratio=1.0,
        data=SupervisedExamples(
            dataset=text(tmp_path / "other.jsonl"), batch_size=8, held_out_percent=0, val_size=0, supervise="all"
        ),
    )
    with pytest.raises(ValueError, match=r"model\.init_args\.ptx\.data"):
        attempt("shared", tiny_model, reward_model, tmp_path, ignore, ptx=other)
