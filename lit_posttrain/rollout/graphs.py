"""CUDA graphs of decoding steps: one launch a token, where Python launches hundreds of kernels too slowly."""

import functools
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from lit_posttrain.rollout.static import StaticKVCache

Forward = Callable[[Tensor, Tensor, StaticKVCache, int], Tensor]
Like = dict[int, tuple[Tensor, Tensor]]


class Capture(ABC):
    """Turns a step into a function that repeats it on the same memory."""

    @abstractmethod
    def __call__(self, step: Callable[[], None]) -> Callable[[], None]:
        """What repeats ``step``, which it may call any number of times; RuntimeError where it cannot be repeated."""

    @abstractmethod
    def reset(self) -> None:
        """All that was returned so far is dropped."""


class CudaCapture(Capture):
    """Captures CUDA graphs that share one memory pool: nothing in it outlives a replay, so they run in any order.

    Args:
        device: A CUDA device.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.pool: Any = None  # torch has no public name for the type

    def __call__(self, step: Callable[[], None]) -> Callable[[], None]:
        """See ``Capture``."""
        with torch.cuda.device(self.device):
            current, side = torch.cuda.current_stream(), _side_stream(self.device)
            side.wait_stream(current)
            try:
                with torch.cuda.stream(side):
                    step()  # libraries set themselves up at their first call, and that cannot be captured
                    if self.pool is None:
                        _without_syncs(step)
                self.pool = self.pool or torch.cuda.graph_pool_handle()
                graph = torch.cuda.CUDAGraph()
                # thread_local: a data loader's thread may pin memory meanwhile, which the default does not forgive.
                with torch.cuda.graph(graph, pool=self.pool, stream=side, capture_error_mode="thread_local"):
                    step()
            finally:
                # A capture that fails leaves its own stream as the current one.
                torch.cuda.set_stream(current)
            current.wait_stream(side)
        return graph.replay

    def reset(self) -> None:
        """See ``Capture``."""
        self.pool = None
        torch.cuda.empty_cache()  # what a pool leaves serves nobody else


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    # One for the process: cuBLAS keeps a workspace for each stream, and captures into one pool should share theirs.
    return torch.cuda.Stream(device)


def _without_syncs(step: Callable[[], None]) -> None:
    """Run ``step``; RuntimeError where it waits for the device.

    A capture would fail there too, but before torch 2.12 that leaves the allocator believing it still goes on.
    """
    mode = torch.cuda.get_sync_debug_mode()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns that this mode does not see everything
            torch.cuda.set_sync_debug_mode("error")
        step()
    finally:
        torch.cuda.set_sync_debug_mode(mode)


class GraphDecoder:
    """Decoding steps over a static cache; each shape is captured when it first comes, and replayed from then on.

    What is captured serves as long as weights and cache stay where they are, over any number of ``generate`` calls.

    Args:
        capture: Captures a step; None computes every step afresh.
        device: Where weights and cache are.
    """

    def __init__(self, capture: Capture | None, device: torch.device):
        self.capture, self.device = capture, device
        self.cache: StaticKVCache | None = None
        self.network: PreTrainedModel | None = None
        self.replays: dict[tuple[int, int], Callable[[], None]] = {}
        self.weights: list[tuple[str, int]] = []
        self.version = 0  # of the cache that was captured
        # Architectures may read the mask that they are handed, so it must stay like everything else.
        self.unread = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
        self.ids = self.logits = torch.empty(0)

    @torch.inference_mode()
    def follow(self, view: PreTrainedModel) -> PreTrainedModel:
        """The view to decode with: the one that was captured while all its weights are where ``view`` has them.

        Args:
            view: Of the network as it is now, from ``inference_view``.
        """
        if self.capture is None:
            return view
        weights = [(name, p.data_ptr()) for name, p in view.named_parameters()]
        if self.network is not None and type(self.network) is type(view) and weights == self.weights:
            # A view's buffers are its own.
            for mine, new in zip(self.network.buffers(), view.buffers(), strict=True):
                mine.copy_(new)
            return self.network
        self._drop()
        self.network, self.weights = view, weights
        return view

    def start(self, rows: int, longest_prompt: int, most: int, like: Like, max_bytes: float) -> StaticKVCache:
        """An empty cache, in the memory of the one before where that suffices.

        Args:
            rows: See ``StaticKVCache.restart``, as for what follows.
            longest_prompt: Its tokens.
            most: Columns that may come to be used.
            like: Keys and values of each layer, for their shapes.
            max_bytes: Bounds keys and values.
        """
        if self.cache is None or _shapes(self.cache.like) != _shapes(like):
            self._drop()
            self.cache = StaticKVCache(like)
        self.cache.restart(rows, longest_prompt, most, max_bytes)
        return self.cache

    def __call__(
        self, forward: Forward, ids: Int[Tensor, "1 r"], positions: Int[Tensor, "1 r"]
    ) -> Float[Tensor, "r v"]:
        """Next-token logits ``forward(ids, positions, cache, 0)``; the next call overwrites them.

        Args:
            forward: Reads no tensor but its arguments, the weights and ``unread``.
            ids: One token a row.
            positions: As ``cache.begin`` returned them.
        """
        cache, rows = self.cache, ids.shape[1]
        assert cache is not None
        if cache.version != self.version:
            self._drop()
        key = rows, cache.width
        if self.capture is None or (key not in self.replays and not self._captured(forward, ids, positions)):
            return forward(ids, positions, cache, 0)
        self.ids[:, :rows].copy_(ids)
        self.replays[key]()
        return self.logits[:rows]

    def close(self) -> None:
        """Give all memory back."""
        self.cache = self.network = None
        self.weights = []
        self._drop()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _captured(self, forward: Forward, ids: Tensor, positions: Tensor) -> bool:
        """Capture the step of this shape; False if it cannot be, now and for good."""
        cache, rows = self.cache, ids.shape[1]
        assert cache is not None
        assert self.capture is not None
        if not len(self.logits):
            example = forward(ids, positions, cache, 0)
            self.logits = example.new_empty(cache.rows, example.shape[-1])
            self.ids = ids.new_zeros(1, cache.rows)
        static_ids, logits = self.ids[:, :rows].copy_(ids), self.logits[:rows]

        def step() -> None:
            cache.masks.clear()  # made outside of what is captured, they would never change again
            # Into one buffer: otherwise each graph would keep an output of its own, rows times vocabulary.
            logits.copy_(forward(static_ids, positions, cache, 0))

        try:
            self.replays[rows, cache.width] = self.capture(step)
        except RuntimeError as error:
            name = type(self.network).__name__
            self._drop()
            self.capture = self.network = None
            cache.masks.clear()
            warnings.warn(
                f"no CUDA graphs for {name} ({(str(error) or 'no reason').splitlines()[0]}): "
                "its kernels are launched one by one, which is slower",
                stacklevel=2,
            )
            return False
        return True

    def _drop(self) -> None:
        self.ids = self.logits = torch.empty(0)
        self.version = 0 if self.cache is None else self.cache.version
        if self.replays and self.capture is not None:
            self.replays.clear()
            self.capture.reset()


def decoder_for(device: torch.device, graphs: bool) -> GraphDecoder | None:
    """What decodes on this device; None where slices of a cache serve better, on a CPU."""
    if device.type != "cuda":
        return None
    return GraphDecoder(CudaCapture(device) if graphs else None, device)


def _shapes(like: Like) -> list[tuple[int, int, int, torch.dtype, torch.device]]:
    return [(layer, x.shape[0], x.shape[-1], x.dtype, x.device) for layer, pair in like.items() for x in pair]
