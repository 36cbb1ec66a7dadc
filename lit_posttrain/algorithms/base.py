"""What every algorithm shares: the policy, one function for one optimizer step, and what a checkpoint holds."""

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Container, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn

from lit_posttrain import gates, randomness
from lit_posttrain.algorithms.reporting import Reporting
from lit_posttrain.algorithms.structure import require_same, structure_of
from lit_posttrain.batching import TOKEN_BUDGETS, to_device
from lit_posttrain.functional.masked import Totals
from lit_posttrain.gathering import gathering
from lit_posttrain.kept_prompts import prompts_once
from lit_posttrain.policy import Policy, PolicyConfig, load_tokenizer
from lit_posttrain.precision import require_full_precision
from lit_posttrain.reference import Reference
from lit_posttrain.schedules import begin
from lit_posttrain.sharding import (
    add_gradients,
    all_reduce_sum,
    average_gradients,
    full_tensor,
    make_gradients,
    prime,
    same_number,
    shard,
    take_gradients,
    world_size,
)
from lit_posttrain.types import Loss, MicroBatch, StepResult, Stream

MOST_BAD_STEPS = 3


class PostTrainModule(Reporting, ABC):
    """Base of all algorithms: a policy, and ``optimize``, which is one optimizer step whatever the layout.

    Args:
        policy: The network that is trained.
        optimizer: Gets the trainable parameters.
        scheduler: Learning-rate schedule, stepped once an iteration.
        max_grad_norm: Gradients are clipped to this global norm; null leaves them.
        token_budget: Most tokens, padding included, in one forward pass; null is 768 in fp32 and 1,152 in
            bf16. Sets memory, never the objective.
    """

    network_class: type[Policy] = Policy
    reference: Reference | None = None  # not a module: out of optimizer, state_dict and checkpoint

    def __init__(
        self,
        policy: PolicyConfig,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-6, weight_decay=0.0, fused=True),
        scheduler: LRSchedulerCallable | None = None,
        max_grad_norm: float | None = 1.0,
        token_budget: int | None = None,
    ):
        super().__init__()
        if token_budget is not None and token_budget < 1:
            raise ValueError(f"model.init_args.token_budget: must be at least 1, is {token_budget}")
        if max_grad_norm is not None and not 0 < max_grad_norm < math.inf:
            raise ValueError(
                f"model.init_args.max_grad_norm: must be finite and above 0, is {max_grad_norm}; null does not clip"
            )
        self.automatic_optimization = False
        self.strict_loading = policy.lora is None
        self.policy_config = policy
        self.make_optimizer = optimizer
        self.make_scheduler = scheduler
        self.max_grad_norm = max_grad_norm
        self._token_budget = token_budget
        self.policy: Policy | None = None
        self.bad_steps = 0
        self.loaded_counters: dict[str, Any] | None = None
        self._weights_step = 0

    @abstractmethod
    def loss(self, batch: MicroBatch, totals: Totals) -> Loss:
        """The objective on one micro-batch, divided by the counts of the whole optimizer step."""

    # --- building ---------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Load the policy, and shard it where the strategy does; runs again at every stage, so it builds once."""
        if self.policy is not None:
            return
        require_full_precision(str(self.trainer.precision))
        self.tokenizer = load_tokenizer(self.policy_config)
        policy = self.network_class(self.policy_config)
        self.prepare_policy(policy)
        if self.device_mesh is not None:
            device = self.trainer.strategy.root_device
            policy.build_view(device, sharded=True)
            assert policy.compute_dtype is not None
            shard(policy, self.device_mesh, policy.compute_dtype, policy.entry_points)
        self.policy = policy

    def prepare_policy(self, policy: Policy) -> None:
        """Look at the loaded policy before it is sharded (a reference hashes it, say)."""

    def configure_optimizers(self) -> Any:
        """One optimizer over the trainable parameters, and the schedule if there is one."""
        policy = self.built_policy()
        named = policy.trainable()
        gates.require_trainable(name for name, _ in named)
        optimizer = self.make_optimizer(self.parameter_groups())
        owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
        gates.require_trainable(name for name, p in named if id(p) in owned)
        if self.make_scheduler is None:
            prime(optimizer)
            return optimizer
        prime(optimizer)
        schedule = self.make_scheduler(optimizer)
        begin(schedule, self.run_length if self.trainer.state.fn == "fit" else None)
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def parameter_groups(self) -> list[Any]:
        """What the optimizer gets: the policy's trainable parameters, or groups that each have a ``name``."""
        return [p for _, p in self.built_policy().trainable()]

    def networks(self) -> list[Policy]:
        """Every one that micro-batches go through."""
        apart = None if self.reference is None else self.reference.network
        return [network for network in (self.built_policy(), apart) if network is not None]

    def sync_views(self) -> None:
        """Re-make every compute view; called after every change of parameters."""
        self.built_policy().sync()

    def run_length(self) -> int | None:
        """Iterations of the whole run, of ``max_steps`` or else of the data and ``max_epochs``; None without an end."""
        # Not Lightning's estimated_stepping_batches: once it is read here, a resume loses the loader's state.
        if self.trainer.max_steps > 0:
            return self.trainer.max_steps
        data, epochs = getattr(self.trainer, "datamodule", None), self.trainer.max_epochs
        return None if data is None or epochs is None or epochs < 1 else epochs * data.iterations_per_epoch

    def built_policy(self) -> Policy:
        """The policy, its compute view made on the device it is on by now."""
        assert self.policy is not None, "configure_model comes first"
        if self.policy.compute_dtype is None:
            self.policy.build_view(self.device, sharded=False)
        return self.policy

    @property
    def token_budget(self) -> int:
        """The setting, or what suits the compute precision."""
        return self._token_budget or TOKEN_BUDGETS[self.built_policy().compute_dtype or torch.float32]

    # --- one optimizer step -----------------------------------------------------------------------------------

    def optimize(self, streams: Sequence[Stream], *, last: bool, still: Container[str] = ()) -> StepResult:
        """One optimizer step: forward and backward of each stream's micro-batches, clip, step.

        Each parameter group is clipped by its own norm. Of several streams the norm of every one's gradient is
        measured, which keeps a second copy of the gradients.

        Args:
            streams: Gone through in order. Their losses add up; other metrics must have names of their own.
            last: Ends the iteration: steps through Lightning, whose ``global_step`` counts iterations, and moves the
                schedule on.
            still: Names of parameter groups that this step leaves as they are.
        """
        wrapper = self.optimizers()
        assert not isinstance(wrapper, list)
        raw = wrapper.optimizer
        raw.zero_grad(set_to_none=True)
        groups = [group for group in raw.param_groups if group.get("name", "policy") not in still]
        resting = [group for group in raw.param_groups if group.get("name", "policy") in still]
        parameters = [p for group in groups for p in group["params"]]
        metrics: dict[str, Tensor] = {}
        extremes: dict[str, Tensor] = {}
        apart: dict[str, float] = {}
        for stream in streams:
            held = take_gradients(parameters)
            several = len(stream.micro_batches) > 1 and world_size() == 1  # ranks must agree on which have gradients
            with gathering(self.networks(), parameters) if several else nullcontext():
                self._accumulate(stream, metrics, extremes)
            if stream.done is not None:
                stream.done()
            if isinstance(self.trainer.strategy, DDPStrategy):
                average_gradients(parameters)
            if len(streams) > 1:
                gradients = [p.grad for p in parameters if p.grad is not None]
                apart[f"grad_norm/{stream.name}"] = float(full_tensor(nn.utils.get_total_norm(gradients)))
            add_gradients(parameters, held)
        for p in (p for group in resting for p in group["params"]):
            p.grad = None  # a shared network's losses reach it too
        make_gradients(parameters)  # left-out answers have a gradient of exactly zero, and momentum must see it
        norms = self._clip(groups)
        norm = sum(n**2 for n in norms.values()) ** 0.5 if len(norms) > 1 else next(iter(norms.values()))
        applied = norm == norm and norm != float("inf")
        self._count_bad_step(applied)
        if not applied:
            raw.zero_grad(set_to_none=True)  # the step then moves and decays nothing
        if last:
            wrapper.step()
            self._step_schedule()
        elif applied:
            raw.step()
        raw.zero_grad(set_to_none=True)  # a copy of the network that no rollout has to find room beside
        self.sync_views()
        reduced, largest = self._reduce(metrics, extremes)
        named = {f"grad_norm/{name}": n for name, n in norms.items()} if len(norms) > 1 else {}
        return StepResult({**reduced, **apart, **named}, largest, norm, applied)

    def _clip(self, groups: list[dict[str, Any]]) -> dict[str, float]:
        limit = float("inf") if self.max_grad_norm is None else self.max_grad_norm
        by_name: dict[str, list[nn.Parameter]] = {}
        for group in groups:
            by_name.setdefault(group.get("name", "policy"), []).extend(group["params"])
        return {name: float(full_tensor(nn.utils.clip_grad_norm_(ps, limit))) for name, ps in by_name.items()}

    def _accumulate(self, stream: Stream, metrics: dict[str, Tensor], extremes: dict[str, Tensor]) -> None:
        model = self.trainer.model
        # Gradients are averaged by hand after the last backward, so DDP's own reducer stays out of it.
        unsynced = model.no_sync() if isinstance(self.trainer.strategy, DDPStrategy) else nullcontext()  # pyright: ignore
        with unsynced:
            batches = same_number(stream.micro_batches, stream.idle_columns, self.device)
            for batch in prompts_once(batches, self.networks()):
                out = stream.loss(to_device(batch, self.device), stream.totals)
                # Gradients are averaged over ranks, and the loss is a sum over them.
                self.manual_backward(out.loss * world_size())
                for name, value in {"loss": out.loss.detach(), **out.metrics}.items():
                    metrics[name] = metrics[name] + value if name in metrics else value
                for name, value in out.extremes.items():
                    extremes[name] = torch.maximum(extremes[name], value) if name in extremes else value
                self.advance()

    def _reduce(
        self, metrics: dict[str, Tensor], extremes: dict[str, Tensor]
    ) -> tuple[dict[str, float], dict[str, float]]:
        sums = all_reduce_sum([float(v) for v in metrics.values()], self.device)
        largest = [float(v) for v in extremes.values()]
        if world_size() > 1 and largest:
            tensor = torch.tensor(largest, dtype=torch.float64, device=self.device)
            torch.distributed.all_reduce(tensor, op=torch.distributed.ReduceOp.MAX)
            largest = tensor.tolist()
        return dict(zip(metrics, sums, strict=True)), dict(zip(extremes, largest, strict=True))

    def _step_schedule(self) -> None:
        schedulers = self.lr_schedulers()
        if schedulers is not None and not isinstance(schedulers, list):
            with warnings.catch_warnings():
                # torch looks for its own step counter on the optimizer, which a skipped step leaves behind.
                warnings.simplefilter("ignore")
                schedulers.step()  # pyright: ignore[reportCallIssue]

    def _count_bad_step(self, applied: bool) -> None:
        self.bad_steps = 0 if applied else self.bad_steps + 1
        if self.bad_steps >= MOST_BAD_STEPS:
            raise gates.GateError(
                f"{MOST_BAD_STEPS} steps in a row had a gradient that is not finite; the last checkpoint is unharmed"
            )
        if not applied:
            warnings.warn("the gradient is not finite: this step is left out", stacklevel=2)

    # --- starting, resuming -----------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        """Say what was found, and make the compute view of whatever was loaded."""
        self.announce(self.built_policy())
        self.sync_views()

    def on_train_start(self) -> None:
        """Weights of a checkpoint may have arrived after ``on_fit_start``."""
        self.sync_views()

    def on_validation_start(self) -> None:
        """A stand-alone validation has no other place to make the view."""
        self.sync_views()

    def on_test_start(self) -> None:
        """Likewise."""
        self.sync_views()

    def on_predict_start(self) -> None:
        """Likewise."""
        self.sync_views()

    def counters(self) -> dict[str, Any]:
        """Everything besides weights, optimizer and schedule that a resume needs; the one place to declare it."""
        dtype = self.policy.compute_dtype if self.policy is not None else None
        own = {"seed": randomness.run_seed(), "compute_dtype": str(dtype), "bad_steps": self.bad_steps}
        return {**own, "structure": self.structure()}

    def restore_counters(self, counters: dict[str, Any]) -> None:
        """Take over what ``counters`` returned.

        Raises:
            ValueError: The run would go on otherwise than it began.
        """
        seed, dtype = randomness.run_seed(), str(self.built_policy().compute_dtype)
        if counters["seed"] != seed:
            raise ValueError(
                f"seed_everything: this run began with {counters['seed']}, not {seed}; use the same to resume"
            )
        if counters["compute_dtype"] != dtype:
            raise ValueError(
                f"model.init_args.policy.compute_dtype: this run began in {counters['compute_dtype']} and would go on "
                f"in {dtype}; set it to {counters['compute_dtype'].removeprefix('torch.')} to resume"
            )
        self.bad_steps = counters["bad_steps"]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the counters; with LoRA drop the frozen base, which the model folder holds."""
        checkpoint["lit_posttrain"] = self.counters()
        # What is loaded in shards must hold every tensor of the module.
        if self.policy_config.lora is not None and self.device_mesh is None:
            kept = self.built_policy().saved_with_adapters()
            kept |= {name.replace("policy.", "average.", 1) for name in kept}
            whole = ("policy.", "average.")
            state = checkpoint["state_dict"]
            checkpoint["state_dict"] = {k: v for k, v in state.items() if k in kept or not k.startswith(whole)}

    def structure(self) -> dict[str, Any]:
        """What the networks and their text are made of, by YAML key; a run goes on only where none of it changed."""
        assert self.policy is not None, "configure_model comes first"
        return structure_of(self.policy)

    def require_structure(self, counters: dict[str, Any]) -> None:
        """Refuse to go on from a run that is made otherwise; called before any of its weights is loaded."""
        if self.trainer.state.fn == "fit" and "structure" in counters:
            require_same(counters["structure"], self.structure())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the counters until the policy is on its device."""
        self.require_structure(checkpoint["lit_posttrain"])
        self.loaded_counters = checkpoint["lit_posttrain"]
        self._weights_step = int(checkpoint["global_step"])

    def on_train_end(self) -> None:
        """An evaluation that follows in the same process belongs where training ended."""
        self._weights_step = self.trainer.global_step

    def step_of_weights(self) -> int:
        """The iteration that the present weights are from; outside ``fit`` Lightning's own count stays at 0."""
        return self.trainer.global_step if self.trainer.state.fn == "fit" else self._weights_step

    def seed_iteration(self) -> None:
        """Seed the global generators for this iteration and rank; a resume seeds them alike."""
        randomness.seed_step(randomness.run_seed(), self.trainer.global_step, self.global_rank)
