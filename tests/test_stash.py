"""What backward needs lies in a few blocks: each tensor once, as it was when it was kept, and gone after backward."""

import copy
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_posttrain import stash
from lit_posttrain.batching import pad_sequences
from lit_posttrain.policy import Policy, PolicyConfig
from lit_posttrain.stash import Stash, taken

ROWS = ([[40, 41, 42], [40, 41, 42], [7, 9]], [[5, 6, 7, 1], [8, 1], [11, 12, 13, 14, 1]])


@pytest.fixture(autouse=True)
def nothing_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stash, "_SMALL", 0)


def in_use(of: Stash) -> int:
    return sum(block.places for block in of._blocks)


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "whole": lambda x: x,
    "turned": lambda x: x.t(),
    "row": lambda x: x[1],
    "column": lambda x: x[:, 2],
    "every other": lambda x: x[:, ::2],
    "expanded": lambda x: x[:1].expand(4, -1),
    "other shape": lambda x: x.view(3, 2, 3)[1:],
    "turned heads": lambda x: x.view(2, 3, 3).transpose(0, 1),
    "scalar": lambda x: x[0, 0],
    "empty": lambda x: x[:0],
    "whole numbers": lambda x: x.long(),
    "truths": lambda x: x > 3,
    "half": lambda x: x.bfloat16(),
}


@pytest.mark.parametrize("view", VIEWS)
def test_whatever_is_kept_comes_back(view: str) -> None:
    x = VIEWS[view](torch.arange(18.0).view(3, 6) if view != "turned heads" else torch.arange(18.0))
    one = Stash()
    with one.keeping():
        kept = one.keep(x)
    back = taken(kept)
    assert torch.equal(back, x)
    assert (back.dtype, back.shape) == (x.dtype, x.shape)
    assert x.numel() == 0 or back.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


def test_once_for_all_that_keep_it() -> None:
    one, x = Stash(), torch.randn(4, 6)
    with one.keeping():
        kept = [one.keep(view) for view in (x, x.view(24), x.view(2, 12), x.detach(), x.t())]
        assert in_use(one) == 1
        apart = [one.keep(view) for view in (x[1:], x.view(torch.int32), x.clone())]
        assert in_use(one) == 4
    assert len({taken(k).data_ptr() for k in kept}) == 1
    assert torch.equal(taken(kept[4]), x.t())
    assert torch.equal(taken(apart[0]), x[1:])


def test_as_it_was_when_it_was_kept() -> None:
    one, x = Stash(), torch.arange(6.0)
    with one.keeping():
        before = one.keep(x)
        x.mul_(10)
        after = one.keep(x)
    assert taken(before).tolist() == [0, 1, 2, 3, 4, 5]
    assert taken(after).tolist() == [0, 10, 20, 30, 40, 50]


def test_memory_that_is_used_again_is_another_tensor() -> None:
    one, kept = Stash(), []
    with one.keeping():
        for i in range(300):  # the allocator gives the same place over and over
            kept.append(one.keep(torch.full((64,), float(i))))
    assert [taken(k)[0].item() for k in kept] == list(range(300))


def test_parameters_stay_where_they_are() -> None:
    one, linear = Stash(), nn.Linear(8, 8)
    frozen = nn.Parameter(torch.randn(8, 8), requires_grad=False)
    with one.keeping():
        for x in (linear.weight, linear.weight.t(), linear.bias, frozen, frozen.t(), frozen[2:]):
            assert one.keep(x) is x
    assert not one._blocks


def test_what_can_be_made_again_is_not_copied() -> None:
    one, x, asked = Stash(), torch.arange(6.0), []

    def make() -> Tensor:
        asked.append(1)
        return torch.arange(6.0)

    with one.keeping():
        one.remake(x, make)
        kept = one.keep(x.view(2, 3))
        x.add_(1)  # no longer what is made
        other = one.keep(x)
        assert in_use(one) == 1
    assert not asked
    assert taken(kept).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert taken(other).tolist() == [1, 2, 3, 4, 5, 6]
    assert asked == [1]


def test_what_is_not_contiguous_is_copied() -> None:
    one, x = Stash(), torch.arange(6.0).view(2, 3).t()
    with one.keeping():
        one.remake(x, lambda: torch.zeros(6))
        kept = one.keep(x)
    assert torch.equal(taken(kept), x)


def test_nothing_is_kept_outside() -> None:
    one, x = Stash(), torch.randn(6)
    assert one.keep(x) is x
    with torch.no_grad(), one.keeping():
        assert one.keep(x) is x
    with pytest.raises(RuntimeError, match="forward failed"), one.keeping():
        raise RuntimeError("forward failed")
    assert one.keep(x) is x


def test_blocks_are_filled_again_and_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stash, "_BLOCK", 1024)
    one, x = Stash(), torch.randn(3, 100, requires_grad=True)
    places = []
    for _ in range(3):
        with one.keeping():
            y = x.exp().sin() * x.cos()
        places.append({block.memory.data_ptr() for block in one._blocks})
        assert in_use(one) > 3
        one.release()
        assert in_use(one) > 3, "what backward needs stays"
        y.sum().backward()
        assert in_use(one) == 0
    assert places[0] == places[1] == places[2]
    one.release()
    assert not one._blocks


def test_what_is_gone_frees_no_place_of_others() -> None:
    one = Stash()
    with one.keeping():
        kept = [one.keep(torch.full((64,), float(i))) for i in range(3)]
        one._known = {}  # nothing but what is kept
        del kept[0]
        kept += [one.keep(torch.full((64,), float(i))) for i in (3, 4)]
    assert [taken(k)[0].item() for k in kept] == [1, 2, 3, 4]


def test_a_graph_that_is_dropped_leaves_nothing() -> None:
    one, x = Stash(), torch.randn(64, requires_grad=True)
    with one.keeping():
        y = x.exp().sin()
    assert in_use(one) == 1  # what exp gives, and sin reads
    del y
    assert in_use(one) == 0, "a cycle keeps the graph"


def policy(folder: Path, **config: Any) -> Policy:
    made = Policy(PolicyConfig(model=str(folder), compute_dtype="float32", **config))
    made.build_view(torch.device("cpu"), sharded=False)
    return made


def test_what_a_token_costs(tiny_model: Path) -> None:
    """Of a layer: its input and middle, q, k, v, what attention gives with its normalisers, and the MLP's two products.

    Norms' outputs are made again, and so is what the MLP's last product reads.
    """
    one, sequences = policy(tiny_model), pad_sequences(*ROWS)
    assert one.stash is not None
    scored = one(sequences, sequences.completion_mask(), 1.0).log_probs
    c = one.hf_config
    heads, head = c.num_attention_heads, c.hidden_size // c.num_attention_heads
    layer = 2 * c.hidden_size + (2 * heads + 2 * c.num_key_value_heads) * head + heads + 2 * c.intermediate_size
    tokens = (3 + 3 + 1) + (2 + 4)  # a shared prompt once, and nobody's last token
    # Besides: the last norm's input; once the embedding's ids and two rotary tables.
    expected = tokens * (4 * (c.num_hidden_layers * layer + c.hidden_size) + 8 + 2 * 4 * head)
    used = sum(block.used for block in one.stash._blocks)
    assert expected <= used <= expected + 64 * in_use(one.stash)
    scored.sum().backward()
    assert in_use(one.stash) == 0
    one.sync()
    assert not one.stash._blocks


def test_a_second_forward_before_the_first_backward(tiny_model: Path) -> None:
    sequences = pad_sequences(*ROWS)
    mask = sequences.completion_mask()
    one = policy(tiny_model)
    first, second = (one(sequences, mask, t).log_probs.sum() for t in (1.0, 2.0))
    (first + 3 * second).backward()
    other = policy(tiny_model, recompute_elementwise=False)
    (other(sequences, mask, 1.0).log_probs.sum() + 3 * other(sequences, mask, 2.0).log_probs.sum()).backward()
    for (name, p), (_, q) in zip(one.trainable(), other.trainable(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-6, msg=name)


def test_a_copied_network_has_a_stash_of_its_own(tiny_model: Path) -> None:
    one, sequences = policy(tiny_model), pad_sequences(*ROWS)
    scored = one(sequences, sequences.completion_mask(), 1.0).log_probs
    other = copy.deepcopy(one)
    assert other.stash is not one.stash
    assert other.stash is not None
    assert not other.stash._blocks
    of_other = other(sequences, sequences.completion_mask(), 1.0).log_probs
    assert torch.equal(scored, of_other)
    of_other.sum().backward()
    assert all(p.grad is None for _, p in one.trainable())
    assert all(p.grad is not None for _, p in other.trainable())
    del scored, of_other
    gc.collect()
    assert in_use(one.stash) == in_use(other.stash) == 0  # pyright: ignore[reportArgumentType]
