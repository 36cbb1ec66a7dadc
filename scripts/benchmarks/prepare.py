"""Worker that runs once before the others: the random model, the prompts as token ids, and what the machine is."""

from __future__ import annotations

import importlib.metadata
import platform
import random
from pathlib import Path
from typing import Any

import torch

from . import offline_data
from .models import write_random_model
from .protocol import Channel
from .questions import QUESTIONS


def main() -> None:
    """Answer one setup."""
    channel = Channel()
    setup = channel.receive()
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    from lit_posttrain.batching import TOGETHER_BUDGET, TOKEN_BUDGETS
    from lit_posttrain.precision import multiplies_bfloat16

    device = setup["device"]
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        channel.reply(error="--device cuda: torch sees no GPU")
        return
    bf16 = multiplies_bfloat16(torch.device(device))
    dtype = setup["dtype"] if setup["dtype"] != "auto" else ("bfloat16" if bf16 else "float32")
    if setup["random_init"] is not None:
        write_random_model(setup["random_init"], Path(setup["model"]), setup["seed"])
    config = AutoConfig.from_pretrained(setup["model"])
    tokenizer = AutoTokenizer.from_pretrained(setup["model"])
    random_prompts = draw_prompts(config.get_text_config().vocab_size, setup)
    chat = chat_prompts(tokenizer, setup["prompts"]) if setup["random_init"] is None else None
    try:
        stops = GenerationConfig.from_pretrained(setup["model"]).eos_token_id
    except OSError:
        stops = None
    stops = config.get_text_config().eos_token_id if stops is None else stops
    channel.reply(
        device=device,
        gpus=torch.cuda.device_count() if device == "cuda" else 0,
        dtype=dtype,
        multiplies_bfloat16=bf16,
        token_budget=TOKEN_BUDGETS[getattr(torch, dtype)],
        together_budget=TOGETHER_BUDGET,
        fixed_prompts=random_prompts,
        natural_prompts=chat or random_prompts,
        natural_source="chat questions" if chat else "random tokens",
        offline=offline(tokenizer, setup) if setup["offline"] else None,
        ppo=ppo(tokenizer, config.get_text_config().vocab_size, setup) if setup["ppo"] else None,
        stops=[] if stops is None else [stops] if isinstance(stops, int) else list(stops),
        machine=machine(device, dtype),
    )


def offline(tokenizer: Any, setup: dict[str, Any]) -> dict[str, Any]:
    """Examples for the sections that learn from fixed ones; for a reward model also the network that it begins with."""
    names = [name for task in setup["offline"] for name in ([task, "pairs"] if task == "rm" else [task])]
    examples = {name: offline_data.make(name, tokenizer, setup["seed"], quick=setup["quick"]) for name in names}
    classifier = None
    if "rm" in setup["offline"]:
        classifier = Path(setup["folder"]) / "classifier"
        offline_data.write_classifier(setup["model"], tokenizer, classifier, setup["seed"])
    return {
        "examples": examples,
        "padding": offline_data.padding_token(tokenizer, [e for made in examples.values() for e in made]),
        "classifier": None if classifier is None else str(classifier),
    }


def ppo(tokenizer: Any, vocabulary: int, setup: dict[str, Any]) -> dict[str, Any]:
    """One prompt an answer, and the network that reward model and critic begin with."""
    asked = {**setup, "prompts": setup["prompts"] * setup["samples"]}
    chat = chat_prompts(tokenizer, asked["prompts"]) if setup["random_init"] is None else None
    prompts = chat or draw_prompts(vocabulary, asked)
    folder = Path(setup["folder"]) / "reward_model"
    offline_data.write_classifier(setup["model"], tokenizer, folder, setup["seed"])
    examples = [{"prompt": prompt, "completions": []} for prompt in prompts]
    return {
        "prompts": prompts,
        "classifier": str(folder),
        "eos": tokenizer.eos_token_id,
        "padding": offline_data.padding_token(tokenizer, examples, besides=[tokenizer.eos_token_id]),
    }


def draw_prompts(vocabulary: int, setup: dict[str, Any]) -> list[list[int]]:
    """Random token ids, special ones left out, a few lengths."""
    draw = random.Random(setup["seed"])
    margin = 100 if vocabulary > 1000 else 2
    lengths = [max(1, setup["prompt_tokens"] - i % 8) for i in range(setup["prompts"])]
    return [[draw.randrange(margin, vocabulary - margin) for _ in range(n)] for n in lengths]


def chat_prompts(tokenizer: Any, count: int) -> list[list[int]] | None:
    """Questions as the chat template writes them; None where there is no template."""
    if tokenizer.chat_template is None:
        return None
    # Past the last question they come again, numbered, since equal prompts would be one group.
    texts = [q if i < len(QUESTIONS) else f"({i}) {q}" for i in range(count) for q in [QUESTIONS[i % len(QUESTIONS)]]]
    messages = [[{"role": "user", "content": text}] for text in texts]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)[
        "input_ids"
    ]


def machine(device: str, dtype: str) -> dict[str, Any]:
    """What the figures depend on."""
    versions = {}
    for package in ("torch", "transformers", "lightning"):
        versions[package] = importlib.metadata.version(package)
    return {
        "cpu": cpu_name(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "capabilities": sorted(k for k, v in torch.cpu.get_capabilities().items() if v is True),
        "device": device,
        "dtype": dtype,
        "versions": versions,
    }


def cpu_name() -> str:
    """The CPU's model, as the kernel calls it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
