"""What every worker shares: one JSON line in, one JSON line out, and how time and memory are read.

Imported in environments that hold a peer alone, so it needs nothing of lit_posttrain.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


class Channel:
    """The worker's end of the pipe. Whatever libraries print goes to stderr and cannot corrupt it."""

    def __init__(self):
        self._out = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)

    def receive(self) -> dict[str, Any]:
        """The next request; ends the process where the parent has none left."""
        line = sys.stdin.readline()
        if not line:
            # Trainers sit in the middle of a loop here, and nothing of theirs is worth tidying up.
            os._exit(0)
        return json.loads(line)

    def reply(self, **values: Any) -> None:
        """Answer the request."""
        self._out.write(json.dumps(values) + "\n")


class Clock:
    """Seconds and peak memory between ``start`` and ``stop``.

    Args:
        device: ``cpu``, where memory is the process's resident set, or ``cuda``, where it is what torch allocated.
    """

    def __init__(self, device: str):
        self.device = device
        self.baseline = 0 if device == "cuda" else _status("VmRSS")  # of the imports alone: made before a model is
        self._started = 0.0

    def start(self) -> None:
        """Begin, with the peak set back to the present level."""
        self.synchronize()
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")
        self._started = time.perf_counter()

    def stop(self) -> dict[str, float]:
        """``seconds``, ``peak_bytes`` and the ``baseline_bytes`` that the imports took."""
        self.synchronize()
        seconds = time.perf_counter() - self._started
        peak = torch.cuda.max_memory_allocated() if self.device == "cuda" else _status("VmHWM")
        return {"seconds": seconds, "peak_bytes": peak, "baseline_bytes": self.baseline}

    def timed(self, function: Callable[..., Any], add: Callable[[float], None]) -> Callable[..., Any]:
        """``function``, each call's seconds going to ``add``."""

        def measured(*args: Any, **kwargs: Any) -> Any:
            self.synchronize()
            started = time.perf_counter()
            result = function(*args, **kwargs)
            self.synchronize()
            add(time.perf_counter() - started)
            return result

        return measured

    def synchronize(self) -> None:
        """Wait for the GPU where there is one."""
        if self.device == "cuda":
            torch.cuda.synchronize()


def _status(field: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field + ":"))


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of these tensors, each storage counted once (tied weights are one)."""
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors}.values())


def optimizer_bytes(optimizer: Any) -> int:
    """Bytes of an optimizer's state."""
    return tensor_bytes(v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor))


def reward(token_ids: Sequence[int]) -> float:
    """A checksum in [0, 1): cheap, the same on both sides, and no group of samples ever scores all alike."""
    return sum((i + 1) * (token + 1) for i, token in enumerate(token_ids)) % 9973 / 9973


def useful_tokens(completions: Tensor, stops: Sequence[int]) -> int:
    """Tokens up to and including the first stop of each row."""
    if not stops:
        return completions.numel()
    ended = torch.isin(completions, torch.tensor(list(stops), device=completions.device))
    return int((ended.cumsum(1) - ended.long() == 0).sum())


def begin(setup: dict[str, Any]) -> None:
    """Threads and seed, as the parent wants them."""
    torch.set_num_threads(setup["threads"])
    torch.manual_seed(setup["seed"])


def trl_settings(setup: dict[str, Any]) -> dict[str, Any]:
    """What every trainer of TRL is told, each setting for a reason."""
    return {
        "output_dir": setup["folder"],
        # The same work: no decay of weights or rate.
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        # Fast: five times the default optimizer's speed on a CPU; activations fit, so nothing is computed twice.
        "optim": "adamw_torch_fused",
        "gradient_checkpointing": False,
        # Precision: fp32 weights under bf16 autocast, or bf16 weights without it; fp32 where nothing multiplies bf16.
        "bf16": setup["autocast"],
        # Nothing besides training.
        "use_cpu": setup["device"] == "cpu",
        "dataloader_pin_memory": False,
        "eval_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": setup["seed"],
    }
