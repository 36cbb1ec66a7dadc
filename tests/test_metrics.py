"""pass@k and maj@k against enumeration of everything that could have been drawn; intervals against the bootstrap."""

import itertools
import math
from collections import Counter
from math import comb

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_posttrain.metrics import ConsensusAtK, PassAtK, consensus, pass_at_k, share_interval


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(n: int) -> None:
    for correct in range(n + 1):
        samples = [i < correct for i in range(n)]
        for k in range(1, n + 1):
            subsets = list(itertools.combinations(samples, k))
            assert pass_at_k(n, correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


def test_pass_at_k_of_a_published_example() -> None:
    """n = 5 with 2 right ones (2107.03374 Eq. 1)."""
    assert pass_at_k(5, 2, 1) == pytest.approx(0.4)
    assert pass_at_k(5, 2, 2) == pytest.approx(0.7)
    assert pass_at_k(5, 2, 5) == 1.0


def test_pass_at_k_is_exact_for_many_samples() -> None:
    """The quotient of factorials overflows floats here; the quotient of integers does not."""
    assert pass_at_k(4000, 1, 64) == pytest.approx(64 / 4000)
    assert pass_at_k(4000, 0, 64) == 0.0


@pytest.mark.parametrize(("n", "p", "k"), [(6, 0.3, 2), (8, 0.6, 5)])
def test_pass_at_k_is_unbiased(n: int, p: float, k: int) -> None:
    """Its expectation over the number of right ones is the chance that k fresh samples hold one."""
    expected = sum(comb(n, c) * p**c * (1 - p) ** (n - c) * pass_at_k(n, c, k) for c in range(n + 1))
    assert expected == pytest.approx(1 - (1 - p) ** k, abs=1e-12)


@pytest.mark.parametrize(("n", "k"), [(3, 4), (0, 1), (5, 0)])
@pytest.mark.trap(41)
def test_pass_at_k_of_fewer_samples_is_an_error(n: int, k: int) -> None:
    with pytest.raises(ValueError, match=f"pass@{k}"):
        pass_at_k(n, 0, k)
    if n:
        with pytest.raises(ValueError, match=f"pass@{k}"):
            PassAtK(k).update(torch.zeros(n, dtype=torch.bool))


def expected_consensus(probabilities: list[float], k: int) -> float:
    """Mean accuracy of the vote over every sequence of k answers, the first answer being right."""
    total = 0.0
    for counts in itertools.product(range(k + 1), repeat=len(probabilities)):
        if sum(counts) != k:
            continue
        ways, remaining, chance = 1, k, 1.0
        for count, p in zip(counts, probabilities, strict=True):
            ways *= comb(remaining, count)
            remaining -= count
            chance *= p**count
        votes = [str(a) for a, count in enumerate(counts) for _ in range(count)]
        total += ways * chance * consensus(votes, [v == "0" for v in votes])
    return total


@pytest.mark.parametrize(
    ("probabilities", "k", "value"),
    [([0.6, 0.4], 3, 0.648), ([0.6, 0.4], 16, 0.786897), ([0.4, 0.6], 16, 0.213103), ([0.4, 0.3, 0.3], 3, 0.424)],
)
@pytest.mark.trap(41)
def test_consensus_has_its_analytic_mean(probabilities: list[float], k: int, value: float) -> None:
    assert expected_consensus(probabilities, k) == pytest.approx(value, abs=5e-7)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["a", "b", "c", None]), min_size=1, max_size=9), st.randoms(use_true_random=False))
@pytest.mark.trap(41)
def test_ties_are_broken_uniformly_and_no_vote_is_no_class(votes: list[str | None], shuffler) -> None:
    """The mean over all tie-breaks, whatever the order of the votes."""
    counts = Counter(v for v in votes if v is not None)
    best = [v for v, n in counts.items() if n == max(counts.values())] if counts else []
    expected = best.count("a") / len(best) if best else 0.0
    for _ in range(3):
        assert consensus(votes, [v == "a" for v in votes]) == pytest.approx(expected)
        shuffler.shuffle(votes)


@pytest.mark.trap(41)
def test_many_abstentions_do_not_win() -> None:
    assert consensus([None, None, None, "7"], [False, False, False, True]) == 1.0
    assert consensus([None, None], [False, False]) == 0.0


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
@pytest.mark.trap(41)
def test_a_tie_is_half_right_in_any_order(order: tuple[int, ...]) -> None:
    votes = ["right", "wrong", "wrong", "right"]
    shuffled = [votes[i] for i in order]
    assert consensus(shuffled, [v == "right" for v in shuffled]) == 0.5


def test_metrics_are_means_over_prompts_not_over_samples() -> None:
    """Prompts with different numbers of samples weigh alike."""
    metric = PassAtK(2)
    metric.update(torch.tensor([True, False, False, False]))
    metric.update(torch.tensor([False, False]))
    metric.update(torch.tensor([True] * 9))
    assert metric.compute().item() == pytest.approx((0.5 + 0.0 + 1.0) / 3)
    metric.reset()
    with pytest.warns(UserWarning, match="before the ``update``"):
        assert metric.compute().isnan()


def test_only_the_first_k_samples_vote() -> None:
    votes, correct = ["a", "a", "b", "b", "b"], torch.tensor([True, True, False, False, False])
    for k, value in ((1, 1.0), (3, 1.0), (4, 0.5), (5, 0.0)):
        metric = ConsensusAtK(k)
        metric.update(votes, correct)
        assert metric.compute().item() == value
    with pytest.raises(ValueError, match="maj@6"):
        ConsensusAtK(6).update(votes, correct)


def test_two_ranks_add_up_to_one() -> None:
    """States are sums: reduced over ranks they give the mean over all prompts, however unevenly these are spread."""
    whole, parts = PassAtK(1), [PassAtK(1), PassAtK(1)]
    for i, correct in enumerate([[True], [True, False], [False], [False, True, True, True], [False]]):
        whole.update(torch.tensor(correct))
        parts[i > 0].update(torch.tensor(correct))
    for name, reduce in parts[0]._reductions.items():
        total = reduce(torch.stack([getattr(part, name) for part in parts]))
        setattr(parts[0], name, total)
    assert parts[0].compute().item() == pytest.approx(whole.compute().item()) == pytest.approx((1 + 0.5 + 0.75) / 5)


def test_wilsons_interval_of_independent_trials() -> None:
    """8 of 10, as in any table of it; nothing and everything; nobody asked."""
    assert share_interval(torch.tensor([1.0] * 8 + [0.0] * 2), torch.ones(10)) == pytest.approx((0.490162, 0.943318))
    assert share_interval(torch.zeros(10), torch.ones(10)) == pytest.approx((0.0, 0.277533), abs=1e-6)
    assert share_interval(torch.ones(10), torch.ones(10)) == pytest.approx((0.722467, 1.0), abs=1e-6)
    assert all(math.isnan(end) for end in share_interval(torch.zeros(3), torch.zeros(3)))


def test_an_interval_of_trials_that_hang_together_is_the_bootstraps() -> None:
    """Prompts have chances of their own and different numbers of trials; resampled are the prompts."""
    generator = torch.Generator().manual_seed(0)
    trials = torch.randint(1, 15, (600,), generator=generator).double()
    chances = torch.rand(600, generator=generator).double().sqrt()
    successes = torch.binomial(trials, chances, generator=generator)
    rows = torch.randint(600, (4000, 600), generator=generator)
    resampled = successes[rows].sum(1) / trials[rows].sum(1)
    expected = resampled.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    low, high = share_interval(successes, trials)
    assert (low, high) == pytest.approx(expected, abs=0.1 * (expected[1] - expected[0]))
    coin = share_interval(torch.cat((torch.ones(int(successes.sum())), torch.zeros(int((trials - successes).sum())))),
                          torch.ones(int(trials.sum())))  # fmt: skip
    assert high - low > 1.3 * (coin[1] - coin[0])
