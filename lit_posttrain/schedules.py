"""Learning-rate schedules by their shape: warm-up, then constant, linear or cosine down to a share of the peak."""

import math
from collections.abc import Callable
from typing import Any, Literal, final

import torch
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau


@final
class Schedule(LRScheduler):
    """Linear warm-up, then constant, linear or cosine decay to ``final_ratio`` times the peak.

    Iteration *i*, from 0, runs at ``warmup_ratio + (1 - warmup_ratio) i / warmup_steps`` of the peak during the
    warm-up; then cosine falls as ``final_ratio + (1 - final_ratio) (1 + cos(pi x)) / 2`` with x from 0 to 1.

    Args:
        optimizer: Whose rate it sets.
        decay: What follows the warm-up.
        warmup_steps: Iterations of the warm-up.
        warmup_ratio: Share of the peak at which it begins, 0 to 1; at 0 the first iteration changes nothing.
        final_ratio: Share of the peak at the end of the run, 0 to 1; not read by ``constant``.
        total_steps: Iterations up to the end; by default those of the run.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        decay: Literal["constant", "linear", "cosine"] = "cosine",
        warmup_steps: int = 0,
        warmup_ratio: float = 0.0,
        final_ratio: float = 0.0,
        total_steps: int | None = None,
    ):
        where = "model.init_args.scheduler.init_args"
        if warmup_steps < 0:
            raise ValueError(f"{where}.warmup_steps: must not be negative, is {warmup_steps}")
        for name, value in (("warmup_ratio", warmup_ratio), ("final_ratio", final_ratio)):
            if not 0 <= value <= 1:
                raise ValueError(f"{where}.{name}: must lie between 0 and 1, is {value}")
        if total_steps is not None and total_steps < 1:
            raise ValueError(f"{where}.total_steps: must be at least 1, is {total_steps}")
        self.decay, self.warmup_steps, self.warmup_ratio = decay, warmup_steps, warmup_ratio
        self.final_ratio, self.total_steps = final_ratio, total_steps
        self._length = total_steps
        super().__init__(optimizer)

    def get_lr(self) -> list[float | torch.Tensor]:
        """Every group's rate in the present iteration."""
        return [base * self.factor(self.last_epoch) for base in self.base_lrs]

    def state_dict(self) -> dict[str, Any]:
        """Where it stands; its shape is the configuration's."""
        return {name: getattr(self, name) for name in ("last_epoch", "base_lrs", "_step_count", "_last_lr")}

    @property
    def open_ended(self) -> bool:
        """Whether its rates depend on the length of the run."""
        return self.total_steps is None and self.decay != "constant"

    def run_for(self, iterations: int) -> None:
        """Say how long the run is; ``total_steps`` goes before it."""
        self._length = self.total_steps or iterations
        # The rate of the first iteration was set before the length was known.
        for group, base in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = base * self.factor(self.last_epoch)

    def factor(self, iteration: int) -> float:
        """Share of the peak rate in this iteration, counted from 0."""
        if iteration < self.warmup_steps:
            return self.warmup_ratio + (1 - self.warmup_ratio) * iteration / self.warmup_steps
        if self.decay == "constant" or self._length is None:
            return 1.0
        x = min(1.0, (iteration - self.warmup_steps) / max(1, self._length - self.warmup_steps))
        left = 1 - x if self.decay == "linear" else (1 + math.cos(math.pi * x)) / 2
        return self.final_ratio + (1 - self.final_ratio) * left


def begin(schedule: Any, run_length: Callable[[], int | None] | None) -> None:
    """Tell a schedule how long the run is, where it asks for that.

    Args:
        schedule: As built from the configuration.
        run_length: Gives the run's iterations, None for one without an end; None where nothing is trained.

    Raises:
        ValueError: Nobody says where it ends, or it does not follow from the iteration.
    """
    if isinstance(schedule, ReduceLROnPlateau):
        raise ValueError(
            "model.init_args.scheduler: ReduceLROnPlateau waits for a metric, and here the rate follows from the "
            "iteration; use lit_posttrain.schedules.Schedule, or another of torch's schedulers"
        )
    if run_length is not None and isinstance(schedule, Schedule) and schedule.open_ended:
        if (steps := run_length()) is None:
            raise ValueError(
                "model.init_args.scheduler.init_args.total_steps: set it, or trainer.max_epochs or "
                "trainer.max_steps, so that the schedule knows where it ends"
            )
        schedule.run_for(steps)
