"""What a user gets wrong: one line that names the key, before anything is computed, and nothing is lost by it."""

import json
import shutil
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_runs import write_questions

from lit_posttrain import cli
from lit_posttrain.checkpoint import newest_checkpoint
from lit_posttrain.data.base import PostTrainDataModule
from lit_posttrain.rollout import NativeEngine

RUN = Path("logs/tiny/version_0")


def experiment(model: Path) -> dict[str, Any]:
    """A whole configuration over the tiny model and ``questions.jsonl``."""
    return {
        "seed_everything": 1,
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_steps": 1,
            "max_epochs": -1,
            "limit_val_batches": 0,
            "num_sanity_val_steps": 0,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "logger": {"class_path": "TensorBoardLogger", "init_args": {"save_dir": "logs", "name": "tiny"}},
            "callbacks": [{"class_path": "lit_posttrain.callbacks.CheckpointEvery", "init_args": {"iterations": 1}}],
        },
        "model": {
            "class_path": "lit_posttrain.algorithms.GRPO",
            "init_args": {
                "policy": {"model": str(model), "compute_dtype": "float32"},
                "objective": {
                    "advantage": {"baseline": "group_mean", "scale": "group_std"},
                    "ratio": {"level": "token", "clip_low": 0.2, "clip_high": 0.2},
                    "kl": {"estimator": "k3", "placement": "loss", "coef": 0.0},
                    "aggregation": "token_mean",
                },
                "rewards": [reward("tiny_runs.even")],
                "sampling": {"max_new_tokens": 4},
                "group_size": 4,
                "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.01}},
            },
        },
        "data": {
            "class_path": "lit_posttrain.data.VerifiablePrompts",
            "init_args": {
                "dataset": "questions.jsonl",
                "held_out_percent": 0,
                "val_size": 0,
                "batch_size": 2,
                "template": {"kind": "plain"},
            },
        },
    }


def reward(function: str) -> dict[str, Any]:
    return {"class_path": "lit_posttrain.rewards.PythonReward", "init_args": {"function": function, "timeout": 0.5}}


@pytest.fixture(scope="module")
def trained(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of one iteration, saved."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.chdir(folder)
        write_questions(Path("questions.jsonl"))
        Path("good.yaml").write_text(yaml.safe_dump(experiment(tiny_model)))
        cli.main(["fit", "--config", "good.yaml"])
    assert newest_checkpoint(folder / RUN) is not None
    return folder


class Case:
    """Runs changed configurations where a good run already is."""

    def __init__(self, capsys: pytest.CaptureFixture[str], generated: list[int], model: Path):
        self.capsys, self.generated, self.model = capsys, generated, model

    def refused(
        self, change: Callable[[dict[str, Any], dict[str, Any]], Any], *said: str, code: int = 2, computes: bool = False
    ) -> str:
        """The changed run goes on from the good one's checkpoint and ends in one line that says all of ``said``."""
        config = experiment(self.model)
        config["trainer"]["max_steps"] = 3
        change(config["model"]["init_args"], config["data"]["init_args"])
        Path("bad.yaml").write_text(yaml.safe_dump(config))
        self.capsys.readouterr()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(SystemExit) as stop:
                cli.main(["fit", "--config", "bad.yaml", "--ckpt_path", "last"])
        error = self.capsys.readouterr().err
        lines = [line for line in error.splitlines() if line.startswith("lit-posttrain: ")]
        assert lines, error
        assert "Traceback" not in error
        assert stop.value.code == code, lines
        for text in said:
            assert text in lines[-1]
        assert bool(self.generated) == computes
        found = newest_checkpoint(RUN, report=pytest.fail)
        assert found is not None
        assert found.step == 1
        return lines[-1]

    def goes_on(self) -> None:
        """The good configuration resumes from what is there."""
        config = experiment(self.model)
        config["trainer"]["max_steps"] = 2
        Path("good.yaml").write_text(yaml.safe_dump(config))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cli.main(["fit", "--config", "good.yaml", "--ckpt_path", "last"])
        found = newest_checkpoint(RUN, report=pytest.fail)
        assert found is not None
        assert found.step == 2


@pytest.fixture
def case(
    tiny_model: Path,
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Case:
    shutil.copytree(trained, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    generated: list[int] = []
    real = NativeEngine.generate

    def counting(self: Any, prompts: Sequence[Any], *rest: Any) -> Any:
        generated.append(len(prompts))
        return real(self, prompts, *rest)

    monkeypatch.setattr(NativeEngine, "generate", counting)
    return Case(capsys, generated, tiny_model)


# --- data -----------------------------------------------------------------------------------------------------------


def test_an_empty_dataset(case: Case) -> None:
    Path("empty.jsonl").write_text("\n")
    case.refused(lambda m, d: d.update(dataset="empty.jsonl"), "data.init_args.dataset", "empty (0 rows)")
    case.goes_on()


def test_a_dataset_that_is_not_there(case: Case) -> None:
    case.refused(lambda m, d: d.update(dataset="questoins.jsonl"), "data.init_args.dataset", "questoins.jsonl")


def test_a_missing_column(case: Case) -> None:
    Path("text.jsonl").write_text('{"text": "1+1", "answer": "2"}\n')
    case.refused(
        lambda m, d: d.update(dataset="text.jsonl"),
        "text.jsonl:1: no column 'prompt'", "the columns are text, answer", "data.init_args.column_map.prompt",
    )  # fmt: skip


def test_a_gold_answer_without_its_mark(case: Case) -> None:
    case.refused(lambda m, d: d.update(answer_after="####"), "questions.jsonl:1", "data.init_args.answer_after", "####")


def test_what_follows_the_mark_is_the_gold_answer(case: Case) -> None:
    from tiny_runs import prompts

    rows = [{"question": f"{i}?", "answer": f"{i} is #### no, ends in\n#### {i}"} for i in range(4)]
    Path("marked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = prompts(case.model, Path(), dataset="marked.jsonl", answer_after="####")
    data.setup()
    assert [p.answer for p in data.prompts("train")] == ["0", "1", "2", "3"]


def test_a_prompt_longer_than_the_context(case: Case) -> None:
    rows = [{"question": "why? " * n, "answer": "1"} for n in (1, 2, 200)]
    Path("long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    case.refused(
        lambda m, d: d.update(dataset="long.jsonl"),
        "the longest prompt (1000 tokens, long.jsonl:3)", "the model has 512", "data.init_args.max_prompt_length: 508",
    )  # fmt: skip


def test_a_limit_that_leaves_no_room(case: Case) -> None:
    case.refused(
        lambda m, d: m["sampling"].update(max_new_tokens=512),
        "model.init_args.sampling.max_new_tokens: 512", "12 of 12 prompts do not fit",
    )  # fmt: skip


def test_a_hub_that_cannot_be_reached(case: Case) -> None:
    case.refused(lambda m, d: d.update(dataset="nobody/nothing"), "data.init_args.dataset", "nobody/nothing")
    case.refused(
        lambda m, d: m["policy"].update(model="nobody/nothing"), "model.init_args.policy", "nobody/nothing", "the hub"
    )


# --- sizes ----------------------------------------------------------------------------------------------------------


def test_minibatches_that_do_not_divide(case: Case) -> None:
    case.refused(
        lambda m, d: m.update(num_minibatches=3),
        "model.init_args.num_minibatches: 3 does not divide batch_size * group_size = 2 * 4 = 8",
    )


def test_a_batch_size_that_ranks_do_not_divide(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PostTrainDataModule, "_ranks", lambda self: (0, 4))
    case.refused(lambda m, d: None, "data.init_args.batch_size: 2", "4 ranks do not divide it; set it to 4")


def test_a_batch_larger_than_the_data(case: Case) -> None:
    case.refused(lambda m, d: d.update(batch_size=13), "data.init_args.batch_size: 13", "12 training examples")


@pytest.mark.trap(21)
def test_a_group_of_one(case: Case) -> None:
    case.refused(lambda m, d: m.update(group_size=1), "model.init_args.group_size: 1", "at least 2")
    case.refused(lambda m, d: m.update(group_size=0), "model.init_args.group_size: 0")


@pytest.mark.parametrize(
    ("key", "value"),
    [("num_epochs", 0), ("token_budget", 0), ("max_grad_norm", -1.0), ("rewards", [])],
)
def test_values_out_of_range(case: Case, key: str, value: Any) -> None:
    case.refused(lambda m, d: m.update({key: value}), f"model.init_args.{key}")


def test_a_temperature_of_zero(case: Case) -> None:
    case.refused(lambda m, d: m["sampling"].update(temperature=0.0), "model.init_args.sampling.temperature: 0")


def test_a_reference_that_nothing_reads(case: Case) -> None:
    case.refused(lambda m, d: m.update(reference={"refresh_every": 2}), "model.init_args.reference.refresh_every")


# --- the model's folder ---------------------------------------------------------------------------------------------


def test_a_tokenizer_without_chat_template(case: Case) -> None:
    shutil.copytree(case.model, "base")
    for path in Path("base").glob("*template*"):
        path.unlink()
    settings = json.loads(Path("base/tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    Path("base/tokenizer_config.json").write_text(json.dumps(settings))

    def change(model: dict[str, Any], data: dict[str, Any]) -> None:
        model["policy"]["model"] = "base"
        data["template"] = {"kind": "chat"}

    case.refused(change, "data.init_args.template.kind: chat needs a chat template", "kind: plain")


def test_a_model_folder_without_weights(case: Case) -> None:
    shutil.copytree(case.model, "half", ignore=shutil.ignore_patterns("*.safetensors"))
    case.refused(lambda m, d: m["policy"].update(model="half"), "model.init_args.policy.model", "half holds no weights")
    case.goes_on()


def test_a_model_folder_with_half_its_weights(case: Case) -> None:
    """What an interrupted download or a full disk leaves."""
    shutil.copytree(case.model, "cut")
    weights = Path("cut/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:5000])
    case.refused(lambda m, d: m["policy"].update(model="cut"), "model.init_args.policy.model", "cut")


def test_a_folder_that_is_no_model(case: Case) -> None:
    Path("nothing").mkdir()
    case.refused(lambda m, d: m["policy"].update(model="nothing"), "model.init_args.policy", "nothing")


# --- rewards --------------------------------------------------------------------------------------------------------


def raising(completions: list[str], **_: Any) -> list[float]:
    raise KeyError("lost")


def hanging(completions: list[str], **_: Any) -> list[float]:
    threading.Event().wait(20)
    return [0.0] * len(completions)


def nan(completions: list[str], **_: Any) -> list[float]:
    return [float("nan")] * len(completions)


def one_too_few(completions: list[str], **_: Any) -> list[float]:
    return [0.0] * (len(completions) - 1)


def wants_a_column(completions: list[str], solution: list[str]) -> list[float]:
    return [0.0] * len(completions)


@pytest.mark.trap(19)
@pytest.mark.parametrize(
    ("function", "said"),
    [
        (raising, "reward function raising gave only invalid verdicts in this iteration ({'KeyError': 8})"),
        (hanging, "reward function hanging gave only invalid verdicts in this iteration ({'timeout': 8})"),
        (nan, "reward function nan gave only invalid verdicts in this iteration ({'not_finite': 8})"),
        (one_too_few, "reward function one_too_few returned 7 values for 8 samples"),
        (wants_a_column, "reward function wants_a_column needs solution, which is no column of the data"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_reward_that_breaks(case: Case, function: Any, said: str) -> None:
    path = f"{__name__}.{function.__name__}"
    case.refused(lambda m, d: m.update(rewards=[reward(path)]), said, code=3, computes=True)
    case.goes_on()


def test_a_reward_that_is_not_there(case: Case) -> None:
    case.refused(
        lambda m, d: m.update(rewards=[reward("tiny_runs.evne")]), "model.init_args.rewards[0].init_args.function"
    )
