"""What is wrong with streamed rows or with the arguments: one sentence with the file and line, or the key."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from offline_runs import pair
from streams import LATE, asked, drawn, fake_trainer, mixed, texts

from lit_posttrain.data import Preferences, Source, SupervisedExamples, UnpairedPreferences
from lit_posttrain.data.sources import Row
from lit_posttrain.data.streaming import Stream, Window
from lit_posttrain.types import Example

Jsonl = Callable[..., str]


LATE_ROWS: dict[str, tuple[str, str]] = {
    "no JSON": ("{", r"rows.jsonl:41: malformed JSON"),
    "an empty completion": ('{"prompt": "a", "completion": ""}', r"rows.jsonl:41: column 'completion' is empty"),
    "no completion": ('{"prompt": "a", "comletion": "b"}', r"rows.jsonl:41: column 'completion' is missing"),
    "too long": (
        '{"prompt": "a", "completion": "0123456789012345678901234567890"}',
        r"^data.init_args.max_length: .*rows.jsonl:41 has 34 tokens, and the model has 20 positions",
    ),
}


@pytest.mark.parametrize(("line", "message"), LATE_ROWS.values(), ids=LATE_ROWS.keys())
def test_a_wrong_row_far_into_a_file_is_named(line: str, message: str, make: Any, jsonl: Jsonl) -> None:
    file = jsonl(asked(LATE))
    with Path(file).open("a") as opened:
        opened.write(line + "\n")
    data = make(dataset=file, shuffle_buffer=4)
    data.check_fits(20)
    drawn(data, 0, LATE // 4 - 1)  # all but the last window
    with pytest.raises(ValueError, match=message):
        drawn(data, LATE // 4 - 1, LATE // 4 + 1)


def test_a_late_csv_row_is_named(make: Any, tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("prompt,completion\n" + "a,b\n" * LATE + "a,b,c\n")
    data = make(dataset=str(file), shuffle_buffer=1)
    with pytest.raises(ValueError, match=r"rows.csv:42: 3 values for 2 columns"):
        drawn(data, 0, LATE)


def test_a_late_row_without_a_column_that_the_others_have_is_named(make: Any, jsonl: Jsonl) -> None:
    rows = [{**pair(i), "margin": 1.0} for i in range(LATE)] + [pair(5)]
    data = make(Preferences, dataset=jsonl(rows), shuffle_buffer=1)
    with pytest.raises(ValueError, match=r"rows.jsonl:41: there is no margin, but .*rows.jsonl:1 has one"):
        [data.batch(i) for i in range(LATE)]


def test_a_source_of_which_nothing_is_left_is_named_before_training(make: Any, paths: list[str], jsonl: Jsonl) -> None:
    long = jsonl([{"text": "x" * 50}] * 3, "long.jsonl")
    chosen = mixed([paths[0], long], 1000.0, 1.0)
    message = r"^data.init_args.datasets\[1\]: no training examples of .*long.jsonl are left \(.*'long_examples': \d+"
    with pytest.raises(ValueError, match=message):
        make(datasets=chosen, max_length=20)
    with pytest.raises(ValueError, match=r"^data.init_args.dataset: no training examples of .*long.jsonl are left"):
        make(dataset=long, max_length=20)
    with pytest.raises(ValueError, match=r"^data.init_args.datasets\[1\].path: .*empty.jsonl is empty"):
        make(datasets=mixed([paths[0], jsonl([], "empty.jsonl")], None, None))


def test_a_source_whose_beginning_is_left_out_is_trained_on(make: Any, paths: list[str], jsonl: Jsonl) -> None:
    late = jsonl([{"text": "x" * 50}] * LATE + texts("short", 2), "late.jsonl")
    data = make(dataset=late, max_length=20)
    assert set(drawn(data, 0, 3)) == {"short 0", "short 1"}
    both = make(datasets=mixed([paths[0], late], None, None), max_length=20)
    assert {e.origin.split("/")[-1].split(":")[0] for e in both.examples("train")} == {"a.jsonl", "late.jsonl"}


def test_a_stream_gives_up_after_a_whole_lap_without_an_example() -> None:
    looked: list[Row] = []
    left = Example([1], [[2]], [[True]], {}, "x")

    def encode(row: Row) -> list[Example]:
        looked.append(row)
        return [left] if len(looked) == 3 else []

    window = Window(0, 2, lambda: (Row({}, f"x:{i}", i) for i in range(5)))
    one = Stream([window], [1.0], 1, encode, lambda number: f"nothing of {number}")
    assert one.batch(0) == [left]
    with pytest.raises(ValueError, match=r"^nothing of 0"):
        one.batch(1)
    assert 5 <= len(looked) - 3 <= 10


def test_a_missing_file_is_named_before_the_others_are_read(make: Any, jsonl: Jsonl, tmp_path: Path) -> None:
    jsonl(texts("a", LATE), "one.jsonl")
    source = Source(path=str(tmp_path), data_files=["one.jsonl", "two.jsonl"])
    with pytest.raises(ValueError, match=r"^data.init_args.datasets\[0\].data_files: there is no file .*two.jsonl"):
        make(datasets=[source])


class Own(SupervisedExamples):
    def load_examples(self, split: Any) -> list[dict[str, Any]]:
        return texts("a", 9)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "fraction": ({"fraction": 0.5}, r"^data.init_args.datasets\[0\].fraction: is 0.5, .*streaming: false"),
    "own rows": ({"kind": Own, "datasets": None}, r"^data.init_args.streaming: load_examples is overridden"),
    "no window": ({"shuffle_buffer": 0}, r"^data.init_args.shuffle_buffer: must be at least 1, got 0"),
    "no number of held-out rows": (
        {"held_out_percent": 5, "val_size": None},
        r"^data.init_args.val_size: with streaming say how many",
    ),
    "nothing held out": (
        {"held_out_percent": 1, "val_size": 2, "datasets": "few"},
        r"^data.init_args.held_out_percent: nothing is held out",
    ),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_stream_is_refused(change: dict[str, Any], message: str, make: Any, paths: list[str]) -> None:
    given = {"datasets": [Source(path=paths[0], fraction=change.get("fraction", 1.0)), Source(path=paths[1])]}
    given |= {k: v for k, v in change.items() if k != "fraction"}
    if given["datasets"] == "few":
        given["datasets"] = [Source(path=paths[1])]
    with pytest.raises(ValueError, match=message):
        make(**given)


def test_several_datasets_have_a_train_size_only_while_streaming(make: Any, paths: list[str]) -> None:
    with pytest.raises(ValueError, match=r"^data.init_args.train_size: .*fraction"):
        make(datasets=mixed(paths, None, None, None), train_size=8, streaming=False)
    assert make(datasets=mixed(paths, None, None, None), train_size=8).size("train") == 8


def test_a_run_needs_an_end_and_evaluations_a_time(make: Any, paths: list[str]) -> None:
    data = make(dataset=paths[0], held_out_percent=20, val_size=2)
    with pytest.raises(ValueError, match=r"^data.init_args.streaming: a pass over all examples never ends"):
        data.setup("predict")
    data.trainer = fake_trainer(max_steps=-1)
    with pytest.raises(ValueError, match=r"^trainer.max_steps: data.init_args.streaming has no end"):
        data.setup("fit")
    data.setup("validate")
    data.trainer = fake_trainer()
    data.setup("fit")
    data.trainer.val_check_interval = 1.0
    with pytest.raises(ValueError, match=r"^trainer.val_check_interval: 1.0 is a share of an epoch"):
        data.setup("fit")
    data.train_size = 40
    data.setup("fit")


# --- resumes that would not be exact ----------------------------------------------------------------------------

CHANGES: dict[str, dict[str, Any]] = {
    "window": {"shuffle_buffer": 6},
    "share held out": {"held_out_percent": 21},
    "length": {"max_length": 15},
    "columns": {"column_map": {"label": "again"}},
    "option": {"prompt_truncation": "keep_start"},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_resume_on_other_rows_or_options_is_refused(change: dict[str, Any], make: Any, jsonl: Jsonl) -> None:
    kind: Any = Preferences if "prompt_truncation" in change else UnpairedPreferences
    row = {"completion": "y", "label": True, "again": True, "chosen": "a", "rejected": "b"}
    file = jsonl([{"prompt": f"{i}", **row} for i in range(30)])
    given = {"dataset": file, "shuffle_buffer": 5, "held_out_percent": 0, "max_length": 16}
    state = make(kind, **given).state_dict()
    make(kind, **given, val_batch_size=3, train_size=8).load_state_dict(state)
    with pytest.raises(ValueError, match="data: the training examples are not what the checkpoint was trained with"):
        make(kind, **{**given, **change}).load_state_dict(state)


def test_other_weights_or_files_refuse_a_resume_and_another_folder_does_not(
    make: Any, paths: list[str], tmp_path: Path
) -> None:
    state = make(datasets=mixed(paths, 1.0, 2.0, 1.0)).state_dict()
    moved = [str(shutil.copy(p, tmp_path / "..")) for p in paths]
    make(datasets=mixed(moved, 1.0, 2.0, 1.0)).load_state_dict(state)
    with pytest.raises(ValueError, match="not what the checkpoint"):
        make(datasets=mixed(paths, 1.0, 1.0, 1.0)).load_state_dict(state)
    with Path(paths[2]).open("a") as file:
        file.write('{"text": "one more"}\n')
    with pytest.raises(ValueError, match="not what the checkpoint"):
        make(datasets=mixed(paths, 1.0, 2.0, 1.0)).load_state_dict(state)
