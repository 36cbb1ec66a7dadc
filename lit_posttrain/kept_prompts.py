"""Prompts whose answers lie in several micro-batches: each goes through the network once, forward and backward.

The first micro-batch that needs such a prompt has it computed by a pass of its own. What the answers read of it, the
keys and values of every layer and the states, then stands in leaves of the graph. Gradients gather in these until the
last micro-batch with answers to the prompt is done, and go through the prompt from there.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lit_posttrain.batching import Group, PackedRow, rows_of_prompts
from lit_posttrain.layout import Absent, Keys, Layout, layout_of
from lit_posttrain.types import MicroBatch

# What a pass of its own costs besides its tokens, in tokens: weights are read, gradients of all of them added up.
PASS_TOKENS = 128
# Share of prompts that are computed again, because their answers were divided, from which on a warning says so.
_MOST_AGAIN = 1 / 4

Prompt = tuple[int, ...]
# Ids, positions and layout through the decoder, to its last states.
Decode = Callable[[Int[Tensor, "1 n"], Int[Tensor, "1 n"], Layout], Float[Tensor, "1 n d"]]
# The last states of all tokens of a row.
Reader = Callable[[PackedRow, Decode], Float[Tensor, "1 n d"]]


def read_whole(row: PackedRow, decode: Decode) -> Float[Tensor, "1 n d"]:
    """All tokens go through the decoder."""
    return decode(row.ids, row.positions, layout_of(row.groups, row.ids.device))


class _Computed(NamedTuple):
    """A prompt that went through the network.

    Attributes:
        states: The decoder's last ones; a leaf.
        keys: Of each attention layer, with its values; leaves.
        made: Leaves beside what they were detached from.
    """

    states: Float[Tensor, "1 p d"]
    keys: Keys
    made: list[tuple[Tensor, Tensor]]


class KeptPrompts:
    """Of one network: the prompts that the present micro-batch shares with others.

    Attributes:
        able: Whether the network can do it, and gains by it; None where its rows are padded.
        wanted: The prompts.
    """

    def __init__(self) -> None:
        self.able: bool | None = None
        self.wanted: set[Prompt] = set()
        self._computed: dict[tuple[Any, Prompt], _Computed] = {}

    def read(self, row: PackedRow, decode: Decode, *, variant: Any = None) -> Float[Tensor, "1 n d"]:
        """Prompts that are wanted go through the decoder only where they have not yet.

        Args:
            row: Packed sequences.
            decode: Of this network.
            variant: Tells apart what it may compute, its adapters on or off.
        """
        if not self.wanted:
            return read_whole(row, decode)
        groups = [group._replace(absent=self._prompt(row, group) in self.wanted) for group in row.groups]
        found = {group: self._of(row, group, decode, variant) for group in groups if group.absent}
        if not found:
            return read_whole(row, decode)
        prompts = [computed.states for computed in found.values()]
        if sum(group.prompt for group in found) == row.ids.shape[1]:  # answers of one token, which predicts nothing
            return torch.cat(prompts, 1)
        places = [(group.start, group.prompt) for group in found]
        absent = Absent(places, row.ids.shape[1], [computed.keys for computed in found.values()])
        layout = layout_of(groups, row.ids.device, absent)
        states = decode(absent.without(row.ids, 1), absent.without(row.positions, 1), layout)
        return absent.filled(states, prompts, 1)

    def settle(self, prompts: set[Prompt]) -> None:
        """No further micro-batch needs these: their gradients go on through them."""
        for key in [key for key in self._computed if key[1] in prompts]:
            reached = [(x, leaf.grad) for leaf, x in self._computed.pop(key).made if leaf.grad is not None]
            if reached:
                torch.autograd.backward([x for x, _ in reached], [grad for _, grad in reached])

    def forget(self) -> None:
        """Weights have changed."""
        self._computed.clear()

    @staticmethod
    def _prompt(row: PackedRow, group: Group) -> Prompt:
        return tuple(row.ids[0, group.start : group.start + group.prompt].tolist())

    def _of(self, row: PackedRow, group: Group, decode: Decode, variant: Any) -> _Computed:
        key = (variant, torch.is_grad_enabled()), self._prompt(row, group)
        if key not in self._computed:
            span = slice(group.start, group.start + group.prompt)
            alone = Group(0, group.prompt, ())
            layout = layout_of([alone], row.ids.device)
            layout.keys = {}
            states = decode(row.ids[:, span], row.positions[:, span], layout)
            made: list[tuple[Tensor, Tensor]] = []
            keys = {m: (_leaf(k, made), _leaf(v, made)) for m, (k, v) in layout.keys.items()}
            self._computed[key] = _Computed(_leaf(states, made), keys, made)
        return self._computed[key]


def _leaf(x: Tensor, made: list[tuple[Tensor, Tensor]]) -> Tensor:
    leaf = x.detach().requires_grad_(x.requires_grad)
    if x.requires_grad:
        made.append((leaf, x))
    return leaf


@runtime_checkable
class Keeper(Protocol):
    """A network with what it keeps."""

    kept: KeptPrompts


def prompts_once(batches: Sequence[MicroBatch], networks: Sequence[Keeper]) -> Iterator[MicroBatch]:
    """The micro-batches one after another, each to be gone through (backward too) before the next is asked for.

    Between them networks keep what they computed of a prompt that several in a row hold, where that saves more than it
    costs.

    Args:
        batches: On whatever device.
        networks: That they go through.
    """
    able = [network.kept for network in networks if network.kept.able]
    parts = _parts(batches)
    if any(network.kept.able is False for network in networks):
        _say_what_is_computed_again(batches, parts)
    parts = {p: own for p, own in parts.items() if _again(p, own) > PASS_TOKENS and _follow_one_another(own)}
    try:
        for i, batch in enumerate(batches):
            for kept in able:
                kept.wanted = {prompt for prompt, own in parts.items() if i in own}
            yield batch
            for kept in able:
                kept.settle({prompt for prompt, own in parts.items() if own[-1] == i})
    finally:
        for kept in able:
            kept.wanted = set()
            kept.forget()


def _parts(batches: Sequence[MicroBatch]) -> dict[Prompt, list[int]]:
    """In which micro-batches each prompt has answers."""
    parts: dict[Prompt, list[int]] = {}
    for i, batch in enumerate(batches):
        for prompt in rows_of_prompts(batch.sequences, range(len(batch.sequences.ids))):
            parts.setdefault(prompt, []).append(i)
    return parts


def _follow_one_another(own: list[int]) -> bool:
    """What is kept is then part of the present micro-batch, whose tokens the budget counts."""
    return own[-1] - own[0] < len(own)


def _again(prompt: Prompt, own: list[int]) -> int:
    return len(prompt) * (len(own) - 1)


def _say_what_is_computed_again(batches: Sequence[MicroBatch], parts: dict[Prompt, list[int]]) -> None:
    answers = sum(int((b.sequences.lengths - b.sequences.prompt_lengths).sum()) for b in batches)
    again = sum(_again(prompt, own) for prompt, own in parts.items())
    if again > _MOST_AGAIN * (answers + again + sum(map(len, parts))):
        warnings.warn(
            "model.init_args.token_budget: it divides the answers to a prompt, and each part computes the prompt "
            "again: more than a quarter of the tokens are such; set it above a prompt with all its answers, in tokens",
            stacklevel=3,
        )
