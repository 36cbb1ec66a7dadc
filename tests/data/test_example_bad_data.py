"""What is wrong with a data set of examples: one sentence with the file, the line, the column, and what to do."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from lit_posttrain.data import (
    PointwiseLabels,
    Preferences,
    Source,
    StepwiseSupervision,
    SupervisedExamples,
    UnpairedPreferences,
)
from lit_posttrain.data.dialogue import Encoder

Jsonl = Callable[..., str]
SFT, DPO, KTO, PRM, SAFE = SupervisedExamples, Preferences, UnpairedPreferences, StepwiseSupervision, PointwiseLabels
GOOD = {
    SFT: {"prompt": "a", "completion": "b"},
    DPO: {"prompt": "a", "chosen": "g", "rejected": "b"},
    KTO: {"prompt": "a", "completion": "b", "label": True},
    PRM: {"prompt": "a", "completions": ["b", "c"], "labels": [True, False]},
    SAFE: {"prompt": "a", "completion": "b", "label": True},
}


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def bot(text: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


@pytest.fixture
def load(tokenizer_folder: str) -> Callable[..., Any]:
    def build(kind: type, stage: str = "fit", **arguments: Any) -> Any:
        defaults = {"batch_size": 2, "tokenizer": tokenizer_folder, "held_out_percent": 0, "val_size": 0}
        data = kind(**(defaults | arguments))
        data.setup(stage)
        return data

    return build


# Each is the second row of a file whose first is good: the class, what the row has in place of or besides the good
# columns (None: not at all), and the message after "rows.jsonl:2".
SAID = {"messages": [user("a"), bot("b")]}
RANKED = {"chosen": None, "rejected": None, "completions": ["g", "b"]}
ROWS: dict[str, tuple[type, dict[str, Any], str]] = {
    "misspelt": (
        SFT,
        {"prompt": None, "promt": "a"},
        r": column 'prompt' is missing \(did you mean 'promt'\?\); the columns are completion, promt. Rows hold "
        r"input_ids or messages or conversations or prompt\+completion or text; set data.init_args.column_map.prompt",
    ),
    "misspelt messages": (
        SFT,
        {"prompt": None, "completion": None, "mesages": []},
        r": column 'messages' is missing \(did you mean 'mesages'\?\)",
    ),
    "null": (DPO, {"rejected": "NULL"}, r": column 'rejected' is null"),
    "one side": (DPO, {"chosen": None}, r": column 'chosen' is missing; the columns are prompt, rejected"),
    "empty side": (DPO, {"chosen": ""}, r": column 'chosen' is empty; remove the row"),
    "blank side": (DPO, {"rejected": " \n"}, r": column 'rejected' is empty; remove the row"),
    "empty prompt": (SFT, {"prompt": ""}, r": column 'prompt' is empty"),
    "empty completion": (SFT, {"completion": ""}, r": column 'completion' is empty"),
    "empty text": (SFT, {"prompt": None, "completion": None, "text": ""}, r": column 'text' is empty"),
    "number": (SFT, {"completion": 5}, r": column 'completion' must be text, not int"),
    "list for text": (
        SFT,
        {"completion": ["b"]},
        r": column 'completion' is a list of messages, but .*column 'prompt' is text",
    ),
    "no list": (SFT, {"messages": "hi"}, r": column 'messages' must be a list, not str"),
    "empty list": (SFT, {"messages": []}, r": column 'messages' must be a list, not an empty one"),
    "no message": (
        SFT,
        {"messages": ["hi"]},
        r": column 'messages'\[0\] must be a message \{role: text, content: text\}, not hi",
    ),
    "no role": (
        SFT,
        {"messages": [{"rol": "user", "content": "a"}]},
        r": column 'messages'\[0\] has no role \(did you mean 'rol'\?\)",
    ),
    "no content": (
        SFT,
        {"messages": [{"role": "user", "contents": "a"}]},
        r": column 'messages'\[0\] has no content \(did you mean 'contents'\?\)",
    ),
    "unknown from": (
        SFT,
        {"conversations": [{"from": "humman", "value": "a"}]},
        r": column 'conversations'\[0\].from is 'humman' \(did you mean 'human'\?\)",
    ),
    "from a list": (
        SFT,
        {"conversations": [{"from": ["human"], "value": "a"}]},
        r": column 'conversations'\[0\].from is \['human'\] .*known are",
    ),
    "role of ShareGPT": (
        DPO,
        {"prompt": [{"role": "human", "content": "a"}], "chosen": [bot("g")], "rejected": [bot("b")]},
        r": column 'prompt'\[0\].role is 'human', which chat templates do not know; call it 'user'",
    ),
    "role in capitals": (
        SFT,
        {"messages": [user("a"), {"role": "Assistant", "content": "b"}]},
        r": column 'messages'\[1\].role is 'Assistant', .*call it 'assistant'",
    ),
    "system number": (SFT, {"messages": [{"role": "system", "content": 0}, user("a"), bot("b")]}, r": .*\[0\] must be"),
    "parts": (
        SFT,
        {"messages": [user([{"type": "text", "text": "a"}]), bot("b")]},
        r": column 'messages'\[0\].content is a list of parts, and only text",
    ),
    "content number": (SFT, {"messages": [user("a"), bot(7)]}, r": column 'messages'\[1\] must be a message"),
    "empty content": (SFT, {"messages": [user("a"), bot("")]}, r": column 'messages'\[1\].content is empty"),
    "empty question": (SFT, {"messages": [user(" "), bot("b")]}, r": column 'messages'\[0\].content is empty"),
    "pictures": (SFT, {"images": ["x.png"]}, r": column 'images' holds pictures"),
    "no assistant": (
        SFT,
        {"messages": [user("a")]},
        r": no message is the assistant's, so nothing would be trained on",
    ),
    "tools": (SFT, SAID | {"tools": "[{"}, r": column 'tools' is text, but not JSON"),
    "tools no list": (SFT, SAID | {"tools": {"a": 1}}, r": column 'tools' must be a list of JSON schemas"),
    "template arguments": (
        SFT,
        SAID | {"chat_template_kwargs": [1]},
        r": column 'chat_template_kwargs' must be a mapping, not list",
    ),
    "double argument": (
        SFT,
        SAID | {"chat_template_kwargs": {"tokenize": True}},
        r": the tokenizer's chat template refuses these messages",
    ),
    "foreign id": (
        SFT,
        {"input_ids": [1, 9999]},
        r": column 'input_ids'\[1\] is 9999, and the tokenizer's ids are 0 to \d+; was the data",
    ),
    "id no number": (SFT, {"input_ids": [1, True]}, r": column 'input_ids'\[1\] is True"),
    "labels length": (
        SFT,
        {"input_ids": [1, 2], "labels": [1]},
        r": column 'labels' has 1 items, but there are 2 input_ids",
    ),
    "labels shifted": (
        SFT,
        {"input_ids": [5, 6, 7], "labels": [6, 7, -100]},
        r": column 'labels'\[0\] is 6, neither -100 nor the token 5",
    ),
    "labels empty": (SFT, {"input_ids": [5, 6], "labels": [5, -100]}, r": no token of a sequence would be trained on"),
    "padding mask length": (
        SFT,
        {"input_ids": [5, 6], "attention_mask": [1]},
        r": column 'attention_mask' has 1 items, but there are 2 input_ids",
    ),
    "mask value": (
        SFT,
        {"input_ids": [5, 6], "completion_mask": [0, "yes"]},
        r": column 'completion_mask'\[1\] must be true or false",
    ),
    "all padding": (
        SFT,
        {"input_ids": [5, 6], "attention_mask": [0, 0]},
        r": no token of a sequence would be trained on",
    ),
    "lengths": (
        SFT,
        {"input_ids": [5, 6, 7], "seq_lengths": [2, 2]},
        r": column 'seq_lengths' adds up to 4, but there are 3 input_ids",
    ),
    "mixed kinds": (DPO, {"chosen": [bot("g")]}, r": columns 'chosen' and 'rejected' must both be text or both lists"),
    "nothing shared": (
        DPO,
        {"prompt": None, "chosen": "xyz", "rejected": "abc"},
        r": 'chosen' and 'rejected' share no beginning",
    ),
    "no message shared": (
        DPO,
        {"prompt": None, "chosen": [bot("g")], "rejected": [bot("b")]},
        r": 'chosen' and 'rejected' share no message to be the prompt",
    ),
    "only the system shared": (
        DPO,
        {
            "prompt": None,
            "chosen": [{"role": "system", "content": "s"}, user("a"), bot("g")],
            "rejected": [{"role": "system", "content": "s"}, user("e"), bot("b")],
        },
        r": 'chosen' and 'rejected' share no message to be the prompt \(a system message asks nothing\)",
    ),
    "other prompt": (
        DPO,
        {"prompt": "q", "chosen": [user("a"), bot("g")], "rejected": [user("a"), bot("b")]},
        r": column 'prompt' is none of the messages",
    ),
    "prompt number": (
        DPO,
        {"prompt": 5, "chosen": "Q g", "rejected": "Q b"},
        r": column 'prompt' must be text or a list of messages, not int; leave the column out",
    ),
    "prompt a message": (
        KTO,
        {"completion": None, "prompt": user("a"), "chosen": [user("a"), bot("g")], "rejected": [user("a"), bot("b")]},
        r": column 'prompt' must be text or a list of messages, not dict",
    ),
    "nothing of its own": (
        DPO,
        {"prompt": None, "chosen": [user("a"), bot("g")], "rejected": [user("a")]},
        r": column 'rejected' has no message of its own",
    ),
    "no first token": (
        DPO,
        {"prompt": None, "chosen": None, "rejected": None, "chosen_ids": [5, 6], "rejected_ids": [7, 6]},
        r": columns 'chosen_ids' and 'rejected_ids' share no first token",
    ),
    "score word": (
        DPO,
        RANKED | {"scores": [1, "high"]},
        r": column 'scores'\[1\] must be a finite number, not 'high'",
    ),
    "score infinite": (DPO, RANKED | {"scores": [1, "inf"]}, r": column 'scores'\[1\] must be a finite number"),
    "scores length": (DPO, RANKED | {"scores": [1]}, r": column 'scores' has 1 items, but there are 2 completions"),
    "scores misspelt": (DPO, RANKED | {"scors": [1, 2]}, r": column 'scores' is missing \(did you mean 'scors'\?\)"),
    "rank zero": (DPO, RANKED | {"ranks": [0, 1]}, r": column 'ranks'\[0\] must be 1 \(the best\), 2, ..., not 0"),
    "rank fraction": (DPO, RANKED | {"ranks": [1, 1.5]}, r": column 'ranks'\[1\] must be 1"),
    "empty completion of many": (
        DPO,
        {"chosen": None, "rejected": None, "completions": ["g", ""], "ranks": [1, 2]},
        r": column 'completions\[1\]' is empty",
    ),
    "margin": (DPO, {"margin": "wide"}, r": column 'margin' must be a finite number, not 'wide'"),
    "label word": (KTO, {"label": "good"}, r": column 'label' must be true or false \(or 1 or 0\), not 'good'"),
    "label two": (SAFE, {"label": 2}, r": column 'label' must be true or false"),
    "label missing": (SAFE, {"label": None, "lable": True}, r": column 'label' is missing \(did you mean 'lable'\?\)"),
    "steps length": (PRM, {"labels": [True]}, r": column 'labels' has 1 items, but there are 2 completions"),
    "step empty": (PRM, {"completions": ["b", " "]}, r": column 'completions'\[1\] is empty"),
    "step label": (PRM, {"labels": [True, None]}, r": column 'labels'\[1\] must be true or false"),
    "step no list": (PRM, {"completions": "b"}, r": column 'completions' must be a list, not str"),
}


@pytest.mark.parametrize(("kind", "change", "message"), ROWS.values(), ids=ROWS.keys())
def test_a_wrong_row(load: Any, jsonl: Jsonl, kind: type, change: dict[str, Any], message: str) -> None:
    row = {k: v for k, v in (GOOD[kind] | change).items() if v is not None}
    row = {k: None if v == "NULL" else v for k, v in row.items()}
    with pytest.raises(ValueError, match=r"^\S*rows.jsonl:2" + message):
        load(kind, dataset=jsonl([GOOD[kind], row]))


@pytest.mark.parametrize("kind", GOOD)
def test_lone_surrogates(load: Any, kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """JSON's are refused by the reader; other sources can bring them, too."""
    row = dict(GOOD[kind])
    name = next(n for n in ("completion", "chosen", "completions") if n in row)
    row[name] = ["\ud83d", "c"] if name == "completions" else "\ud83d"
    monkeypatch.setattr(kind, "load_examples", lambda self, split: [row])
    with pytest.raises(ValueError, match=rf"load_examples\('train'\)\[0\]: column '{name}' holds a lone surrogate"):
        load(kind, dataset="rows.jsonl")


def test_nan_in_parquet(load: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    columns = {"prompt": ["a"], "completions": [["g", "b"]], "scores": [[1.0, float("nan")]]}
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    with pytest.raises(ValueError, match=r"rows.parquet:1: column 'scores'\[1\] must be a finite number, not nan"):
        load(Preferences, dataset=str(path))


def test_parquets_nulls_in_messages_are_no_trouble(load: Any, tmp_path: Path) -> None:
    """Arrow gives every message the fields of all others, as nulls, and rows the columns of all others."""
    path = tmp_path / "rows.parquet"
    said = [user("a") | {"name": None}, bot("b") | {"name": "x"}]
    rows = [{"messages": said, "text": None}, {"messages": None, "text": "t"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert load(SupervisedExamples, dataset=str(path)).size("train") == 2


def test_a_byte_order_mark_and_malformed_lines(load: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD[SFT]).encode() + b"\n" + json.dumps(GOOD[SFT]).encode())
    assert load(SupervisedExamples, dataset=str(path)).size("train") == 2
    path.write_bytes(path.read_bytes() + b"\n{")
    with pytest.raises(ValueError, match=r"rows.jsonl:3: malformed JSON"):
        load(SupervisedExamples, dataset=str(path))


def test_csv(load: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('prompt,completion,label\na,b,true\n"two\nlines",c,0\n')
    assert [e.columns["label"] for e in load(PointwiseLabels, dataset=str(path)).examples("train")] == [[1.0], [0.0]]
    path.write_text("prompt,completion,label\na,b,true\nc,d,perhaps\n")
    with pytest.raises(ValueError, match=r"rows.csv:3: column 'label' must be true or false"):
        load(PointwiseLabels, dataset=str(path))


def test_a_conversation_that_the_assistant_begins(load: Any, make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.removeprefix("{{ bos_token }}")
    with pytest.raises(ValueError, match=r"^f:1: the conversation begins with the assistant.*supervise: last or all"):
        Encoder(tokenizer).dialogue([bot("a"), user("b"), bot("c")], "f:1")
    assert Encoder(tokenizer).dialogue([bot("a"), user("b"), bot("c")], "f:1", supervise="last").prompt


def test_no_chat_template(load: Any, make_tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"^f:1: the row holds messages, and the tokenizer '' has no chat template"):
        Encoder(make_tokenizer(chat=False)).dialogue([user("a"), bot("b")], "f:1")


SETTINGS = {
    "neither": (SFT, {"dataset": None}, r"^data.init_args.dataset, data.init_args.datasets: set exactly one"),
    "both": (SFT, {"datasets": [Source(path="x.jsonl")]}, r"^data.init_args.dataset, data.init_args.datasets"),
    "empty": (SFT, {"dataset": None, "datasets": []}, r"^data.init_args.dataset, data.init_args.datasets"),
    "column_map": (
        DPO,
        {"column_map": {"choosen": "x"}},
        r"^data.init_args.column_map.choosen: .*\(did you mean 'chosen'\?\)",
    ),
    "mapped": (
        DPO,
        {"column_map": {"prompt": "promt"}},
        r":1: no column 'promt' \(did you mean 'prompt'\?\).*column_map.prompt",
    ),
    "max_length": (SFT, {"max_length": 1}, r"^data.init_args.max_length: must be at least 2, got 1"),
    "train_size": (SFT, {"train_size": 0}, r"^data.init_args.train_size: must be at least 1, got 0"),
    "held out": (SFT, {"held_out_percent": 100}, r"^data.init_args.held_out_percent: must be 0 to 99, got 100"),
    "test size": (SFT, {"test_split_size": 5.0}, r"^data.init_args.test_split_size: must be a share in whole percents"),
    "test share": (SFT, {"test_split_size": 0.015}, r"^data.init_args.test_split_size"),
    "prompt length": (
        DPO,
        {"max_prompt_length": 9, "max_length": 9},
        r"^data.init_args.max_prompt_length: must be at least 1 and below",
    ),
    "truncate": (DPO, {"truncate_responses": True}, r"^data.init_args.truncate_responses: needs max_length"),
    "batch": (SFT, {"batch_size": 3}, r"^data.init_args.batch_size: 3 is more than the 2 training examples"),
    "all dropped": (SFT, {"max_length": 2}, r"^data.init_args: no training examples are left .*'long_examples': 2"),
    "none held out": (
        SFT,
        {"held_out_percent": 1, "val_size": None},
        r"^data.init_args.held_out_percent: nothing is held out",
    ),
    "nothing to validate": (SFT, {"stage": "validate"}, r"^data.init_args.held_out_percent: nothing is held out"),
    "val file": (SFT, {"val_split": "./val.jsonl"}, r"^data.init_args.val_split: there is no file ./val.jsonl"),
    "val split": (SFT, {"val_split": "test"}, r"^data.init_args.val_split: 'test', but .*rows.jsonl is a file"),
    "tokenizer": (SFT, {"tokenizer": None}, r"^data.init_args.tokenizer: not set"),
    "demonstrations": (DPO, {"demonstrations": "./d.jsonl"}, r"^data.init_args.demonstrations: there is no file"),
}


@pytest.mark.parametrize(("kind", "arguments", "message"), SETTINGS.values(), ids=SETTINGS.keys())
def test_a_wrong_setting(load: Any, jsonl: Jsonl, kind: type, arguments: dict[str, Any], message: str) -> None:
    path = jsonl([GOOD[kind], GOOD[kind]])
    with pytest.raises(ValueError, match=message):
        load(kind, **({"dataset": path} | arguments))


def test_train_size_of_a_mixture(load: Any, jsonl: Jsonl) -> None:
    sources = [Source(path=jsonl([GOOD[SFT]])), Source(path=jsonl([GOOD[SFT]]))]
    with pytest.raises(ValueError, match=r"^data.init_args.train_size: .*datasets\[...\].fraction"):
        load(SupervisedExamples, datasets=sources, train_size=3)
