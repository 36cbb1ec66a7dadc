"""``lit-posttrain inspect``: what it shows, what it counts, and its exit status when something is wrong."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from offline_runs import demonstration, pair, write
from tiny import CHAT_TEMPLATE, byte_tokenizer
from tiny_runs import write_questions

from lit_posttrain import cli

MODEL = "lit_posttrain.algorithms."
DATA = "lit_posttrain.data."


def experiment(folder: Path, algorithm: str, model: Path, data: str, **init_args: Any) -> Path:
    file = folder / "experiment.yaml"
    arguments = {"held_out_percent": 20, "batch_size": 2, **init_args}
    description = {
        "seed_everything": 1,
        "model": {"class_path": MODEL + algorithm, "init_args": {"policy": {"model": str(model)}}},
        "data": {"class_path": DATA + data, "init_args": arguments},
    }
    if algorithm == "GRPO":
        description["model"]["init_args"] |= {
            "objective": {
                "advantage": {"baseline": "group_mean", "scale": "none"},
                "ratio": {"level": "token", "clip_low": 0.2, "clip_high": 0.2},
                "kl": {"estimator": "k3", "placement": "loss", "coef": 0.0},
                "aggregation": "token_mean",
            },
            "rewards": [{"class_path": "lit_posttrain.rewards.MathVerifier"}],
            "sampling": {"max_new_tokens": 8},
            "group_size": 4,
        }
    file.write_text(yaml.safe_dump(description))
    return file


def run(*words: str) -> int:
    try:
        cli.main(["inspect", *words])
    except SystemExit as status:
        return int(status.code or 0)
    return 0


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_what_counts_in_the_loss_is_marked(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write(tmp_path / "rows.jsonl", demonstration, 20)
    file = experiment(tmp_path, "SFT", tiny_model, "SupervisedExamples", dataset=str(rows))
    assert run("--config", str(file), "--json", "found.json") == 0
    shown = capsys.readouterr().out
    first = demonstration(0)
    assert f"{first['prompt']}«{first['completion']}<|im_end|>»" in shown
    assert "tokens of a completion" in shown
    assert "nothing is wrong" in shown
    found = json.loads(Path("found.json").read_text())
    assert len(found["lengths"]["train"]["prompt"]) + len(found["lengths"]["val"]["prompt"]) == 20
    assert found["unended"] == {split: [0, found["summary"][split]["examples"]] for split in ("train", "val")}
    assert found["overlap"] == 0
    assert not any(Path().glob("logs*"))  # nothing was trained or logged


def test_pairs_show_both_completions(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = write(tmp_path / "rows.jsonl", pair, 20)
    file = experiment(tmp_path, "DPO", tiny_model, "Preferences", dataset=str(rows))
    assert run("--config", str(file), "--shown", "1") == 0
    shown = capsys.readouterr().out
    assert "completion 1 (preference 1)" in shown
    assert "completion 2 (preference 0)" in shown


def test_prompts_of_reinforcement_learning(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_questions(tmp_path / "questions.jsonl", 20)
    file = experiment(
        tmp_path, "GRPO", tiny_model, "VerifiablePrompts", dataset=str(rows), template={"kind": "chat"}, val_size=2
    )
    assert run("--config", str(file)) == 0
    assert "<|im_start|>user" in capsys.readouterr().out


def test_what_is_dropped_is_counted_by_reason_and_too_much_is_wrong(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write(tmp_path / "rows.jsonl", demonstration, 30)
    lengths = sorted(len(demonstration(i)["prompt"] + demonstration(i)["completion"]) + 1 for i in range(30))
    file = experiment(
        tmp_path, "SFT", tiny_model, "SupervisedExamples", dataset=str(rows), max_length=lengths[8], val_size=1
    )
    assert run("--config", str(file)) == 3
    out = capsys.readouterr()
    assert "more than half of the" in out.out + out.err
    assert "long" in out.out + out.err


@pytest.mark.parametrize("counted", ["special_tokens", "truncated_prompts"])
def test_what_is_counted_and_stays_is_not_left_out(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], counted: str
) -> None:
    """A share is shown of each, and nothing is wrong."""
    text = "<|im_start|>{}" if counted == "special_tokens" else "a long prompt {}"
    rows = write(tmp_path / "rows.jsonl", lambda i: pair(i) | {"prompt": text.format(i)}, 20)
    limit = {"max_prompt_length": 8} if counted == "truncated_prompts" else {}
    file = experiment(tmp_path, "DPO", tiny_model, "Preferences", dataset=str(rows), held_out_percent=0, **limit)
    assert run("--config", str(file)) == 0
    shown = capsys.readouterr().out
    assert "nothing is wrong" in shown
    assert re.search(counted.replace("_", " ") + r" +│ +20 \(100%\)", shown)


def test_both_sides_of_a_pair_that_is_taken_apart_are_counted(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ten of forty completions are too long, however many rows they stand in."""
    long = "x" * 30
    rows = write(
        tmp_path / "rows.jsonl",
        lambda i: {"prompt": f"p{i}", "chosen": long if i < 5 else "g", "rejected": long + "y" if i < 5 else "b"},
        20,
    )
    file = experiment(
        tmp_path, "KTO", tiny_model, "UnpairedPreferences", dataset=str(rows), held_out_percent=0, max_length=20
    )
    assert run("--config", str(file)) == 0
    assert re.search(r"long examples +│ +10 \(25%\)", capsys.readouterr().out)


def test_completions_without_an_end_token_are_wrong(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write(tmp_path / "rows.jsonl", demonstration, 20)
    file = experiment(
        tmp_path, "SFT", tiny_model, "SupervisedExamples",
        dataset=str(rows), max_length=13, long_examples="truncate",
    )  # fmt: skip
    assert run("--config", str(file)) == 3
    assert "never learn to stop" in capsys.readouterr().err


def test_examples_beyond_the_context_are_wrong(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write(tmp_path / "rows.jsonl", lambda i: {"prompt": f"{i} " * 300, "completion": "x"}, 20)
    file = experiment(tmp_path, "SFT", tiny_model, "SupervisedExamples", dataset=str(rows))
    assert run("--config", str(file)) == 3
    assert "and the model has 512" in capsys.readouterr().err


def test_the_same_example_again_is_a_duplicate_and_the_same_prompt_is_none(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for end, status in (("{}", 0), ("", 3)):
        rows = write(
            tmp_path / "rows.jsonl", lambda i, e=end: {"prompt": f"p{i % 2}", "completion": f"c{e}".format(i)}, 20
        )
        file = experiment(tmp_path, "SFT", tiny_model, "SupervisedExamples", dataset=str(rows), held_out_percent=0)
        assert run("--config", str(file)) == status
    assert "18 of 20 examples are duplicates" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("algorithm", "data", "row"),
    [
        ("KTO", "UnpairedPreferences", {"completion": "x", "label": True}),
        ("PointwiseRewardModel", "PointwiseLabels", {"completion": "x", "label": 0}),
        ("ProcessRewardModel", "StepwiseSupervision", {"completions": ["x", "y"], "labels": [True, True]}),
    ],
)
def test_labels_that_are_all_the_same_are_wrong(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], algorithm: str, data: str, row: dict[str, Any]
) -> None:
    rows = write(tmp_path / "rows.jsonl", lambda i: {"prompt": f"p{i}", **row}, 20)
    file = experiment(tmp_path, algorithm, tiny_model, data, dataset=str(rows), held_out_percent=0)
    assert run("--config", str(file)) == 3
    assert re.search(r"all (20|40) labels are [01], so nothing tells good from bad", capsys.readouterr().err)
    other = {name: False if name == "label" else [False, True] for name in row if name.startswith("label")}
    if row.get("label") == 0:
        other = {"label": 1}
    rows.write_text(rows.read_text() + json.dumps({"prompt": "q", **row, **other}) + "\n")
    assert run("--config", str(file)) == 0


def test_a_prompt_on_both_sides_is_noted(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = write(tmp_path / "rows.jsonl", pair, 20)
    held = write(tmp_path / "held.jsonl", lambda i: pair(i) | {"chosen": "other"}, 3)
    file = experiment(tmp_path, "DPO", tiny_model, "Preferences", dataset=str(rows), val_split=str(held))
    assert run("--config", str(file), "--json", "found.json") == 0
    found = json.loads(Path("found.json").read_text())
    assert (found["overlap"], found["asked"]) == (0, 3)
    assert "note: 3 training examples have a prompt that is also held out" in capsys.readouterr().out


def test_bad_rows_end_with_the_status_of_a_user_error(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"promt": "a", "completion": "b"}\n')
    file = experiment(tmp_path, "SFT", tiny_model, "SupervisedExamples", dataset=str(tmp_path / "rows.jsonl"))
    assert run("--config", str(file)) == 2
    message = capsys.readouterr().err
    assert "rows.jsonl:1" in message
    assert "did you mean" in message
    assert run() == 2
    assert run("--config", str(file), "--mdel.init_args.dropout=0.1") == 2


def test_control_characters_of_the_data_do_not_reach_the_terminal(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write(tmp_path / "rows.jsonl", lambda i: {"prompt": f"\x1b[2J{i}", "completion": "[bold]x[/bold]"}, 20)
    file = experiment(tmp_path, "SFT", tiny_model, "SupervisedExamples", dataset=str(rows))
    assert run("--config", str(file)) == 0
    shown = capsys.readouterr().out
    assert "\x1b[2J" not in shown
    assert "[bold]x[/bold]" in shown


def test_a_template_that_is_no_prefix_of_itself_is_refused(tmp_path: Path, tiny_model: Path, capsys: Any) -> None:
    folder = tmp_path / "tokenizer"
    template = CHAT_TEMPLATE.replace("{{ m['content'] }}", "{{ m['content'].split('</think>')[-1] }}")
    byte_tokenizer(template).save_pretrained(folder)
    rows = tmp_path / "rows.jsonl"
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "<think>why</think>a"}]
    rows.write_text((json.dumps({"messages": messages}) + "\n") * 20)
    file = experiment(tmp_path, "SFT", tiny_model, "SupervisedExamples", dataset=str(rows), held_out_percent=0)
    assert run("--config", str(file), f"--model.init_args.policy.tokenizer={folder}") == 2
    assert "leaves out" in capsys.readouterr().err
