"""Where the stretches of a packed row lie, in the form that each kind of attention reads: built once for all layers."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor, nn

from lit_posttrain.batching import Group

# Stretches this much shorter than the longest are padded into its call: below it a call costs more than its padding.
SLACK = 4


class Block(NamedTuple):
    """Causal stretches of the row, alike in length, that attend in one call.

    Attributes:
        start: Where the first begins.
        rows: How many.
        width: Tokens of the longest.
        tokens: Where each query and key stands in the row, the stretches padded by their own last token; None for
            a single stretch, which is the slice of ``width`` from ``start``.
        real: Which of ``tokens`` are not padding.
        padding: Which are.
    """

    start: int
    rows: int
    width: int
    tokens: Int[Tensor, " m"] | None
    real: Int[Tensor, " r"] | None
    padding: Int[Tensor, " p"] | None


class Ragged(NamedTuple):
    """The row as sequences of a variable-length attention, causal and aligned at their ends.

    The queries are the row as it stands: every prompt and every completion is a sequence. A prompt's keys are its
    own tokens, a completion's are its prompt's and then its own.

    Attributes:
        keys: Where in the row each key stands.
        query_ends: Queries up to each sequence, from 0 on.
        key_ends: Keys up to each sequence.
        most_queries: Of a sequence.
        most_keys: Of a sequence.
    """

    keys: Int[Tensor, " m"]
    query_ends: Int[Tensor, " s"]
    key_ends: Int[Tensor, " s"]
    most_queries: int
    most_keys: int


# Of each attention layer: what it was given as keys and values, ``[1, key heads, n, d]``.
Keys = dict[nn.Module, tuple[Tensor, Tensor]]


class Absent:
    """Prompts that do not go through the network with their row, since their keys and values are known.

    Args:
        places: Where in the row each would begin, and its tokens; in order.
        tokens: Of the whole row.
        keys: Of each, by layer.
    """

    def __init__(self, places: list[tuple[int, int]], tokens: int, keys: list[Keys]):
        self.keys, self.lengths = keys, [length for _, length in places]
        self._sizes, end = [], 0
        for start, length in places:
            self._sizes += [start - end, length]
            end = start + length
        self._sizes.append(tokens - end)

    def without(self, row: Tensor, dim: int) -> Tensor:
        """What goes through the network of something as long as the whole row."""
        return torch.cat(row.split(self._sizes, dim)[::2], dim)

    def filled(self, rest: Tensor, prompts: Sequence[Tensor], dim: int) -> Tensor:
        """The way back, with something for each absent prompt in its place."""
        parts = list(rest.split(self._sizes[::2], dim))
        for i, prompt in enumerate(prompts):
            parts.insert(2 * i + 1, prompt)
        return torch.cat(parts, dim)


class Layout:
    """A packed row as attention reads it.

    A plain class: ``torch.compile`` compiles a decoder layer again for whatever tuples and lists it is given.

    Args:
        groups: Its prompts and their completions.
        blocks: Its causal stretches; every token that is there lies in exactly one.
        ragged: The row for an accelerator; None on a CPU, which reads ``blocks``.
        absent: Which prompts attention finds elsewhere; None has all in the row.

    Attributes:
        keys: Where given, attention notes here what it was handed.
    """

    def __init__(self, groups: list[Group], blocks: list[Block], ragged: Ragged | None, absent: Absent | None = None):
        self.groups, self.blocks, self.ragged, self.absent = groups, blocks, ragged, absent
        self.keys: Keys | None = None


def layout_of(groups: list[Group], device: torch.device, absent: Absent | None = None) -> Layout:
    """What the attention on ``device`` reads."""
    if device.type == "cpu":
        return Layout(groups, blocks_of(groups), None, absent)
    return Layout(groups, [], ragged_of(groups, device), absent)


def blocks_of(groups: list[Group], slack: int = SLACK) -> list[Block]:
    """Causal stretches: each prompt that is there and each completion, but a lone one together with its prompt.

    Args:
        groups: Of the row.
        slack: Stretches of one block differ by at most so many tokens.
    """
    stretches: list[tuple[int, int]] = []  # length, start
    for group in groups:
        if not group.shares:
            stretches.append((group.tokens, group.start))
            continue
        start = group.start
        for length in (group.prompt, *group.completions):
            if start > group.start or not group.absent:
                stretches.append((length, start))
            start += length
    stretches.sort(key=lambda stretch: (-stretch[0], stretch[1]))
    blocks, block = [], stretches[:1]
    for stretch in stretches[1:]:
        if block[0][0] - stretch[0] > slack:
            blocks.append(_block(block))
            block = []
        block.append(stretch)
    return [*blocks, _block(block)]


def _block(stretches: list[tuple[int, int]]) -> Block:
    width, start = stretches[0]
    if len(stretches) == 1:
        return Block(start, 1, width, None, None, None)
    lengths, starts = (torch.tensor(x)[:, None] for x in zip(*stretches, strict=True))
    place = torch.arange(width).expand(len(stretches), -1)
    # By the last token: the log-sum-exp that goes with it covers every key of the stretch, so that backward's
    # exp(score - log-sum-exp) stays at most 1 in the padding too.
    tokens = starts + place.minimum(lengths - 1)
    real = (place < lengths).flatten()
    return Block(start, len(stretches), width, tokens.flatten(), real.nonzero()[:, 0], (~real).nonzero()[:, 0])


def ragged_of(groups: list[Group], device: torch.device) -> Ragged:
    """Indices on ``device``."""
    keys, queries, sizes = [], [], []
    for group in groups:
        prompt = torch.arange(group.start, group.start + group.prompt)
        keys.append(prompt)
        queries.append(group.prompt)
        sizes.append(group.prompt)
        start = group.start + group.prompt
        for length in group.completions:
            keys += [prompt, torch.arange(start, start + length)]
            queries.append(length)
            sizes.append(group.prompt + length)
            start += length
    ends = [torch.tensor([0, *x]).cumsum(0).to(device, torch.int32) for x in (queries, sizes)]
    return Ragged(torch.cat(keys).to(device), ends[0], ends[1], max(queries), max(sizes))
