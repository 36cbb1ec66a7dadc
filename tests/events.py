"""Event files whose names come in the order of time.

TensorBoard reads a folder's files by name: the second, the host, then the process id *as text* ("10000" before
"9999"). Attempts of a second each would be read, and purged, in a wrong order now and then; a user's never are.
"""

import os
import socket
import time
from pathlib import Path

from lightning.pytorch.loggers import TensorBoardLogger

from lit_posttrain.checkpoint import Checkpoint


def await_later_name(folder: Path) -> None:
    """Wait for the next second if an event file written now would be read before one that is there.

    Args:
        folder: Of the run; need not exist.
    """
    newest = max((path.name for path in folder.glob("events.out.tfevents.*")), default="")
    while f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}" <= newest:
        time.sleep(0.02)


def logger_from(folder: Path, found: Checkpoint | None) -> TensorBoardLogger:
    """Of ``folder/version_0``, for an attempt that goes on from a checkpoint or begins: later points are dropped."""
    await_later_name(folder / "version_0")
    return TensorBoardLogger(folder, name="", version=0, purge_step=found.step + 1 if found else 1)
