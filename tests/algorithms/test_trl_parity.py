"""Whole runs against TRL's trainers: the same weights, the same two batches, plain SGD in fp32 on both sides."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from offline_runs import data, fit, module
from tiny import byte_tokenizer
from tiny_runs import Recorder
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForSequenceClassification

from lit_posttrain.functional.preference_losses import PairLossOptions

pytestmark = pytest.mark.parity
STEPS, BATCH, BETA = 2, 4, 0.1
ROWS = STEPS * BATCH
TOLERANCE, MOVED = 1e-5, 1e-3
UNUSED = (
    "~"  # a byte that no row holds; the classifier of transformers takes the end token for padding where both are one
)
Row = Callable[[int], dict[str, Any]]
Weights = dict[str, Tensor]


def prompt(i: int) -> str:
    return f"Q{i}{'?' * (3 * i % 7)}:"


def completion(i: int) -> str:
    return f" {'abcde'[i % 5] * (5 * i % 9 + 1)}{i}"


def demonstration(i: int) -> dict[str, Any]:
    return {"prompt": prompt(i), "completion": completion(i)}


def labelled(i: int) -> dict[str, Any]:
    return {**demonstration(i), "label": i % 3 > 0}


def pair(i: int) -> dict[str, Any]:
    return {"prompt": prompt(i), "chosen": completion(i), "rejected": completion(2 * i + 3)}


def with_margin(i: int) -> dict[str, Any]:
    return {**pair(i), "margin": 0.3 * i - 1}


@pytest.fixture(scope="module")
def classifier(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sequence classifier with a head; the bias that ours has besides begins at 0."""
    folder = tmp_path_factory.mktemp("parity") / "classifier"
    network = LlamaForSequenceClassification.from_pretrained(tiny_model, num_labels=1)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        network.score.weight.copy_(0.3 * torch.randn(network.score.weight.shape, generator=generator))
    network.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def ours(
    kind: str, model: Path, folder: Path, row: Row, lr: float, **settings: Any
) -> tuple[list[float], Weights, list[int]]:
    """Losses of the steps, weights after them, and the rows in the order of the steps."""
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row(i)) + "\n" for i in range(ROWS)))
    examples = data(kind, model, folder, dataset=str(path), batch_size=BATCH)
    run = module(kind, model, lr=lr, **{"max_grad_norm": None, **settings})
    recorder = Recorder(run)
    fit(run, examples, folder, max_steps=STEPS)
    a_row = 2 if kind in ("dpo", "rm") else 1
    seen = [r for step in range(STEPS) for r in examples.batch(step).columns["row"].tolist() if r >= 0]
    network = run.built_policy().model
    weights = {name: p.detach().clone() for name, p in network.named_parameters() if name != "score.bias"}
    return [r.metrics["loss"] for r in recorder.results], weights, [r // a_row for r in seen[::a_row]]


def theirs(
    name: str, network: Any, folder: Path, rows: list[dict[str, Any]], lr: float, **settings: Any
) -> tuple[list[float], Weights]:
    """Losses of the steps and weights after them, of a trainer of TRL that takes the rows as they come."""
    tokenizer = byte_tokenizer(chat_template=None)
    tokenizer.pad_token = UNUSED
    arguments = {
        "output_dir": str(folder / "trl"), "max_steps": STEPS, "per_device_train_batch_size": BATCH,
        "train_sampling_strategy": "sequential", "optim": "sgd", "learning_rate": lr, "lr_scheduler_type": "constant",
        "weight_decay": 0.0, "max_grad_norm": 0.0, "bf16": False, "gradient_checkpointing": False, "use_cpu": True,
        "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1000,
    }  # fmt: skip
    config = getattr(trl, f"{name}Config")(**{**arguments, **settings})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = getattr(trl, f"{name}Trainer")(
            model=network, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
        )
        losses, compute = [], trainer.compute_loss

        def recording(*args: Any, **kwargs: Any) -> Any:
            loss = compute(*args, **kwargs)
            losses.append(float(loss))
            return loss

        trainer.compute_loss = recording
        trainer.train()
    return losses, {key: p.detach().clone() for key, p in trainer.model.named_parameters()}


def compare(
    kind: str, name: str, model: Path, folder: Path, row: Row, *, lr: float, own: Any = None, other: Any = None
) -> None:
    """Both train; losses of every step and weights after the last are equal, and the weights moved."""
    loader = LlamaForSequenceClassification if kind == "rm" else AutoModelForCausalLM
    network = loader.from_pretrained(model, dtype=torch.float32)
    before = {key: p.detach().clone() for key, p in network.named_parameters()}
    losses, weights, order = ours(kind, model, folder, row, lr, **(own or {}))
    assert sorted(order) == list(range(ROWS)) != order
    expected, after = theirs(name, network, folder, [row(i) for i in order], lr, **(other or {}))
    assert len(losses) == len(expected) == STEPS
    assert losses == pytest.approx(expected, rel=TOLERANCE, abs=TOLERANCE)
    assert weights.keys() == after.keys() == before.keys()
    for key, value in after.items():
        torch.testing.assert_close(weights[key], value, rtol=0, atol=TOLERANCE, msg=lambda m, k=key: f"{k}: {m}")
        assert float((value - before[key]).abs().max()) > MOVED, f"{key} hardly moved"


def test_sft(tiny_model: Path, tmp_path: Path) -> None:
    compare("sft", "SFT", tiny_model, tmp_path, demonstration, lr=0.1, other={"completion_only_loss": True})


@pytest.mark.parametrize(("row", "centring"), [(pair, None), (with_margin, None), (pair, 0.1), (with_margin, 0.1)])
def test_reward_model(classifier: Path, tmp_path: Path, row: Row, centring: float | None) -> None:
    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in parameters if p.shape != (1,)], lr=0.1)  # TRL's head has no bias

    own = {"centring": centring or 0.0, "optimizer": optimizer, "normalise": False}
    compare("rm", "Reward", classifier, tmp_path, row, lr=0.1, own=own, other={"center_rewards_coefficient": centring})


@pytest.mark.parametrize(
    ("losses", "weights", "lr"),
    [
        (["sigmoid"], None, 0.5),
        (["ipo"], None, 0.05),
        (["hinge"], None, 0.5),
        (["aot"], None, 0.5),
        (["sigmoid", "sft"], [0.8, 0.3], 0.2),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, list) and isinstance(value[0], str) else None,
)
def test_dpo(tiny_model: Path, tmp_path: Path, losses: Any, weights: Any, lr: float) -> None:
    own = {"loss_type": losses, "loss_weights": weights, "options": PairLossOptions(beta=BETA)}
    other = {"loss_type": losses, "loss_weights": weights, "beta": BETA}
    compare("dpo", "DPO", tiny_model, tmp_path, pair, lr=lr, own=own, other=other)


def test_kto(tiny_model: Path, tmp_path: Path) -> None:
    constants = {"beta": BETA, "desirable_weight": 1.2, "undesirable_weight": 0.7}
    compare("kto", "KTO", tiny_model, tmp_path, labelled, lr=0.5, own=constants, other=constants)
