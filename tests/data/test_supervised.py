"""Demonstrations of every form become the tokens and masks they should."""

import hashlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lit_posttrain.data import SupervisedExamples
from lit_posttrain.types import Example, ExampleBatch

Jsonl = Callable[..., str]
BOS, START, END = 0, 2, 3


@pytest.fixture
def make(tokenizer_folder: str) -> Callable[..., SupervisedExamples]:
    def build(stage: str = "fit", **arguments: Any) -> SupervisedExamples:
        defaults = {"batch_size": 1, "tokenizer": tokenizer_folder, "held_out_percent": 0, "val_size": 0}
        data = SupervisedExamples(**(defaults | arguments))
        data.setup(stage)
        return data

    return build


def chat(*said: str) -> dict[str, Any]:
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]}


def shown(data: SupervisedExamples, example: Example) -> tuple[str, str]:
    """The prompt, and what of the rest is trained on; as text."""
    tokenizer = data.encoder.tokenizer
    counted = [t for t, m in zip(example.completions[0], example.masks[0], strict=True) if m]
    return str(tokenizer.decode(example.prompt)), str(tokenizer.decode(counted))


ASKED = "<s><|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
FORMS = {
    "text": ({"text": "ab"}, ("<s>", "ab<|im_end|>")),
    "pair": ({"prompt": "a", "completion": "b"}, ("<s>a", "b<|im_end|>")),
    "messages": (chat("a", "b", "c", "d"), (ASKED, "b<|im_end|>d<|im_end|>")),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        (ASKED, "b<|im_end|>"),
    ),
    "conversational pair": (
        {"prompt": chat("a")["messages"], "completion": [{"role": "assistant", "content": "b"}]},
        (ASKED, "b<|im_end|>"),
    ),
    "answer as text": ({"prompt": chat("a")["messages"], "completion": "b"}, (ASKED, "b<|im_end|>")),
    "messages before prompt": (chat("a", "b") | {"prompt": "a"}, (ASKED, "b<|im_end|>")),
    "tokens": ({"input_ids": [10, 11, 12]}, None),
}


@pytest.mark.parametrize(("row", "expected"), FORMS.values(), ids=FORMS.keys())
def test_every_form(make: Any, jsonl: Jsonl, row: dict[str, Any], expected: Any) -> None:
    data = make(dataset=jsonl([row]))
    (example,) = data.examples("train")
    if expected is None:
        assert (example.prompt, example.completions, example.masks) == ([10], [[11, 12]], [[True, True]])
    else:
        assert shown(data, example) == expected
    assert example.origin.endswith("rows.jsonl:1")
    assert example.masks[0][0]  # the prompt is everything before the first supervised token


def test_supervise_last_and_all(make: Any, jsonl: Jsonl) -> None:
    path = jsonl([chat("a", "b", "c", "d")])
    last = make(dataset=path, supervise="last")
    prompt, counted = shown(last, last.examples("train")[0])
    assert prompt.endswith("b<|im_end|>\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n")
    assert counted == "d<|im_end|>"
    every = make(dataset=path, supervise="all")
    prompt, counted = shown(every, every.examples("train")[0])
    assert prompt == "<s>"
    assert counted == prompt_and_rest(every)
    pair = make(dataset=jsonl([{"prompt": "a", "completion": "b"}]), supervise="all")
    assert shown(pair, pair.examples("train")[0]) == ("<s>", "ab<|im_end|>")


def prompt_and_rest(data: SupervisedExamples) -> str:
    messages = chat("a", "b", "c", "d")["messages"]
    text = str(data.encoder.tokenizer.apply_chat_template(messages, tokenize=False))
    return text.removeprefix("<s>").removesuffix("\n")


def test_labels_are_masks(make: Any, jsonl: Jsonl) -> None:
    row = {"input_ids": [10, 3, 12, 13, 3], "labels": [-100, -100, 12, -100, 3]}
    (example,) = make(dataset=jsonl([row])).examples("train")
    assert example == Example([10, 3], [[12, 13, 3]], [[True, False, True]], {}, example.origin)
    masks = {"input_ids": [10, 11, 12, 13], "completion_mask": [0, 0, 1, 1], "assistant_masks": [1, 1, 1, 0]}
    (example,) = make(dataset=jsonl([masks])).examples("train")
    assert (example.prompt, example.masks) == ([10, 11], [[True, False]])


@pytest.mark.trap(1)
@pytest.mark.parametrize("left", [0, 2])
def test_padding_of_tokenised_rows_is_left_out(make: Any, jsonl: Jsonl, left: int) -> None:
    """By the attention mask and not by the id: the end token may be the padding token."""
    right = 3 - left
    row = {"input_ids": [3] * left + [10, 11, 3] + [3] * right, "attention_mask": [0] * left + [1] * 3 + [0] * right}
    (example,) = make(dataset=jsonl([row])).examples("train")
    assert example == Example([10], [[11, 3]], [[True, True]], {}, example.origin)
    labels = [-100] * (left + 2) + [3] + [-100] * right
    (example,) = make(dataset=jsonl([row | {"labels": labels}])).examples("train")
    assert example == Example([10, 11], [[3]], [[True]], {}, example.origin)


@pytest.mark.trap(44)
def test_packed_rows_come_apart(make: Any, jsonl: Jsonl) -> None:
    row = {"input_ids": [10, 11, 12, 20, 21, 30, 31], "seq_lengths": [3, 2, 2]}
    packed = make(dataset=jsonl([row])).examples("train")
    assert [(e.prompt, e.completions) for e in packed] == [([10], [[11, 12]]), ([20], [[21]]), ([30], [[31]])]


@pytest.mark.trap(1)
def test_a_batch(make: Any, jsonl: Jsonl) -> None:
    rows = [
        chat("a", "b", "c", "dd"),
        {"prompt": "x", "completion": "yyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyy"},
    ]
    data = make(dataset=jsonl(rows), batch_size=2)
    batch = data.collate("train", [1, 0], [0, 1])
    assert isinstance(batch, ExampleBatch)
    assert batch.columns["group"].tolist() == [0, 1]
    assert batch.columns["row"].tolist() == [1, 0]
    assert batch.columns["row"].dtype == torch.long
    for row, example in zip(range(2), [data.examples("train")[i] for i in (1, 0)], strict=True):
        ids = example.prompt + example.completions[0]
        assert batch.sequences.ids[row, : len(ids)].tolist() == ids
        assert batch.sequences.lengths[row] == len(ids)
        assert batch.sequences.prompt_lengths[row] == len(example.prompt)
        # Position i scores token i + 1.
        counted = [ids[i + 1] for i in batch.mask[row].nonzero()[:, 0].tolist()]
        assert counted == [t for t, m in zip(example.completions[0], example.masks[0], strict=True) if m]
        assert counted[-1] == END
    assert (batch.mask & ~batch.sequences.completion_mask()).sum() == 0


def test_an_empty_share(make: Any, jsonl: Jsonl) -> None:
    data = make(dataset=jsonl([chat("a", "b")]))
    batch = data.collate("train", [], [])
    assert [len(batch.sequences.ids), len(batch.mask), len(batch.columns["group"])] == [0, 0, 0]
    assert batch.mask.any(-1).sum() == 0


def test_long_examples(make: Any, jsonl: Jsonl) -> None:
    path = jsonl([{"prompt": "abc", "completion": "x" * n} for n in (3, 4, 10)])
    dropped = make(dataset=path, max_length=8)  # BOS, prompt, completion, EOS
    assert dropped.size("train") == 1
    assert dropped.summary()["train"]["long_examples"] == 2
    cut = make(dataset=path, max_length=8, long_examples="truncate")
    assert [e.completions[0][-1] == END for e in cut.examples("train")] == [True, False, False]
    assert [len(e.prompt) + len(e.completions[0]) for e in cut.examples("train")] == [8, 8, 8]
    assert cut.summary()["train"]["truncated"] == 2
    rows = [{"prompt": "abcdefgh", "completion": "x"}, {"prompt": "a", "completion": "x"}]
    none = make(dataset=jsonl(rows, "prompts.jsonl"), max_length=8, long_examples="truncate")
    assert none.summary()["train"]["long_examples"] == 1
    with pytest.raises(ValueError, match=r"^data.init_args.max_length: the example at .*:2 has 9 tokens, more than 8"):
        make(dataset=path, max_length=8, long_examples="error")


def test_held_out_by_the_prompts_hash(make: Any, jsonl: Jsonl) -> None:
    rows = [{"prompt": f"q{i // 2}", "completion": f"c{i}"} for i in range(200)]
    data = make(dataset=jsonl(rows), held_out_percent=20, val_size=None)
    out = {q for q in (r["prompt"] for r in rows) if int(hashlib.sha256(q.encode()).hexdigest(), 16) % 100 < 20}
    expected = [i + 1 for i, r in enumerate(rows) if r["prompt"] in out]
    assert [int(e.origin.rsplit(":")[-1]) for e in data.examples("val")] == expected
    assert 10 < len(expected) < 80
    assert data.size("train") == 200 - len(expected)
    # One message asks the same as the bare text, so both forms of a dataset are split alike.
    messages = [{"prompt": [{"role": "user", "content": r["prompt"]}], "completion": r["completion"]} for r in rows]
    again = make(dataset=jsonl(messages, "m.jsonl"), held_out_percent=20, val_size=None)
    assert [int(e.origin.rsplit(":")[-1]) for e in again.examples("val")] == expected
    whole = make(
        dataset=jsonl([chat(r["prompt"], r["completion"]) for r in rows], "c.jsonl"), test_split_size=0.2, val_size=None
    )
    assert [int(e.origin.rsplit(":")[-1]) for e in whole.examples("val")] == expected


def test_overlap_identical_and_limits(make: Any, jsonl: Jsonl) -> None:
    train = jsonl([{"text": f"t{i % 8}"} for i in range(10)] + [{"text": "v1"}], "train.jsonl")
    val = jsonl([{"text": f"v{i}"} for i in range(4)], "val.jsonl")
    data = make(dataset=train, val_split=val, val_size=None)
    counts = data.summary()
    assert counts["train"] == counts["train"] | {"rows": 11, "overlap": 1, "identical": 2, "examples": 10}
    assert counts["val"]["examples"] == 4
    limited = make(dataset=train, val_split=val, train_size=3, val_size=2)
    assert [limited.size("train"), limited.size("val")] == [3, 2]


def test_the_summary_counts_tokens(make: Any, jsonl: Jsonl) -> None:
    data = make(dataset=jsonl([{"prompt": "abc", "completion": "de"}, {"prompt": "a", "completion": "<s>bcdef"}]))
    counts = data.summary()["train"]
    assert counts == counts | {"rows": 2, "examples": 2, "tokens": 7 + 9, "supervised_tokens": 3 + 7, "longest": 9}
    assert counts["special_tokens"] == 1


def test_announced_once(make: Any, jsonl: Jsonl, capfd: Any, caplog: Any) -> None:
    data = make(dataset=jsonl([chat("a", "b")]))
    caplog.set_level("INFO")
    data.train_dataloader()
    data.val_dataloader()
    assert caplog.text.count("train data: rows 1") == 1


def test_the_fingerprint_sees_tokens_and_masks(make: Any, jsonl: Jsonl) -> None:
    def of(row: dict[str, Any], **arguments: Any) -> str:
        return make(dataset=jsonl([row]), **arguments).fingerprint()

    one = chat("a", "b", "c", "d")
    assert of(one) == of(one)
    assert len({of(one), of(chat("a", "b", "c", "e")), of(one, supervise="last"), of(one, supervise="all")}) == 4


def test_check_fits(make: Any, jsonl: Jsonl) -> None:
    data = make(dataset=jsonl([{"text": "abc"}, {"text": "abcdefgh"}]))
    data.check_fits(10)
    with pytest.raises(
        ValueError, match=r"^data.init_args.max_length: the longest example has 10 tokens \(.*:2\).*1 of 2.*9"
    ):
        data.check_fits(9)


def test_bring_your_own(tokenizer_folder: str) -> None:
    class Own(SupervisedExamples):
        def load_examples(self, split: Any) -> list[dict[str, Any]]:
            return [{"text": f"{split} {i}"} for i in range(4)]

    data = Own(batch_size=2, tokenizer=tokenizer_folder, held_out_percent=0, val_size=0)
    data.setup("fit")
    assert data.size("train") == 4
    assert data.examples("train")[2].origin == "Own.load_examples('train')[2]"
    assert data.draws(3) == {}


def test_shares_of_ranks_make_the_batch(make: Any, jsonl: Jsonl) -> None:
    path = jsonl([{"text": "x" * (i + 1)} for i in range(12)])
    alone = make(dataset=path, batch_size=4)
    for iteration in range(6):
        whole = sorted(alone.batch(iteration).sequences.lengths.tolist())
        parts = []
        for rank in range(2):
            alone.trainer = SimpleNamespace(  # type: ignore[assignment]
                distributed_sampler_kwargs={"rank": rank, "num_replicas": 2}, state=SimpleNamespace(fn="fit")
            )
            parts += alone.batch(iteration).sequences.lengths.tolist()
            alone.trainer = None
        assert sorted(parts) == whole
        assert len(whole) == 4


def test_a_demonstration_of_the_real_tokenizer() -> None:
    """SmolLM2: pad is eos, both end every turn, and the template adds a system message and a line break."""
    from pathlib import Path

    from transformers import AutoTokenizer

    from lit_posttrain.data.dialogue import Encoder

    folder = Path(__file__).parents[2] / "models" / "SmolLM2-135M-Instruct"
    if not folder.is_dir():
        pytest.skip("the model is not here")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = chat("Hi", "Hello!", "Bye", "Goodbye.")["messages"]
    encoded = Encoder(tokenizer).dialogue(messages, "x:1")
    counted = [t for t, m in zip(encoded.completion, encoded.mask, strict=True) if m]
    assert tokenizer.decode(counted) == "Hello!<|im_end|>Goodbye.<|im_end|>"
    prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
    assert encoded.prompt == prompt
