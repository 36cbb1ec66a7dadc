import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from streams import HEAD, stream, texts
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lit_posttrain.data import Template, VerifiablePrompts, streaming

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tokenizer(
    *, chat: bool = True, bos: bool = True, eos: bool = False, thinking: bool = False
) -> PreTrainedTokenizerFast:
    """Byte-level, with the one merge ``: <`` so that a token can span the end of a prompt."""
    specials = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*specials, *alphabet, ":<"])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[(":", "<")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(specials)
    single = ("<s> " if bos else "") + "$A" + (" </s>" if eos else "")
    core.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 0), ("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
    )
    if chat:
        tokenizer.chat_template = (
            CHAT_TEMPLATE.replace("assistant\n{% endif", "assistant\n<think>\n{% endif") if thinking else CHAT_TEMPLATE
        )
    return tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    return build_tokenizer


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., str]:
    def write(rows: list[dict[str, Any]], name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


@pytest.fixture
def make_data(tokenizer_folder: str) -> Callable[..., VerifiablePrompts]:
    """A DataModule with the tiny tokenizer; arguments as in the YAML, the template plain unless given."""

    def make(**arguments: Any) -> VerifiablePrompts:
        defaults = {"template": Template(kind="plain"), "batch_size": 4, "tokenizer": tokenizer_folder}
        return VerifiablePrompts(**(defaults | arguments))

    return make


@pytest.fixture(autouse=True)
def run_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")


@pytest.fixture
def paths(jsonl: Callable[..., str]) -> list[str]:
    return [jsonl(texts("a", 60), "a.jsonl"), jsonl(texts("b", 12), "b.jsonl"), jsonl(texts("c", 30), "c.jsonl")]


@pytest.fixture
def make(tokenizer_folder: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    monkeypatch.setattr(streaming, "HEAD", HEAD)
    return functools.partial(stream, tokenizer_folder)
