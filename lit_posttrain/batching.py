"""From rows to micro-batches within a token budget: how memory is bounded without touching the objective."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from lit_posttrain.types import MicroBatch, Sequences


def pad_sequences(prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> Sequences:
    """Right-padded rows of each prompt and its completion."""
    rows = [[*p, *c] for p, c in zip(prompts, completions, strict=True)]
    ids = torch.zeros(len(rows), max(map(len, rows), default=0), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row, dtype=torch.long)
    return Sequences(ids, torch.tensor([len(p) for p in prompts]), torch.tensor([len(row) for row in rows]))


def split(
    sequences: Sequences,
    mask: Bool[Tensor, "b t"],
    columns: dict[str, Tensor],
    token_budget: int,
    rows: Int[Tensor, " n"] | None = None,
) -> list[MicroBatch]:
    """Micro-batches of rows alike in length, each of at most ``token_budget`` padded tokens.

    A row longer than the budget goes alone. The order depends on lengths and indices only.

    Args:
        sequences: All rows.
        mask: Scored positions that count.
        columns: Per-token ``[b, t]`` or per-row ``[b]`` tensors.
        token_budget: Most tokens, padding included, that go through the network at once.
        rows: Which rows to take; all by default.
    """
    chosen = torch.arange(len(sequences.ids)) if rows is None else rows
    lengths = sequences.lengths[chosen].tolist()
    order = sorted(range(len(chosen)), key=lambda i: (-lengths[i], i))
    batches, group = [], []
    for i in order:
        # Sorted from long to short, so the first row of a group sets its width.
        if group and lengths[group[0]] * (len(group) + 1) > token_budget:
            batches.append(chosen[group])
            group = []
        group.append(i)
    if group:
        batches.append(chosen[group])
    return [take(sequences, mask, columns, index) for index in batches]


def take(
    sequences: Sequences, mask: Bool[Tensor, "b t"], columns: dict[str, Tensor], rows: Int[Tensor, " n"]
) -> MicroBatch:
    """These rows, trimmed to the longest of them."""
    width = int(sequences.lengths[rows].max())
    trimmed = Sequences(sequences.ids[rows, :width], sequences.prompt_lengths[rows], sequences.lengths[rows])
    picked = {name: c[rows, : width - 1] if c.dim() == 2 else c[rows] for name, c in columns.items()}
    return MicroBatch(trimmed, mask[rows, : width - 1], picked, rows)


def idle(columns: dict[str, Tensor]) -> MicroBatch:
    """One row of two tokens that counts nowhere: what a rank runs while others still have micro-batches.

    Sharded forwards are collectives, so every rank must run the same number of them.
    """
    sequences = Sequences(torch.zeros(1, 2, dtype=torch.long), torch.ones(1, dtype=torch.long), torch.full((1,), 2))
    empty = {name: c.new_zeros((1, 1) if c.dim() == 2 else (1,)) for name, c in columns.items()}
    return MicroBatch(sequences, torch.zeros(1, 1, dtype=torch.bool), empty, torch.zeros(0, dtype=torch.long))


def to_device(batch: MicroBatch, device: torch.device) -> MicroBatch:
    """The micro-batch on ``device``."""
    sequences = Sequences(*(x.to(device) for x in batch.sequences))
    columns = {name: c.to(device) for name, c in batch.columns.items()}
    return MicroBatch(sequences, batch.mask.to(device), columns, batch.rows)
