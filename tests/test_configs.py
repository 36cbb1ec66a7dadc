"""Every YAML file that is shipped: it parses as a user's command, runs, and holds the values of its paper."""

import re
import shlex
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml
from offline_runs import demonstration, labelled, pair, ranking, write
from tiny_runs import scalars, write_questions

from lit_posttrain import cli

CONFIGS = Path(__file__).parents[1] / "configs"
HARDWARE = sorted((CONFIGS / "hardware").glob("*.yaml"))
EXPERIMENTS = sorted(set(CONFIGS.rglob("*.yaml")) - set(HARDWARE))
ids = [str(p.relative_to(CONFIGS)) for p in EXPERIMENTS]

# The one set of overrides by which any experiment becomes a run of seconds: sizes, the tiny model and local data.
# Nothing of the algorithm is among them: objective, rewards, minibatches, reference, template and schedule stay.
SIZES = shlex.split("""
--trainer.accelerator=cpu --trainer.devices=1 --trainer.limit_val_batches=1 --trainer.logger.init_args.save_dir=logs
--model.init_args.policy.compute_dtype=float32 --data.init_args.batch_size=4 --data.init_args.val_batch_size=2
""")
STEPS = shlex.split("""
--trainer.max_steps=2 --trainer.val_check_interval=1 --trainer.check_val_every_n_epoch=null
--model.init_args.token_budget=4096
""")
ONLINE = shlex.split("""
--model.init_args.sampling.max_new_tokens=4 --model.init_args.group_size=4 --model.init_args.evaluation.samples=2
""")
SHOWN = shlex.split("--model.init_args.generations.prompts=2 --model.init_args.generations.max_new_tokens=4")
FIXED_DATA = shlex.split("""
--data.init_args.dataset=rows.jsonl --data.init_args.held_out_percent=30 --data.init_args.column_map=null
""")
LOCAL_DATA = {"dataset": "questions.jsonl", "subset": None, "val_split": None, "held_out_percent": 30, "val_size": 2}


def small(model: Path, experiment: dict[str, Any]) -> list[str]:
    words = [*SIZES, f"--model.init_args.policy.model={model}"]
    algorithm = algorithm_of(experiment)
    if algorithm == "WinRate":
        return [*words, *SHOWN, *FIXED_DATA, f"--model.init_args.opponent.model={model}"]
    words += STEPS
    if algorithm != "GRPO":
        return [*words, *FIXED_DATA, *(SHOWN if algorithm in ("SFT", "DPO", "KTO") else [])]
    words += ONLINE
    if "dataset" in experiment["data"]["init_args"]:
        words += [f"--data.init_args.{k}={'null' if v is None else v}" for k, v in LOCAL_DATA.items()]
    else:
        words += ["--data.init_args.train_size=8", "--data.init_args.val_size=2"]
    return words


def algorithm_of(experiment: dict[str, Any]) -> str:
    return experiment["model"]["class_path"].rpartition(".")[2]


def command_of(path: Path) -> str:
    return "validate" if algorithm_of(read(path)) == "WinRate" else "fit"


def read(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


def arguments(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    experiment = read(path)
    return experiment["model"]["init_args"], experiment["data"]["init_args"]


def assert_holds(whole: Any, given: Any, key: str) -> None:
    """What was parsed is what was written: no value is dropped or read as another."""
    if isinstance(given, dict):
        for name, value in given.items():
            assert name in whole, f"{key}.{name}"
            assert_holds(whole[name], value, f"{key}.{name}")
    elif isinstance(given, list):
        for i, (mine, value) in enumerate(zip(whole, given, strict=True)):
            assert_holds(mine, value, f"{key}[{i}]")
    else:
        assert whole == given, key


def test_there_are_experiments() -> None:
    assert {"grpo/deepseekmath.yaml", "grpo/dr_grpo.yaml", "grpo/gsm8k.yaml", "r1_zero/r1_zero.yaml"} <= set(ids)
    assert {p.name for p in HARDWARE} >= {"cpu.yaml", "gpu1.yaml", "fsdp8.yaml"}


@pytest.mark.parametrize("path", EXPERIMENTS, ids=ids)
def test_an_experiment_parses_alone_and_says_how_to_run_it(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        cli.main([command_of(path), "--config", str(path), "--print_config"])
    assert not done.value.code
    whole = yaml.safe_load(capsys.readouterr().out)
    assert_holds(whole, read(path), "")
    comments = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert path.read_text().startswith("# ")
    run = next(line for line in comments if line.startswith(f"# Run: lit-posttrain {command_of(path)} --config "))
    for named in re.findall(r"configs/\S+\.yaml", run):
        assert (CONFIGS.parent / named).is_file(), named
    assert str(path.relative_to(CONFIGS.parent)) in run


ROWS = {"SupervisedExamples": demonstration, "Preferences": ranking, "UnpairedPreferences": labelled}
OFFLINE = [p for p in EXPERIMENTS if algorithm_of(read(p)) != "GRPO"]


@pytest.mark.parametrize("path", OFFLINE, ids=[str(p.relative_to(CONFIGS)) for p in OFFLINE])
def test_an_experiment_on_fixed_examples_runs_two_steps_on_the_tiny_model(
    path: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = read(path)
    monkeypatch.chdir(tmp_path)
    row = ROWS[given["data"]["class_path"].rpartition(".")[2]]
    write(Path("rows.jsonl"), pair if algorithm_of(given) in ("DPO", "WinRate") else row, 24)
    Path("experiment.yaml").write_text(path.read_text())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cli.main([command_of(path), "--config", "experiment.yaml", *small(tiny_model, given)])
    (run,) = Path("logs").glob("*/version_0")
    curves = scalars(run.parent)
    if algorithm_of(given) == "WinRate":
        assert curves["eval/win_rate"] == [(0, 0.5)]  # the same policy, twice
        return
    assert [step for step, _ in curves["train/loss"]] == [1, 2]
    assert [step for step, _ in curves["eval/loss"]] == [1, 2]
    assert (run / "checkpoints" / "step-2").is_dir()
    assert (run / "config.yaml").is_file()


RL = [p for p in EXPERIMENTS if algorithm_of(read(p)) == "GRPO"]


@pytest.mark.parametrize("path", RL, ids=[str(p.relative_to(CONFIGS)) for p in RL])
def test_an_experiment_runs_two_iterations_on_the_tiny_model(
    path: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = read(path)
    text = path.read_text()
    monkeypatch.chdir(tmp_path)
    columns = given["data"]["init_args"].get("column_map") or {}
    after = given["data"]["init_args"].get("answer_after")
    rows = write_questions(Path("questions.jsonl"), 20).read_text()
    rows = rows.replace('"question"', f'"{columns.get("prompt", "question")}"')
    Path("questions.jsonl").write_text(re.sub(r'("answer": ")', rf"\1because {after} ", rows) if after else rows)
    Path("experiment.yaml").write_text(text)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cli.main(["fit", "--config", "experiment.yaml", *small(tiny_model, given)])
    (run,) = Path("logs").glob("*/version_0")
    curves = scalars(run.parent)
    assert [step for step, _ in curves["train/reward"]] == [1, 2]
    assert [step for step, _ in curves["eval/pass@1"]] == [1, 2]
    assert (run / "checkpoints" / "step-2").is_dir()
    assert (run / "config.yaml").is_file()


@pytest.mark.parametrize("path", HARDWARE, ids=lambda p: p.name)
def test_a_hardware_file_says_nothing_about_the_experiment(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = read(path)
    assert set(given) <= {"trainer", "model"}
    assert set(given["trainer"]) <= {"accelerator", "devices", "strategy"}
    assert given.get("model", {"init_args": {"policy": {}}}).keys() == {"init_args"}
    policy = given.get("model", {"init_args": {"policy": {}}})["init_args"]
    assert set(policy) == {"policy"}
    assert set(policy["policy"]) <= {"compute_dtype"}
    with pytest.raises(SystemExit) as done:
        cli.main(["fit", "--config", str(CONFIGS / "grpo/gsm8k.yaml"), "--config", str(path), "--print_config"])
    assert not done.value.code
    whole = yaml.safe_load(capsys.readouterr().out)
    assert whole["trainer"]["devices"] == given["trainer"]["devices"]


# --- the papers' numbers --------------------------------------------------------------------------------------------


def test_deepseekmath() -> None:
    """2402.03300 section 4.2."""
    model, data = arguments(CONFIGS / "grpo/deepseekmath.yaml")
    assert (model["group_size"], data["batch_size"]) == (64, 16)  # 1024 outputs
    assert model["optimizer"]["init_args"]["lr"] == 1e-6
    assert "scheduler" not in model
    assert model["objective"]["kl"] == {"estimator": "k3", "placement": "loss", "coef": 0.04}
    assert model["objective"]["advantage"] == {"baseline": "group_mean", "scale": "group_std"}
    assert model["objective"]["aggregation"] == "sequence_mean"
    assert model["objective"]["ratio"]["level"] == "token"
    assert model["sampling"]["max_new_tokens"] == 1024
    assert (model["num_epochs"], model["num_minibatches"]) == (1, 1)


def test_dr_grpo() -> None:
    """2503.20783 Table 6."""
    model, data = arguments(CONFIGS / "grpo/dr_grpo.yaml")
    assert (model["group_size"], data["batch_size"]) == (8, 128)
    assert model["objective"]["advantage"] == {"baseline": "group_mean", "scale": "none"}
    assert model["objective"]["aggregation"] == "constant"
    assert model["objective"]["constant_length"] == model["sampling"]["max_new_tokens"] == 3000
    assert model["objective"]["kl"]["coef"] == 0
    assert model["objective"]["ratio"] == {"level": "token", "clip_low": 0.2, "clip_high": 0.2}
    assert model["optimizer"]["init_args"] == {"lr": 1e-6, "betas": [0.9, 0.95], "weight_decay": 0.0, "fused": True}
    assert "scheduler" not in model
    assert model["max_grad_norm"] == 1.0
    assert (model["num_epochs"], model["sampling"]["temperature"]) == (1, 1.0)


def test_instructgpt() -> None:
    """2203.02155 sections 3.5, C.1 and C.2."""
    model, data = arguments(CONFIGS / "sft/instructgpt.yaml")
    assert read(CONFIGS / "sft/instructgpt.yaml")["trainer"]["max_epochs"] == 16
    assert (model["dropout"], data["batch_size"]) == (0.2, 32)
    assert model["optimizer"]["init_args"] == {"lr": 9.65e-6, "betas": [0.9, 0.95], "weight_decay": 0.0}
    assert model["scheduler"]["init_args"] == {"decay": "cosine", "final_ratio": 0.1}
    model, data = arguments(CONFIGS / "reward_model/instructgpt.yaml")
    assert read(CONFIGS / "reward_model/instructgpt.yaml")["trainer"]["max_epochs"] == 1
    assert (model["optimizer"]["init_args"]["lr"], data["batch_size"], model["normalise"]) == (9e-6, 64, True)
    assert model["scheduler"]["init_args"] == {"decay": "cosine", "final_ratio": 0.1}


def test_dpo() -> None:
    """2305.18290 appendix B and its released code."""
    model, data = arguments(CONFIGS / "dpo/dpo.yaml")
    assert (model["options"]["beta"], data["batch_size"], model["max_grad_norm"]) == (0.1, 64, 10.0)
    assert model["optimizer"] == {"class_path": "torch.optim.RMSprop", "init_args": {"lr": 1e-6}}
    assert model["scheduler"]["init_args"] == {"decay": "constant", "warmup_steps": 150}
    assert (data["max_length"], data["max_prompt_length"], data["prompt_truncation"]) == (512, 256, "keep_end")


def test_r1_supervised_stages() -> None:
    """2501.12948 appendices B.4.2 and B.4.3."""
    for name, epochs, rate in (("r1_cold_start", 2, 5e-6), ("r1_distill", 3, 1e-4)):
        model, data = arguments(CONFIGS / f"sft/{name}.yaml")
        assert read(CONFIGS / f"sft/{name}.yaml")["trainer"]["max_epochs"] == epochs
        assert (model["optimizer"]["init_args"]["lr"], data["batch_size"], data["max_length"]) == (rate, 64, 32768)
        assert model["scheduler"]["init_args"] == {"decay": "cosine", "final_ratio": 0.1}


def test_r1_zero() -> None:
    """2501.12948 sections 2.1 and 2.2, clip width of 3.2.1."""
    model, data = arguments(CONFIGS / "r1_zero/r1_zero.yaml")
    outputs = model["group_size"] * data["batch_size"]
    assert (model["group_size"], outputs, model["num_minibatches"]) == (16, 8192, 16)
    assert outputs // model["num_minibatches"] == 512  # outputs of a step: 32 questions
    assert model["num_epochs"] == 1
    assert model["optimizer"]["init_args"]["lr"] == 3e-6
    assert model["objective"]["kl"] == {"estimator": "k3", "placement": "loss", "coef": 0.001}
    assert model["objective"]["ratio"]["clip_high"] == 10
    assert model["sampling"] == {"temperature": 1.0, "max_new_tokens": 32768}
    assert model["reference"]["refresh_every"] * model["num_minibatches"] == 400
    assert read(CONFIGS / "r1_zero/r1_zero.yaml")["trainer"]["max_steps"] * model["num_minibatches"] == 10_400
    assert data["template"] == {"kind": "r1_zero"}
    weights = {r["class_path"].rpartition(".")[2]: r["init_args"]["weight"] for r in model["rewards"]}
    assert weights == {"MathVerifier": 1.0, "ThinkFormat": 1.0}
