"""Runs over two processes of this machine."""

import os
import socket
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.multiprocessing as mp
from lightning.pytorch.strategies import DDPStrategy

from lit_posttrain.sharding import ShardedStrategy


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def train_in_two(kind: str, train: Callable[[Any], None]) -> None:
    """Fork two ranks that each call ``train`` with an FSDP2 (``fsdp2``) or DDP (``ddp``) strategy over gloo."""
    mp.start_processes(_child, args=(free_port(), kind, train), nprocs=2, start_method="fork")


def _child(rank: int, port: int, kind: str, train: Callable[[Any], None]) -> None:
    torch.set_num_threads(1)  # with two threads a forked child hangs once its parent used OpenMP
    os.environ.update(
        LOCAL_RANK=str(rank), NODE_RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    try:
        train(
            ShardedStrategy(process_group_backend="gloo", timeout_seconds=30.0)
            if kind == "fsdp2"
            else DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=30))
        )
    except BaseException:
        traceback.print_exc(file=sys.stderr)
        os._exit(1)
    os._exit(0)
