"""The reference's log-probs of a whole data set, computed once and kept under the hash of what they depend on."""

import hashlib
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryFile
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

    A file's name is the hash of the reference's weights and configuration, the precision it computes in, and every
    token and mask, so that another model or other data never find it; its checksum is verified when it is read.

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

        Raises:
            ValueError: There is nothing to read, and the folder cannot be written to.
        """
        file = self.folder / f"{part}-{self._key(contents)}.safetensors"
        found = _read(file, rows) if rank() == 0 else None
        problem = _problem(self.folder) if rank() == 0 and found is None else None
        values, problem = gather_objects((found, problem))[0]
        if problem is not None:  # seen before the log-probs are computed
            raise ValueError(f"model.init_args.reference_cache: {self.folder} cannot be written to ({problem})")
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


def _problem(folder: Path) -> str | None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return str(error)


def _write(file: Path, values: Tensor) -> None:
    staged = file.with_name(f".tmp-{os.getpid()}-{file.name}")
    try:
        save_file({"log_probs": values}, staged, metadata={"sha256": _checksum(values)})
        staged.replace(file)
    except (OSError, SafetensorError) as error:  # the run has them in memory
        staged.unlink(missing_ok=True)
        warnings.warn(f"the reference's log-probs could not be kept in {file.parent} ({error})", stacklevel=2)


def _checksum(values: Tensor) -> str:
    return hashlib.sha256(values.contiguous().numpy().tobytes()).hexdigest()
