"""The compute view: what trains is fp32, what computes may be bf16, and gradients find their way back."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from lit_posttrain.policy import LoraConfig, Policy, PolicyConfig
from lit_posttrain.precision import ComputeView, describe_hardware, multiplies_bfloat16, resolve_dtype

CPU = torch.device("cpu")
IDS = torch.tensor([[5, 80, 200, 7, 9], [3, 3, 17, 250, 1]])


@pytest.fixture
def network(tiny_model: Path) -> nn.Module:
    """Tied weights included."""
    return Policy(PolicyConfig(model=str(tiny_model))).model


def loss(network: nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    return network(input_ids=ids).logits.float().log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None]).sum()


# --- what dtype -------------------------------------------------------------------------------------------------------


def test_a_named_dtype_is_taken_at_its_word() -> None:
    assert resolve_dtype("float32", CPU) == torch.float32
    assert resolve_dtype("bfloat16", CPU) == torch.bfloat16


@pytest.mark.parametrize(
    ("capabilities", "dtype"),
    [
        ({}, torch.float32),
        ({"avx2": True, "avx512_f": True}, torch.float32),
        ({"avx2": True, "amx_bf16": False, "avx512_bf16": False}, torch.float32),
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True}, torch.bfloat16),
    ],
)
def test_auto_on_a_cpu(monkeypatch, capabilities: dict[str, bool], dtype: torch.dtype) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert resolve_dtype("auto", CPU) == dtype
    assert multiplies_bfloat16(CPU) == (dtype == torch.bfloat16)
    assert f"auto precision {str(dtype).removeprefix('torch.')}" in describe_hardware(CPU)


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [((7, 0), torch.float32), ((7, 5), torch.float32), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)],
)
def test_auto_on_cuda(monkeypatch, capability: tuple[int, int], dtype: torch.dtype) -> None:
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda asked: capability if asked == device else (0, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda asked: "Some GPU")
    assert resolve_dtype("auto", device) == dtype
    assert describe_hardware(device) == f"Some GPU, auto precision {str(dtype).removeprefix('torch.')}"


# --- the view ---------------------------------------------------------------------------------------------------------


def test_in_float32_the_view_is_the_network(network: nn.Module) -> None:
    assert ComputeView(network, torch.float32).module is network


@pytest.mark.trap(14)
def test_masters_stay_fp32_and_the_view_is_their_rounding(network: nn.Module) -> None:
    before = copy.deepcopy(network.state_dict())
    view = ComputeView(network, torch.bfloat16)
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    assert {p.dtype for p in view.module.parameters()} == {torch.bfloat16}
    for (name, master), (other, low) in zip(network.named_parameters(), view.module.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(master, before[name])
        assert torch.equal(low, master.bfloat16())


def test_tied_weights_stay_tied(network: nn.Module) -> None:
    module = ComputeView(network, torch.bfloat16).module
    assert module.get_input_embeddings().weight is module.get_output_embeddings().weight


def test_buffers_stay_fp32(network: nn.Module) -> None:
    """A rotary frequency in bf16 is wrong by a part in 256, and at position 1000 by whole turns."""
    module = ComputeView(network, torch.bfloat16).module
    buffers = {name: b for name, b in module.named_buffers() if b.is_floating_point()}
    assert any("inv_freq" in name for name in buffers)
    for name, buffer in network.named_buffers():
        if buffer.is_floating_point():
            assert buffers[name].dtype == torch.float32
            assert torch.equal(buffers[name], buffer)


def test_gradients_are_those_of_a_plain_bf16_network(network: nn.Module) -> None:
    plain = copy.deepcopy(network)
    for p in plain.parameters():
        p.data = p.data.bfloat16()
    loss(plain).backward()
    view = ComputeView(network, torch.bfloat16)
    loss(view.module).backward()
    for master, reference in zip(network.parameters(), plain.parameters(), strict=True):
        assert master.grad is not None
        assert reference.grad is not None
        assert master.grad.dtype == torch.float32
        assert torch.equal(master.grad, reference.grad.float())
    assert all(low.grad is None for low in view.module.parameters())


def test_micro_batches_accumulate_in_fp32(network: nn.Module) -> None:
    """The sum over micro-batches, each rounded to bf16 once; adding them up in bf16 would round at each."""
    view = ComputeView(network, torch.bfloat16)
    singles = []
    for row in range(2):
        network.zero_grad()
        loss(view.module, IDS[row : row + 1]).backward()
        singles.append([p.grad.clone() for p in network.parameters()])
    network.zero_grad()
    for row in range(2):
        loss(view.module, IDS[row : row + 1]).backward()
    lost = 0
    for i, master in enumerate(network.parameters()):
        expected = singles[0][i] + singles[1][i]
        assert torch.equal(master.grad, expected)
        lost += int((expected.bfloat16().float() != expected).sum())
    assert lost > 0


@pytest.mark.trap(14)
def test_updates_below_bf16_resolution_are_kept_and_add_up(network: nn.Module) -> None:
    view = ComputeView(network, torch.bfloat16)
    master, low = next((m, v) for m, v in view.pairs if m.dim() > 1)
    start, seen = master.detach().clone(), low.detach().clone()
    with torch.no_grad():
        master.mul_(1 + 1e-6)
    view.sync()
    moved = (master / start - 1)[start.abs() > 1e-3]
    torch.testing.assert_close(moved, torch.full_like(moved, 1e-6), atol=2e-7, rtol=0)
    assert (low == seen).float().mean() > 0.99  # bf16 cannot see one such update
    with torch.no_grad():
        for _ in range(9999):
            master.mul_(1 + 1e-6)
    view.sync()
    assert (low != seen).float().mean() > 0.5  # but it sees ten thousand of them
    assert torch.equal(low, master.bfloat16())


def test_without_sync_the_view_is_as_it_was(network: nn.Module) -> None:
    view = ComputeView(network, torch.bfloat16)
    before = [low.detach().clone() for _, low in view.pairs]
    with torch.no_grad():
        for p in network.parameters():
            p.add_(1.0)
    assert all(torch.equal(low, b) for (_, low), b in zip(view.pairs, before, strict=True))
    view.sync()
    assert all(torch.equal(low, master.bfloat16()) for master, low in view.pairs)


def test_frozen_parameters_exist_once(tiny_model: Path) -> None:
    policy = Policy(PolicyConfig(model=str(tiny_model), compute_dtype="bfloat16", lora=LoraConfig(r=2)))
    policy.sync()
    pairs = policy.view.pairs
    assert {master.requires_grad for master, _ in pairs} == {True, False}
    for master, low in pairs:
        shared = master.data_ptr() == low.data_ptr()
        assert shared == (not master.requires_grad)
        assert master.dtype == (torch.float32 if master.requires_grad else torch.bfloat16)


def test_the_view_is_no_part_of_the_module_tree(tiny_model: Path) -> None:
    policy = Policy(PolicyConfig(model=str(tiny_model), compute_dtype="bfloat16"))
    names, parameters = policy.state_dict().keys(), list(policy.parameters())
    policy.sync()
    assert policy.compute_dtype == torch.bfloat16
    assert policy.state_dict().keys() == names
    assert all(a is b for a, b in zip(policy.parameters(), parameters, strict=True))
