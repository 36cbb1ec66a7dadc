"""The frozen reference policy that KL is measured against; never a part of the module tree."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedTokenizerBase

from lit_posttrain.beside import beside, require_fits
from lit_posttrain.checkpoint import CheckpointError, load_artefact, save_artefact, tensor_hash
from lit_posttrain.model_files import configuration_hash
from lit_posttrain.policy import Policy, PolicyConfig
from lit_posttrain.sharding import full_tensor, gather_objects, rank, reshard, shard, world_size
from lit_posttrain.types import Sequences

KEY = "model.init_args.reference"


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """What the policy is held close to; only read where the objective has a KL.

    Args:
        model: Folder or hub name; by default the policy as it was at the start (with LoRA: its base). Its tokenizer
            must be the policy's.
        refresh_every: Copy the policy into the reference every so many iterations (DeepSeek-R1-Zero: 400).
    """

    model: str | None = None
    refresh_every: int | None = None

    def __post_init__(self):
        """Check the ranges."""
        if self.refresh_every is not None and self.refresh_every < 1:
            raise ValueError(
                f"reference.refresh_every: must be at least 1, is {self.refresh_every}; null never refreshes"
            )


class Reference:
    """A frozen network, or with LoRA the policy's own base with other adapters or none.

    Not an ``nn.Module``: absent from optimizer, state_dict and checkpoint. Where it differs from the initial weights
    it is saved once as an artefact that checkpoints name by the hash of its content.

    Args:
        policy: The policy, freshly loaded and not yet sharded.
        config: What the reference is.
    """

    def __init__(self, policy: Policy, config: ReferenceConfig):
        self.config = config
        self.policy = policy
        self.refreshed_at: int | None = None
        self.adapters: dict[str, Tensor] | None = None
        self.network: Policy | None = None
        self._saved: str | None = None
        self._own: PolicyConfig | None = None  # of a network of its own
        if policy.config.lora is not None and None not in (config.model, config.refresh_every):
            raise ValueError("reference.refresh_every: with LoRA it needs reference.model: null (adapters are copied)")
        if policy.config.lora is None or config.model is not None:
            own = self._own = beside(policy.config, config.model, gradient_checkpointing=False)
            self.network = _frozen(own)
            if config.refresh_every is not None and _shapes(self.network) != _shapes(policy):
                raise ValueError(
                    f"reference.refresh_every: {own.model} has weights of other names or shapes than the policy, so it "
                    "can never become the policy; use null or a reference of the same architecture"
                )
            self.initial_hash = _hash(self.network)
        else:
            self.initial_hash = _hash(policy)

    @property
    def equals_initial_policy(self) -> bool:
        """Whether by configuration its KL to the untrained policy is zero."""
        return self.refreshed_at is None and self.config.model in (None, self.policy.config.model)

    @property
    def released(self) -> bool:
        """Whether nothing is left that could score."""
        return self._own is not None and self.network is None

    def release(self) -> None:
        """Free the network, whose log-probs are known by now; adapters that are switched off take no memory."""
        self.network = None

    def recall(self, device: torch.device, mesh: DeviceMesh | None) -> None:
        """Read a released network from its files again. Every rank enters.

        Raises:
            ValueError: They are gone, or hold other weights by now.
        """
        if self._own is None or self.network is not None:
            return
        network, problem = None, None
        try:
            network = _frozen(self._own)
            if _hash(network) != self.initial_hash:
                problem = f"{KEY}: {self._own.model} holds other weights or another configuration than at the start"
        except ValueError as error:
            problem = str(error)
        # All ranks or none: one that stayed behind would keep the others waiting.
        if problems := [each for each in gather_objects(problem) if each is not None]:
            raise ValueError(problems[0])
        self.network = network
        self.place(device, mesh)

    def place(self, device: torch.device, mesh: DeviceMesh | None) -> None:
        """Put the network where the policy is, sharded like it. A collective under sharding."""
        if self.network is None:
            return
        self.network.to(device).build_view(device, sharded=mesh is not None)
        if mesh is not None and not isinstance(self.network, FSDPModule):  # a later evaluation comes here too
            assert self.network.compute_dtype is not None
            shard(self.network, mesh, self.network.compute_dtype, frozen=True)

    @torch.no_grad()
    def log_probs(self, sequences: Sequences, mask: Bool[Tensor, "b t"], temperature: float) -> Float[Tensor, "b t"]:
        """The reference's log-probs of every masked token."""
        assert not self.released, "without adapters to switch off this would be the policy itself: recall() it first"
        if self.network is not None:
            return self.network(sequences, mask, temperature).log_probs
        if self.adapters is None:
            return self.policy(sequences, mask, temperature, adapters=False).log_probs
        trained = {name: p.detach().clone() for name, p in self.policy.trainable()}
        self._put(self.adapters)
        try:
            return self.policy(sequences, mask, temperature).log_probs
        finally:
            self._put(trained)

    def require_fits(self, tokenizer: PreTrainedTokenizerBase, data: Any, *more: int) -> None:
        """As :func:`lit_posttrain.beside.require_fits`, where it is another model than the policy."""
        if self.network is not None and self.network.config.model != self.policy.config.model:
            require_fits(self.network, self.policy, tokenizer, f"{KEY}.model", data, *more)

    def refresh_if_due(self, iteration: int) -> None:
        """Become the policy every ``refresh_every`` iterations."""
        every = self.config.refresh_every
        if every is not None and iteration > 0 and iteration % every == 0:
            self.refresh(iteration)

    @torch.no_grad()
    def refresh(self, iteration: int) -> None:
        """Become the policy as it is now: values are copied, so later updates of the policy do not reach it."""
        self.refreshed_at, self._saved = iteration, None
        reshard(self.policy)
        if self.network is None:
            self.adapters = {name: p.detach().clone() for name, p in self.policy.trainable()}
            return
        for mine, theirs in zip(self.network.model.parameters(), self.policy.model.parameters(), strict=True):
            mine.copy_(theirs)

    def artefacts(self, run_dir: Path) -> list[str]:
        """Save what is not the initial reference, once, and name it. A collective under sharding."""
        if self.refreshed_at is None:
            return []
        if self._saved is None:
            named = self.adapters if self.network is None else dict(self.network.model.named_parameters())
            assert named is not None
            tensors = {name: full_tensor(t.detach()).cpu().contiguous() for name, t in named.items()}
            name = save_artefact(run_dir, tensors) if rank() == 0 else ""
            self._saved = _from_rank_zero(name)
        return [self._saved]

    def state(self) -> dict[str, Any]:
        """What a checkpoint records: which reference this is."""
        return {"initial_hash": self.initial_hash, "refreshed_at": self.refreshed_at, "artefact": self._saved}

    @torch.no_grad()
    def restore(self, state: dict[str, Any], run_dir: Path) -> None:
        """Be the reference that the checkpoint was saved with; the next checkpoint saves it with its own run.

        Raises:
            ValueError: The initial weights are not the ones the run began with, or the artefact is gone.
        """
        if state["initial_hash"] != self.initial_hash:
            raise ValueError(
                f"{KEY}: the reference's weights or its configuration are not those this run began with (their hash "
                "differs); put the original model folder back"
            )
        self.refreshed_at = state["refreshed_at"]
        if self.refreshed_at is None:
            return
        try:
            tensors = load_artefact(run_dir, state["artefact"])
        except CheckpointError as error:
            raise ValueError(f"the reference policy that the checkpoint names cannot be loaded: {error}") from error
        if self.network is None:
            self.adapters = {n: _like(tensors[n], p) for n, p in self.policy.trainable()}
            return
        for name, p in self.network.model.named_parameters():
            p.copy_(_like(tensors[name], p))

    def _put(self, values: dict[str, Tensor]) -> None:
        for name, p in self.policy.trainable():
            p.data.copy_(values[name])
        self.policy.sync()


def _frozen(config: PolicyConfig) -> Policy:
    network = Policy(config).requires_grad_(False).eval()
    return network


def _shapes(policy: Policy) -> dict[str, torch.Size]:
    return {name: p.shape for name, p in policy.model.named_parameters()}


def _hash(policy: Policy) -> str:
    """Of what a network computes: its weights, adapters aside, and the configuration that says how they are used."""
    weights = tensor_hash({n: p.detach() for n, p in policy.model.named_parameters() if "lora_" not in n})
    return f"{weights} {configuration_hash(policy.hf_config)}"


def _like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """``tensor`` with the parameter's dtype, device and sharding."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if isinstance(parameter, DTensor):
        moved = tensor.to(parameter.device, parameter.dtype)
        return distribute_tensor(moved, parameter.device_mesh, parameter.placements)
    return tensor.to(parameter.device, parameter.dtype)


def _from_rank_zero(name: str) -> str:
    if world_size() == 1:
        return name
    box = [name]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]
