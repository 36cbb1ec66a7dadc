"""The reference's log-probs of a whole data set, computed once and kept under the hash of what they depend on."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lit_posttrain.reference import Reference
from lit_posttrain.sharding import gather_objects, rank, world_size
from lit_posttrain.types import Example, ExampleBatch

_EXAMPLES_AT_ONCE = 64


class ReferenceCache:
    """Sums of log-probs by row, one file a split.

    A file's name is the hash of the reference's weights, the precision they compute in, and every token and mask, so
    that other weights or other data never find it; its checksum is verified when it is read.

    Args:
        folder: Where the files lie; made if absent.
        reference: Whose log-probs.
        precision: What its forward passes compute in.
    """

    def __init__(self, folder: str, reference: Reference, precision: str):
        self.folder = Path(folder)
        self.depends_on = f"{reference.initial_hash} {precision}"
        self.values: dict[str, Float[Tensor, " n"]] = {}

    def fill(
        self,
        split: str,
        data: Any,
        score: Callable[[ExampleBatch], Tensor],
        phase: Callable[[str, int], None],
        device: torch.device,
    ) -> None:
        """Read a split's file, or compute and write it. Every rank enters.

        Args:
            split: ``train`` or ``val``.
            data: The DataModule.
            score: A batch's sums by row; a collective under sharding.
            phase: Told that work begins.
            device: Not read on a CPU.
        """
        examples: list[Example] = data.examples(split)
        file = self.folder / f"{split}-{self._key(examples)}.safetensors"
        rows = sum(len(e.completions) for e in examples)
        found = _read(file, rows) if rank() == 0 else None
        values = gather_objects(found)[0]
        if values is None:
            phase("reference log-probs", -(-len(examples) // (_EXAMPLES_AT_ONCE * world_size())))
            values = self._compute(split, data, len(examples), rows, score)
            if rank() == 0:
                _write(file, values)
        self.values[split] = values

    def read(self, split: str, rows: Int[Tensor, " b"]) -> Float[Tensor, " b"]:
        """The sums of these rows of a split."""
        return self.values[split][rows]

    def _compute(
        self, split: str, data: Any, examples: int, rows: int, score: Callable[[ExampleBatch], Tensor]
    ) -> Float[Tensor, " n"]:
        values = torch.zeros(rows)
        step = _EXAMPLES_AT_ONCE * world_size()
        for start in range(0, examples, step):
            first = start + rank() * _EXAMPLES_AT_ONCE
            mine = list(range(first, min(first + _EXAMPLES_AT_ONCE, examples)))
            batch = data.collate(split, mine, list(range(len(mine))))
            for theirs, sums in gather_objects((batch.columns["row"], score(batch))):
                values[theirs] = sums
        return values

    def _key(self, examples: list[Example]) -> str:
        digest = hashlib.sha256(self.depends_on.encode())
        for e in examples:
            digest.update(repr((e.prompt, e.completions, e.masks)).encode())
        return digest.hexdigest()[:32]


def _read(file: Path, rows: int) -> Tensor | None:
    if not file.is_file():
        return None
    try:
        with safe_open(file, "pt") as opened:
            # A copy: a mapped tensor would change, or end the process, with the file.
            values, checksum = opened.get_tensor("log_probs").clone(), (opened.metadata() or {}).get("sha256")
    except (SafetensorError, OSError, ValueError):
        return None
    return values if len(values) == rows and checksum == _checksum(values) else None


def _write(file: Path, values: Tensor) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    staged = file.with_name(f".tmp-{os.getpid()}-{file.name}")
    save_file({"log_probs": values}, staged, metadata={"sha256": _checksum(values)})
    staged.replace(file)


def _checksum(values: Tensor) -> str:
    return hashlib.sha256(values.contiguous().numpy().tobytes()).hexdigest()
