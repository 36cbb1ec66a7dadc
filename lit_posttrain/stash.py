"""What backward needs, side by side in memory of its own.

Kept where they were made, activations lie between the temporaries of their layer. glibc then seldom puts the next
tensor in the place of one that is gone (``memalign`` asks for room to align in), and a step holds half as much again
as it needs.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

# Bytes: of a block, of what is too small to be worth a copy, and of a cache line.
_BLOCK, _SMALL, _LINE = 2**25, 2**12, 2**6
# Storages that are remembered before those that are gone are forgotten.
_REMEMBERED = 64


class Stash:
    """Keeps tensors of a CPU as copies in a few large blocks, which the next forward pass fills again.

    A tensor that several operations keep, as a whole or as a view, is copied once. Parameters, small tensors and those
    of other devices stay as they are.
    """

    def __init__(self) -> None:
        self._open = False
        self._blocks: list[_Block] = []
        self._known: dict[StorageWeakRef, dict[Any, Callable[[], Tensor]]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> "Stash":
        return Stash()  # a copied network fills its own

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Inside, what autograd keeps is kept here."""
        if self._open or not torch.is_grad_enabled():
            yield
            return
        self._open = True
        try:
            with saved_tensors_hooks(self.keep, taken):
                yield
        finally:
            self._open, self._known = False, {}

    def keep(self, x: Tensor) -> Any:
        """What ``taken`` gives the tensor back from."""
        if not self._open or _stays(x):
            return x
        x = x.detach()
        dense = _is_dense(x)
        places, key = self._places(x), _key(x, dense)
        if key not in places:
            places[key] = self._copy(x, dense).numbers
        return _Kept(places[key], x.size(), x.stride() if dense else None)

    def remake(self, x: Tensor, make: Callable[[], Tensor]) -> None:
        """Keep no copy of ``x``, if it is contiguous, but ``make``, which gives its numbers again, in order."""
        if self._open and x.is_contiguous() and not _stays(x):
            self._places(x)[_key(x, dense=True)] = make

    def release(self) -> None:
        """Give back the blocks that hold nothing: room for what comes before the next forward pass."""
        self._blocks = [block for block in self._blocks if block.places]

    def _places(self, x: Tensor) -> dict[Any, Callable[[], Tensor]]:
        # A reference, though weak, keeps another storage from taking this one's identity.
        storage = StorageWeakRef(x.untyped_storage())
        if storage not in self._known and len(self._known) >= _REMEMBERED:
            self._known = {known: places for known, places in self._known.items() if not known.expired()}
        return self._known.setdefault(storage, {})

    def _copy(self, x: Tensor, dense: bool) -> "_Place":
        block = next((b for b in self._blocks if b.room() >= x.nbytes), None)
        if block is None:
            block = _Block(max(_BLOCK, x.nbytes))
            self._blocks.append(block)
        place = _Place(block, x.nbytes, x.dtype)
        if dense:
            place.numbers().copy_(x.as_strided((x.numel(),), (1,)))
        else:
            place.numbers().view(x.shape).copy_(x)
        return place


class _Block:
    """Memory that is filled from its start until all that it holds is gone."""

    def __init__(self, size: int):
        self.memory = torch.empty(size, dtype=torch.uint8)
        self.used = self.places = 0

    def room(self) -> int:
        """Bytes that are left."""
        return len(self.memory) - self.used


class _Place:
    """A stretch of a block, its own for as long as this lives."""

    __slots__ = ("_block", "_numbers")

    def __init__(self, block: _Block, size: int, dtype: torch.dtype):
        self._block = block
        self._numbers = block.memory[block.used : block.used + size].view(dtype)
        block.used += -(-size // _LINE) * _LINE
        block.places += 1

    def numbers(self) -> Tensor:
        return self._numbers

    def __del__(self) -> None:
        self._block.places -= 1
        if not self._block.places:
            self._block.used = 0


class _Kept:
    """A kept tensor: its numbers in order, and how it sees them (None: contiguous)."""

    __slots__ = ("numbers", "size", "stride")

    def __init__(self, numbers: Callable[[], Tensor], size: torch.Size, stride: tuple[int, ...] | None):
        self.numbers, self.size, self.stride = numbers, size, stride

    def tensor(self) -> Tensor:
        numbers = self.numbers()
        if self.stride is None:
            return numbers.view(self.size)
        return numbers.as_strided(self.size, self.stride, numbers.storage_offset())


def taken(kept: Any) -> Tensor:
    """The tensor that ``Stash.keep`` gave this for; valid for as long as what was given is referred to."""
    return kept.tensor() if isinstance(kept, _Kept) else kept


def _stays(x: Tensor) -> bool:
    if isinstance(x if x._base is None else x._base, nn.Parameter):
        return True
    return type(x) is not Tensor or x.device.type != "cpu" or x.layout != torch.strided or x.nbytes < _SMALL


def _key(x: Tensor, dense: bool) -> Any:
    return x.dtype, x._version, x.storage_offset(), x.numel() if dense else (x.size(), x.stride())


def _is_dense(x: Tensor) -> bool:
    """Whether the tensor's numbers fill a stretch of memory, in whatever order."""
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(x.stride(), x.size(), strict=True) if size > 1):
        if stride != expected:
            return False
        expected *= size
    return True
