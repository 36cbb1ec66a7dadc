"""Pairs, rankings and labelled completions."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from trl.data_utils import extract_prompt

from lit_posttrain.data import Preferences
from lit_posttrain.types import Example, ExampleBatch

Jsonl = Callable[..., str]
END = 3


@pytest.fixture
def make(tokenizer_folder: str) -> Callable[..., Preferences]:
    def build(**arguments: Any) -> Preferences:
        defaults = {"batch_size": 2, "tokenizer": tokenizer_folder, "held_out_percent": 0, "val_size": 0}
        data = Preferences(**(defaults | arguments))
        data.setup()
        return data

    return build


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def bot(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def shown(data: Any, example: Example) -> tuple[str, list[str]]:
    decode = data.encoder.tokenizer.decode
    return str(decode(example.prompt)), [str(decode(c)) for c in example.completions]


ASKED = "<s><|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
SIDES = ("chosen", "rejected")
TWO = ["g<|im_end|>", "b<|im_end|>"]
PAIRS = {
    "texts": ({"prompt": "a", "chosen": "g", "rejected": "b"}, "<s>a", TWO),
    "messages": ({"prompt": [user("a")], "chosen": [bot("g")], "rejected": [bot("b")]}, ASKED, TWO),
    "answers as text": ({"prompt": [user("a")], "chosen": "g", "rejected": "b"}, ASKED, TWO),
    "implicit messages": ({"chosen": [user("a"), bot("g")], "rejected": [user("a"), bot("b")]}, ASKED, TWO),
    "prompt repeated": (
        {"prompt": "a", "chosen": [user("a"), bot("g")], "rejected": [user("a"), bot("b")]},
        ASKED,
        TWO,
    ),
    "prompt as messages repeated": (
        {"prompt": [user("a")], "chosen": [user("a"), bot("g")], "rejected": [user("a"), bot("b")]},
        ASKED,
        TWO,
    ),
    "prompt as text": ({"prompt": "a", "chosen": [bot("g")], "rejected": [bot("b")]}, ASKED, TWO),
    "implicit text": (
        {"chosen": "H: hi\n\nA: good one", "rejected": "H: hi\n\nA: gone"},
        "<s>H: hi\n\nA:",
        [" good one<|im_end|>", " gone<|im_end|>"],
    ),
    "implicit text by lines": ({"chosen": "Q\ngg", "rejected": "Q\nggb"}, "<s>Q\n", ["gg<|im_end|>", "ggb<|im_end|>"]),
    "one goes on": (
        {"chosen": "The sky is", "rejected": "The sky is red"},
        "<s>The sky",
        [" is<|im_end|>", " is red<|im_end|>"],
    ),
}


@pytest.mark.parametrize(("row", "prompt", "completions"), PAIRS.values(), ids=PAIRS.keys())
def test_pairs(make: Any, jsonl: Jsonl, row: dict[str, Any], prompt: str, completions: list[str]) -> None:
    data = make(dataset=jsonl([row]))
    (example,) = data.examples("train")
    assert shown(data, example) == (prompt, completions)
    assert example.columns == {"preference": [1.0, 0.0]}
    assert all(map(all, example.masks))


@pytest.mark.parity
@pytest.mark.parametrize("name", ["implicit messages", "implicit text"])
def test_implicit_prompts_are_trls(make: Any, jsonl: Jsonl, name: str) -> None:
    row = PAIRS[name][0]
    theirs = extract_prompt(row)
    if isinstance(row["chosen"], list):
        explicit = theirs
    else:  # it may tear a word ("g|ood", "g|one"); the torn letters are ours to give back
        assert theirs["prompt"].startswith("H: hi\n\nA:")
        torn = theirs["prompt"].removeprefix("H: hi\n\nA:")
        explicit = {"prompt": "H: hi\n\nA:", **{k: torn + str(theirs[k]) for k in ("chosen", "rejected")}}
    implicit = make(dataset=jsonl([row], "i.jsonl")).examples("train")[0]
    assert implicit[:4] == make(dataset=jsonl([explicit], "e.jsonl")).examples("train")[0][:4]


def test_several_turns_train_on_the_assistants_only(make: Any, jsonl: Jsonl) -> None:
    said = [bot("g"), user("why"), bot("so")]
    data = make(dataset=jsonl([{"prompt": [user("a")], "chosen": said, "rejected": [bot("b")]}]))
    (example,) = data.examples("train")
    counted = [t for t, m in zip(example.completions[0], example.masks[0], strict=True) if m]
    assert data.encoder.tokenizer.decode(counted) == "g<|im_end|>so<|im_end|>"
    assert example.completions[0][-1] == END


RANKED = {"prompt": "a", "completions": ["x", "y", "z", "w"]}


@pytest.mark.trap(32)
def test_rankings(make: Any, jsonl: Jsonl) -> None:
    scores = make(dataset=jsonl([RANKED | {"scores": [0.5, 2, "1.25", 0.5]}])).examples("train")[0]
    assert scores.columns == {"preference": [0.5, 2.0, 1.25, 0.5]}
    assert len(scores.completions) == 4
    ranks = make(dataset=jsonl([RANKED | {"ranks": [2, 1, 2, 3]}])).examples("train")[0]
    assert ranks.columns == {"preference": [-2.0, -1.0, -2.0, -3.0]}
    data = make(dataset=jsonl([RANKED | {"ranks": [2, 3, 1, 3]}]), keep="best_worst")
    (example,) = data.examples("train")
    assert shown(data, example)[1] == ["z<|im_end|>", "y<|im_end|>"]
    assert example.columns == {"preference": [-1.0, -3.0]}


@pytest.mark.parametrize(
    "scores", [[1_700_000_001, 1_700_000_003, 1_700_000_002], [1.0, 1.0000000002, 1.0000000001], [1e39, 3e39, 2e39]]
)
def test_scores_that_single_precision_makes_equal_keep_their_order(
    make: Any, jsonl: Jsonl, scores: list[float]
) -> None:
    data = make(dataset=jsonl([{"prompt": "a", "completions": ["x", "y", "z"], "scores": scores}]))
    assert data.collate("train", [0], [0]).columns["preference"].tolist() == [0, 2, 1]


@pytest.mark.trap(30)
def test_equal_completions_of_a_ranking_are_no_pair(make: Any, jsonl: Jsonl) -> None:
    """Their pair has no gradient, whatever the scores, and would count as one that is never ordered right."""
    row = {"prompt": "a", "completions": ["g", "b", "g", "c", "c"], "scores": [0.3, 1, 0.1, 0.1, 0.1]}
    data = make(dataset=jsonl([row]))
    assert data.examples("train")[0].columns == {"preference": [0.2, 1.0, 0.2, 0.1, 0.1]}
    assert data.summary()["train"]["contradictory_completions"] == 1
    after = {"prompt": "abc", "completions": ["x" * 8, "x" * 9, "y"], "ranks": [1, 2, 3]}
    cut = make(dataset=jsonl([after]), max_length=9, truncate_responses=True)
    assert cut.examples("train")[0].columns == {"preference": [-1.5, -1.5, -3.0]}
    nothing = {"prompt": "a", "completions": ["g", "g", "b"], "scores": [1, 0, 0.5]}
    counts = make(dataset=jsonl([nothing, row])).summary()["train"]
    assert counts == counts | {"all_tied": 1, "contradictory_completions": 2, "examples": 1}


def test_rankings_of_conversations(make: Any, jsonl: Jsonl) -> None:
    row = {"prompt": [user("a")], "completions": [[bot("g")], [bot("b")], "c"], "scores": [1, 0, 0]}
    data = make(dataset=jsonl([row]))
    assert shown(data, data.examples("train")[0]) == (ASKED, [*TWO, "c<|im_end|>"])


def test_rankings_of_conversations_after_a_prompt_of_text(make: Any, jsonl: Jsonl) -> None:
    """It is the user's, as in pairs; whether or not the completions repeat it."""
    row = {"prompt": "a", "completions": [[bot("g")], [user("a"), bot("b")], "c"], "ranks": [1, 2, 2]}
    (example,) = make(dataset=jsonl([row])).examples("train")
    assert example.messages == [user("a")]
    assert shown(make(dataset=jsonl([row])), example) == (ASKED, [*TWO, "c<|im_end|>"])


def test_columns_within_lists_are_reached(make: Any, jsonl: Jsonl) -> None:
    row = {"instruction": "a", "completions": [{"response": "g", "overall": 4.5}, {"response": "b", "overall": 1}]}
    paths = {"prompt": "instruction", "completions": "completions.*.response", "scores": "completions.*.overall"}
    data = make(dataset=jsonl([row]), column_map=paths)
    assert shown(data, data.examples("train")[0]) == ("<s>a", TWO)
    with pytest.raises(ValueError, match=r"rows.jsonl:1, item 0: no column 'respones' \(did you mean 'response'\?\)"):
        make(dataset=jsonl([row]), column_map=paths | {"completions": "completions.*.respones"})


def test_tokens(make: Any, jsonl: Jsonl) -> None:
    for names in (("chosen_ids", "rejected_ids"), ("chosen_input_ids", "rejected_input_ids")):
        row = dict(zip(names, ([9, 8, 7, 3], [9, 8, 6, 5, 3]), strict=True))
        (example,) = make(dataset=jsonl([row])).examples("train")
        assert (example.prompt, example.completions) == ([9, 8], [[7, 3], [6, 5, 3]])
    ended = make(dataset=jsonl([{"chosen_ids": [9, 8, 7], "rejected_ids": [9, 8]}])).examples("train")[0]
    assert (ended.prompt, ended.completions) == ([9], [[8, 7], [8]])
    for names in (("prompt_ids", "chosen_ids", "rejected_ids"), tuple(f"{n}_input_ids" for n in ("prompt", *SIDES))):
        given = dict(zip(names, ([9], [8, 3], [8, 4, 3]), strict=True))
        assert make(dataset=jsonl([given])).examples("train")[0][:2] == ([9], [[8, 3], [8, 4, 3]])


def test_margin_and_reference(make: Any, jsonl: Jsonl) -> None:
    row = {
        "prompt": "a",
        "chosen": "g",
        "rejected": "b",
        "margin": 2,
        "ref_chosen_logps": -3.5,
        "ref_rejected_logps": -4,
    }
    data = make(dataset=jsonl([row, row | {"prompt": "c"}]))
    assert data.examples("train")[0].columns == {
        "preference": [1.0, 0.0],
        "margin": [2.0, 2.0],
        "ref_log_probs": [-3.5, -4.0],
    }
    batch = data.collate("train", [1, 0], [0, 1])
    assert batch.columns["ref_log_probs"].tolist() == [-3.5, -4.0, -3.5, -4.0]
    with pytest.raises(ValueError, match=r"^.*rows.jsonl:1: ref_chosen_logps and ref_rejected_logps come together"):
        make(dataset=jsonl([{k: v for k, v in row.items() if k != "ref_rejected_logps"}]))
    with pytest.raises(ValueError, match=r"rows.jsonl:2: there is no margin, but .*rows.jsonl:1 has one"):
        make(dataset=jsonl([PAIRS["texts"][0] | {"margin": 1}, PAIRS["texts"][0]]))


REFERENCE = {"ref_chosen_logps": -3.5, "ref_rejected_logps": -4}


def test_the_references_log_probs_follow_the_preference(make: Any, jsonl: Jsonl) -> None:
    row = {"prompt": "a", "completions": ["b", "g"], **REFERENCE}
    for better in ({"scores": [0, 1]}, {"ranks": [2, 1]}):
        assert make(dataset=jsonl([row | better])).examples("train")[0].columns["ref_log_probs"] == [-4.0, -3.5]
    assert make(dataset=jsonl([row | {"scores": [1, 0]}])).examples("train")[0].columns["ref_log_probs"] == [-3.5, -4.0]


@pytest.mark.parametrize(
    "limits", [{"max_prompt_length": 4}, {"max_length": 14, "truncate_responses": True}], ids=["prompt", "responses"]
)
def test_the_references_log_probs_of_a_cut_pair_are_refused(make: Any, jsonl: Jsonl, limits: dict[str, Any]) -> None:
    row = {"prompt": "abcdef", "chosen": "xxxxxxxx", "rejected": "y", **REFERENCE}
    assert make(dataset=jsonl([row])).examples("train")[0].columns["ref_log_probs"] == [-3.5, -4.0]
    with pytest.raises(ValueError, match=r"rows.jsonl:1: ref_chosen_logps .* are of the whole pair, and .*cuts it"):
        make(dataset=jsonl([row]), **limits)


def test_a_batch_of_rankings(make: Any, jsonl: Jsonl) -> None:
    rows = [RANKED | {"scores": [4, 3, 2, 1]}, {"prompt": "longer", "chosen": "g", "rejected": "bbb"}]
    data = make(dataset=jsonl(rows))
    batch = data.collate("train", [1, 0], [0, 1])
    assert isinstance(batch, ExampleBatch)
    assert batch.columns["group"].tolist() == [0, 0, 1, 1, 1, 1]
    assert batch.columns["row"].tolist() == [4, 5, 0, 1, 2, 3]
    assert batch.columns["preference"].tolist() == [1, 0, 4, 3, 2, 1]
    assert batch.mask.sum(-1).tolist() == [2, 4, 2, 2, 2, 2]
    assert batch.sequences.prompt_lengths.tolist() == [7, 7, 2, 2, 2, 2]


def test_what_prefers_nothing_is_dropped_and_counted(make: Any, jsonl: Jsonl) -> None:
    rows = [
        {"prompt": "a", "chosen": "g", "rejected": "b"},
        {"prompt": "a", "chosen": "g", "rejected": "g"},
        {"chosen": [user("a"), bot("g")], "rejected": [user("a"), bot("g")]},
        {"chosen": "a b", "rejected": "a b"},
        {"chosen": "same", "rejected": "same"},
        {"chosen": [bot("g")], "rejected": [bot("g")]},
        {"prompt": "a", "completions": ["g"], "scores": [1]},
        {"prompt": "a", "completions": ["g", "b"], "scores": [1, 1]},
        {"prompt": "a", "completions": ["g", "b"], "ranks": [1, 1]},
    ]
    counts = make(dataset=jsonl(rows)).summary()["train"]
    assert counts == counts | {
        "rows": 9,
        "examples": 1,
        "identical_completions": 5,
        "single_completion": 1,
        "all_tied": 2,
    }
    with pytest.raises(ValueError, match=r"^data.init_args: no training examples are left .*'single_completion': 1"):
        make(dataset=jsonl(rows[6:7]))


@pytest.mark.trap(30)
def test_long_pairs(make: Any, jsonl: Jsonl, recwarn: Any) -> None:
    rows = [
        {"prompt": "abc", "chosen": "xxxx", "rejected": "y"},
        {"prompt": "abc", "chosen": "x", "rejected": "yyyyyyyyyy"},
        {"prompt": "abc", "chosen": "xxxxxxx", "rejected": "xxxxxxxyyyy"},
    ]
    dropped = make(dataset=jsonl(rows), max_length=9)  # BOS, prompt, four letters, EOS
    assert [e.origin[-1] for e in dropped.examples("train")] == ["1"]
    assert dropped.summary()["train"]["long_examples"] == 2
    recwarn.clear()
    cut = make(dataset=jsonl(rows), max_length=9, truncate_responses=True)
    assert [shown(cut, e)[1] for e in cut.examples("train")] == [["xxxx<|im_end|>", "y<|im_end|>"], ["x", "yyyyy"]]
    assert [list(map(len, e.masks)) for e in cut.examples("train")] == [[5, 2], [1, 5]]
    counts = cut.summary()["train"]
    assert counts == counts | {
        "truncated_responses": 2,
        "identical_completions": 1,
    }  # the third is the same on both sides
    (warning,) = [str(w.message) for w in recwarn if "truncate_responses" in str(w.message)]
    assert "2 rows were cut to 9 tokens" in warning


@pytest.mark.trap(30)
@pytest.mark.parametrize("prompt", ["a" * 8, "a" * 12])
def test_a_prompt_that_leaves_no_room_is_dropped(make: Any, jsonl: Jsonl, prompt: str) -> None:
    rows = [{"prompt": prompt, "chosen": "x" * 12, "rejected": "y" * 14}, PAIRS["texts"][0]]
    data = make(dataset=jsonl(rows), max_length=9, truncate_responses=True)
    assert [e.origin[-1] for e in data.examples("train")] == ["2"]
    counts = data.summary()["train"]
    assert counts == counts | {"long_examples": 1, "longest": 4}
    assert "truncated_responses" not in counts


def test_long_prompts(make: Any, jsonl: Jsonl) -> None:
    path = jsonl([{"prompt": "abcdef", "chosen": "g", "rejected": "b"}])
    end = make(dataset=path, max_prompt_length=4)
    assert shown(end, end.examples("train")[0])[0] == "<s>def"
    start = make(dataset=path, max_prompt_length=4, prompt_truncation="keep_start")
    assert shown(start, start.examples("train")[0])[0] == "<s>abc"
    assert start.summary()["train"]["truncated_prompts"] == 1
    assert "truncated_prompts" not in make(dataset=path, max_prompt_length=7).summary()["train"]
    chat = make(dataset=jsonl([PAIRS["messages"][0]]), max_prompt_length=12)
    assert shown(chat, chat.examples("train")[0])[0] == "<s><|im_start|>assistant\n"


def test_the_same_prompt_is_on_one_side(make: Any, jsonl: Jsonl) -> None:
    """An explicit, an implicit and a conversational form of the same question are held out together."""
    sides = []
    for number, form in enumerate(("explicit", "implicit", "messages")):
        rows = []
        for i in range(60):
            if form == "explicit":
                rows.append({"prompt": f"question {i}", "chosen": "g", "rejected": "b"})
            elif form == "implicit":
                said = [user(f"question {i}")]
                rows.append({"chosen": [*said, bot("g")], "rejected": [*said, bot("b")]})
            else:
                rows.append({"prompt": [user(f"question {i}")], "chosen": [bot("g")], "rejected": [bot("b")]})
        data = make(dataset=jsonl(rows, f"{number}.jsonl"), held_out_percent=30, val_size=None)
        sides.append([int(e.origin.rsplit(":")[-1]) for e in data.examples("val")])
    assert sides[0] == sides[1] == sides[2]
    assert 5 < len(sides[0]) < 40


def test_demonstrations_and_samples(make: Any, jsonl: Jsonl) -> None:
    pairs = jsonl([{"prompt": "a", "completions": ["b", "g", "c"], "scores": [0, 2, 1]}], "pairs.jsonl")
    own = make(dataset=pairs)
    (batch,) = own.demonstrations()
    assert own.encoder.tokenizer.decode(batch.sequences.ids[0]) == "<s>ag<|im_end|>"
    with pytest.raises(ValueError, match=r"^data.init_args.reference_samples: not set"):
        own.reference_samples()
    rows = [{"messages": [user("a"), bot("x"), user("b"), bot(f"d{i}")]} for i in range(5)]
    data = make(
        dataset=pairs,
        demonstrations=jsonl(rows, "d.jsonl"),
        reference_samples=jsonl([{"prompt": "q", "completion": "r"}], "s.jsonl"),
    )
    assert [len(b.sequences.ids) for b in data.demonstrations()] == [2, 2, 1]
    assert data.encoder.tokenizer.decode(data.reference_samples()[0].sequences.ids[0]) == "<s>qr<|im_end|>"
    shares = []
    for rank in range(2):
        data.trainer = SimpleNamespace(distributed_sampler_kwargs={"rank": rank, "num_replicas": 2})
        shares.append([len(b.sequences.ids) for b in data.demonstrations()])
    assert shares == [[1, 1, 0], [1, 1, 1]]
    mask = data.demonstrations()[0].mask
    assert int(mask.sum()) == 3  # the last answer only


def test_an_empty_share_has_all_columns(make: Any, jsonl: Jsonl) -> None:
    data = make(dataset=jsonl([PAIRS["texts"][0]]))
    assert sorted(data.collate("train", [], []).columns) == ["group", "preference", "row"]
