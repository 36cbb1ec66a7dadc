"""A run's policy as a Hugging Face folder, said to be done only once its logits were read back and compared."""

import importlib
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from jaxtyping import Float
from jsonargparse import ArgumentError, ArgumentParser
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from lit_posttrain.checkpoint import (
    Checkpoint,
    CheckpointError,
    checkpoints_folder,
    manifest,
    newest_checkpoint,
    resolve_checkpoint_file,
)
from lit_posttrain.export_scores import write_tokenizer
from lit_posttrain.policy import Policy, PolicyConfig, load_tokenizer
from lit_posttrain.scalar_heads import ScoreNetwork, last_tokens
from lit_posttrain.types import Sequences

_PREFIX = "policy."
_TOKENS = 32
# Of the largest logit: fp32 rounding of merged adapters is some 1e-6, a wrong weight some 1e-2 and more.
_TOLERANCE = 1e-4


def export(checkpoint: str, out: str) -> None:
    """Writes weights (fp32 safetensors, adapters merged), configuration and tokenizer, and checks what was written.

    Args:
        checkpoint: A run's folder, of which the newest checkpoint that verifies is taken, or a checkpoint's folder.
        out: The folder to write; absent or empty. It appears only once its content is right.

    Raises:
        ValueError: No such checkpoint or run, a checkpoint of another network, ``out`` not empty, or the folder as
            written computes other logits than the checkpoint.
    """
    target = Path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"--out {out} exists and is not an empty folder; give another one")
    found = find_checkpoint(checkpoint)
    config, network_class = policy_config(found.run_dir)
    # What is compared is compared in fp32, whatever the run computed in.
    policy = network_class(replace(config, compute_dtype="float32")).eval()
    load_weights(policy, _state_dict(found), found)
    staged = target.parent / f".tmp-{target.name}"
    shutil.rmtree(staged, ignore_errors=True)
    try:
        policy.save_pretrained(staged)
        tokenizer = load_tokenizer(config)
        if isinstance(policy, ScoreNetwork):
            write_tokenizer(tokenizer, staged)
            error = rescoring_error(policy, staged)
        else:
            tokenizer.save_pretrained(staged)
            error = reload_error(policy.model, staged)
        if not error <= _TOLERANCE:  # NaN too
            raise ValueError(
                f"what was written for {found.path} computes other numbers than the checkpoint (they differ by "
                f"{error:.2g} of the largest), so nothing was exported"
            )
        if target.exists():
            target.rmdir()
        staged.rename(target)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    what = "scores" if isinstance(policy, ScoreNetwork) else "logits"
    print(f"exported step {found.step} of {found.run_dir} to {target}; read back, its {what} agree to {error:.1g}")
    if isinstance(policy, ScoreNetwork):
        print(f"AutoModelForSequenceClassification.from_pretrained({str(target)!r}, trust_remote_code=True) loads it")


def find_checkpoint(path: str | Path) -> Checkpoint:
    """The checkpoint that a path means: a run's folder (its newest), a checkpoint's folder, or the state in it.

    Args:
        path: As given by the user.

    Raises:
        ValueError: No such path, or no checkpoint that verifies in it.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"checkpoint {path} not found; give a run's folder, a checkpoint's folder (step-N), or 'last'")
    if checkpoints_folder(path).is_dir():
        if (checkpoint := newest_checkpoint(path)) is None:
            raise ValueError(f"no checkpoint that verifies in {path}")
        return checkpoint
    try:
        folder = Path(resolve_checkpoint_file(path)).parent
        return Checkpoint(folder, manifest(folder)["step"])
    except CheckpointError as error:
        raise ValueError(str(error)) from None


def policy_config(run: Path) -> tuple[PolicyConfig, type[Policy]]:
    """The policy's description in the ``config.yaml`` that a run saved, and what kind of network it describes.

    Args:
        run: The run's folder.

    Raises:
        ValueError: No such file, or it describes no policy.
    """
    file = run / "config.yaml"
    if not file.is_file():
        raise ValueError(f"{file} not found; a checkpoint is exported from inside its run's folder")
    given: Any = yaml.safe_load(file.read_text(encoding="utf-8"))
    model = given.get("model") if isinstance(given, dict) else None
    network_class = _network_class(str((model or {}).get("class_path", "")))
    for key in ("model", "init_args", "policy"):
        given = given.get(key) if isinstance(given, dict) else None
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(PolicyConfig, "policy")
    try:
        return parser.instantiate(parser.parse_object({"policy": given or {}})).policy, network_class
    except ArgumentError as error:
        raise ValueError(f"{file}: model.init_args.policy describes no policy: {error}") from None


def _network_class(algorithm: str) -> type[Policy]:
    """What an algorithm trains, by its dotted path."""
    module, _, name = algorithm.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name).network_class
    except (ImportError, ValueError, AttributeError):
        return Policy


def load_weights(policy: Policy, state: Mapping[str, Tensor], source: Checkpoint) -> None:
    """Fills the policy with a module's weights; with adapters the frozen base may be absent, its files hold it.

    Args:
        policy: As its description says, with the weights that training began with.
        state: The ``state_dict`` of the checkpoint.
        source: Where that came from, for messages.

    Raises:
        ValueError: Other names or shapes than the policy has, or one of its trained parameters missing.
    """
    weights = {name.removeprefix(_PREFIX): value for name, value in state.items() if name.startswith(_PREFIX)}
    try:
        missing, unexpected = policy.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise ValueError(f"{source.path} does not fit the policy of its run's config.yaml: {error}") from None
    trained = {f"model.{name}" for name, _ in policy.trainable()}
    lacking = [name for name in missing if name in trained or policy.config.lora is None]
    if lacking or unexpected or not weights:
        names = ", ".join([*lacking, *unexpected][:3]) or f"no key begins with {_PREFIX}"
        raise ValueError(f"{source.path} does not fit the policy of its run's config.yaml: {names}")


@torch.no_grad()
def reload_error(network: nn.Module, folder: Path) -> float:
    """Error = max |logits - logits read back| / max(1, max |logits|) on fixed tokens, both in fp32.

    Args:
        network: The causal LM that was saved, in eval mode.
        folder: Where it was saved to.
    """
    reloaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ours, theirs = _logits(network), _logits(reloaded)
    return ((ours - theirs).abs().max() / ours.abs().max().clamp(min=1.0)).item()


@torch.no_grad()
def rescoring_error(network: ScoreNetwork, folder: Path) -> float:
    """Error = max |scores - scores read back| / max(1, max |scores|) on fixed token rows of two lengths, in fp32."""
    reloaded = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True)
    size, pad = network.hf_config.get_text_config().vocab_size, reloaded.config.pad_token_id
    ids = (torch.arange(2 * _TOKENS).view(2, -1) * 7919 + 1) % size
    ids[ids == pad] = (pad + 1) % size
    lengths = torch.tensor([_TOKENS, _TOKENS // 2])
    sequences = Sequences(ids, torch.ones_like(lengths), lengths)
    mask = sequences.attention_mask()
    ours = network.normalised(network(sequences, last_tokens(sequences)))
    theirs = reloaded.eval()(input_ids=ids.where(mask, pad), attention_mask=mask.long()).logits[:, 0]
    return ((ours - theirs).abs().max() / ours.abs().max().clamp(min=1.0)).item()


def _logits(network: nn.Module) -> Float[Tensor, "1 s v"]:
    config: Any = network.config
    ids = (torch.arange(_TOKENS) * 7919 + 1)[None] % config.get_text_config().vocab_size
    return network(input_ids=ids, use_cache=False).logits.float()


def _state_dict(checkpoint: Checkpoint) -> Mapping[str, Tensor]:
    state = Path(checkpoint.state)
    if state.is_dir():
        from lightning.fabric.utilities.load import _load_distributed_checkpoint

        return _load_distributed_checkpoint(state)["state_dict"]
    return torch.load(state, map_location="cpu", weights_only=True, mmap=True)["state_dict"]
