from collections.abc import Callable

import jsonargparse
import pytest
from transformers import PreTrainedTokenizerFast

from lit_posttrain.data.templates import Example, Template

MakeTokenizer = Callable[..., PreTrainedTokenizerFast]
BOS, EOS, END = 0, 1, 3


def text_of(template: Template, question: str, tokenizer: PreTrainedTokenizerFast) -> str:
    return template.render(question, tokenizer).text


def test_r1_zero_is_table_1_of_the_paper_word_for_word(tokenizer: PreTrainedTokenizerFast) -> None:
    assert text_of(Template(kind="r1_zero", prefill=" <think>"), "What is 1 + 1?", tokenizer) == (
        "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. "
        "The assistant first thinks about the reasoning process in the mind and then provides the user with the "
        "answer. "
        "The reasoning process and answer are enclosed within <think>...</think> and <answer>...</answer> tags, "
        "respectively, i.e., <think> reasoning process here </think> <answer> answer here </answer>. "
        "User: What is 1 + 1?. Assistant: <think>"
    )


def test_few_shot_layout(tokenizer: PreTrainedTokenizerFast) -> None:
    template = Template(
        kind="few_shot",
        instruction="Q: {question}\nA:",
        examples=(Example("1+1?", " 2"), Example("2+2?", " 4")),
        prefill=" The",
    )
    rendered = template.render("3+3?", tokenizer)
    assert rendered.prompt == "Q: 1+1?\nA: 2\n\nQ: 2+2?\nA: 4\n\nQ: 3+3?\nA:"
    assert rendered.text == f"{rendered.prompt} The"
    assert rendered.prefill == " The"


def test_chat_is_system_examples_and_the_question(tokenizer: PreTrainedTokenizerFast) -> None:
    template = Template(
        kind="chat",
        system="Be short.",
        instruction="{question} Box it.",
        examples=(Example("1+1?", "2"),),
        prefill="So",
    )
    rendered = template.render("3+3?", tokenizer)
    assert rendered.prompt == [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "1+1? Box it."},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "3+3? Box it."},
    ]
    assert rendered.text == (
        "<s><|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\n1+1? Box it.<|im_end|>\n"
        "<|im_start|>assistant\n2<|im_end|>\n<|im_start|>user\n3+3? Box it.<|im_end|>\n<|im_start|>assistant\nSo"
    )


def test_messages_keep_their_turns(tokenizer: PreTrainedTokenizerFast) -> None:
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    template = Template(kind="chat", instruction="<{question}>", examples=(Example("e", "c"),))
    shown = [{"role": "user", "content": "<e>"}, {"role": "assistant", "content": "c"}]
    assert template.render(turns, tokenizer).prompt == [turns[0], *shown, {"role": "user", "content": "<u>"}]
    assert turns[1]["content"] == "u"


@pytest.mark.parametrize("question", ["{question}", "{prompt}", "{0} {} {x!r}", r"\frac{1}{2}", "%s $x \\1"])
@pytest.mark.parametrize("kind", ["plain", "r1_zero", "chat"])
def test_braces_in_a_question_mean_nothing(kind: str, question: str, tokenizer: PreTrainedTokenizerFast) -> None:
    text = text_of(Template(kind=kind), question, tokenizer)  # type: ignore[arg-type]
    assert text == text_of(Template(kind=kind), "QUESTION", tokenizer).replace("QUESTION", question)  # type: ignore[arg-type]
    assert text.count(question) == 1


def test_braces_in_an_instruction_mean_nothing(tokenizer: PreTrainedTokenizerFast) -> None:
    template = Template(kind="plain", instruction=r"{question} Put it into \boxed{}.")
    assert text_of(template, "1 + 1?", tokenizer) == r"1 + 1? Put it into \boxed{}."


@pytest.mark.trap(5)
def test_plain_text_gets_one_bos_and_no_eos(make_tokenizer: MakeTokenizer) -> None:
    template = Template(kind="plain")
    for bos, eos in ((True, False), (True, True), (False, True), (False, False)):
        tokenizer = make_tokenizer(bos=bos, eos=eos)
        ids = template.token_ids(template.render("hi", tokenizer), tokenizer)
        assert ids == [BOS] * bos + tokenizer.convert_tokens_to_ids(["h", "i"])


@pytest.mark.trap(5)
def test_text_that_begins_with_bos_gets_no_second(tokenizer: PreTrainedTokenizerFast) -> None:
    template = Template(kind="plain", instruction="<s>{question}")
    assert template.token_ids(template.render("hi", tokenizer), tokenizer).count(BOS) == 1


@pytest.mark.trap(5)
def test_chat_text_gets_no_specials_but_its_own(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(bos=True, eos=True)
    template = Template(kind="chat")
    rendered = template.render("hi", tokenizer)
    ids = template.token_ids(rendered, tokenizer)
    oracle = tokenizer.apply_chat_template(rendered.prompt, tokenize=True, add_generation_prompt=True)  # type: ignore[arg-type]
    assert ids == oracle["input_ids"]  # type: ignore[index]
    assert (ids.count(BOS), EOS in ids) == (1, False)


@pytest.mark.trap(2)
@pytest.mark.trap(3)
def test_end_tokens_inside_the_prompt_and_the_line_after_them_stay(tokenizer: PreTrainedTokenizerFast) -> None:
    template = Template(kind="chat", system="s", examples=(Example("q", "a"),))
    rendered = template.render("hi", tokenizer)
    ids = template.token_ids(rendered, tokenizer)
    assert ids.count(END) == 4
    assert tokenizer.decode(ids) == rendered.text
    assert rendered.text.endswith("<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.trap(4)
def test_prompt_and_prefill_are_tokenised_as_one_text(tokenizer: PreTrainedTokenizerFast) -> None:
    template = Template(kind="plain", instruction="{question} A:", prefill="<b>")
    rendered = template.render("q", tokenizer)
    assert isinstance(rendered.prompt, str)
    ids = template.token_ids(rendered, tokenizer)
    apart = [tokenizer.encode(part, add_special_tokens=False) for part in (rendered.prompt, rendered.prefill)]
    assert ids[1:] == tokenizer.encode("q A:<b>", add_special_tokens=False)
    assert ids[1:] != apart[0] + apart[1], "the tokenizer was to have a token across the boundary"
    assert tokenizer.decode(ids[1:]) == rendered.text


@pytest.mark.trap(37)
def test_a_thought_that_the_chat_template_opens_is_prefill(make_tokenizer: MakeTokenizer) -> None:
    rendered = Template(kind="chat", prefill="So").render("What is <think>?", make_tokenizer(thinking=True))
    assert rendered.prefill == "<think>\nSo"
    assert rendered.text.endswith("<|im_start|>assistant\n<think>\nSo")
    assert Template(kind="chat").render("What is <think>?", make_tokenizer()).prefill == ""


def test_special_token_text_in_a_question_becomes_that_token(tokenizer: PreTrainedTokenizerFast) -> None:
    template = Template(kind="plain")
    assert END in template.token_ids(template.render("a<|im_end|>b", tokenizer), tokenizer)


MESSAGES = [{"role": "user", "content": "u"}]


@pytest.mark.parametrize(
    ("template", "question", "message"),
    [
        (Template(kind="plain"), MESSAGES, "list of messages: set data.init_args.template.kind: chat, not plain"),
        (Template(kind="r1_zero"), MESSAGES, "list of messages: set data.init_args.template.kind: chat"),
        (
            Template(kind="chat", system="s"),
            [{"role": "system", "content": "t"}, *MESSAGES],
            "remove .*template.system",
        ),
        (
            Template(kind="chat"),
            [*MESSAGES, {"role": "assistant", "content": "a"}],
            "last message .* must be the user's",
        ),
        (Template(kind="chat"), [{"role": "system", "content": "s"}], "last message .* must be the user's"),
    ],
)
def test_prompts_a_template_cannot_render(
    template: Template, question: list[dict[str, str]], message: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(ValueError, match=message):
        template.render(question, tokenizer)


def test_chat_needs_a_chat_template(make_tokenizer: MakeTokenizer) -> None:
    with pytest.raises(ValueError, match=r"data.init_args.template.kind: chat needs a chat template.*set kind: plain"):
        Template(kind="chat").render("q", make_tokenizer(chat=False))


def test_a_refusal_of_the_chat_template_is_readable(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no system role here') }}"
    with pytest.raises(ValueError, match=r"refuses these messages \(system, user\): no system role here"):
        Template(kind="chat", system="s").render("q", tokenizer)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "plain", "instruction": "Answer."}, "template.instruction: must contain {question}"),
        ({"kind": "r1_zero", "system": "s"}, "template.system: only kind chat"),
        ({"kind": "few_shot"}, "template.examples: few_shot needs at least one"),
        ({"kind": "plain", "examples": (Example("q", "a"),)}, "template.examples: kind plain shows none"),
    ],
)
def test_contradicting_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Template(**arguments)  # type: ignore[arg-type]


def test_a_template_is_written_inline_in_yaml() -> None:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--template", type=Template)
    yaml = "{kind: few_shot, instruction: 'Q: {question} A:', examples: [{question: '1+1', completion: ' 2'}]}"
    parsed = parser.instantiate(parser.parse_args([f"--template={yaml}"])).template
    assert parsed == Template(kind="few_shot", instruction="Q: {question} A:", examples=(Example("1+1", " 2"),))
    with pytest.raises(jsonargparse.ArgumentError):
        parser.parse_args(["--template={kind: fewshot}"])
