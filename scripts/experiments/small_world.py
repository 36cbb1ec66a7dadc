"""A world small enough to train in minutes: a language of three domains, a network pretrained on it, PPO in it."""

import json
import os
import random
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lit_posttrain.algorithms import PPO
from lit_posttrain.algorithms.pretraining import PtxConfig
from lit_posttrain.critic import CriticConfig
from lit_posttrain.data import SupervisedExamples, Template, VerifiablePrompts
from lit_posttrain.objective import KLConfig, RatioConfig
from lit_posttrain.policy import PolicyConfig
from lit_posttrain.ppo_objective import GAEConfig, PPOObjective, ValueConfig
from lit_posttrain.rewards import PythonReward, RewardFunction
from lit_posttrain.rollout import SamplingParams
from lit_posttrain.schedules import Schedule

GOOD = ["bright", "kind", "happy", "warm", "brave", "gentle", "clever", "calm"]
BAD = ["dark", "cruel", "sad", "cold", "weak", "rough", "dull", "angry"]
PLAIN = ["big", "small", "old", "young", "red", "blue", "tall", "round"]
NOUNS = ["cat", "dog", "house", "river", "king", "child", "stone", "tree", "ship", "bird"]
VERBS = ["sees", "likes", "follows", "finds", "leaves", "calls"]
KEYS = list("abcdefgh")
WORDS = [*"0123456789", "+", "=", ";", "?", ".", "the", "and", *KEYS, *GOOD, *BAD, *PLAIN, *NOUNS, *VERBS]
DOMAINS = ("prose", "sums", "recall")


def prose(rng: random.Random) -> str:
    """Two to four sentences."""

    def phrase() -> str:
        return f"the {rng.choice(rng.choice((GOOD, BAD, PLAIN)))} {rng.choice(NOUNS)}"

    sentences = [f"{phrase()} {rng.choice(VERBS)} {phrase()} ." for _ in range(rng.randint(2, 4))]
    return " ".join(sentences)


def sums(rng: random.Random) -> str:
    """Sums of digits, each answer two digits."""
    lines = []
    for _ in range(rng.randint(2, 4)):
        a, b = rng.randint(0, 9), rng.randint(0, 9)
        lines.append(f"{a} + {b} = {(a + b) // 10} {(a + b) % 10} .")
    return " ".join(lines)


def recall(rng: random.Random) -> str:
    """Keys with their values, then some of them asked for."""
    pairs = [(key, rng.randint(0, 9)) for key in rng.sample(KEYS, 4)]
    given = " ".join(f"{key} {value} ;" for key, value in pairs)
    return given + " " + " ".join(f"{key} ? {value} ." for key, value in rng.sample(pairs, 3))


def texts(domain: str, count: int, seed: int) -> list[str]:
    """Texts of one domain."""
    rng = random.Random(f"{domain} {seed}")
    return [{"prose": prose, "sums": sums, "recall": recall}[domain](rng) for _ in range(count)]


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )


def rows(words: PreTrainedTokenizerFast, documents: list[str]) -> torch.Tensor:
    """Padded token ids, BOS in front and EOS behind; -100 is not needed, since padding is looked up by id."""
    ids = [[words.bos_token_id, *words(d).input_ids, words.eos_token_id] for d in documents]
    width = max(map(len, ids))
    return torch.tensor([row + [words.pad_token_id] * (width - len(row)) for row in ids])


def loss_of(network: Any, ids: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy a token; padding, whose id is 0, counts nowhere."""
    logits = network(input_ids=ids).logits[:, :-1].float()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), ignore_index=0)


def pretrain(folder: Path, seed: int, steps: int, layers: int = 4, width: int = 128) -> None:
    """Train a small Llama on all domains alike, and save it with its tokenizer."""
    words = tokenizer()
    torch.manual_seed(seed)
    network = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(words), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=128, tie_word_embeddings=True,
            pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    documents = [t for domain in DOMAINS for t in texts(domain, 6000, seed)]
    random.Random(seed).shuffle(documents)
    for step in range(steps):
        batch = [documents[(step * 64 + i) % len(documents)] for i in range(64)]
        optimizer.zero_grad()
        loss_of(network, rows(words, batch)).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    network.save_pretrained(folder)
    words.save_pretrained(folder)


@torch.no_grad()
def held_out(network: Any, seed: int) -> dict[str, float]:
    """Loss on held-out text, by domain."""
    words = tokenizer()
    network.eval()
    return {d: float(loss_of(network, rows(words, texts(d, 300, seed + 10_000)))) for d in DOMAINS}


def prompts_file(path: Path, seed: int, count: int = 2000) -> Path:
    """Beginnings of prose: the first two words of a sentence."""
    rng = random.Random(f"prompts {seed}")
    questions = [f"the {rng.choice(PLAIN)} {rng.choice(NOUNS)} {rng.choice(VERBS)}" for _ in range(count)]
    path.write_text("".join(json.dumps({"question": q}) + "\n" for q in dict.fromkeys(questions)))
    return path


def ppo(
    base: Path, folder: Path, seed: int, reward: Callable[..., list[float]] | RewardFunction, *, steps: int,
    ptx_coef: float = 0.0, kl: float = 0.02, lr: float = 3e-4, answers: int = 128, tokens: int = 24,
    questions: Path | None = None, callbacks: Sequence[pl.Callback] = (),
) -> tuple[Any, list[float]]:  # fmt: skip
    """Train by PPO, on prompts_file's or other questions; the trained HF network and every iteration's mean reward."""
    os.environ["PL_GLOBAL_SEED"] = str(seed)
    text = folder / "pretraining.jsonl"
    documents = [t for domain in DOMAINS for t in texts(domain, 2000, seed)]
    text.write_text("".join(json.dumps({"text": f"<s> {t}"}) + "\n" for t in documents))  # as in pretraining
    ptx = None
    if ptx_coef:
        data = SupervisedExamples(
            dataset=str(text), batch_size=answers, held_out_percent=0, val_size=0, supervise="all"
        )
        ptx = PtxConfig(coef=ptx_coef, ratio=1.0, data=data)
    module = PPO(
        policy=PolicyConfig(model=str(base), compute_dtype="float32"),
        objective=PPOObjective(
            ratio=RatioConfig(level="token", clip_low=0.2, clip_high=0.2),
            kl=KLConfig(estimator="k1", placement="reward", coef=kl),
            aggregation="token_mean",
            gae=GAEConfig(gamma=1.0, lam=0.95, whiten_advantages=True, whiten_rewards=False),
            value=ValueConfig(coef=0.1, clip=0.2),
        ),
        critic=CriticConfig(zero_head=True, lr=1e-3),
        rewards=[reward if isinstance(reward, RewardFunction) else PythonReward(reward)],
        sampling=SamplingParams(max_new_tokens=tokens),
        num_minibatches=2,
        ptx=ptx,
        token_budget=8192,
        log_samples_every=0,
        optimizer=lambda params: torch.optim.AdamW(params, lr=lr, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0),
        scheduler=lambda o: Schedule(o, decay="constant", warmup_steps=5, warmup_ratio=0.1),
    )
    seen: list[float] = []
    collect = module.collect

    def watched(batch: Any, iteration: int) -> Any:
        rollout = collect(batch, iteration)
        seen.append(float(rollout.judgement.rewards.mean()))
        return rollout

    module.collect = watched  # type: ignore[method-assign]
    asked = questions or prompts_file(folder / "prompts.jsonl", seed)
    data = VerifiablePrompts(
        template=Template(kind="plain"), dataset=str(asked), batch_size=answers,
        tokenizer=str(base), held_out_percent=0, val_size=0,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pl.Trainer(
            accelerator="cpu", devices=1, max_steps=steps, max_epochs=-1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, limit_val_batches=0,
            default_root_dir=str(folder), callbacks=list(callbacks),
        ).fit(module, data)  # fmt: skip
    network = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    network.load_state_dict(module.built_policy().model.state_dict())
    return network, seen


def temporary() -> tempfile.TemporaryDirectory[str]:
    """A folder of an experiment's own."""
    return tempfile.TemporaryDirectory(prefix="experiment-")
