"""PPO-ptx that is killed anywhere goes on bit for bit: critic, KL controller, average, text, learned reward."""

import itertools
import os
import shutil
import signal
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kills import At, Tick, bits, ignore, record, saved, start
from ppo_runs import ppo, ppo_objective
from test_grpo_resume import TickingEngine
from test_ptx import ptx, text
from tiny import write_tiny_model
from tiny_runs import child, curve, even, prompts, trainer

from lit_posttrain import callbacks
from lit_posttrain.algorithms import PPO
from lit_posttrain.algorithms.pretraining import PtxConfig
from lit_posttrain.callbacks import CheckpointEvery
from lit_posttrain.checkpoint import newest_checkpoint
from lit_posttrain.critic import CriticConfig
from lit_posttrain.data import SupervisedExamples
from lit_posttrain.data.mixture import Source
from lit_posttrain.objective import KLConfig
from lit_posttrain.policy import LoraConfig, PolicyConfig
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


# --- another YAML -----------------------------------------------------------------------------------------------------


def one_more(model: Path, folder: Path, **overrides: Any) -> PPO:
    """One iteration more than the newest checkpoint in the folder has, or the first one."""
    folder.mkdir(parents=True, exist_ok=True)
    found = newest_checkpoint(folder / "version_0")
    arguments = {name: make(folder) if callable(make) else make for name, make in overrides.items()}
    run = trainer(folder, CheckpointEvery(1), max_steps=found.step + 1 if found else 1)
    module = ppo(model, **arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run.fit(module, prompts(model, folder), ckpt_path=found and found.state)
    return module


LORA: Any = {"policy": {"lora": LoraConfig(r=2, alpha=4)}}
AVERAGE: Any = {"ema_decay": 0.9}
WITH_TEXT: Any = {"ptx": lambda folder: ptx(folder, coef=0.5)}
BIGGER: Any = {"critic": lambda folder: CriticConfig(model=str(write_tiny_model(folder / "bigger", hidden_size=48)))}
CHANGES = {
    "average added": ({}, AVERAGE, "ema_decay: .* with nothing here, and this one has a moving average"),
    "average removed": (AVERAGE, {}, "ema_decay: .* with a moving average here, and this one has nothing"),
    "average added with adapters": (LORA, {**LORA, **AVERAGE}, "ema_decay: "),
    "adapters removed": (LORA, {}, "policy.lora: .* with r 2, alpha 4, target_modules all-linear here, .* nothing"),
    "critic shared": ({}, {"critic": CriticConfig(shared=True)}, "critic.shared: .* a critic of its own .* a shared"),
    "critic of another size": ({}, BIGGER, "critic.model: .* LlamaForSequenceClassification with"),
    "critic of another size with adapters": (LORA, {**LORA, **BIGGER}, "critic.model: "),
    "text removed": (WITH_TEXT, {}, "ptx: .* text for num_epochs 1, num_minibatches 1 here, and this one has nothing"),
    "text for more epochs": (WITH_TEXT, {**WITH_TEXT, "num_epochs": 2}, "ptx: .* num_epochs 2, num_minibatches 1"),
}


@pytest.fixture(scope="module")
def begun(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[dict[str, Any]], Path]:
    """Folders of runs after their first iteration, one for each kind."""
    folders: dict[str, Path] = {}

    def begin(overrides: dict[str, Any]) -> Path:
        key = ", ".join(overrides)
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("begun")
            one_more(tiny_model, folders[key], **overrides)
        return folders[key]

    return begin


@pytest.mark.parametrize("change", CHANGES)
def test_a_run_that_is_made_otherwise_is_refused_in_one_line(
    tiny_model: Path, tmp_path: Path, begun: Callable[[dict[str, Any]], Path], change: str
) -> None:
    before, now, message = CHANGES[change]
    shutil.copytree(begun(before), tmp_path / "run")
    with pytest.raises(ValueError, match=rf"^model\.init_args\.{message}") as error:
        one_more(tiny_model, tmp_path / "run", **now)
    assert "\n" not in str(error.value)
    one_more(tiny_model, tmp_path / "run", **before)  # nothing was lost by the refusal


def test_a_fixed_coefficient_is_the_yamls(
    tiny_model: Path, tmp_path: Path, begun: Callable[[dict[str, Any]], Path]
) -> None:
    shutil.copytree(begun({}), tmp_path / "run")
    assert one_more(tiny_model, tmp_path / "run", objective=ppo_objective(kl=0.7)).kl_coef == 0.7
    assert curve(tmp_path / "run", "train/objective/kl_coef")[-1] == pytest.approx(0.7)


def test_episodes_a_second_are_this_processs(
    tiny_model: Path, tmp_path: Path, begun: Callable[[dict[str, Any]], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that goes on by a second whenever it is asked."""
    shutil.copytree(begun({}), tmp_path / "run")
    clock = itertools.count(100.0)
    monkeypatch.setattr("lit_posttrain.algorithms.ppo.time", SimpleNamespace(monotonic=lambda: next(clock)))
    module = one_more(tiny_model, tmp_path / "run")
    assert module.episodes == 16
    assert curve(tmp_path / "run", "train/eps")[-1] == 8.0
