"""Prompts whose answers lie in several micro-batches: once through the network, and nothing else changes."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from architectures.zoo import ARCHITECTURES
from torch import Tensor

from lit_posttrain import kept_prompts
from lit_posttrain.batching import pad_sequences, split
from lit_posttrain.critic import ValuePolicy
from lit_posttrain.kept_prompts import prompts_once
from lit_posttrain.policy import LoraConfig, Policy, PolicyConfig, causal_lm
from lit_posttrain.scalar_heads import ScoreNetwork
from lit_posttrain.types import MicroBatch, Sequences

PROMPTS = [[5, 6, 7, 8] * 10, [9, 10, 11] * 13]  # 40 and 39 tokens
ANSWERS = [[1, 2, 3], [4] * 5, [12, 13], [14], [15] * 4, [16, 17, 18]]
TOKENS = 40 + 39 + sum(len(answer) - 1 for answer in ANSWERS)


@pytest.fixture(autouse=True)
def _however_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_prompts, "PASS_TOKENS", 0)


def rows() -> Sequences:
    return pad_sequences([PROMPTS[0]] * 4 + [PROMPTS[1]] * 2, ANSWERS)


def parts(budget: int = 46) -> list[MicroBatch]:
    """The first prompt's answers in several micro-batches."""
    sequences = rows()
    return split(sequences, sequences.completion_mask(), {}, budget, packed=True)


def policy(folder: Path, **config) -> Policy:
    made = Policy(PolicyConfig(model=str(folder), compute_dtype="float32", **config))
    made.sync()
    return made


def weights_of(mask: Tensor) -> Tensor:
    return torch.arange(1, mask.numel() + 1).view(mask.shape).sin()


def gradients(
    network: Policy, batches: list[MicroBatch], networks: list[Policy], sequences: Sequences | None = None
) -> dict[str, Tensor]:
    network.zero_grad()
    whole = weights_of((sequences or rows()).completion_mask())
    for batch in prompts_once(batches, networks):
        scored = network(batch.sequences, batch.mask, 0.8)
        (scored.log_probs * whole[batch.rows, : batch.mask.shape[1]]).sum().backward()
    return {name: p.grad.clone() for name, p in network.trainable() if p.grad is not None}


def as_one(network: Policy, sequences: Sequences | None = None) -> dict[str, Tensor]:
    """All rows padded, in one pass: nothing is shared or kept."""
    shares, network.shares_prompts = network.shares_prompts, False
    sequences = sequences or rows()
    batch = MicroBatch(sequences, sequences.completion_mask(), {}, torch.arange(len(sequences.ids)))
    made = gradients(network, [batch], [], sequences)
    network.shares_prompts = shares
    return made


def assert_equal(made: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert made.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(made[name], gradient, atol=2e-5 * float(gradient.abs().max()) + 1e-6, rtol=1e-4)


@contextmanager
def counted(network: Policy) -> Iterator[list[int]]:
    """Tokens of each pass through the decoder."""
    seen: list[int] = []
    decoder = causal_lm(network.model).base_model
    hook = decoder.get_input_embeddings().register_forward_hook(lambda m, a, out: seen.append(out.shape[1]))
    yield seen
    hook.remove()


@pytest.mark.parametrize(
    "architecture", [name for name in ARCHITECTURES if "sliding_window" not in ARCHITECTURES[name]]
)
def test_gradients_are_those_of_one_padded_pass(architecture_folder, architecture: str) -> None:
    network = policy(architecture_folder(architecture))
    batches = parts()
    assert len(batches) > 2
    assert_equal(gradients(network, batches, [network]), as_one(network))


@pytest.mark.parametrize("budget", [46, 42, 1])
def test_each_prompt_goes_through_the_network_once(tiny_model: Path, budget: int) -> None:
    network = policy(tiny_model)
    batches = parts(budget)
    with counted(network) as seen:
        kept = gradients(network, batches, [network])
    assert sum(seen) == TOKENS
    with counted(network) as seen:
        again = gradients(network, batches, [])
    assert sum(seen) >= TOKENS + 39
    assert_equal(kept, again)
    assert_equal(kept, as_one(network))


def test_parts_of_two_prompts_in_one_micro_batch(tiny_model: Path) -> None:
    network = policy(tiny_model)
    sequences = pad_sequences([[5] * 20] * 6 + [[6] * 19] * 15, [[7] * 10] * 6 + [[8, 9, 10, 11]] * 15)
    batches = split(sequences, sequences.completion_mask(), {}, 60, packed=True)
    assert any({0, 1} == {int(r >= 6) for r in batch.rows} for batch in batches)
    with counted(network) as seen:
        kept = gradients(network, batches, [network], sequences)
    assert sum(seen) == 20 + 6 * 9 + 19 + 15 * 3
    assert_equal(kept, as_one(network, sequences))


def test_answers_of_one_token_beside_another_prompt(tiny_model: Path) -> None:
    """They add nothing to the row, so attention has no queries for their prompt."""
    network = policy(tiny_model)
    sequences = pad_sequences([PROMPTS[0]] * 4 + [PROMPTS[1]] * 2, [[1] * 9, [2] * 9, [3], [4], [5] * 4, [6] * 4])
    pairs = torch.tensor([0, 0, 1, 1, 2, 2])
    batches = split(sequences, sequences.completion_mask(), {}, 90, packed=True, together=pairs)
    assert [batch.rows.tolist() for batch in batches] == [[0, 1], [4, 5, 2, 3]]
    assert_equal(gradients(network, batches, [network], sequences), as_one(network, sequences))


def test_in_low_precision_gradients_land_on_the_masters_too(tiny_model: Path) -> None:
    network = Policy(PolicyConfig(model=str(tiny_model), compute_dtype="bfloat16"))
    network.sync()
    batches = parts()
    kept, again = gradients(network, batches, [network]), gradients(network, batches, [])
    assert kept.keys() == again.keys() == dict(network.trainable()).keys()
    for name, gradient in again.items():
        assert kept[name].dtype == torch.float32
        assert float((kept[name] - gradient).norm() / gradient.norm()) < 0.05, name


def test_scores_without_gradients_are_kept_too(tiny_model: Path) -> None:
    network = policy(tiny_model)
    sequences = rows()
    with torch.no_grad(), counted(network) as seen:
        expected = network(sequences, sequences.completion_mask(), 1.0).log_probs
        assert seen.pop() == TOKENS
        for batch in prompts_once(parts(), [network]):
            found = network(batch.sequences, batch.mask, 1.0).log_probs
            torch.testing.assert_close(found, expected[batch.rows, : found.shape[1]], atol=1e-5, rtol=1e-5)
        assert sum(seen) == TOKENS


def test_scores_and_losses_in_one_turn_do_not_share_a_graph(tiny_model: Path) -> None:
    """A loss may look at the network without gradients first."""
    network = policy(tiny_model)
    expected = as_one(network)
    real = network.forward

    def twice(*arguments, **named):
        with torch.no_grad():
            real(*arguments, **named)
        return real(*arguments, **named)

    network.forward = twice  # type: ignore[method-assign]
    assert_equal(gradients(network, parts(), [network]), expected)


def test_adapters_on_and_off_are_kept_apart(tiny_model: Path) -> None:
    torch.manual_seed(3)  # of the adapters
    network = policy(tiny_model, lora=LoraConfig(r=2))
    with torch.no_grad():
        for name, p in network.trainable():
            p.add_(0.05 if "lora_B" in name else 0.0)
    network.sync()
    sequences = rows()
    mask = sequences.completion_mask()
    with torch.no_grad():
        expected = [network(sequences, mask, 1.0, adapters=on).log_probs for on in (True, False)]
        assert not torch.allclose(*expected, atol=1e-2)
        for batch in prompts_once(parts(), [network]):
            for on, whole in zip((True, False), expected, strict=True):
                found = network(batch.sequences, batch.mask, 1.0, adapters=on).log_probs
                torch.testing.assert_close(found, whole[batch.rows, : found.shape[1]], atol=1e-5, rtol=1e-5)
    assert_equal(gradients(network, parts(), [network]), as_one(network))


def test_changed_weights_are_seen_at_once(tiny_model: Path) -> None:
    """A reference that takes the policy's adapters' place for a moment syncs the policy, twice a micro-batch."""
    network, other = policy(tiny_model), policy(tiny_model)
    sequences = rows()
    with torch.no_grad():
        for i, batch in enumerate(prompts_once(parts(), [network])):
            network(batch.sequences, batch.mask, 1.0)
            for p in network.model.parameters():
                p.mul_(1.25 if i % 2 else 0.8)
            network.sync()
            found = network(batch.sequences, batch.mask, 1.0).log_probs
            other.load_state_dict(network.state_dict())
            expected = other(sequences, sequences.completion_mask(), 1.0).log_probs
            torch.testing.assert_close(found, expected[batch.rows, : found.shape[1]], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", [ScoreNetwork, ValuePolicy])
def test_values_and_rewards_are_kept_as_well(tiny_model: Path, kind: type[Policy]) -> None:
    network = kind(PolicyConfig(model=str(tiny_model), compute_dtype="float32"))
    network.sync()
    if isinstance(network, ValuePolicy):
        torch.nn.init.normal_(network.value_head.weight, generator=torch.Generator().manual_seed(0))

    def values(batch: MicroBatch) -> Tensor:
        if isinstance(network, ValuePolicy):
            return network.with_values(batch.sequences, batch.mask, 1.0)[1]
        at = torch.nn.functional.pad(batch.mask, (0, 1))
        return at.float().masked_scatter(at, network(batch.sequences, at))[:, :-1]

    def learned(batches: list[MicroBatch], networks: list[Policy]) -> dict[str, Tensor]:
        network.zero_grad()
        whole = weights_of(rows().completion_mask())
        for batch in prompts_once(batches, networks):
            (values(batch) * whole[batch.rows, : batch.mask.shape[1]]).sum().backward()
        return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}

    with counted(network) as seen:
        kept = learned(parts(), [network])
    assert sum(seen) == TOKENS
    network.shares_prompts = False
    assert_equal(kept, learned(parts(10_000), []))


def test_nothing_is_kept_where_it_costs_more_than_it_saves(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = policy(tiny_model)
    counts = []
    for limit in (39, 40):  # the first prompt comes in two parts, the second in one
        monkeypatch.setattr(kept_prompts, "PASS_TOKENS", limit)
        with counted(network) as seen:
            gradients(network, parts(), [network])
        counts.append(sum(seen))
    assert counts == [TOKENS, TOKENS + 40]


def test_a_prompt_does_not_wait_for_micro_batches_without_it(tiny_model: Path) -> None:
    """The token budget bounds memory, and counts what a micro-batch holds."""
    network = policy(tiny_model)
    batches = parts(1)  # four of the first prompt, two of the second
    order = [*batches[:2], batches[4], *batches[2:4], batches[5]]
    most = 0
    with counted(network) as seen:
        for batch in prompts_once(order, [network]):
            network(batch.sequences, batch.mask, 1.0).log_probs.sum().backward()
            most = max(most, len(network.kept._computed))
    assert most == 0
    assert sum(seen) == TOKENS + 3 * 40 + 39


def test_nothing_stays_behind(tiny_model: Path) -> None:
    network = policy(tiny_model)
    gradients(network, parts(), [network])
    assert not network.kept.wanted
    assert not network.kept._computed
    batches = prompts_once(parts(), [network])
    batch = next(batches)
    network(batch.sequences, batch.mask, 1.0)
    assert network.kept._computed
    batches.close()  # as an error in the loss would
    assert not network.kept.wanted
    assert not network.kept._computed


@pytest.mark.parametrize("config", [{"gradient_checkpointing": True}, {"compile_layers": True}])
def test_networks_that_go_without_say_what_they_compute_again(tiny_model: Path, config: dict[str, bool]) -> None:
    network = Policy(PolicyConfig(model=str(tiny_model), compute_dtype="float32", **config))
    network.build_view(torch.device("cpu"), sharded=False)
    assert network.kept.able is False
    for budget, said in ((46, 1), (10_000, 0)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert len(list(prompts_once(parts(budget), [network]))) == len(parts(budget))
        assert ["token_budget: it divides" in str(w.message) for w in caught] == [True] * said
    short = pad_sequences([[1]] * 4, [[1] * 9] * 4)  # 1 of 38 tokens again
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        divided = split(short, short.completion_mask(), {}, 17, packed=True)
        assert len(list(prompts_once(divided, [network]))) == 2
    able = policy(tiny_model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(prompts_once(parts(), [able]))
