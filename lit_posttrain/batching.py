"""From rows to micro-batches within a token budget: how memory is bounded without touching the objective."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from lit_posttrain.types import MicroBatch, Sequences

# Defaults of algorithms: what is kept of a token takes twice as much memory in fp32. A prompt and 8 completions of 128
# tokens fit into 1,152; 1,024 would divide them.
TOKEN_BUDGETS = {torch.float32: 768, torch.bfloat16: 1152}
# Rows that are compared stay together: with a few hundred tokens to a pair 768 would often hold one, and a quarter stay
# empty.
TOGETHER_BUDGET = 1152


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
    *,
    packed: bool = False,
    together: Int[Tensor, " b"] | None = None,
) -> list[MicroBatch]:
    """Micro-batches of at most ``token_budget`` tokens: rows alike in length, or where packed of the same prompt.

    A row longer than the budget goes alone. The order depends on the rows only.

    Args:
        sequences: All rows.
        mask: Scored positions that count.
        columns: Per-token ``[b, t]`` or per-row ``[b]`` tensors.
        token_budget: Most tokens, padding included, that go through the network at once.
        rows: Which rows to take; all by default.
        packed: Count tokens as the policy's packed rows hold them, a shared prompt once.
        together: Rows of the same number stay in one micro-batch and keep their order (the loss compares them), even
            beyond the budget.
    """
    chosen = torch.arange(len(sequences.ids)) if rows is None else rows
    units = None if together is None else _units(chosen, together)
    if packed:
        found = _first_fit(sequences, chosen, units, token_budget)
        return [take(sequences, mask, columns, index) for index in found]
    if units is not None:
        return [take(sequences, mask, columns, index) for index in _whole_units(sequences, units, token_budget)]
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


def rows_of_prompts(sequences: Sequences, rows: Sequence[int]) -> dict[tuple[int, ...], list[int]]:
    """Rows by the prompt they begin with."""
    prompts = sequences.prompt_lengths.tolist()
    groups: dict[tuple[int, ...], list[int]] = {}
    for row in rows:
        groups.setdefault(tuple(sequences.ids[row, : prompts[row]].tolist()), []).append(row)
    return groups


def _first_fit(
    sequences: Sequences, chosen: Int[Tensor, " n"], units: list[list[int]] | None, token_budget: int
) -> list[Int[Tensor, " m"]]:
    """Packed micro-batches of units of rows: from the largest on, each goes into the first that has room for it.

    Args:
        sequences: All rows.
        chosen: Rows to take.
        units: Those that stay together; None takes the rows of a prompt, and divides these beyond the budget: their
            parts then follow one another.
        token_budget: Of a micro-batch.
    """
    prompts, lengths = sequences.prompt_lengths.tolist(), sequences.lengths.tolist()
    by_prompt = list(rows_of_prompts(sequences, chosen.tolist()).values())
    batches: list[list[int]] = []
    room: list[int] = []  # tokens that each has left

    def put(place: int, rows: list[int], tokens: int) -> None:
        if place == len(batches):
            batches.append([])
            room.append(token_budget)
        batches[place] += rows
        room[place] -= tokens

    for size, rows in _from_the_largest(sequences, by_prompt, by_prompt if units is None else units):
        if size <= token_budget or units is not None:
            put(next((i for i, left in enumerate(room) if size <= left), len(room)), rows, size)
            continue
        shared = 0  # tokens of the prompt, once the last micro-batch holds it
        for row in sorted(rows, key=lambda r: (-lengths[r], r)):
            tokens = packed_tokens(prompts[row], [lengths[row] - prompts[row]])
            fits = bool(room) and tokens - shared <= room[-1]
            put(len(room) - fits, [row], tokens - shared if fits else tokens)
            shared = prompts[row]
    return [torch.tensor(batch) for batch in batches]


def _from_the_largest(
    sequences: Sequences, by_prompt: list[list[int]], units: list[list[int]]
) -> list[tuple[int, list[int]]]:
    """Units after the tokens that each takes in a packed row."""
    prompts, lengths = sequences.prompt_lengths.tolist(), sequences.lengths.tolist()
    prompt_of = {row: k for k, rows in enumerate(by_prompt) for row in rows}
    sized = []
    for rows in units:
        answers: dict[int, list[int]] = {}
        for row in rows:
            answers.setdefault(prompt_of[row], []).append(row)
        sizes = (packed_tokens(prompts[own[0]], [lengths[r] - prompts[r] for r in own]) for own in answers.values())
        sized.append((sum(sizes), rows))
    return sorted(sized, key=lambda unit: (-unit[0], unit[1][0]))


def _units(chosen: Int[Tensor, " n"], together: Int[Tensor, " b"]) -> list[list[int]]:
    """Rows that stay together."""
    units: dict[int, list[int]] = {}
    for row in chosen.tolist():
        units.setdefault(int(together[row]), []).append(row)
    return list(units.values())


def _whole_units(sequences: Sequences, units: list[list[int]], token_budget: int) -> list[Int[Tensor, " m"]]:
    """Padded micro-batches of units of rows, from the longest to the shortest, all as wide as the longest."""
    lengths = sequences.lengths.tolist()
    batches: list[list[int]] = [[]]
    for rows in sorted(units, key=lambda rows: -max(lengths[r] for r in rows)):
        together = batches[-1] + rows
        if batches[-1] and len(together) * max(lengths[r] for r in together) > token_budget:
            batches.append([])
        batches[-1] += rows
    return [torch.tensor(batch) for batch in batches if batch]


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


class Group(NamedTuple):
    """One prompt and its completions in a packed row, in tokens.

    Attributes:
        start: Where the prompt begins.
        prompt: Its length.
        completions: Tokens of each completion that the row holds after it.
        absent: Whether only the prompt's keys and values are there, and nobody asks for its attention.
    """

    start: int
    prompt: int
    completions: tuple[int, ...]
    absent: bool = False

    @property
    def tokens(self) -> int:
        """Of the prompt and its completions."""
        return self.prompt + sum(self.completions)

    @property
    def shares(self) -> bool:
        """Whether completions attend to the prompt apart from themselves; a lone one is plain text after it."""
        return len(self.completions) > 1 or self.absent


class PackedRow(NamedTuple):
    """Sequences as one row ``[prompt | completion | completion ...] [next prompt | ...]``, nothing padded.

    A sequence's last token predicts nothing, so a completion's is left out unless its state is wanted.

    Attributes:
        ids: Token ids.
        positions: Position of each within its own sequence.
        groups: The layout.
        states: For every token of the sequences that the row holds, where in it the token (and its state) stands.
    """

    ids: Int[Tensor, "1 n"]
    positions: Int[Tensor, "1 n"]
    groups: list[Group]
    states: Int[Tensor, "b s"]


def pack(sequences: Sequences, *, last: bool = False) -> PackedRow:
    """One row of all sequences; those with the same prompt share it.

    Args:
        sequences: The rows.
        last: Keep every sequence's last token: a reward is read from its state.
    """
    device, lengths = sequences.ids.device, sequences.lengths.tolist()
    left_out = 0 if last else 1
    ids, positions, groups, start = [], [], [], 0
    states = torch.zeros(len(lengths), sequences.ids.shape[1], dtype=torch.long)
    for prompt, rows in rows_of_prompts(sequences, range(len(lengths))).items():
        p, first = len(prompt), start + len(prompt)
        ids.append(sequences.ids[rows[0], :p])
        positions.append(torch.arange(p))
        for row in rows:
            end = max(lengths[row] - left_out, p)
            ids.append(sequences.ids[row, p:end])
            positions.append(torch.arange(p, end))
            # The prompt's last state predicts the first token of every completion.
            states[row, :p] = torch.arange(start, start + p)
            states[row, p:end] = torch.arange(first, first + end - p)
            first += end - p
        kept = [lengths[row] - left_out - p for row in rows]
        groups.append(Group(start, p, tuple(n for n in kept if n > 0)))
        start = first
    return PackedRow(torch.cat(ids)[None], torch.cat(positions)[None].to(device), groups, states.to(device))


def packed_tokens(prompt: int, completions: list[int]) -> int:
    """Tokens that a prompt of this length and its completions take in a packed row."""
    return prompt + sum(max(length - 1, 0) for length in completions)
