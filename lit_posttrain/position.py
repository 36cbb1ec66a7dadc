"""Where in the data a run stands; what a DataModule saves as its cursor and a checkpoint rewrites the counters to."""

from typing import cast

from lightning.pytorch import Trainer
from lightning.pytorch.loops.progress import _ProcessedTracker
from lightning.pytorch.trainer.states import TrainerFn


def position(trainer: Trainer) -> tuple[int, int]:
    """(epoch, batches of it that are trained and, where due, validated): where a resumed run goes on.

    Right in every hook. An epoch whose batches and validation are finished counts as the next one's start.
    """
    epoch = max(cast(_ProcessedTracker, trainer.fit_loop.epoch_progress.current).started - 1, 0)
    batches = cast(_ProcessedTracker, trainer.fit_loop.epoch_loop.batch_progress.current).processed
    unfinished = batches < trainer.fit_loop.max_batches or validation_is_due(trainer)
    return (epoch, batches) if unfinished else (epoch + 1, 0)


def validation_is_due(trainer: Trainer) -> bool:
    """Whether a validation within ``fit`` has begun and not ended."""
    return trainer.state.fn == TrainerFn.FITTING and trainer.validating


def batches_trained(trainer: Trainer) -> int:
    """Batches trained since the beginning of the run, over all epochs."""
    return cast(_ProcessedTracker, trainer.fit_loop.epoch_loop.batch_progress.total).processed
