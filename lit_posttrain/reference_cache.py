"""The reference's log-probs of a whole data set, computed once and kept under the hash of what they depend on."""

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lit_posttrain.reference import Reference
from lit_posttrain.sharding import gather_objects, rank, world_size
from lit_posttrain.types import ExampleBatch

_AT_ONCE = 64


class ReferenceCache:
    """Sums of log-probs by row, one file a split (or other part of the data).

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
        part: str,
        contents: Sequence[Any],
        rows: int,
        batch_of: Callable[[list[int]], ExampleBatch],
        score: Callable[[ExampleBatch, Tensor], Tensor],
        phase: Callable[[str, int], None],
    ) -> None:
        """Read a part's file, or compute and write it. Every rank enters.

        Args:
            part: ``train``, ``val``, ...
            contents: What each of its items is: every token and mask.
            rows: How many numbers it has.
            batch_of: Items as a batch, whose column ``row`` says which number each row is; a negative one is none.
            score: The sums of a batch, one a row, right at the rows that are named; a collective under sharding.
            phase: Told that work begins.
        """
        file = self.folder / f"{part}-{self._key(contents)}.safetensors"
        found = _read(file, rows) if rank() == 0 else None
        values = gather_objects(found)[0]
        if values is None:
            phase("reference log-probs", -(-len(contents) // (_AT_ONCE * world_size())))
            values = torch.zeros(rows)
            step = _AT_ONCE * world_size()
            for start in range(0, len(contents), step):
                first = start + rank() * _AT_ONCE
                batch = batch_of(list(range(first, min(first + _AT_ONCE, len(contents)))))
                numbers = batch.columns["row"]
                mine = (numbers >= 0).nonzero()[:, 0]
                for theirs, sums in gather_objects((numbers[mine], score(batch, mine)[mine])):
                    values[theirs] = sums
            if rank() == 0:
                _write(file, values)
        self.values[part] = values

    def read(self, part: str, rows: Int[Tensor, " b"]) -> Float[Tensor, " b"]:
        """The sums of these rows of a part."""
        return self.values[part][rows]

    def _key(self, contents: Sequence[Any]) -> str:
        digest = hashlib.sha256(self.depends_on.encode())
        for item in contents:
            digest.update(repr(item).encode())
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
