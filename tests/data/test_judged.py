"""Solutions judged step by step, and completions judged by themselves."""

from collections.abc import Callable
from typing import Any

import pytest

from lit_posttrain.data import PointwiseLabels, StepwiseSupervision

Jsonl = Callable[..., str]
END = 3


@pytest.fixture
def make(tokenizer_folder: str) -> Callable[..., Any]:
    def build(kind: type, **arguments: Any) -> Any:
        defaults = {"batch_size": 1, "tokenizer": tokenizer_folder, "held_out_percent": 0, "val_size": 0}
        data = kind(**(defaults | arguments))
        data.setup("fit")
        return data

    return build


STEPS = {"prompt": "2+3*4", "completions": ["3*4=12", "2+12=15", "15"], "labels": [True, False, 0]}


def test_steps(make: Any, jsonl: Jsonl) -> None:
    data = make(StepwiseSupervision, dataset=jsonl([STEPS]))
    (example,) = data.examples("train")
    decode = data.encoder.tokenizer.decode
    assert decode(example.prompt) == "<s>2+3*4"
    assert decode(example.completions[0]) == "3*4=12\n2+12=15\n15<|im_end|>"
    at = [i for i, m in enumerate(example.masks[0]) if m]
    # A step's last token is its separator's, and of the last step the end token.
    assert [decode(example.completions[0][: i + 1]) for i in at] == [
        "3*4=12\n",
        "3*4=12\n2+12=15\n",
        "3*4=12\n2+12=15\n15<|im_end|>",
    ]
    assert [example.columns["step_labels"][0][i] for i in at] == [1.0, 0.0, 0.0]


@pytest.mark.trap(31)
def test_a_batch_of_steps(make: Any, jsonl: Jsonl) -> None:
    rows = [STEPS, {"prompt": "p", "completions": ["s", "t"], "labels": [False, True]}]
    data = make(StepwiseSupervision, dataset=jsonl(rows), batch_size=2, step_separator=" ;")
    batch = data.collate("train", [0, 1], [0, 1])
    assert batch.columns["step_labels"].shape == batch.mask.shape
    for row in range(2):
        counted = batch.mask[row].nonzero()[:, 0].tolist()
        # Position i is about token i + 1.
        ids = batch.sequences.ids[row]
        assert [data.encoder.tokenizer.decode(ids[i + 1]) for i in counted] == [
            *[";"] * (len(counted) - 1),
            "<|im_end|>",
        ]
        assert int(batch.sequences.lengths[row]) - 2 == counted[-1]
        assert batch.columns["step_labels"][row][batch.mask[row]].tolist() == [float(x) for x in rows[row]["labels"]]
    assert batch.columns["step_labels"][~batch.mask].abs().sum() == 0


def test_steps_that_follow_a_conversation(make: Any, jsonl: Jsonl) -> None:
    data = make(StepwiseSupervision, dataset=jsonl([STEPS | {"prompt": [{"role": "user", "content": "a"}]}]))
    prompt = data.encoder.tokenizer.decode(data.examples("train")[0].prompt)
    assert prompt == "<s><|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"


def test_long_solutions(make: Any, jsonl: Jsonl) -> None:
    rows = [STEPS, {"prompt": "p", "completions": ["s"], "labels": [1]}]
    data = make(StepwiseSupervision, dataset=jsonl(rows), max_length=10)
    assert [data.size("train"), data.summary()["train"]["long_examples"]] == [1, 1]


def test_labels(make: Any, jsonl: Jsonl) -> None:
    rows = [
        {"prompt": "p", "completion": "safe", "label": True},
        {
            "prompt": [{"role": "user", "content": "p"}],
            "completion": [{"role": "assistant", "content": "x"}],
            "label": 0,
        },
        {"prompt": "p", "completion": "s" * 90, "label": True},
    ]
    data = make(PointwiseLabels, dataset=jsonl(rows), max_length=60, batch_size=2)
    assert [e.columns for e in data.examples("train")] == [{"label": [1.0]}, {"label": [0.0]}]
    assert data.summary()["train"]["long_examples"] == 1
    batch = data.collate("train", [1, 0], [0, 1])
    assert batch.columns["label"].tolist() == [0.0, 1.0]
    lengths = batch.sequences.lengths
    assert batch.sequences.ids[range(2), (lengths - 1).tolist()].tolist() == [END, END]  # where the score is read


def test_an_empty_separator(make: Any, jsonl: Jsonl) -> None:
    with pytest.raises(ValueError, match=r"^data.init_args.step_separator: must not be empty"):
        make(StepwiseSupervision, dataset=jsonl([STEPS]), step_separator="")
