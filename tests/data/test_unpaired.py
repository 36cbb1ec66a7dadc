"""Completions that are labelled good or bad, and those that change places."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from lit_posttrain.data import UnpairedPreferences
from lit_posttrain.types import Example, ExampleBatch

Jsonl = Callable[..., str]
ASKED = "<s><|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture
def make(tokenizer_folder: str) -> Callable[..., UnpairedPreferences]:
    def build(**arguments: Any) -> UnpairedPreferences:
        defaults = {"batch_size": 2, "tokenizer": tokenizer_folder, "held_out_percent": 0, "val_size": 0}
        data = UnpairedPreferences(**(defaults | arguments))
        data.setup()
        return data

    return build


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def bot(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def shown(data: Any, example: Example) -> tuple[str, str]:
    decode = data.encoder.tokenizer.decode
    return str(decode(example.prompt)), str(decode(example.completions[0]))


def labelled(n: int) -> list[dict[str, Any]]:
    return [{"prompt": f"p{i}", "completion": f"c{i}", "label": i % 2 == 0} for i in range(n)]


def rows_of(data: Any, batch: ExampleBatch) -> list[tuple[str, int, int]]:
    """Text, role and label of every row."""
    texts = [
        str(data.encoder.tokenizer.decode(ids[:n], skip_special_tokens=True))
        for ids, n in zip(batch.sequences.ids.tolist(), batch.sequences.lengths.tolist(), strict=True)
    ]
    return list(zip(texts, batch.columns["role"].int().tolist(), batch.columns["label"].int().tolist(), strict=True))


def test_mismatched_completions_are_the_example_before(make: Any, jsonl: Jsonl) -> None:
    data = make(dataset=jsonl(labelled(8)))
    batch = data.collate("train", [5, 2, 4], [0, 1, 2])
    assert rows_of(data, batch) == [
        ("p5c5", 0, 0),
        ("p5c4", 1, 0),
        ("p2c2", 0, 1),
        ("p2c5", 1, 1),
        ("p4c4", 0, 1),
        ("p4c2", 1, 1),
    ]
    assert batch.columns["group"].tolist() == [0, 0, 1, 1, 2, 2]
    assert batch.columns["row"].tolist() == [5, -5, 2, -6, 4, -3]  # -1 - n is the completion of row n
    assert batch.mask.sum(-1).tolist() == [3] * 6
    assert batch.sequences.prompt_lengths.tolist() == [3] * 6


@pytest.mark.parity
def test_mismatched_completions_are_trls(make: Any, jsonl: Jsonl) -> None:
    """TRL rotates the completions of a batch by one; ours does over the whole step."""
    data = make(dataset=jsonl(labelled(8)), batch_size=8)
    batch = rows_of(data, data.batch(0))
    own, other = [t for t, role, _ in batch if role == 0], [t for t, role, _ in batch if role == 1]
    completions = [t[2:] for t in own]
    assert [t[2:] for t in other] == completions[-1:] + completions[:-1]
    assert [t[:2] for t in other] == [t[:2] for t in own]


def test_they_are_exchanged_over_all_ranks(make: Any, jsonl: Jsonl) -> None:
    data = make(dataset=jsonl(labelled(12)), batch_size=6, val_batch_size=5)
    alone = [rows_of(data, data.batch(i)) for i in range(4)]
    evaluated = [rows_of(data, data.evaluation_batch("train", i)) for i in range(3)]
    together, evaluated_together = [[] for _ in alone], [[] for _ in evaluated]
    for rank in range(3):
        data.trainer = SimpleNamespace(
            distributed_sampler_kwargs={"rank": rank, "num_replicas": 3}, state=SimpleNamespace(fn="fit")
        )
        for i in range(4):
            together[i] += rows_of(data, data.batch(i))
        for i in range(3):
            evaluated_together[i] += rows_of(data, data.evaluation_batch("train", i))
    assert together == alone
    assert evaluated_together == evaluated
    data.trainer = None


def test_never_a_completion_of_the_same_prompt(make: Any, jsonl: Jsonl) -> None:
    rows = [{"prompt": f"p{i // 2}", "completion": f"c{i}", "label": 1} for i in range(4)]
    data = make(dataset=jsonl(rows), val_batch_size=3)
    assert [t for t, role, _ in rows_of(data, data.evaluation_batch("train", 0)) if role] == ["p0c2", "p0c2", "p1c1"]
    # An evaluation batch of one looks further back.
    assert [t for t, role, _ in rows_of(data, data.evaluation_batch("train", 1)) if role] == ["p1c1"]


def test_pairs_are_taken_apart(make: Any, jsonl: Jsonl) -> None:
    rows = [
        {"chosen": [user("a"), bot("g")], "rejected": [user("a"), bot("b")]},
        {"prompt": "q", "chosen": "x", "rejected": "x"},
    ]
    data = make(dataset=jsonl(rows))
    assert [(shown(data, e), e.columns["label"]) for e in data.examples("train")] == [
        ((ASKED, "g<|im_end|>"), [1.0]),
        ((ASKED, "b<|im_end|>"), [0.0]),
    ]
    assert data.summary()["train"]["identical_completions"] == 1


@pytest.mark.parametrize("label", [True, 1, "true", "1", 1.0])
def test_labels(make: Any, jsonl: Jsonl, label: Any) -> None:
    rows = [{"prompt": "a", "completion": "b", "label": label}, {"prompt": "b", "completion": "b", "label": False}]
    data = make(dataset=jsonl(rows))
    assert [e.columns["label"] for e in data.examples("train")] == [[1.0], [0.0]]


def test_mismatched_completions_fit(make: Any, jsonl: Jsonl) -> None:
    rows = [
        {"prompt": "p" * 9, "completion": "c", "label": 1},
        {"prompt": "p", "completion": "c" * 9, "label": 0},
        {"prompt": "p", "completion": "c" * 20, "label": 0},
    ]
    data = make(dataset=jsonl(rows), max_length=12)
    assert data.summary()["train"]["long_examples"] == 1
    batch = data.collate("train", [0, 1], [0, 1])
    assert batch.sequences.lengths.tolist() == [12, 12, 12, 4]
    assert batch.mask.sum(-1).tolist() == [2, 2, 10, 2]


def test_one_completion_cannot_change_places(make: Any, jsonl: Jsonl) -> None:
    with pytest.raises(ValueError, match=r"^data.init_args.batch_size: must be at least 2"):
        make(dataset=jsonl(labelled(2)), batch_size=1)


def test_an_empty_share_has_all_columns(make: Any, jsonl: Jsonl) -> None:
    data = make(dataset=jsonl(labelled(4)))
    batch = data.share("train", [0], [])
    assert sorted(batch.columns) == ["group", "label", "role", "row"]
    assert len(batch.columns["role"]) == len(batch.mask) == 0
