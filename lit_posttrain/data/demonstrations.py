"""Answers that a reward model's scores are normalised on."""

from collections.abc import Sequence

from lit_posttrain.data import batches
from lit_posttrain.data.columns import check_text, kind_of, where
from lit_posttrain.data.dialogue import ASSISTANT, Encoder
from lit_posttrain.data.messages import as_messages, extras_of
from lit_posttrain.data.sources import read_rows
from lit_posttrain.types import Example, ExampleBatch

_KINDS = {"messages": ("messages",), "pair": ("prompt", "completion")}


def answers(path: str, key: str, encoder: Encoder, max_length: int | None) -> list[Example]:
    """The prompts and completions of a dataset; of a conversation its last answer.

    Args:
        path: The dataset.
        key: The key under ``data.init_args`` that names it.
        encoder: Tokenises.
        max_length: Longer ones are left out.

    Raises:
        ValueError: A row is wrong, or nothing is short enough.
    """
    examples = []
    for row in read_rows(path, key=key):
        check_text(row, ("prompt", "completion", "messages"))
        if kind_of(row, _KINDS) == "pair":
            encoded = encoder.pair(row["prompt"], row["completion"], row, ("prompt", "completion"))
        else:
            messages = as_messages(row["messages"], where(row, "messages"))
            last = max((i for i, m in enumerate(messages) if m["role"] == ASSISTANT), default=0)
            encoded = encoder.dialogue(messages[: last + 1], row.origin, first=last, extras=extras_of(row))
        prompt, completion, mask, messages = encoded
        if max_length is None or len(prompt) + len(completion) <= max_length:
            examples.append(Example(prompt, [completion], [mask], {}, row.origin, messages))
    if not examples:
        raise ValueError(f"data.init_args.{key}: no row of {path} is within max_length ({max_length})")
    return examples


def shares(examples: Sequence[Example], batch_size: int, rank: int, world: int) -> list[ExampleBatch]:
    """A rank's share of batches of answers, contiguous; as many batches on every rank, some perhaps empty."""
    shared = []
    for start in range(0, len(examples), batch_size):
        count = min(batch_size, len(examples) - start)
        mine = range(start + count * rank // world, start + count * (rank + 1) // world)
        rows = [line for group, i in enumerate(mine) for line in batches.lines(examples[i], group, i)]
        shared.append(batches.as_batch(rows, {}))
    return shared
