"""GRPO over two processes gives what one gives: same tokens, same losses, same weights (fp32)."""

import random
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from two_processes import train_in_two

from lit_posttrain.algorithms import GRPO
from lit_posttrain.data import PythonTask, Template, VerifiablePrompts
from lit_posttrain.objective import AdvantageConfig, KLConfig, Objective, RatioConfig
from lit_posttrain.policy import LoraConfig, PolicyConfig
from lit_posttrain.reference import ReferenceConfig
from lit_posttrain.rewards import PythonReward
from lit_posttrain.rollout import SamplingParams
from lit_posttrain.sharding import full_tensor

ITERATIONS = 3


def long_or_short(rng: random.Random) -> dict[str, str]:
    """Questions of which two short ones share a micro-batch and two long ones do not."""
    return {"question": "".join(rng.choices("abcdef ", k=rng.choice([8, 70]))), "answer": "1"}


def vowels(completions: list[str], **_: object) -> list[float]:
    return [float(sum(c in "aeiou0123456789" for c in text)) for text in completions]


def train(model: Path, out: Path, strategy: object, devices: int, lora: bool) -> None:
    """Three iterations with KL, a reference refresh and uneven minibatches; rank 0 saves what is compared."""
    pl.seed_everything(3, verbose=False)
    module = GRPO(
        policy=PolicyConfig(model=str(model), compute_dtype="float32", lora=LoraConfig(r=4, alpha=8) if lora else None),
        objective=Objective(
            advantage=AdvantageConfig(baseline="group_mean", scale="group_std"),
            ratio=RatioConfig(level="token", clip_low=0.2, clip_high=0.2),
            kl=KLConfig(estimator="k3", placement="loss", coef=0.05),
            aggregation="token_mean",
        ),
        rewards=[PythonReward(function=vowels)],
        sampling=SamplingParams(max_new_tokens=12),
        group_size=3,
        num_minibatches=2,
        reference=ReferenceConfig(refresh_every=2),
        optimizer=lambda params: torch.optim.AdamW(params, lr=3e-3, eps=1e-4),
        # Ranks then run different numbers of micro-batches.
        token_budget=140,
        log_samples_every=0,
    )
    data = VerifiablePrompts(
        template=Template(kind="plain"),
        batch_size=4,
        task=PythonTask(function=long_or_short),
        train_size=32,
        val_size=4,
        tokenizer=str(model),
    )
    seen: list[list[list[int]]] = []
    collect = module.collect

    def recorded(batch, iteration):
        rollout = collect(batch, iteration)
        seen.append([c.token_ids for c in rollout.completions])
        return rollout

    module.collect = recorded  # type: ignore[method-assign]
    phases: list[tuple[str, int]] = []
    module.phase = lambda name, total: phases.append((name, total))  # type: ignore[method-assign]
    trainer = pl.Trainer(
        accelerator="cpu", devices=devices, strategy=strategy, max_steps=ITERATIONS, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        limit_val_batches=0, default_root_dir=str(out),
    )  # fmt: skip
    trainer.fit(module, data)
    weights = {name: full_tensor(p.detach()).clone() for name, p in module.built_policy().trainable()}
    forwards = {kind: [n for name, n in phases if name == kind] for kind in ("scoring", "update")}
    torch.save({"tokens": seen, "weights": weights, "forwards": forwards}, out / f"rank{trainer.global_rank}.pt")


def one_process(model: Path, out: Path, lora: bool) -> dict:
    out.mkdir()
    train(model, out, "auto", 1, lora)
    return torch.load(out / "rank0.pt", weights_only=True)


@pytest.fixture(scope="module")
def single(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    return one_process(tiny_model, tmp_path_factory.mktemp("single") / "run", lora=False)


@pytest.mark.parametrize("kind", ["fsdp2", "ddp"])
@pytest.mark.trap(43)
@pytest.mark.trap(20)
def test_two_processes_train_as_one(kind: str, single: dict, tiny_model: Path, tmp_path: Path) -> None:
    compare(kind, single, tiny_model, tmp_path, lora=False)


def test_lora_under_ddp_trains_as_one_process(tiny_model: Path, tmp_path: Path) -> None:
    compare("ddp", one_process(tiny_model, tmp_path / "one", lora=True), tiny_model, tmp_path, lora=True)


def compare(kind: str, expected: dict, model: Path, out: Path, lora: bool) -> None:
    train_in_two(kind, lambda strategy: train(model, out, strategy, 2, lora))
    ranks = [torch.load(out / f"rank{r}.pt", weights_only=True) for r in range(2)]
    for i in range(ITERATIONS):
        # Each rank has a contiguous half of the prompts.
        assert ranks[0]["tokens"][i] + ranks[1]["tokens"][i] == expected["tokens"][i]
    assert ranks[0]["tokens"][0] != ranks[1]["tokens"][0]
    for kind in ("scoring", "update"):
        assert ranks[0]["forwards"][kind] != ranks[1]["forwards"][kind]
    for name, weight in expected["weights"].items():
        for rank in ranks:
            torch.testing.assert_close(rank["weights"][name], weight, rtol=1e-5, atol=1e-5)
