"""A cache at fixed addresses and in few shapes, so that a step captured once can be repeated for every further token.

Each row writes its next token at the column of its position, so nothing ever shifts: a step depends on the ids and the
positions alone, which stand in buffers that stay. Attention goes over the width of a bucket, under a mask made on the
device from the positions. Nothing here waits for the device.
"""

from itertools import chain

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from lit_posttrain.rollout.kv_cache import Layout, Scores, attention, bytes_per_column, zeros

# The narrowest bucket of columns; each further one is twice as wide.
COLUMNS = 256


def row_bucket(rows: int) -> int:
    """Rows that a step computes for so many live ones: multiples of 8 up to 64, then of 32."""
    step = 8 if rows <= 64 else 32
    return -(-rows // step) * step


def column_bucket(columns: int) -> int:
    """The narrowest bucket of so many columns: ``COLUMNS`` times a power of two."""
    return COLUMNS << ((columns - 1) // COLUMNS).bit_length()


def most_columns(longest_prompt: int, max_new_tokens: int) -> int:
    """Columns that the cache never exceeds, however many completions pass through it."""
    return -(-(longest_prompt + max_new_tokens) // COLUMNS) * COLUMNS


def to_device(host: Shaped[Tensor, "..."], device: torch.device) -> Shaped[Tensor, "..."]:
    """A CPU tensor on ``device``, without waiting for what is queued there."""
    return _pinned(host, device).to(device, non_blocking=True)


def _pinned(host: Tensor, device: torch.device) -> Tensor:
    # From other memory a copy waits for all that is queued on the device.
    return host.pin_memory() if device.type == "cuda" else host


class StaticKVCache(Layout):
    """Keys and values of the rows being decoded, each row from column 0 on; kept from one ``generate`` to the next.

    ``version`` counts the times that memory moved: what was captured before is then void.

    Args:
        like: Keys and values of each layer, for their shapes.
    """

    def __init__(self, like: dict[int, tuple[Tensor, Tensor]]):
        self.like = {layer: (_shape_of(keys), _shape_of(values)) for layer, (keys, values) in like.items()}
        first = next(iter(like.values()))[0]
        self.device, self.dtype = first.device, first.dtype
        self.rows = self.columns = self.version = self.live = self.width = self.most = self.needed_rows = 0
        self.max_bytes = 0.0
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}
        self.lengths: list[int] = []
        self.masks: dict[int | None, Tensor] = {}
        self.positions = self.row = self.column = torch.empty(0)

    def restart(self, rows: int, longest_prompt: int, most: int, max_bytes: float) -> None:
        """Forget every row.

        Args:
            rows: Rows that will be used.
            longest_prompt: Its tokens.
            most: Columns that may come to be used.
            max_bytes: Memory of earlier calls is kept as far as all of it stays within these.
        """
        self.most, self.needed_rows, self.max_bytes = most, rows, max_bytes
        self._reserve(min(column_bucket(longest_prompt + 1), most))
        self.lengths = [0] * self.rows
        for x in chain.from_iterable(self.layers.values()):
            # Masked columns count with weight 0, and 0 * NaN is NaN: diverged weights must not outlive their call.
            x.zero_()

    def put(self, rows: slice, layers: dict[int, tuple[Tensor, Tensor]], span: slice) -> None:
        """Give rows a prompt."""
        n = span.stop - span.start
        for layer, (keys, values) in self.layers.items():
            prompt_keys, prompt_values = layers[layer]
            keys[rows, :, :n] = prompt_keys[:, span]
            values[rows, :, :n] = prompt_values[:, span]
        self.lengths[rows] = [n] * (rows.stop - rows.start)

    def move(self, sources: Int[Tensor, " n"], targets: Int[Tensor, " n"]) -> None:
        """Rows ``targets`` become rows ``sources``; both on the CPU."""
        for source, target in zip(sources.tolist(), targets.tolist(), strict=True):
            self.lengths[target] = self.lengths[source]
        used = max(self.lengths[target] for target in targets.tolist())
        sources, targets = to_device(sources, self.device), to_device(targets, self.device)
        for x in chain.from_iterable(self.layers.values()):
            x[targets, :, :used] = x[sources, :, :used]

    def begin(self, live: int, rows: int) -> Int[Tensor, " rows"]:
        """Get ready for one more token in each of the first ``live`` rows; returns the tokens' positions.

        The rows from there up to ``rows`` only fill the batch up. The result stays at its address.
        """
        self.live = live
        self.lengths[live:rows] = [0] * (rows - live)
        needed = max(self.lengths[:live]) + 1
        assert needed <= self.most, f"{needed} columns, of {self.most} announced"
        self._reserve(min(column_bucket(needed), self.most))
        self.width = min(column_bucket(needed), self.columns)
        self.masks.clear()
        positions = self.positions[:rows]
        return positions.copy_(_pinned(torch.tensor(self.lengths[:rows]), self.device), non_blocking=True)

    def finish(self) -> None:
        """The column is written in every layer."""
        for row in range(self.live):
            self.lengths[row] += 1

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
        """Attention of one new token a row over its own tokens; see ``Layout``."""
        keys, values = self.layers[layer]
        heads, rows, size = query.shape[1:]
        grouped = query[0].transpose(0, 1).reshape(rows, key.shape[1], heads // key.shape[1], size)
        row, column = self.row[:rows], self.positions[:rows]
        keys[row, :, column], values[row, :, column] = key[0].transpose(0, 1), value[0].transpose(0, 1)
        mask = self._mask(rows, scores.window)
        out = attention(grouped, keys[:rows, :, : self.width], values[:rows, :, : self.width], mask, scores)
        return out.reshape(1, rows, heads, out.shape[-1])

    def _mask(self, rows: int, window: int | None) -> Float[Tensor, "r 1 1 c"]:
        """Made by the first layer that asks, within the step: a captured step makes it anew each time."""
        if window not in self.masks:
            column, own = self.column[: self.width], self.positions[:rows, None]
            hidden = column > own
            if window is not None:
                hidden |= column <= own - window
            mask = torch.zeros(hidden.shape, dtype=self.dtype, device=self.device).masked_fill_(hidden, -torch.inf)
            self.masks[window] = mask[:, None, None]
        return self.masks[window]

    def _reserve(self, columns: int) -> None:
        """Room for ``needed_rows`` rows of so many columns; what the rows hold is kept."""
        rows = self.needed_rows
        if rows <= self.rows and columns <= self.columns:
            return
        larger = max(rows, self.rows), max(columns, self.columns)
        if larger[0] * larger[1] * bytes_per_column(self.like) <= self.max_bytes:
            rows, columns = larger
        kept = slice(min(rows, self.rows)), slice(None), slice(min(columns, self.columns))
        for layer, pair in self.like.items():
            # One layer after another, so that never more than one exists twice.
            fresh = [zeros(rows, columns, x) for x in pair]
            for new, old in zip(fresh, self.layers.pop(layer, ()), strict=False):
                new[kept] = old[kept]
            self.layers[layer] = fresh[0], fresh[1]
        self.rows, self.columns = rows, columns
        self.positions = torch.zeros(rows, dtype=torch.long, device=self.device)
        self.row = torch.arange(rows, device=self.device)
        self.column = torch.arange(columns, device=self.device)
        self.version += 1


def _shape_of(x: Float[Tensor, "h n d"]) -> Float[Tensor, "h 0 d"]:
    return x.new_empty(x.shape[0], 0, x.shape[-1])  # not a view, which would keep a prompt's keys alive
