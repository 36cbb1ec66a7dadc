"""When a run is saved, and how it stops: ``CheckpointEvery``; what a preset says of its paper: ``Deviations``."""

import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from lit_posttrain.checkpoint import (
    STATE_FILE,
    STATE_FOLDER,
    CheckpointError,
    prune,
    set_aside_damaged,
    write_checkpoint,
)
from lit_posttrain.durable import save_state
from lit_posttrain.position import batches_trained, position, validation_is_due
from lit_posttrain.sharding import all_reduce_max, world_size

STOPPED = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, run the same command again
_SAME_REQUEST_SECONDS = 0.05


class GracefulStop(SystemExit):
    """Ends a run after a signal; its code, 75, says that the run was saved and can be resumed."""


class CheckpointEvery(Checkpoint):
    """Save every ``iterations`` iterations, at the end, and when asked to stop; a resume continues bit for bit.

    An iteration is one ``global_step``: one batch, however many updates it makes. It is saved when the next one
    begins, so that it has been logged and, where due, validated. SIGTERM or SIGINT ends the run with exit code 75 at
    the next safe point, saved; a second signal ends it at once with 128 + its number, the last checkpoint unharmed.

    During ``fit`` the module finds this callback as ``self.stop``. A long rollout or validation calls
    ``self.stop.check()`` between completions, before it changes anything that is saved: a stop discards the
    unfinished rollout or validation, and a resume makes it again.

    ``pl_module.checkpoint_artefacts()``, where it exists, names the artefacts that the state refers to.

    Args:
        iterations: Iterations between two checkpoints, at least 1.
        keep_last: Checkpoints to keep, at least 1. While a new one is written there is one more.

    Raises:
        ValueError: An argument below 1, gradient accumulation by Lightning, or a run folder that already holds
            checkpoints from beyond the step this run starts at.
        CheckpointError: A save failed twice. The run ends; the previous checkpoint is as it was.
    """

    def __init__(self, iterations: int, keep_last: int = 2):
        for name, value in (("iterations", iterations), ("keep_last", keep_last)):
            if value < 1:
                raise ValueError(f"CheckpointEvery.{name}: {value}, it must be at least 1")
        self.iterations = iterations
        self.keep_last = keep_last
        self._run_dir = Path()
        self._saved: int | None = None
        self._received: tuple[int, float] | None = None
        self._agreed = False
        self._mid_update = False
        self._handlers: dict[int, Any] = {}
        self._hooks: list[Any] = []

    # --- stopping -----------------------------------------------------------------------------------------------

    @property
    def requested(self) -> bool:
        """Whether to stop at the next safe point; on several ranks only once all have agreed between iterations."""
        return self._agreed or (world_size() == 1 and self._received is not None)

    def check(self) -> None:
        """Raise ``GracefulStop`` if a stop is requested; never between the first update of an iteration and its end."""
        if self.requested and not self._mid_update:
            raise GracefulStop(STOPPED)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._received is None:
            self._received = (number, now)
            # Not print: a signal handler must not re-enter a buffered stream.
            os.write(2, b"\nstopping at the next safe point, then saving; a second signal exits at once\n")
        elif self._received[0] != number or now - self._received[1] > _SAME_REQUEST_SECONDS:
            # coreutils' timeout sends the same signal twice in a row, to the process and to its group.
            os._exit(128 + number)

    def _release(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        for hook in self._hooks:
            hook.remove()
        self._handlers, self._hooks = {}, []

    # --- hooks --------------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse a Trainer whose iterations would not be steps."""
        if stage == "fit" and trainer.accumulate_grad_batches != 1:
            raise ValueError(
                "trainer.accumulate_grad_batches: must be 1; a batch is one iteration, set memory by the token budget"
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take over the signals and look at the run folder."""
        self._saved, self._received, self._agreed, self._mid_update = None, None, False, False
        self._run_dir = Path(trainer.log_dir or trainer.default_root_dir)
        self._inspect_run_folder(trainer)
        pl_module.stop = self  # type: ignore[assignment]
        if threading.current_thread() is threading.main_thread():
            self._handlers = {s: signal.signal(s, self._handle) for s in (signal.SIGTERM, signal.SIGINT)}
        if trainer.received_sigterm:
            # It came during start-up. Left with Lightning it would end the run after an epoch, unsaved, with exit 0.
            trainer._signal_connector.received_sigterm = False
            self._received = (signal.SIGTERM, time.monotonic())
        self._hooks = [o.register_step_post_hook(self._after_update) for o in trainer.optimizers]

    def _inspect_run_folder(self, trainer: pl.Trainer) -> None:
        problem = ""
        if trainer.is_global_zero and not getattr(trainer, "fast_dev_run", False):
            ahead = None
            try:
                ahead = set_aside_damaged(self._run_dir, trainer.global_step)
            except CheckpointError as e:
                problem = str(e)
            if ahead is not None:
                # Left in place it would be taken for this run's newest after the next interruption.
                problem = (
                    f"{ahead.path} is already further than step {trainer.global_step}, where this run starts: resume "
                    "from it (--ckpt_path last), or let the run write into another folder (the logger's version)"
                )
        problem = trainer.strategy.broadcast(problem)
        if problem:
            raise ValueError(problem)

    def _after_update(self, *_: Any) -> None:
        self._mid_update = True

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Between two iterations: save what is due and stop if asked to."""
        # Skipping a validation that was done before the save makes Lightning count one batch too many.
        trainer.fit_loop.epoch_loop._batches_that_stepped = batches_trained(trainer)
        if trainer.global_step and trainer.global_step % self.iterations == 0:
            self.save(trainer, pl_module)
        self._agreed = bool(all_reduce_max(int(self._received is not None), trainer.strategy.root_device))
        self.check()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """All updates of the iteration are made."""
        self._mid_update = False

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the last iteration."""
        self.save(trainer, pl_module)
        self._release()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Save a run that was asked to stop; any other error leaves the checkpoints as they are."""
        try:
            if isinstance(exception, GracefulStop) and not self._mid_update:
                self.save(trainer, pl_module)
        finally:
            self._release()

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Rewrite Lightning's counters as "``b`` batches of epoch ``e`` are finished".

        As they stand in mid-epoch, its restart paths drop a validation, train extra batches or shift the axis.
        """
        epoch, batches = position(trainer)
        state = checkpoint["loops"]["fit_loop"]
        epochs, progress = state["epoch_progress"], state["epoch_loop.batch_progress"]
        validation = state["epoch_loop.val_loop.batch_progress"]
        progress["is_last_batch"] = False
        for key, count in (("total", progress["total"]["processed"]), ("current", batches)):
            epochs[key] = {"ready": epoch + 1, "started": epoch + 1, "processed": epoch, "completed": epoch}
            progress[key] = dict.fromkeys(progress[key], count)
            if validation_is_due(trainer):  # begin it again
                validation[key] = {"ready": 1, "started": 1, "processed": 0, "completed": 0}

    # --- saving -------------------------------------------------------------------------------------------------

    def save(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write a checkpoint of this ``global_step`` unless there is one; every rank enters.

        Raises:
            CheckpointError: It failed twice.
        """
        step = trainer.global_step
        if step == self._saved or getattr(trainer, "fast_dev_run", False):
            return
        for logger in trainer.loggers:
            # What is still queued when the process is killed would be a hole in the curves of a resumed run.
            logger.save()
        # Before the state is dumped: asking may save an artefact, whose name the state then holds.
        artefacts = list(getattr(pl_module, "checkpoint_artefacts", list)())
        state = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        problem = self._write(trainer, state, step, artefacts)
        if problem:
            if trainer.is_global_zero:
                print(f"{problem}; trying once more", file=sys.stderr, flush=True)
            problem = self._write(trainer, state, step, artefacts)
        if problem:
            raise CheckpointError(problem)
        self._saved = step

    def _write(self, trainer: pl.Trainer, state: dict[str, Any], step: int, artefacts: list[str]) -> str:
        """One attempt; returns what went wrong on any rank, or nothing, the same on every rank."""
        strategy = trainer.strategy
        sharded = getattr(strategy, "device_mesh", None) is not None
        announced = False

        def write_shards(folder: Path) -> None:
            # Lightning's own writer takes entries out of the dict it is given.
            strategy.save_checkpoint(dict(state), folder / STATE_FOLDER)

        def write(folder: Path) -> dict[str, str] | None:
            nonlocal announced
            if not sharded:
                return save_state(state, folder / STATE_FILE)
            announced = True
            strategy.broadcast(str(folder))
            problem = _first_problem(trainer, lambda: write_shards(folder))
            if problem:
                raise CheckpointError(problem)
            return None

        problem = ""
        if trainer.is_global_zero:
            try:
                write_checkpoint(self._run_dir, write, step, artefacts=artefacts, expected_bytes=_size(state))
                prune(self._run_dir, self.keep_last, artefacts)
            except CheckpointError as e:
                problem = str(e)
        if sharded and trainer.is_global_zero and not announced:
            strategy.broadcast("")  # nothing to write: the others are waiting to hear where
        elif sharded and not trainer.is_global_zero and (folder := strategy.broadcast("")):
            _first_problem(trainer, lambda: write_shards(Path(folder)))
        return strategy.broadcast(problem)


def _first_problem(trainer: pl.Trainer, act: Any) -> str:
    """Run a collective on every rank and say on all of them what went wrong on any."""
    from torch.distributed import all_gather_object

    problem = ""
    try:
        act()
    except Exception as e:
        problem = f"rank {trainer.global_rank}: {e}"
    problems = [problem] * world_size()
    if world_size() > 1:
        all_gather_object(problems, problem)
    return next(filter(None, problems), "")


def _size(value: Any) -> int:
    """Bytes of all tensors within, whole even where sharded."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(map(_size, value.values()))
    return sum(map(_size, value)) if isinstance(value, (list, tuple)) else 0


class Deviations(pl.Callback):
    """Say when training begins where a preset is not what its paper says.

    Args:
        paper: Where the preset's values are from.
        deviations: One sentence each.
    """

    def __init__(self, paper: str, deviations: list[str]):
        self.paper, self.deviations = paper, deviations

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print them on the first rank."""
        rank_zero_info("\n  - ".join([f"after {self.paper}; other than there:", *self.deviations]))
