"""FSDP2 under Lightning: a strategy that shards data-parallel by default, one root per network, gathered rollouts."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from lit_posttrain.batching import idle
from lit_posttrain.types import MicroBatch


class ShardedStrategy(ModelParallelStrategy):
    """FSDP2: parameters, gradients and optimizer state sharded over all processes.

    Lightning's own default reads as one data-parallel group of N tensor-parallel ranks, which shards nothing and
    feeds every rank the same data; here ``auto`` means "all processes data-parallel". Works with one device too.

    Args:
        data_parallel_size: Processes to shard over; ``auto`` is all of them divided by ``tensor_parallel_size``.
        tensor_parallel_size: Must be 1 for now; policies are not tensor-parallel.
        timeout_seconds: A collective that takes longer ends the job instead of hanging it.
    """

    def __init__(
        self,
        data_parallel_size: int | Literal["auto"] = "auto",
        tensor_parallel_size: int = 1,
        timeout_seconds: float = 1800.0,
        **kwargs: Any,
    ):
        from datetime import timedelta

        if tensor_parallel_size != 1:
            raise ValueError("trainer.strategy.init_args.tensor_parallel_size: only 1 is supported")
        kwargs.setdefault("timeout", timedelta(seconds=timeout_seconds))
        super().__init__(data_parallel_size, tensor_parallel_size, **kwargs)

    def setup_environment(self) -> None:
        """Resolve ``auto`` once the number of processes is known."""
        if self._data_parallel_size == "auto":
            self._data_parallel_size = self.num_nodes * self.num_processes // int(self._tensor_parallel_size)
        super().setup_environment()

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """The weights are filled here, so the module looks at what the checkpoint is from before that."""
        path = Path(self.broadcast(checkpoint_path))
        saved = torch.load(path / "meta.pt" if path.is_dir() else path, "cpu", weights_only=weights_only, mmap=True)
        require: Any = getattr(self.lightning_module, "require_structure", None)
        if require is not None:
            require(saved["lit_posttrain"])
        return super().load_checkpoint(checkpoint_path, weights_only)


def shard(network: nn.Module, mesh: DeviceMesh, dtype: torch.dtype, methods: Sequence[str] = (), frozen: bool = False):
    """Shard ``network`` per decoder block and as one root, in place.

    Args:
        network: An ``nn.Module`` that is called only through ``forward`` or the named ``methods``.
        mesh: Lightning's mesh with a ``data_parallel`` dimension.
        dtype: What forward and backward compute in; parameters and gradient reduction stay fp32.
        methods: Further entry points besides ``forward``.
        frozen: No backward will follow a forward, so gather and free again at once.
    """
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32) if dtype != torch.float32 else None
    for module in (*decoder_layers(network), network):
        fully_shard(
            module,
            mesh=mesh["data_parallel"],
            mp_policy=policy or MixedPrecisionPolicy(),
            reshard_after_forward=True if frozen else None,
        )
    for name in methods:
        register_fsdp_forward_method(network, name)
    # A parameter left unsharded is never reduced: ranks would drift apart without a word.
    stray = [name for name, p in network.named_parameters() if p.requires_grad and not isinstance(p, DTensor)]
    assert not stray, f"not sharded: {stray}"


def decoder_layers(network: nn.Module) -> list[nn.Module]:
    """The blocks that transformers says belong together on one device."""
    names = {name for m in network.modules() for name in getattr(m, "_no_split_modules", None) or ()}
    return [m for m in network.modules() if type(m).__name__ in names]


@contextmanager
def unsharded(network: nn.Module) -> Iterator[None]:
    """All of ``network``'s parameters gathered on every rank: inside, forwards need no communication.

    Ranks may stop at different steps. Entering is a collective. Weight writes inside are lost. A network that was
    never sharded passes through.
    """
    modules = [m for m in network.modules() if isinstance(m, FSDPModule)]
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in modules:
            module.reshard()
            module.set_reshard_after_forward(module is not network, recurse=False)


def reshard(network: nn.Module) -> None:
    """Have a network's parameters be this rank's shards, also after a forward that no backward followed."""
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def all_reduce_sum(values: Sequence[int | float], device: torch.device) -> list[float]:
    """Sums over all ranks (float64); the values themselves on one process."""
    if world_size() == 1:
        return [float(v) for v in values]
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(tensor)
    return tensor.tolist()


def all_reduce_max(value: int, device: torch.device) -> int:
    """The largest over all ranks."""
    if world_size() == 1:
        return value
    tensor = torch.tensor([value], dtype=torch.int64, device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return int(tensor.item())


def same_number(batches: Sequence[MicroBatch], columns: dict[str, Tensor], device: torch.device) -> list[MicroBatch]:
    """As many micro-batches as the busiest rank has, idle ones at the end: sharded forwards are collectives.

    Args:
        batches: This rank's.
        columns: What columns an idle one needs.
        device: Of the collective.
    """
    return [*batches, *[idle(columns)] * (all_reduce_max(len(batches), device) - len(batches))]


def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Mean of every gradient over all ranks, for replicated parameters (DDP); a missing gradient counts as zero.

    Done by hand, after all micro-batches, because the compute view's gradients reach the fp32 masters outside
    DDP's reducer, and because ranks may run different numbers of backwards.
    """
    if world_size() == 1:
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)
        parameter.grad.div_(world_size())


def take_gradients(parameters: Sequence[nn.Parameter]) -> list[Tensor | None]:
    """The gradients, which the parameters then have no more."""
    taken = [p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    return taken


def make_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """A gradient of zeros for each that has none."""
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)


def add_gradients(parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor | None]) -> None:
    """Add gradients that were taken away."""
    for p, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None:
            p.grad = gradient if p.grad is None else p.grad.add_(gradient)


def gather_objects(value: Any) -> list[Any]:
    """Every rank's value, by rank; tensors among them on the CPU."""
    if world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def world_size() -> int:
    """Number of processes, 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's rank, 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole of a possibly sharded tensor; a collective when it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def prime(optimizer: torch.optim.Optimizer) -> None:
    """Give every parameter its optimizer state now, without moving anything.

    A sharded checkpoint that was saved while some parameters had no state can never be loaded again.
    """
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    for group, lr in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = lr
    for state in optimizer.state.values():
        if "step" in state:
            state["step"].zero_()
