import csv
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants
import pytest

from lit_posttrain.data import PythonTask, ReasoningGym, Template, VerifiablePrompts
from lit_posttrain.data.arithmetic import addition
from lit_posttrain.types import Prompt, PromptBatch

Jsonl = Callable[..., str]
Make = Callable[..., VerifiablePrompts]


def rows(n: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"prompt": f"What is {i} + 1?", "answer": str(i + 1), "level": i % 3} for i in range(start, start + n)]


def loaded(data: VerifiablePrompts, stage: str | None = "fit") -> VerifiablePrompts:
    data.setup(stage)
    return data


def questions(data: VerifiablePrompts, split: Any) -> list[str]:
    return [prompt.question for prompt in data.prompts(split)]


def test_a_row_becomes_a_prompt(make_data: Make, jsonl: Jsonl, tokenizer: Any) -> None:
    template = Template(kind="plain", instruction="{question} =", prefill=" <")
    data = loaded(make_data(dataset=jsonl(rows(8)), template=template, held_out_percent=0))
    text = "What is 2 + 1? ="
    assert data.prompts("train")[2] == Prompt(
        id=2,
        question="What is 2 + 1?",
        prompt=text,
        token_ids=[0, *tokenizer.encode(f"{text} <", add_special_tokens=False)],
        prefill=" <",
        answer="3",
        columns={"prompt": "What is 2 + 1?", "answer": "3", "level": 2},
    )
    assert type(data.prompts("train")[2].columns) is dict


def test_the_hash_splits(make_data: Make, jsonl: Jsonl) -> None:
    data = loaded(make_data(dataset=jsonl(rows(300)), held_out_percent=20))
    train, val = questions(data, "train"), questions(data, "val")
    assert sorted(train + val) == sorted(r["prompt"] for r in rows(300))
    assert val == [
        q["prompt"] for q in rows(300) if int(hashlib.sha256(q["prompt"].encode()).hexdigest(), 16) % 100 < 20
    ]
    again = loaded(make_data(dataset=jsonl(rows(300)[::-1]), held_out_percent=20))
    assert set(questions(again, "val")) == set(val)


def test_summary_counts_everything(make_data: Make, jsonl: Jsonl) -> None:
    data = [*rows(20), rows(1)[0], rows(1)[0] | {"answer": "2"}, {"prompt": "x" * 50, "answer": "1"}]
    data += [{"prompt": "a <s> tag", "answer": "1"}, {"prompt": "not a number", "answer": float("inf")}]
    path = jsonl(data[:-1])
    with open(path, "a") as file:
        file.write('{"prompt": "gold is a list", "answer": ["1"]}\n')
    made = loaded(
        make_data(dataset=path, held_out_percent=0, max_prompt_length=40, long_prompts="drop", bad_answers="drop")
    )
    made.check_answers(lambda answer: (_ for _ in ()).throw(ValueError("odd")) if answer == "7" else None)
    assert made.summary() == {
        "train": {
            "rows": 25,
            "bad_answers": 2,
            "duplicates": 2,
            "conflicting_answers": 1,
            "special_tokens": 1,
            "long_prompts": 1,
            "prompts": 20,
            "longest_prompt": 16,
        },
        "val": {"long_prompts": 0, "bad_answers": 0, "prompts": 0, "longest_prompt": 0},
    }
    assert "7" not in [p.answer for p in made.prompts("train")]


def test_a_long_prompt_is_cut_at_the_questions_end(make_data: Make, jsonl: Jsonl, tokenizer: Any) -> None:
    """What the template writes after the question stays, and a character is not torn."""
    path = jsonl([{"prompt": "abcdefgh" * 6, "answer": "1"}, {"prompt": "né" * 30, "answer": "2"}, *rows(1)])
    data = loaded(
        make_data(
            dataset=path, held_out_percent=0, max_prompt_length=20, long_prompts="cut", batch_size=1,
            template=Template(kind="plain", instruction="{question} =", prefill=""),
        )
    )  # fmt: skip
    first, second, short = data.prompts("train")
    lengths = [len(p.token_ids) for p in (first, second, short)]
    assert lengths[0] == 20
    assert 16 < lengths[1] <= 20
    assert isinstance(first.prompt, str)
    assert first.prompt.endswith(" =")
    assert ("abcdefgh" * 6).startswith(first.prompt.removesuffix(" ="))
    assert isinstance(second.prompt, str)
    assert ("né" * 30).startswith(second.prompt.removesuffix(" ="))
    assert short.prompt == "What is 0 + 1? ="
    assert [p.question for p in (first, second)] == ["abcdefgh" * 6, "né" * 30]
    assert data.summary()["train"]["cut_prompts"] == 2
    assert data.summary()["train"]["long_prompts"] == 0


def test_the_summary_is_printed_once(make_data: Make, jsonl: Jsonl, caplog: pytest.LogCaptureFixture) -> None:
    data = loaded(make_data(dataset=jsonl(rows(40))))
    with caplog.at_level("INFO"):
        for loader in (data.train_dataloader, data.val_dataloader, data.train_dataloader):
            loader()
    told = [r.getMessage() for r in caplog.records if "data: " in r.getMessage()]
    assert [line.split()[0] for line in told] == ["train", "val"]
    assert "rows 40" in told[0]


TRL = {"prompt": [{"role": "user", "content": "1+1?"}], "solution": "2"}
VERL = {"prompt": [{"role": "user", "content": "1+1?"}], "reward_model": {"ground_truth": "2"}, "data_source": "x"}
OPEN_INSTRUCT = {"messages": [{"role": "user", "content": "1+1?"}], "ground_truth": "2", "dataset": "x"}
GSM8K = {"question": "1+1?", "answer": "2"}


@pytest.mark.parametrize(
    ("row", "column_map"),
    [
        (TRL, {"answer": "solution"}),
        (VERL, {"answer": "reward_model.ground_truth"}),
        (OPEN_INSTRUCT, {"prompt": "messages", "answer": "ground_truth"}),
        (GSM8K, {}),
    ],
    ids=["TRL", "verl", "open-instruct", "question and answer"],
)
def test_the_peers_datasets(row: dict[str, Any], column_map: dict[str, str], make_data: Make, jsonl: Jsonl) -> None:
    data = make_data(
        dataset=jsonl([row]), column_map=column_map, template=Template(kind="chat"), batch_size=1, held_out_percent=0
    )
    (prompt,) = loaded(data).prompts("train")
    assert (prompt.question, prompt.answer, prompt.columns) == ("1+1?", "2", row)
    assert prompt.prompt == [{"role": "user", "content": "1+1?"}]


@pytest.mark.parametrize("kind", ["csv", "parquet", "saved"])
def test_every_source_gives_the_same_prompts(kind: str, make_data: Make, jsonl: Jsonl, tmp_path: Path) -> None:
    reference = loaded(make_data(dataset=jsonl(rows(60)))).prompts("val")
    path = tmp_path / f"rows.{kind}"
    if kind == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["prompt", "answer", "level"])
            writer.writeheader()
            writer.writerows(rows(60))
    elif kind == "parquet":
        datasets.Dataset.from_list(rows(60)).to_parquet(path)
    else:
        datasets.Dataset.from_list(rows(60)).save_to_disk(path)
    prompts = loaded(make_data(dataset=str(path))).prompts("val")
    assert [p._replace(columns={}) for p in prompts] == [p._replace(columns={}) for p in reference]


def test_a_second_file_as_held_out_set(make_data: Make, jsonl: Jsonl) -> None:
    train, val = jsonl(rows(12), "train.jsonl"), jsonl(rows(6, start=10), "val.jsonl")
    with pytest.raises(ValueError, match=r"val_split: 2 questions of .* at .*train.jsonl:11.*overlap: drop"):
        loaded(make_data(dataset=train, val_split=val))
    data = loaded(make_data(dataset=train, val_split=val, overlap="drop"))
    assert questions(data, "train") == [r["prompt"] for r in rows(10)]
    assert questions(data, "val") == [r["prompt"] for r in rows(6, start=10)]
    assert data.summary()["train"]["overlap"] == 2
    with pytest.raises(ValueError, match=r"data.init_args.val_split: 'test', but .* is a file"):
        loaded(make_data(dataset=train, val_split="test"))
    with pytest.raises(ValueError, match=r"data.init_args.val_split: there is no file nowhere.jsonl"):
        loaded(make_data(dataset=train, val_split="nowhere.jsonl"))


def test_a_second_split_as_held_out_set(make_data: Make, tmp_path: Path) -> None:
    parts = {"train": datasets.Dataset.from_list(rows(10)), "test": datasets.Dataset.from_list(rows(3, start=10))}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    data = loaded(make_data(dataset=str(tmp_path / "saved"), val_split="test"))
    assert (data.size("train"), data.size("val")) == (10, 3)


def test_sizes_cap_the_sets(make_data: Make, jsonl: Jsonl) -> None:
    everything = loaded(make_data(dataset=jsonl(rows(200))))
    data = loaded(make_data(dataset=jsonl(rows(200)), train_size=9, val_size=3))
    assert data.prompts("train") == everything.prompts("train")[:9]
    assert data.prompts("val") == everything.prompts("val")[:3]
    assert loaded(make_data(dataset=jsonl(rows(8)), val_size=0)).val_dataloader() == []


def test_a_python_task(make_data: Make) -> None:
    task = PythonTask(addition, seed=5, arguments={"digits": 1})
    data = loaded(make_data(task=task, train_size=40, val_size=5))
    assert (data.size("train"), data.size("val")) == (40, 5)
    assert not set(questions(data, "train")) & set(questions(data, "val"))
    assert data.summary()["train"]["duplicates"] > 0
    prompt = data.prompts("train")[3]
    assert (prompt.question, prompt.answer) == tuple(task.example(prompt.id).values())


def test_a_gym_task_keeps_what_its_scorer_needs(make_data: Make) -> None:
    pytest.importorskip("reasoning_gym")
    config = {"min_num_vertices": 4, "max_num_vertices": 4}
    data = make_data(task=ReasoningGym("graph_color", config=config), train_size=4, val_size=1, batch_size=2)
    prompt = loaded(data).prompts("train")[0]
    assert prompt.answer is None
    assert set(prompt.columns) == {"question", "answer", "metadata"}


class Own(VerifiablePrompts):
    def load_examples(self, split: Any) -> list[dict[str, Any]]:
        return [{"prompt": f"{split} {i}", "answer": str(i)} for i in range(5)]


def test_load_examples_is_the_override_point(tokenizer_folder: str) -> None:
    arguments: dict[str, Any] = {"template": Template(kind="plain"), "batch_size": 2, "tokenizer": tokenizer_folder}
    data = loaded(Own(**arguments, held_out_percent=0))
    assert questions(data, "train") == [f"train {i}" for i in range(5)]
    data = loaded(Own(**arguments, val_split="mine"))
    assert questions(data, "val") == [f"val {i}" for i in range(5)]
    with pytest.raises(
        ValueError, match=r"Own.load_examples\('train'\)\[0\]: no column 'x'; the columns are prompt, an"
    ):
        loaded(Own(**arguments, column_map={"prompt": "x"}))


def refuse_odd(answer: str | None) -> None:
    if answer is None or int(answer) % 2:
        raise ValueError(f"{answer} is odd")


def test_answers_that_the_rewards_refuse(make_data: Make, jsonl: Jsonl) -> None:
    data = loaded(make_data(dataset=jsonl(rows(10)), held_out_percent=0))
    with pytest.raises(ValueError, match=r"bad_answers: 5 of 10 gold answers .* at .*rows.jsonl:1: 1 is odd"):
        data.check_answers(refuse_odd)
    assert data.size("train") == 10
    data = loaded(make_data(dataset=jsonl(rows(10)), held_out_percent=0, bad_answers="drop"))
    data.check_answers(refuse_odd)
    assert [p.answer for p in data.prompts("train")] == ["2", "4", "6", "8", "10"]
    assert data.summary()["train"]["bad_answers"] == 5
    data = loaded(make_data(dataset=jsonl(rows(6)), held_out_percent=0, bad_answers="drop"))
    with pytest.raises(ValueError, match=r"batch_size: 4 is more than the 3 training examples"):
        data.check_answers(refuse_odd)


def test_without_an_answer_column_the_answers_are_none(make_data: Make, jsonl: Jsonl) -> None:
    path = jsonl([{"prompt": f"q{i}", "solution": "1"} for i in range(5)])
    data = loaded(make_data(dataset=path, held_out_percent=0))
    assert {p.answer for p in data.prompts("train")} == {None}
    with pytest.raises(ValueError, match=r"column_map.answer \(now 'answer'\) to the column that holds them"):
        data.check_answers(refuse_odd)


def test_prompts_must_leave_room(make_data: Make, jsonl: Jsonl) -> None:
    data = loaded(make_data(dataset=jsonl(rows(8) + rows(1, start=1000)), held_out_percent=0))
    data.check_fits(18 + 10, 10)
    with pytest.raises(
        ValueError, match=r"max_new_tokens: 11 .*\(18 tokens, .*rows.jsonl:9\) need 29 .* has 28; 1 of 9"
    ):
        data.check_fits(28, 11)
    with pytest.raises(ValueError, match=r"sampling.max_new_tokens: 0 new tokens after the longest"):
        data.check_fits(17, 0)


BAD_DATA = {
    "no such column": ({"dataset": [{"promt": "a"}]}, r"rows.jsonl:1: no column 'prompt' \(did you mean 'promt'\?\)"),
    "mapped to nothing": ({"column_map": {"answer": "anwser"}}, r":1: no column 'anwser' \(did you mean 'answer'\?\)"),
    "column missing in one row": ({"dataset": [*rows(2), {"prompt": "a"}]}, r"rows.jsonl:3: no column 'answer'"),
    "empty prompt": ({"dataset": [*rows(1), {"prompt": "", "answer": "1"}]}, ":2: column 'prompt' is empty"),
    "gold is no answer": (
        {"dataset": [{"prompt": "a", "answer": [1]}]},
        ":1: column 'answer' must be .*bad_answers: drop",
    ),
    "messages, plain": ({"dataset": [TRL]}, r"rows.jsonl:1: .* set data.init_args.template.kind: chat, not plain"),
    "too long": (
        {"max_prompt_length": 15, "dataset": rows(12)},
        "max_prompt_length: 2 prompts are longer than 15 tokens, the longest with 16 at .*:11.*long_prompts: drop",
    ),
    "messages, cut": (
        {"max_prompt_length": 3, "long_prompts": "cut", "dataset": [TRL], "template": Template(kind="chat")},
        r"rows.jsonl:1: the prompt is a conversation .*only a text can be cut; set data.init_args.long_prompts: drop",
    ),
    "all too long": ({"max_prompt_length": 3, "long_prompts": "drop"}, "no training prompts are left"),
    "empty file": ({"dataset": []}, r"data.init_args.dataset: .* is empty \(0 rows\)"),
    "batch too large": ({"batch_size": 50}, "batch_size: 50 is more than the 20 training examples"),
    "nothing held out": ({"held_out_percent": 1, "dataset": rows(5)}, "held_out_percent: no question is held out"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD_DATA.values(), ids=BAD_DATA.keys())
def test_bad_data_fails_in_setup(arguments: dict[str, Any], message: str, make_data: Make, jsonl: Jsonl) -> None:
    content = arguments.get("dataset", rows(20))
    data = make_data(**({"held_out_percent": 0} | arguments | {"dataset": jsonl(content)}))
    with pytest.raises(ValueError, match=message):
        data.setup("fit")


BAD_ARGUMENTS = {
    "no source": ({}, "data.init_args.dataset, data.init_args.task: set exactly one"),
    "two sources": ({"dataset": "a.jsonl", "task": PythonTask(addition)}, "set exactly one"),
    "unknown column": ({"dataset": "a.jsonl", "column_map": {"anwser": "x"}}, r"column_map.anwser: .*mean 'answer'"),
    "task without size": ({"task": PythonTask(addition), "train_size": 3}, "set train_size and val_size"),
    "task with split": (
        {"task": PythonTask(addition), "train_size": 3, "val_size": 1, "val_split": "x"},
        "val_split: a task has no splits",
    ),
    "task with nothing to hold out": (
        {"task": PythonTask(addition), "train_size": 3, "val_size": 1, "held_out_percent": 0},
        "val_size: held_out_percent is 0",
    ),
    "all held out": ({"dataset": "a.jsonl", "held_out_percent": 100}, "held_out_percent: must be 0 to 99, got 100"),
    "train_size": ({"dataset": "a.jsonl", "train_size": 0}, "train_size: must be at least 1, got 0"),
    "val_size": ({"dataset": "a.jsonl", "val_size": -1}, "val_size: must be at least 0, got -1"),
    "max_prompt_length": ({"dataset": "a.jsonl", "max_prompt_length": 0}, "max_prompt_length: must be at least 1"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS.keys())
def test_contradictions_fail_at_once(arguments: dict[str, Any], message: str, make_data: Make) -> None:
    with pytest.raises(ValueError, match=message):
        make_data(**arguments)


def test_nothing_is_read_before_setup(make_data: Make) -> None:
    make_data(dataset="nowhere.jsonl", tokenizer="nowhere")


def test_the_tokenizer_must_be_there(
    make_data: Make, jsonl: Jsonl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"data.init_args.tokenizer: not set"):
        loaded(make_data(dataset=jsonl(rows(8)), tokenizer=None))
    with pytest.raises(ValueError, match=r"model.init_args.policy.model \(or its tokenizer\): "):
        loaded(make_data(dataset=jsonl(rows(8)), tokenizer=str(tmp_path)))
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match=r"model.init_args.policy.model \(or its tokenizer\): "):
        loaded(make_data(dataset=jsonl(rows(8)), tokenizer="nobody/nothing"))


def test_evaluation_needs_held_out_questions_only(make_data: Make, jsonl: Jsonl) -> None:
    path = jsonl(rows(30))
    assert loaded(make_data(dataset=path, batch_size=1000, val_batch_size=2), "validate").size("val") > 0
    with pytest.raises(ValueError, match=r"no question is held out"):
        loaded(make_data(dataset=path, held_out_percent=0), "validate")


def test_batches_hold_prompts_and_their_global_positions(make_data: Make, jsonl: Jsonl) -> None:
    data = loaded(make_data(dataset=jsonl(rows(40))))
    batch = next(iter(data.train_dataloader()))
    assert isinstance(batch, PromptBatch)
    assert batch == data.batch(0)
    assert batch.positions == [0, 1, 2, 3]
    held_out = [p for b in data.val_dataloader() for p in b.prompts]
    assert held_out == data.prompts("val")


@pytest.mark.trap(20)
def test_every_prompt_of_an_epoch_is_another(make_data: Make, jsonl: Jsonl) -> None:
    data = loaded(make_data(dataset=jsonl(rows(30) + rows(30)), held_out_percent=0))
    ids = [p.id for b in data.train_dataloader() for p in b.prompts]
    assert len(ids) == len(set(ids)) == 28


def test_the_fingerprint_sees_text_answers_and_order(make_data: Make, jsonl: Jsonl) -> None:
    def fingerprint(content: list[dict[str, Any]], kind: Any = "plain") -> str:
        template = Template(kind=kind)
        return loaded(make_data(dataset=jsonl(content), held_out_percent=0, template=template)).fingerprint()

    base = rows(8)
    others = [base[::-1], base[:-1], [base[0] | {"answer": "x"}, *base[1:]], [base[0] | {"prompt": "x"}, *base[1:]]]
    found = {fingerprint(base), *map(fingerprint, others), fingerprint(base, "r1_zero")}
    assert len(found) == 6
    assert fingerprint(base) in found
