"""The reference stays what it is while the policy trains, becomes the policy when told to, and survives a resume."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tiny import write_tiny_model
from torch import Tensor

from lit_posttrain.batching import pad_sequences
from lit_posttrain.beside import beside
from lit_posttrain.checkpoint import checkpoints_folder
from lit_posttrain.functional.kl import kl_estimate
from lit_posttrain.policy import LoraConfig, Policy, PolicyConfig
from lit_posttrain.reference import Reference, ReferenceConfig

SEQUENCES = pad_sequences([[5, 6], [7]], [[8, 200, 33], [9, 10]])
MASK = SEQUENCES.completion_mask()
LORA = [None, LoraConfig(r=4)]
DTYPES = ["float32", "bfloat16"]


def pair(
    folder: Path, lora: LoraConfig | None = None, compute_dtype: str = "float32", **config
) -> tuple[Policy, Reference]:
    torch.manual_seed(0)
    policy = Policy(PolicyConfig(model=str(folder), compute_dtype=compute_dtype, lora=lora))
    reference = Reference(policy, ReferenceConfig(**config))
    reference.place(torch.device("cpu"), None)
    policy.build_view(torch.device("cpu"), sharded=False)
    return policy, reference


def scores(policy: Policy) -> Tensor:
    with torch.no_grad():
        return policy(SEQUENCES, MASK, 0.9).log_probs


def ref_scores(reference: Reference) -> Tensor:
    return reference.log_probs(SEQUENCES, MASK, 0.9)


def train(policy: Policy, seed: int = 1) -> None:
    """Move every trainable parameter, as an optimizer would: in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, p in policy.trainable():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    policy.sync()


@contextmanager
def unmoved(policy: Policy) -> Iterator[None]:
    before = {k: v.clone() for k, v in policy.state_dict().items()}
    scored = scores(policy)
    yield
    assert all(torch.equal(v, before[k]) for k, v in policy.state_dict().items())
    assert torch.equal(scores(policy), scored)


@pytest.mark.parametrize("lora", LORA)
@pytest.mark.parametrize("compute_dtype", DTYPES)
@pytest.mark.trap(11)
def test_at_the_start_the_kl_is_exactly_zero(tiny_model: Path, lora, compute_dtype: str) -> None:
    policy, reference = pair(tiny_model, lora, compute_dtype)
    for estimator in ("k1", "k2", "k3"):
        assert not kl_estimate(scores(policy), ref_scores(reference), estimator).any()
    assert reference.equals_initial_policy


@pytest.mark.parametrize("lora", LORA)
@pytest.mark.parametrize("compute_dtype", DTYPES)
def test_training_the_policy_does_not_reach_it(tiny_model: Path, lora, compute_dtype: str) -> None:
    policy, reference = pair(tiny_model, lora, compute_dtype)
    before = ref_scores(reference)
    train(policy)
    assert (scores(policy) - before).abs().max() > 0.05
    with unmoved(policy):
        assert torch.equal(ref_scores(reference), before)
    assert not ref_scores(reference).requires_grad


@pytest.mark.parametrize("lora", LORA)
@pytest.mark.parametrize("compute_dtype", DTYPES)
@pytest.mark.trap(28)
def test_a_refresh_copies_values_not_views(tiny_model: Path, lora, compute_dtype: str) -> None:
    policy, reference = pair(tiny_model, lora, compute_dtype, refresh_every=2)
    train(policy)
    with unmoved(policy):
        reference.refresh(2)
    refreshed = ref_scores(reference)
    assert torch.equal(refreshed, scores(policy))
    assert not reference.equals_initial_policy
    train(policy, seed=2)
    with unmoved(policy):
        assert torch.equal(ref_scores(reference), refreshed)
    reference.refresh(4)
    assert torch.equal(ref_scores(reference), scores(policy))


@pytest.mark.parametrize("lora", LORA)
def test_scoring_keeps_gradients_that_wait(tiny_model: Path, lora) -> None:
    """Between two micro-batches: what has accumulated stays, and the next backward works."""
    policy, reference = pair(tiny_model, lora, refresh_every=1)
    train(policy)
    reference.refresh(1)
    train(policy, seed=2)
    policy(SEQUENCES, MASK, 1.0).log_probs.sum().backward()
    before = [p.grad.clone() for _, p in policy.trainable()]
    ref_scores(reference)
    assert all(torch.equal(p.grad, g) for (_, p), g in zip(policy.trainable(), before, strict=True))
    policy(SEQUENCES, MASK, 1.0).log_probs.sum().backward()
    for (_, p), g in zip(policy.trainable(), before, strict=True):
        torch.testing.assert_close(p.grad, 2 * g)


@pytest.mark.trap(12)
def test_it_is_frozen_and_no_part_of_the_policy(tiny_model: Path) -> None:
    policy, reference = pair(tiny_model)
    assert reference.network is not None
    assert not any(p.requires_grad for p in reference.network.parameters())
    assert not isinstance(reference, torch.nn.Module)
    own = {p.data_ptr() for p in policy.parameters()}
    assert own.isdisjoint(p.data_ptr() for p in reference.network.parameters())


def test_with_adapters_there_is_no_second_network(tiny_model: Path) -> None:
    assert pair(tiny_model, LORA[1])[1].network is None


@pytest.mark.parametrize("lora", LORA)
def test_another_model_as_reference(tiny_model: Path, tmp_path: Path, lora) -> None:
    other = write_tiny_model(tmp_path / "other", seed=7)
    policy, reference = pair(tiny_model, lora, model=str(other))
    expected = scores(Policy(PolicyConfig(model=str(other), compute_dtype="float32")))
    assert torch.equal(ref_scores(reference), expected)
    assert not torch.equal(scores(policy), expected)
    assert not reference.equals_initial_policy


def test_the_models_own_name_is_the_initial_policy(tiny_model: Path) -> None:
    assert pair(tiny_model, model=str(tiny_model))[1].equals_initial_policy


# --- artefacts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", LORA)
def test_the_initial_reference_needs_no_artefact(tiny_model: Path, tmp_path: Path, lora) -> None:
    _, reference = pair(tiny_model, lora, refresh_every=2)
    assert reference.artefacts(tmp_path) == []
    assert not checkpoints_folder(tmp_path).exists()
    assert reference.state()["artefact"] is None


@pytest.mark.parametrize("lora", LORA)
@pytest.mark.parametrize("compute_dtype", DTYPES)
@pytest.mark.trap(43)
def test_a_refreshed_reference_comes_back_from_its_artefact(
    tiny_model: Path, tmp_path: Path, lora, compute_dtype: str
) -> None:
    policy, reference = pair(tiny_model, lora, compute_dtype, refresh_every=2)
    train(policy)
    reference.refresh(2)
    expected, (name,) = ref_scores(reference), reference.artefacts(tmp_path)
    assert (checkpoints_folder(tmp_path) / name).is_dir()
    state = reference.state()
    assert (state["refreshed_at"], state["artefact"]) == (2, name)
    resumed, restored = pair(tiny_model, lora, compute_dtype, refresh_every=2)
    with unmoved(resumed):
        restored.restore(state, tmp_path)
        assert torch.equal(ref_scores(restored), expected)
    assert restored.artefacts(tmp_path) == [name]  # still named by the next checkpoint
    assert restored.state() == state
    assert not restored.equals_initial_policy


@pytest.mark.trap(28)
def test_an_artefact_is_written_once_for_each_refresh(tiny_model: Path, tmp_path: Path) -> None:
    policy, reference = pair(tiny_model, refresh_every=1)
    names = []
    for iteration in (1, 2):
        train(policy, seed=iteration)
        reference.refresh(iteration)
        assert reference.artefacts(tmp_path) == reference.artefacts(tmp_path)
        names += reference.artefacts(tmp_path)
    assert len(set(names)) == 2
    assert {p.name for p in checkpoints_folder(tmp_path).iterdir()} == set(names)


@pytest.mark.parametrize("lora", LORA)
def test_another_base_than_the_run_began_with_is_refused(tiny_model: Path, tmp_path: Path, lora) -> None:
    other = write_tiny_model(tmp_path / "other", seed=7)
    state = pair(tiny_model, lora)[1].state()
    pair(tiny_model, lora)[1].restore(state, tmp_path)
    assert state["initial_hash"] == pair(tiny_model, lora)[1].initial_hash
    with pytest.raises(ValueError, match=r"model\.init_args\.reference: .*hash"):
        pair(other, lora)[1].restore(state, tmp_path)


def test_one_changed_bit_changes_the_hash(tiny_model: Path, tmp_path: Path) -> None:
    policy = Policy(PolicyConfig(model=str(tiny_model)))
    with torch.no_grad():
        first = policy.trainable()[0][1].view(-1)
        first[3] = torch.nextafter(first[3], torch.tensor(10.0))
    policy.save_pretrained(tmp_path)
    assert pair(tmp_path)[1].initial_hash != pair(tiny_model)[1].initial_hash


@pytest.mark.parametrize("damage", ["gone", "flipped"])
def test_an_artefact_that_is_gone_or_damaged_is_said(tiny_model: Path, tmp_path: Path, damage: str) -> None:
    import shutil

    policy, reference = pair(tiny_model, refresh_every=1)
    train(policy)
    reference.refresh(1)
    (name,) = reference.artefacts(tmp_path)
    folder = checkpoints_folder(tmp_path) / name
    if damage == "gone":
        shutil.rmtree(folder)
    else:
        (file,) = folder.glob("*.safetensors")
        content = bytearray(file.read_bytes())
        content[-5] ^= 1
        file.write_bytes(bytes(content))
    with pytest.raises(ValueError, match="reference"):
        pair(tiny_model, refresh_every=1)[1].restore(reference.state(), tmp_path)


# --- what cannot be ---------------------------------------------------------------------------------------------------


def test_refreshing_never_is_null_not_zero() -> None:
    with pytest.raises(ValueError, match=r"reference\.refresh_every.*null"):
        ReferenceConfig(refresh_every=0)


def test_what_could_never_be_refreshed_is_refused_at_once(tiny_model: Path, tmp_path: Path) -> None:
    """Not after the iterations up to the first refresh."""
    with pytest.raises(ValueError, match=r"reference\.refresh_every.*LoRA"):
        pair(tiny_model, LORA[1], model=str(tiny_model), refresh_every=2)
    wider = write_tiny_model(tmp_path / "wider", intermediate_size=80)
    with pytest.raises(ValueError, match=r"reference\.refresh_every.*shape"):
        pair(tiny_model, model=str(wider), refresh_every=2)


def test_a_revision_and_a_tokenizer_go_with_their_own_model() -> None:
    policy = PolicyConfig(model="a", tokenizer="t", revision="r", lora=LoraConfig())
    same = PolicyConfig(model="a", tokenizer="t", revision="r")
    assert beside(policy, None) == beside(policy, "a") == same
    assert beside(policy, "b", gradient_checkpointing=True) == PolicyConfig(model="b", gradient_checkpointing=True)
