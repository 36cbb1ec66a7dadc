"""Gradients of embeddings and head that backward adds where they belong: the same, and no arrays of their own."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import offline_runs
import pytest
import torch
from architectures.zoo import ARCHITECTURES
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lit_posttrain.algorithms import SFT
from lit_posttrain.batching import pad_sequences
from lit_posttrain.gathering import gathering
from lit_posttrain.policy import LoraConfig, Policy, PolicyConfig
from lit_posttrain.scalar_heads import ScoreNetwork, last_tokens
from lit_posttrain.types import Sequences

# Two passes with tokens in common, one twice in a row: gradients add up within and between them.
PASSES = [pad_sequences([[5, 6, 7], [5, 6, 7]], [[8, 8, 5], [9]]), pad_sequences([[10, 5]], [[8, 11]])]

Around = Callable[[Policy], AbstractContextManager[Any]]


def policy(folder: Path, dtype: str = "float32", kind: type[Policy] = Policy, **config: Any) -> Policy:
    made = kind(PolicyConfig(model=str(folder), compute_dtype=dtype, **config))  # type: ignore[arg-type]
    made.sync()
    return made


def trained(network: Policy) -> list[nn.Parameter]:
    return [p for _, p in network.trainable()]


def gathered(network: Policy) -> AbstractContextManager[Any]:
    return gathering([network], trained(network))


def by_autograd(network: Policy) -> AbstractContextManager[Any]:
    return nullcontext()


def score(network: Policy, sequences: Sequences) -> Tensor:
    if isinstance(network, ScoreNetwork):
        return network(sequences, last_tokens(sequences)).sum()
    scored = network(sequences, sequences.completion_mask(), 0.8).log_probs
    return (scored * torch.arange(1, scored.numel() + 1).view(scored.shape).sin()).sum()


def gradients(network: Policy, around: Around) -> dict[str, Tensor]:
    network.zero_grad()
    with around(network):
        for sequences in PASSES:
            score(network, sequences).backward()
    assert all(p.grad is not None and not p.grad.is_sparse for _, p in network.trainable())
    return {name: p.grad.clone() for name, p in network.trainable() if p.grad is not None}


def assert_equal(made: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert made.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(made[name], gradient, atol=1e-6 * float(gradient.abs().max()), rtol=1e-6)


class LargeArrays(TorchDispatchMode):
    """How many arrays of a shape were made."""

    def __init__(self, shape: Sequence[int]):
        super().__init__()
        self.shape, self.made = tuple(shape), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if _is_strided(x)}
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if _is_strided(x) and tuple(x.shape) == self.shape and x.untyped_storage().data_ptr() not in given:
                self.made += 1
        return out


def _is_strided(x: Any) -> bool:
    return isinstance(x, Tensor) and x.layout == torch.strided


def arrays_of_backward(network: Policy, around: Around) -> int:
    """As large as the embeddings."""
    network.zero_grad()
    with around(network):
        loss = score(network, PASSES[0])
        with LargeArrays(network.decode_network().get_input_embeddings().weight.shape) as seen:
            loss.backward()
    return seen.made


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_are_those_of_autograd(architecture_folder, architecture: str) -> None:
    network = policy(architecture_folder(architecture))
    assert_equal(gradients(network, gathered), gradients(network, by_autograd))


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3_text"])  # tied, not tied, scaled
def test_no_array_as_large_as_the_vocabulary_is_made(architecture_folder, architecture: str) -> None:
    network = policy(architecture_folder(architecture))
    assert arrays_of_backward(network, by_autograd) >= 2
    assert arrays_of_backward(network, gathered) == 0


def test_in_low_precision_the_heads_product_alone_is_made(tiny_model: Path) -> None:
    network = policy(tiny_model, "bfloat16")
    assert arrays_of_backward(network, by_autograd) > 2
    assert arrays_of_backward(network, gathered) == 1


def test_a_network_without_vocabulary_head(tiny_model: Path) -> None:
    network = policy(tiny_model, kind=ScoreNetwork)
    assert_equal(gradients(network, gathered), gradients(network, by_autograd))
    assert arrays_of_backward(network, by_autograd) >= 1
    assert arrays_of_backward(network, gathered) == 0


def test_adapters_alone_have_gradients(tiny_model: Path) -> None:
    torch.manual_seed(3)  # of the adapters
    network = policy(tiny_model, lora=LoraConfig(r=2))
    assert_equal(gradients(network, gathered), gradients(network, by_autograd))
    assert all(p.grad is None for p in network.parameters() if not p.requires_grad)


@pytest.mark.trap(14)
@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_in_low_precision_sums_are_fp32(architecture_folder, architecture: str) -> None:
    """As exact as autograd's, which rounds the sum of a pass, head and embeddings together, to bf16 again."""
    network = policy(architecture_folder(architecture), "bfloat16")
    exact = gradients(policy(architecture_folder(architecture)), by_autograd)
    ours, theirs = gradients(network, gathered), gradients(network, by_autograd)
    assert ours.keys() == exact.keys()
    for name, gradient in exact.items():
        assert ours[name].dtype == torch.float32
        gap, usual = (float((made[name] - gradient).norm()) for made in (ours, theirs))
        assert gap <= 1.1 * usual + 1e-3 * float(gradient.norm()), name
    assert network.view is not None
    assert all(low.grad is None for _, low in network.view.pairs)


def test_many_small_gradients_do_not_vanish_in_low_precision(tiny_model: Path) -> None:
    """Each is below the resolution in bf16 of the gradient that they are added to."""
    network = policy(tiny_model, "bfloat16")
    weight: Any = network.model.get_input_embeddings().weight  # type: ignore[operator]
    single = gradients(network, by_autograd)
    with gathered(network):
        weight.grad.fill_(1000.0)
        for sequences in PASSES:
            score(network, sequences).backward()
    name = next(name for name, p in network.trainable() if p is weight)
    torch.testing.assert_close(weight.grad - 1000.0, single[name], atol=2e-3, rtol=0.02)


def test_what_is_not_trained_has_the_gradient_it_would_have(tiny_model: Path) -> None:
    """A policy at rest while a critic on its network learns: autograd adds up, and the caller throws it away."""
    network = policy(tiny_model)
    expected = gradients(network, by_autograd)

    def at_rest(network: Policy) -> AbstractContextManager[Any]:
        return gathering([network], [p for p in trained(network) if p.dim() == 1])

    made = gradients(network, at_rest)
    assert_equal(made, expected)


def test_afterwards_all_is_as_before(tiny_model: Path) -> None:
    network = policy(tiny_model)
    expected = gradients(network, by_autograd)
    with pytest.raises(RuntimeError, match="on the way"), gathered(network):
        raise RuntimeError("on the way")
    for p in network.parameters():
        p.grad = None
    score(network, PASSES[0]).backward()
    for p in trained(network):
        assert p.grad is not None
        assert not p.grad.is_sparse
    found = torch.autograd.grad(sum((score(network, s) for s in PASSES), torch.zeros(())), trained(network))
    assert_equal(dict(zip((name for name, _ in network.trainable()), found, strict=True)), expected)


def test_elsewhere_autograd_adds_up(tiny_model: Path) -> None:
    network = policy(tiny_model)
    assert network.gathers
    network.build_view(torch.device("cpu"), sharded=True)
    assert not network.gathers
    assert arrays_of_backward(network, gathered) >= 2
    network.build_view(torch.device("meta"), sharded=False)
    assert not network.gathers


@pytest.mark.parametrize(("budget", "in_place"), [(1, True), (10_000, False)])
def test_a_step_of_several_passes_gathers(tiny_model: Path, tmp_path: Path, budget: int, in_place: bool) -> None:
    """One pass has nothing to add to: its gradients become the parameters' as they are."""
    module: SFT = offline_runs.module("sft", tiny_model, token_budget=budget)
    seen: list[bool] = []

    class Look(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            embedding = pl_module.policy.decode_network().get_input_embeddings()
            embedding.register_forward_hook(lambda m, *_: seen.append(m.sparse))

    offline_runs.fit(module, offline_runs.data("sft", tiny_model, tmp_path), tmp_path, Look(), max_steps=1)
    assert len(seen) == (4 if in_place else 1)
    assert set(seen) == {in_place}
