"""Data modules that stream, small files for them, and what their batches hold."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch

from lit_posttrain.data import Source, SupervisedExamples

HEAD = 16  # rows that are looked at first, where tests make it so
LATE = 40  # a row that this look does not see


def texts(name: str, n: int) -> list[dict[str, Any]]:
    return [{"text": f"{name} {i}"} for i in range(n)]


def asked(n: int, name: str = "q") -> list[dict[str, Any]]:
    return [{"prompt": f"{name}{i}?", "completion": f" {i}"} for i in range(n)]


def fake_trainer(max_steps: int = 9, **ranks: int) -> Any:
    return SimpleNamespace(
        distributed_sampler_kwargs=ranks, state=SimpleNamespace(fn="fit"),
        max_steps=max_steps, val_check_interval=3, limit_val_batches=1.0,
    )  # fmt: skip


def stream(tokenizer: str, kind: Any = SupervisedExamples, rank: int = 0, world: int = 1, **arguments: Any) -> Any:
    """A data module, set up."""
    defaults = {"batch_size": 4, "tokenizer": tokenizer, "held_out_percent": 0, "val_size": 0}
    data = kind(**{**defaults, "streaming": True, **arguments})
    if world > 1:
        data.trainer = fake_trainer(rank=rank, num_replicas=world)
    data.setup("fit")
    return data


def rows_of(batch: Any) -> list[Any]:
    """Per row its tokens, what counts of them, and its columns; the padding and the example's number in the share left
    out."""
    columns = {name: c.tolist() for name, c in batch.columns.items() if name != "group"}
    rows = zip(*batch.sequences, batch.mask, strict=True)
    return [
        (ids[:n].tolist(), int(p), mask[: n - 1].tolist(), {name: c[i] for name, c in columns.items()})
        for i, (ids, p, n, mask) in enumerate(rows)
    ]


def drawn(data: Any, start: int, stop: int) -> list[str]:
    found = []
    for i in range(start, stop):
        for tokens, *_ in rows_of(data.batch(i)):
            found.append(str(data.encoder.tokenizer.decode(tokens, skip_special_tokens=True)))
    return found


def same(a: Any, b: Any) -> bool:
    return a.columns.keys() == b.columns.keys() and all(
        torch.equal(x, y)
        for x, y in zip(
            [*a.sequences, a.mask, *a.columns.values()], [*b.sequences, b.mask, *b.columns.values()], strict=True
        )
    )


def mixed(paths: Sequence[str], *weights: float | None) -> list[Source]:
    return [Source(path=p, weight=w) for p, w in zip(paths, weights, strict=True)]
