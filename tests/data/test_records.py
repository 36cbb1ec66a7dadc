from collections import Counter
from decimal import Decimal
from typing import Any

import pytest

from lit_posttrain.data.records import UnusableAnswer, column, held_out, record, without_duplicates, without_overlap
from lit_posttrain.data.sources import Row


def row(**columns: Any) -> Row:
    return Row(columns, "rows.jsonl:7", 6)


def test_nested_columns() -> None:
    nested = row(reward_model={"ground_truth": "025"}, messages=[{"content": "q"}], **{"a.b": 1})
    assert column(nested, "reward_model.ground_truth", "answer") == "025"
    assert column(nested, "messages.0.content", "prompt") == "q"
    assert column(nested, "a.b", "prompt") == 1


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("promt", r"rows.jsonl:7: no column 'promt' \(did you mean 'prompt'\?\); the columns are prompt, reward_model"),
        (
            "reward_model.ground_trut",
            r"mean 'ground_truth'\?\); the columns in 'reward_model' are ground_truth",
        ),
        ("prompt.x", "no column 'prompt.x'"),
        ("solution", "Set data.init_args.column_map.answer to the one that holds the answer"),
    ],
)
def test_missing_columns(path: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        column(row(prompt="q", reward_model={"ground_truth": "1"}), path, "answer")


@pytest.mark.parametrize(
    ("gold", "text"),
    [
        ("025", "025"),
        (25, "25"),
        (123456789012345678901234567890, "123456789012345678901234567890"),
        (0.5, "0.5"),
        (Decimal("1.50"), "1.50"),
        (None, None),
        ("", ""),
        (" 7 ", " 7 "),
    ],
)
def test_gold_is_text(gold: Any, text: str | None) -> None:
    assert record(row(prompt="q", answer=gold), "prompt", "answer").answer == text


@pytest.mark.parametrize("gold", [True, float("nan"), float("-inf"), ["1"], {"a": 1}, Decimal("NaN")])
def test_gold_that_is_no_answer(gold: Any) -> None:
    with pytest.raises(UnusableAnswer, match=r"rows.jsonl:7: column 'answer'"):
        record(row(prompt="q", answer=gold), "prompt", "answer")


def test_gold_after_a_marker() -> None:
    worked = row(prompt="q", answer="3 #### no, 2 + 2 = 4\n#### 1,000 \n")
    assert record(worked, "prompt", "answer", "####").answer == "1,000"


@pytest.mark.parametrize("gold", ["4", "4 ####", "4 #### \n", None])
def test_gold_without_its_marker(gold: str | None) -> None:
    with pytest.raises(UnusableAnswer, match=r"rows.jsonl:7: no answer after '####' \(data.init_args.answer_after\)"):
        record(row(prompt="q", answer=gold), "prompt", "answer", "####")


@pytest.mark.parametrize("text", ["half \ud83d"])
def test_lone_surrogates(text: str) -> None:
    for columns in ({"prompt": text}, {"prompt": [{"role": "user", "content": text}]}, {"prompt": "q", "answer": text}):
        with pytest.raises(ValueError, match=r"rows.jsonl:7: .* lone surrogate"):
            record(row(**{"answer": "1"} | columns), "prompt", "answer")


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "column 'prompt' is empty"),
        (" \n", "column 'prompt' is empty"),
        (None, "must be text or a list of messages, not null"),
        (3, "must be text or a list of messages, not int"),
        ([], "must be text or a list of messages, not an empty list"),
        (["q"], r"column 'prompt'\[0\] must be a message"),
        ([{"role": "user", "content": [{"type": "image"}]}], r"column 'prompt'\[0\] must be a message"),
        ([{"role": "user", "content": "q", "tool_calls": "x"}], r"column 'prompt'\[0\] must be a message"),
        ([{"role": "user", "content": " "}], r"column 'prompt'\[0\].content is empty"),
    ],
)
def test_prompts_that_are_none(prompt: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"rows.jsonl:7: .*{message}"):
        record(row(prompt=prompt), "prompt", None)


def test_the_question_of_messages() -> None:
    user, other = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    single = record(row(prompt=[{**user, "name": None}]), "prompt", None)
    assert (single.question, single.prompt) == ("q", [user])
    several = record(row(prompt=[user, other, {"role": "user", "content": "yes"}]), "prompt", None)
    assert several.question == "user: q\nassistant: a\nuser: yes"


def test_held_out_is_sha256_of_the_question_mod_100() -> None:
    # Remainders by sha256sum and bc.
    for question, remainder in {"What is 1 + 1?": 36, "naïve 文": 99}.items():
        assert [percent for percent in range(100) if not held_out(question, percent)] == list(range(remainder + 1))
    share = sum(held_out(f"What is {i} + 1?", 10) for i in range(5000)) / 5000
    assert abs(share - 0.1) < 5 * (0.1 * 0.9 / 5000) ** 0.5


def test_duplicates_and_contradictions_are_counted() -> None:
    rows = [
        Row({"prompt": q, "answer": a}, f"f:{i}", i)
        for i, (q, a) in enumerate([("x", "1"), ("y", "2"), ("x", "1"), ("x", "3")])
    ]
    counts: Counter[str] = Counter()
    kept = without_duplicates([record(r, "prompt", "answer") for r in rows], counts)
    assert [(r.question, r.answer, r.number) for r in kept] == [("x", "1", 0), ("y", "2", 1)]
    assert counts == {"duplicates": 2, "conflicting_answers": 1}


def test_overlap() -> None:
    train, val = (
        [record(Row({"prompt": q}, f"{name}:{i}", i), "prompt", None) for i, q in enumerate(questions)]
        for name, questions in (("train", "abcd"), ("val", "cxd"))
    )
    with pytest.raises(
        ValueError, match=r"data.init_args.val_split: 2 questions of .*first at train:2: 'c'.*overlap: drop"
    ):
        without_overlap(train, val, "error", Counter())
    counts: Counter[str] = Counter()
    assert [r.question for r in without_overlap(train, val, "drop", counts)] == ["a", "b"]
    assert counts["overlap"] == 2
