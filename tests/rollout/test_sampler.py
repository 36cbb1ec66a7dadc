"""The sampler against a brute-force inverse CDF in float64 and against the softmax itself."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_posttrain.rollout.sampler import draw

ALMOST_ONE = 1.0 - 2.0**-53
VOCABULARIES = [1, 2, 5, 255, 256, 257, 511, 512, 1000, 3001]


def logits_and_uniforms(rows: int, vocabulary: int, seed: int, spread: float = 3.0):
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(rows, vocabulary, generator=generator)
    return logits, torch.rand(rows, generator=generator, dtype=torch.float64)


def brute_force(logits: torch.Tensor, u: float, temperature: float) -> tuple[int, float]:
    """min {j : CDF(j) > u} by a loop, and how far u is from the nearest step of the CDF."""
    x = logits.double().numpy() / temperature
    mass = np.exp(x - x.max())
    cdf = np.cumsum(mass) / mass.sum()
    token = next(j for j in range(len(cdf)) if cdf[j] > u or j == len(cdf) - 1)
    return token, float(np.abs(cdf - u).min())


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_equals_brute_force_inverse_cdf(vocabulary: int, temperature: float) -> None:
    logits, u = logits_and_uniforms(64, vocabulary, seed=vocabulary)
    drawn = draw(logits, u, temperature)
    compared = 0
    for row in range(64):
        expected, margin = brute_force(logits[row], u[row].item(), temperature)
        if margin > 1e-6:  # closer than that, fp32 masses decide
            assert drawn.tokens[row] == expected
            compared += 1
    assert compared >= 60


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.trap(7)
def test_log_prob_is_log_softmax_at_the_temperature(vocabulary: int, temperature: float) -> None:
    logits, u = logits_and_uniforms(32, vocabulary, seed=vocabulary)
    drawn = draw(logits, u, temperature)
    expected = (logits.double() / temperature).log_softmax(-1).gather(1, drawn.tokens[:, None])[:, 0]
    assert drawn.log_probs.dtype == torch.float32
    torch.testing.assert_close(drawn.log_probs.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("vocabulary", [7, 300])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_draws_follow_the_softmax(vocabulary: int, temperature: float) -> None:
    """Chi-square of 40,000 draws; at this seed a right sampler is far from the bound, which is 6 sigma."""
    n = 40_000
    logits = logits_and_uniforms(1, vocabulary, seed=3, spread=1.5)[0]
    u = torch.rand(n, generator=torch.Generator().manual_seed(11), dtype=torch.float64)
    tokens = torch.cat([draw(logits.expand(len(part), -1), part, temperature).tokens for part in u.split(4000)])
    expected = n * (logits[0].double() / temperature).softmax(-1)
    counts = torch.bincount(tokens, minlength=vocabulary).double()
    kept = expected >= 5
    chi_square = ((counts - expected).square() / expected)[kept].sum().item()
    freedom = int(kept.sum()) - 1
    assert chi_square < freedom + 6 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("vocabulary", [5, 256, 700])
def test_equally_spaced_uniforms_give_each_token_its_share(vocabulary: int) -> None:
    """Every token's draws differ from n p by less than two: no token is lost at a chunk's border."""
    n = 20_000
    logits = logits_and_uniforms(1, vocabulary, seed=5, spread=1.0)[0]
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    tokens = torch.cat([draw(logits.expand(len(part), -1), part, 1.0).tokens for part in u.split(2500)])
    counts = torch.bincount(tokens, minlength=vocabulary).double()
    expected = n * logits[0].double().softmax(-1)
    assert (counts - expected).abs().max() < 2
    assert (tokens.diff() >= 0).all()  # the inverse CDF is monotone


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_the_ends_of_the_uniforms(vocabulary: int) -> None:
    logits = logits_and_uniforms(1, vocabulary, seed=1)[0]
    assert draw(logits, torch.tensor([0.0], dtype=torch.float64), 1.0).tokens.item() == 0
    last = draw(logits, torch.tensor([ALMOST_ONE], dtype=torch.float64), 1.0).tokens.item()
    # fp32 masses of the very last tokens may round away, never the token's validity.
    assert logits[0, int(last) :].double().exp().sum() > 0
    assert last == vocabulary - 1 or vocabulary > 1


@pytest.mark.parametrize("possible", [[0], [3], [255], [256], [299], [2, 5], [100, 257], [255, 256], [0, 511]])
@pytest.mark.parametrize("u", [0.0, 1e-300, 0.25, 0.5, 0.75, 1 - 1e-9, ALMOST_ONE])
def test_impossible_tokens_are_never_drawn(possible: list[int], u: float) -> None:
    """Neither those of logit -inf nor those whose mass underflows, whatever u is, nor the padding of the last chunk."""
    for impossible in (-math.inf, -1e4):
        for temperature in (0.5, 1.0):
            logits = torch.full((1, 600), impossible)
            logits[0, possible] = torch.arange(len(possible), dtype=torch.float32)
            drawn = draw(logits, torch.tensor([u], dtype=torch.float64), temperature)
            assert drawn.tokens.item() in possible
            assert drawn.log_probs.isfinite().all()


@pytest.mark.parametrize("scale", [1e4, 1e30, 3e38])
def test_huge_logits(scale: float) -> None:
    logits = scale * torch.tensor([[-1.0, 1.0, 0.0], [0.5, -1.0, 0.25]])
    drawn = draw(logits, torch.tensor([0.999, 0.0], dtype=torch.float64), 1.0)
    assert drawn.tokens.tolist() == [1, 0]
    assert drawn.log_probs.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_no_distribution_show_and_harm_no_other_row(bad: float) -> None:
    logits, u = logits_and_uniforms(3, 300, seed=0)
    healthy = draw(logits, u, 1.0)
    logits[1, 7] = bad
    drawn = draw(logits, u, 1.0)
    assert not drawn.log_probs[1].isfinite()
    assert 0 <= int(drawn.tokens[1]) < 300
    assert torch.equal(drawn.tokens[[0, 2]], healthy.tokens[[0, 2]])
    assert torch.equal(drawn.log_probs[[0, 2]], healthy.log_probs[[0, 2]])


def test_temperature_zero_takes_the_likeliest_token() -> None:
    logits, u = logits_and_uniforms(16, 777, seed=2)
    drawn = draw(logits, u, 0.0)
    assert torch.equal(drawn.tokens, logits.argmax(-1))
    expected = logits.log_softmax(-1).amax(-1)
    torch.testing.assert_close(drawn.log_probs, expected, atol=1e-6, rtol=1e-6)


def test_a_low_temperature_tends_to_the_likeliest_token() -> None:
    logits, u = logits_and_uniforms(16, 777, seed=2)
    assert torch.equal(draw(logits, u, 1e-4).tokens, logits.argmax(-1))


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 9),
    vocabulary=st.integers(1, 1200),
    seed=st.integers(0, 10_000),
    temperature=st.sampled_from([0.0, 0.2, 1.0, 3.0]),
    data=st.data(),
)
def test_a_row_is_drawn_alike_in_any_batch(rows: int, vocabulary: int, seed: int, temperature: float, data) -> None:
    logits, u = logits_and_uniforms(rows, vocabulary, seed)
    whole = draw(logits, u, temperature)
    order = torch.tensor(data.draw(st.permutations(range(rows))))
    shuffled = draw(logits[order], u[order], temperature)
    assert torch.equal(shuffled.tokens, whole.tokens[order])
    assert torch.equal(shuffled.log_probs, whole.log_probs[order])
    for row in range(rows):
        alone = draw(logits[row : row + 1], u[row : row + 1], temperature)
        assert torch.equal(alone.tokens, whole.tokens[row : row + 1])
        assert torch.equal(alone.log_probs, whole.log_probs[row : row + 1])


def test_uniforms_keep_their_precision() -> None:
    """A token of probability 1e-9 is drawn by uniforms that fp32 could not tell from 1."""
    logits = torch.tensor([[0.0, math.log(1e-9)]])
    u = torch.tensor([1 - 1e-8, 1 - 1e-10], dtype=torch.float64)
    assert draw(logits.expand(2, -1), u, 1.0).tokens.tolist() == [0, 1]


def test_low_precision_logits_are_drawn_in_fp32() -> None:
    logits, u = logits_and_uniforms(8, 400, seed=4)
    low = logits.bfloat16()
    drawn, exact = draw(low, u, 0.9), draw(low.float(), u, 0.9)
    assert torch.equal(drawn.tokens, exact.tokens)
    assert torch.equal(drawn.log_probs, exact.log_probs)
