"""Every YAML file that is shipped: it parses as a user's command, runs, and holds the values of its paper."""

import re
import shlex
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_runs import scalars, write_questions

from lit_posttrain import cli

CONFIGS = Path(__file__).parents[1] / "configs"
HARDWARE = sorted((CONFIGS / "hardware").glob("*.yaml"))
EXPERIMENTS = sorted(set(CONFIGS.rglob("*.yaml")) - set(HARDWARE))
ids = [str(p.relative_to(CONFIGS)) for p in EXPERIMENTS]

# The one set of overrides by which any experiment becomes a run of seconds: sizes, the tiny model and local data.
# Nothing of the algorithm is among them: objective, rewards, minibatches, reference, template and schedule stay.
SIZES = shlex.split("""
--trainer.accelerator=cpu --trainer.devices=1 --trainer.max_steps=2 --trainer.limit_val_batches=1
--trainer.val_check_interval=1 --trainer.logger.init_args.save_dir=logs
--model.init_args.policy.compute_dtype=float32 --model.init_args.sampling.max_new_tokens=4
--model.init_args.group_size=4 --model.init_args.token_budget=4096 --model.init_args.evaluation.samples=2
--data.init_args.batch_size=4 --data.init_args.val_batch_size=2
""")
LOCAL_DATA = {"dataset": "questions.jsonl", "subset": None, "val_split": None, "held_out_percent": 30, "val_size": 2}


def small(model: Path, experiment: dict[str, Any]) -> list[str]:
    words = [*SIZES, f"--model.init_args.policy.model={model}"]
    if "dataset" in experiment["data"]["init_args"]:
        words += [f"--data.init_args.{k}={'null' if v is None else v}" for k, v in LOCAL_DATA.items()]
    else:
        words += ["--data.init_args.train_size=8", "--data.init_args.val_size=2"]
    return words


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
        cli.main(["fit", "--config", str(path), "--print_config"])
    assert not done.value.code
    whole = yaml.safe_load(capsys.readouterr().out)
    assert_holds(whole, read(path), "")
    comments = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert path.read_text().startswith("# ")
    run = next(line for line in comments if line.startswith("# Run: lit-posttrain fit --config "))
    for named in re.findall(r"configs/\S+\.yaml", run):
        assert (CONFIGS.parent / named).is_file(), named
    assert str(path.relative_to(CONFIGS.parent)) in run


@pytest.mark.parametrize("path", EXPERIMENTS, ids=ids)
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
