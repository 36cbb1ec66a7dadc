"""Random numbers as a function of names: the same for the same name, others for any other, whatever came before."""

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_posttrain.randomness import generator, key, permutation, run_seed, seed_step, uniforms
from lit_posttrain.types import SamplingKey

SAMPLING_KEY = SamplingKey(seed=1, purpose="rollout", iteration=2, prompt_id=3, sample=4)
OTHERS = [
    SAMPLING_KEY._replace(seed=2),
    SAMPLING_KEY._replace(purpose="evaluate"),
    SAMPLING_KEY._replace(iteration=3),
    SAMPLING_KEY._replace(prompt_id=4),
    SAMPLING_KEY._replace(sample=5),
    # Numbers that would meet if keys were sums, products or texts glued together.
    SAMPLING_KEY._replace(iteration=3, prompt_id=2),
    SAMPLING_KEY._replace(iteration=23, prompt_id=0),
    SAMPLING_KEY._replace(prompt_id=34, sample=0),
    SAMPLING_KEY._replace(prompt_id=4, sample=3),
    SAMPLING_KEY._replace(seed=12, iteration=0),
]
DRAWS: dict[str, Callable[[], torch.Tensor]] = {
    "uniforms": lambda: uniforms(SAMPLING_KEY, 50),
    "permutation": lambda: permutation(50, 1, "data", 3),
    "generator": lambda: torch.rand(50, generator=generator(1, "data", 3)),
}


@settings(max_examples=30, deadline=None)
@given(short=st.integers(0, 200), more=st.integers(0, 200))
def test_a_longer_call_begins_with_a_shorter_ones(short: int, more: int) -> None:
    """So that max_new_tokens changes no token below it."""
    assert torch.equal(uniforms(SAMPLING_KEY, short + more)[:short], uniforms(SAMPLING_KEY, short))


def test_uniforms_are_uniform() -> None:
    """Mean, variance, lag and a Kolmogorov-Smirnov bound at about 5 sigma, over many short streams."""
    streams = torch.stack([uniforms(SAMPLING_KEY._replace(sample=i), 20) for i in range(1000)])
    assert streams.dtype == torch.float64
    assert streams.min() >= 0
    assert streams.max() < 1
    u, n = streams.flatten(), streams.numel()
    assert abs(u.mean() - 0.5) < 5 * (1 / 12 / n) ** 0.5
    assert abs(u.var() - 1 / 12) < 5 * (1 / 180 / n) ** 0.5
    gaps = (u.sort().values - (torch.arange(n) + 0.5) / n).abs().max()
    assert gaps < 2.5 / n**0.5
    for a, b in ((streams[:, :-1], streams[:, 1:]), (streams[:-1], streams[1:])):  # along a stream, between streams
        assert abs(((a - 0.5) * (b - 0.5)).mean() * 12) < 5 / n**0.5


@pytest.mark.trap(43)
def test_every_part_of_a_key_matters() -> None:
    streams = [tuple(uniforms(k, 4).tolist()) for k in (SAMPLING_KEY, *OTHERS)]
    assert len(set(streams)) == len(streams)


@pytest.mark.trap(43)
def test_keys_of_many_counters_are_distinct() -> None:
    keys = {key(s, p, i, j) for s in range(8) for p in ("rollout", "data") for i in range(40) for j in range(40)}
    assert len(keys) == 8 * 2 * 40 * 40
    assert all(0 <= k < 2**63 for k in keys)
    assert len({key(1, "a"), key(1, "a", 0), key(1, "a", 0, 0), key(1, "a", 12), key(1, "a", 1, 2)}) == 5


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.trap(43)
def test_global_random_state_is_neither_read_nor_moved(draw: str) -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    first = DRAWS[draw]()
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]
    assert random.getstate() == states[2]
    torch.manual_seed(9)
    np.random.seed(9)
    random.seed(9)
    assert torch.equal(DRAWS[draw](), first)


def test_the_numbers_are_the_same_on_every_machine_and_day() -> None:
    """Golden: a checkpoint is resumed bit for bit only while these stay as they are."""
    assert key(1, "rollout", 2, 3, 4) == 4826815639453041259
    expected = [0.014965932773414958, 0.6397691897128127, 0.41130129671199744]
    assert uniforms(SAMPLING_KEY, 3).tolist() == expected
    assert permutation(6, 1, "data", 0).tolist() == [1, 3, 0, 5, 2, 4]


@settings(max_examples=20, deadline=None)
@given(n=st.integers(0, 60), seed=st.integers(0, 10), epoch=st.integers(0, 5))
def test_a_permutation_holds_every_index_once(n: int, seed: int, epoch: int) -> None:
    order = permutation(n, seed, "data", epoch)
    assert order.sort().values.tolist() == list(range(n))


def test_epochs_are_ordered_differently() -> None:
    orders = {tuple(permutation(30, 1, "data", epoch).tolist()) for epoch in range(20)}
    assert len(orders) == 20


@pytest.mark.trap(43)
def test_dropout_differs_by_step_and_rank_and_repeats_on_a_resume() -> None:
    def draws(step: int, rank: int) -> tuple[float, float, float]:
        seed_step(1, step, rank)
        return torch.rand(1).item(), float(np.random.rand()), random.random()

    places = [(step, rank) for step in range(4) for rank in range(4)]
    first = [draws(*place) for place in places]
    for values in zip(*first, strict=True):
        assert len(set(values)) == len(places)
    assert [draws(*place) for place in places] == first


def test_the_runs_seed_is_lightnings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "42")
    assert run_seed() == 42
    monkeypatch.delenv("PL_GLOBAL_SEED")
    with pytest.raises(ValueError, match="seed_everything"):
        run_seed()
