"""Activations that are made again in backward: the same bits, no product twice, and nothing of it in sampling."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lit_posttrain import blocks, stash
from lit_posttrain.batching import pad_sequences
from lit_posttrain.policy import LoraConfig, Policy, PolicyConfig

ROWS = ([[40, 41, 42], [40, 41, 42], [7, 9]], [[5, 6, 7, 1], [8, 1], [11, 12, 13, 14, 1]])


class Operations(TorchDispatchMode):
    """Counts what runs."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ran[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def policy(folder: Path, **config: Any) -> Policy:
    made = Policy(PolicyConfig(model=str(folder), **{"compute_dtype": "float32", **config}))
    made.build_view(torch.device("cpu"), sharded=False)
    return made


def learned(of: Policy) -> tuple[dict[str, torch.Tensor], Counter[str]]:
    """Log-probs and all gradients of a step, and what ran in backward."""
    sequences = pad_sequences(*ROWS)
    scored = of(sequences, sequences.completion_mask(), 1.0).log_probs
    with Operations() as backward:
        scored.sum().backward()
    return {"log_probs": scored.detach(), **{n: p.grad for n, p in of.trainable() if p.grad is not None}}, backward.ran


@pytest.mark.parametrize("lora", [None, LoraConfig(r=2, alpha=4)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3_text", "gpt2", "gpt_neox", "phi3"])
def test_the_same_to_the_last_bit(
    architecture_folder: Any, architecture: str, dtype: str, lora: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stash, "_SMALL", 0)
    folder = architecture_folder(architecture)
    results = []
    for lean_ in (False, True):
        torch.manual_seed(0)  # of the adapters
        results.append(learned(policy(folder, recompute_elementwise=lean_, compute_dtype=dtype, lora=lora))[0])
    assert results[0].keys() == results[1].keys()
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name


def test_products_that_an_mlp_changes_in_place(architecture_folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts add their bias to a product where it stands; what is kept has to be from before."""
    monkeypatch.setattr(stash, "_SMALL", 2**40)  # nothing is copied on the way
    folder = architecture_folder("gpt_oss")
    plain, lean = (learned(policy(folder, recompute_elementwise=wanted))[0] for wanted in (False, True))
    for name, value in plain.items():
        assert torch.equal(value, lean[name]), name


def test_what_is_cheap_runs_again_and_products_do_not(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = policy(tiny_model)
    _, again = learned(one)
    _, kept = learned(policy(tiny_model, recompute_elementwise=False))
    layers = one.hf_config.num_hidden_layers
    assert (kept["silu"], again["silu"]) == (0, layers)
    assert kept["rsqrt"] == 0
    norms = 2 * layers + 1  # before attention, before the MLP, and the last
    assert again["rsqrt"] == norms
    for product in ("mm", "addmm", "bmm"):
        assert again[product] == kept[product], product
    monkeypatch.setattr(stash, "_SMALL", 0)
    _, again = learned(one)
    assert again["rsqrt"] == 2 * norms - 1  # also for what follows a norm and keeps no copy of it; after the last none


def test_sampling_goes_past_it(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("nothing is learned here")

    one, sequences = policy(tiny_model), pad_sequences(*ROWS)
    monkeypatch.setattr(blocks, "_checkpoint", refuse)
    with torch.no_grad():
        one(sequences, sequences.completion_mask(), 1.0)
    with pytest.raises(AssertionError, match="nothing is learned"):
        one(sequences, sequences.completion_mask(), 1.0)


@pytest.mark.parametrize("config", [{"gradient_checkpointing": True}, {"recompute_elementwise": False}])
def test_where_it_stays_out(tiny_model: Path, config: dict[str, Any]) -> None:
    assert not any("forward" in vars(m) for m in policy(tiny_model, **config).model.modules())


@pytest.mark.parametrize(("device", "wanted", "done"), [("cpu", None, 1), ("cuda", None, 0), ("cuda", True, 1)])
def test_on_a_cpu_unless_said(tiny_model: Path, device: str, wanted: bool | None, done: int) -> None:
    one = Policy(PolicyConfig(model=str(tiny_model), compute_dtype="float32", recompute_elementwise=wanted))
    one.build_view(torch.device(device), sharded=False)
    assert any("forward" in vars(m) for m in one.model.modules()) == bool(done)


def test_it_is_done_once(tiny_model: Path) -> None:
    one = policy(tiny_model)
    first = [vars(m)["forward"] for m in one.model.modules() if "forward" in vars(m)]
    one.build_view(torch.device("cpu"), sharded=False)
    assert [vars(m)["forward"] for m in one.model.modules() if "forward" in vars(m)] == first
    assert len(first) == 3 * one.hf_config.num_hidden_layers + 2  # two norms and an MLP; the last norm, the decoder
