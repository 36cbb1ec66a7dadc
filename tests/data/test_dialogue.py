"""Which tokens of a conversation are trained on."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lit_posttrain.data import Template
from lit_posttrain.data.dialogue import Encoder
from lit_posttrain.data.messages import Extras, as_messages
from lit_posttrain.data.sources import Row

START, END = 2, 3
# The same text as the fixture's template, with the marks that transformers' own mask reads.
MARKED = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m['content'] }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STRIPS_REASONING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if loop.last or m['role'] != 'assistant' %}{{ m['content'] }}{% else %}{{ m['content'].split('</think>')[-1] }}"
    "{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello <b>"},
    {"role": "user", "content": "2 + 2:"},
    {"role": "assistant", "content": "<4"},
]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def bot(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def whole(encoded: Any) -> tuple[list[int], list[bool]]:
    return encoded.prompt + encoded.completion, [False] * len(encoded.prompt) + encoded.mask


def supervised(tokenizer: Any, encoded: Any) -> str:
    ids, mask = whole(encoded)
    return tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m])


@pytest.fixture
def encoder(tokenizer: Any) -> Encoder:
    return Encoder(tokenizer)


@pytest.fixture(scope="session")
def marked(make_tokenizer: Callable[..., Any]) -> Any:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = MARKED
    return tokenizer


TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=12).filter(str.strip)


@pytest.mark.parity
@pytest.mark.trap(2)
@pytest.mark.trap(44)
@given(turns=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4), system=st.none() | TEXT)
def test_masks_are_those_of_generation_marks(marked: Any, turns: list[tuple[str, str]], system: str | None) -> None:
    """transformers finds the assistant's tokens by {% generation %}; ours are the same without the marks."""
    messages = [{"role": "system", "content": system}] if system else []
    messages += [m for asked, said in turns for m in (user(asked), bot(said))]
    theirs = marked.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True, tokenize=True)
    ids, mask = whole(Encoder(marked).dialogue(messages, "x:1"))
    assert ids == theirs["input_ids"][: len(ids)]
    assert mask == [bool(m) for m in theirs["assistant_masks"]][: len(ids)]
    assert marked.decode(theirs["input_ids"][len(ids) :]) == "\n"


@pytest.mark.trap(1)
@pytest.mark.trap(3)
@pytest.mark.trap(44)
def test_the_end_token_is_trained_on_and_nothing_behind_it(tokenizer: Any, encoder: Encoder) -> None:
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == END
    encoded = encoder.dialogue(CONVERSATION, "x:1")
    assert supervised(tokenizer, encoded) == "Hello <b><|im_end|><4<|im_end|>"
    assert encoded.completion[-1] == END
    assert encoded.mask[-1]
    # Every end token of another role is masked.
    ids, mask = whole(encoded)
    assert [m for i, m in zip(ids, mask, strict=True) if i == END] == [False, False, True, False, True]


@pytest.mark.trap(3)
def test_the_prompt_is_what_inference_sees(tokenizer: Any, encoder: Encoder) -> None:
    inference = tokenizer.encode(
        tokenizer.apply_chat_template(CONVERSATION[:4], tokenize=False, add_generation_prompt=True),
        add_special_tokens=False,
    )
    last = encoder.dialogue(CONVERSATION, "x:1", supervise="last")
    assert last.prompt == inference
    assert encoder.dialogue(CONVERSATION, "x:1", first=4).prompt == inference
    assert supervised(tokenizer, last) == "<4<|im_end|>"
    assert all(last.mask)


@pytest.mark.trap(4)
def test_no_token_spans_prompt_and_completion(tokenizer: Any, encoder: Encoder) -> None:
    joint = tokenizer.encode("a:<b", add_special_tokens=False)
    assert tokenizer.decode([joint[1]]) == ":<"  # the pair would merge
    encoded = encoder.pair("a:", "<b", Row({}, "x:1", 0), ("prompt", "completion"))
    assert encoded.prompt == [0, *tokenizer.encode("a:", add_special_tokens=False)]
    assert tokenizer.decode(encoded.completion) == "<b<|im_end|>"


@pytest.mark.trap(5)
@pytest.mark.parametrize("text", ["Hi", "<s>Hi"])
def test_one_bos(tokenizer: Any, encoder: Encoder, text: str) -> None:
    encoded = encoder.pair(text, "you<|im_end|>", Row({}, "x:1", 0), ("prompt", "completion"))
    assert encoded.prompt.count(0) == 1
    assert encoded.completion.count(END) == 1  # an end token that is there is not doubled
    assert encoder.dialogue(CONVERSATION, "x:1").prompt.count(0) == 1


def test_no_bos_where_the_tokenizer_adds_none(make_tokenizer: Callable[..., Any]) -> None:
    encoder = Encoder(make_tokenizer(bos=False))
    assert 0 not in encoder.pair("Hi", "you", Row({}, "x:1", 0), ("prompt", "completion")).prompt


def test_a_tokenizer_that_appends_eos_does_not_end_the_prompt(make_tokenizer: Callable[..., Any]) -> None:
    encoder = Encoder(make_tokenizer(eos=True))
    encoded = encoder.pair("Hi", "you", Row({}, "x:1", 0), ("prompt", "completion"))
    assert 1 not in encoded.prompt + encoded.completion


def test_sentencepiece_puts_no_space_into_a_completion() -> None:
    """Llama 2's and Mistral's tokenizers put a space in front of any text that is tokenised by itself."""
    pieces = ["<unk>", "<s>", "</s>", "▁", "\n", "x", "y", "a", "b", "▁a", "▁b"]
    core = Tokenizer(models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=[("▁", "a"), ("▁", "b")]))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Replace("▁", " ")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>")
    natural = tokenizer.encode("a b", add_special_tokens=False)
    assert [pieces[i] for i in natural] == ["▁a", "▁b"]
    encoded = Encoder(tokenizer).pair("a", " b", Row({}, "x:1", 0), ("prompt", "completion"))
    assert [pieces[i] for i in encoded.prompt + encoded.completion] == ["▁a", "▁b", "</s>"]


@pytest.mark.trap(4)
@pytest.mark.parametrize("completion", ["b", " b", "\n", "\nb", "\n\nb", "\n\n\n", "xb", ".b"])
def test_a_completion_loses_nothing_that_begins_like_the_anchor(completion: str) -> None:
    """A tokenizer that puts a space in front of texts, and for which two line breaks are one token."""
    symbols = ["</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ĊĊ", "xb"]
    merges = [("Ċ", "Ċ"), ("x", "b")]
    core = Tokenizer(models.BPE(vocab={s: i for i, s in enumerate(symbols)}, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    core.decoder = decoders.ByteLevel()
    encoder = Encoder(PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>"))
    assert encoder.tokenizer.decode(encoder.then(completion)) == completion


def test_supervise_all(tokenizer: Any, encoder: Encoder) -> None:
    encoded = encoder.dialogue(CONVERSATION[:4], "x:1", supervise="all")
    assert len(encoded.prompt) == 1
    assert all(encoded.mask)
    rendered = tokenizer.apply_chat_template(CONVERSATION[:4], tokenize=False)
    assert tokenizer.decode(whole(encoded)[0]) == rendered.removesuffix("\n")


def test_a_trailing_question_is_cut_off(tokenizer: Any, encoder: Encoder) -> None:
    assert encoder.dialogue(CONVERSATION[:4], "x:1") == encoder.dialogue(CONVERSATION[:3], "x:1")


def test_content_that_the_end_token_spells(tokenizer: Any, encoder: Encoder) -> None:
    encoded = encoder.dialogue([user("name it"), bot("im_end")], "x:1")
    assert supervised(tokenizer, encoded) == "im_end<|im_end|>"


def test_same_content_twice(tokenizer: Any, encoder: Encoder) -> None:
    said = [user("a"), bot("a"), user("a"), bot("a")]
    assert supervised(tokenizer, encoder.dialogue(said, "x:1")) == "a<|im_end|>a<|im_end|>"
    assert tokenizer.decode(encoder.dialogue(said, "x:1", supervise="all").completion).count("<|im_end|>") == 4


def test_a_template_without_end_token_gets_eos(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    encoded = Encoder(tokenizer).dialogue([user("a"), bot("b"), user("c"), bot("d")], "x:1")
    assert supervised(tokenizer, encoded).endswith("assistant: d\n<|im_end|>")
    assert encoded.completion.count(END) == 1


def test_a_template_that_ends_the_whole_with_eos(make_tokenizer: Callable[..., Any]) -> None:
    """Phi-3's: every message has an end token of its own, and EOS stands behind the last alone."""
    tokenizer = make_tokenizer()
    tokenizer.eos_token = "</s>"
    tokenizer.chat_template = tokenizer.chat_template.replace("{% endif %}", "{% else %}{{ eos_token }}{% endif %}")
    said = [user("a"), bot("b"), user("c"), bot("d")]
    encoder = Encoder(tokenizer)
    assert supervised(tokenizer, encoder.dialogue(said, "x:1")) == "b<|im_end|>d<|im_end|>\n</s>"
    assert "</s>" not in tokenizer.decode(encoder.dialogue(said, "x:1", first=2).prompt)
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "")
    with pytest.raises(ValueError, match=r"^x:1: the chat template renders"):  # earlier answers would have no end
        Encoder(tokenizer).dialogue(said, "x:1")


def test_the_generation_prompt_may_be_no_prefix(make_tokenizer: Callable[..., Any]) -> None:
    """A template that opens a thought which the data does not have: what it writes before is the prompt."""
    tokenizer = make_tokenizer(thinking=True)
    encoded = Encoder(tokenizer).dialogue([user("a"), bot("b")], "x:1")
    assert tokenizer.decode(encoded.prompt) == "<s><|im_start|>user\na<|im_end|>\n"
    with_thought = Encoder(tokenizer).dialogue([user("a"), bot("<think>\nhm</think>b")], "x:1")
    assert tokenizer.decode(with_thought.prompt).endswith("assistant\n<think>\n")


@pytest.mark.trap(2)
def test_a_default_system_prompt_is_no_trouble(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are.<|im_end|>\n{% endif %}"
        + tokenizer.chat_template.removeprefix("{{ bos_token }}")
    )
    encoded = Encoder(tokenizer).dialogue([user("a"), bot("b"), user("c"), bot("d")], "x:1")
    assert supervised(tokenizer, encoded) == "b<|im_end|>d<|im_end|>"
    assert tokenizer.decode(encoded.prompt).startswith("<|im_start|>system\nYou are.<|im_end|>\n<|im_start|>user")


def test_tools_and_template_arguments_reach_the_template(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% if tools %}{{ tools | length }} {{ tools[0] | tojson }}{% endif %}{{ mood }}" + tokenizer.chat_template
    )
    extras = Extras([{"name": "add"}], {"mood": "calm"})
    encoded = Encoder(tokenizer).dialogue([user("a"), bot("b")], "x:1", extras=extras)
    assert tokenizer.decode(encoded.prompt).startswith('1 {"name": "add"}calm<s>')


def test_a_tool_call_has_no_content(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls %}CALL {{ c.name }}"
        "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    value = [user("a"), {"role": "assistant", "content": None, "tool_calls": [{"name": "add", "extra": None}]}]
    messages = as_messages(value, "x:1: column 'messages'")
    assert messages[1] == {"role": "assistant", "content": "", "tool_calls": [{"name": "add"}]}
    assert supervised(tokenizer, Encoder(tokenizer).dialogue(messages, "x:1")) == "CALL add<|im_end|>"


def test_from_and_value() -> None:
    value = [{"from": "system", "value": "s"}, {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    assert as_messages(value, "p") == [{"role": "system", "content": "s"}, user("a"), bot("b")]


def test_a_template_that_rewrites_earlier_messages_is_refused(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = STRIPS_REASONING
    said = [user("a"), bot("<think>x</think>b"), user("c"), bot("<think>y</think>d")]
    with pytest.raises(ValueError, match=r"^f.jsonl:7: the chat template renders.*set data.init_args.supervise: last"):
        Encoder(tokenizer).dialogue(said, "f.jsonl:7")
    last = Encoder(tokenizer).dialogue(said, "f.jsonl:7", supervise="last")
    assert supervised(tokenizer, last) == "<think>y</think>d<|im_end|>"


@pytest.mark.parametrize("supervise", ["assistant", "last", "all"])
def test_a_template_that_drops_reasoning_is_refused(make_tokenizer: Callable[..., Any], supervise: Any) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = STRIPS_REASONING.replace("loop.last or ", "")
    with pytest.raises(ValueError, match=r"^f:1: the chat template leaves out part of .*'<think>x</think>b'"):
        Encoder(tokenizer).dialogue([user("a"), bot("<think>x</think>b")], "f:1", supervise=supervise)


def test_a_tokenizer_without_end_token_is_refused(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"^model.init_args.policy.tokenizer: .* has no eos_token"):
        Encoder(tokenizer)


@pytest.mark.parametrize("program", ["{{ 1 / 0 }}", "{{ messages[0]['tool'] + 'x' }}", "{{ messages[9].content[0] }}"])
def test_what_a_chat_template_trips_over_names_the_row(make_tokenizer: Callable[..., Any], program: str) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = program
    with pytest.raises(ValueError, match=r"^x:7: the tokenizer's chat template refuses these messages \(user, assist"):
        Encoder(tokenizer).dialogue([user("a"), bot("b")], "x:7")
    with pytest.raises(ValueError, match=r"chat template refuses these messages \(user\)"):
        Template(kind="chat").render("a", tokenizer)
