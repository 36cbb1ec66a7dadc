"""Gates stop what could not have learned and let pass what can."""

import math
import warnings

import pytest
import torch

from lit_posttrain.gates import (
    MISMATCH_TOLERANCE,
    REFERENCE_TOLERANCE,
    GateError,
    fingerprint,
    require_change,
    require_engine_agrees,
    require_reference_is_policy,
    require_some_valid,
    require_trainable,
    warn_nothing_to_learn,
)

DTYPES = [torch.float32, torch.bfloat16]


def test_something_must_be_trainable() -> None:
    require_trainable(iter(["weight"]))
    with pytest.raises(GateError, match="no parameter is trainable"):
        require_trainable(iter([]))


def test_an_update_must_change_something() -> None:
    require_change([1, 2], [1, 3], lr=1e-6, grad_norm=0.5)
    require_change([1, 2], [1, 2], lr=0.0, grad_norm=0.5)  # warm-up from zero
    require_change([1, 2], [1, 2], lr=1e-6, grad_norm=0.0)  # nothing to learn from
    with pytest.raises(GateError, match=r"1e-06.*0\.5"):
        require_change([1, 2], [1, 2], lr=1e-6, grad_norm=0.5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("gate", "tolerances"),
    [(require_engine_agrees, MISMATCH_TOLERANCE), (require_reference_is_policy, REFERENCE_TOLERANCE)],
)
def test_log_probs_must_agree_within_the_precision(gate, tolerances, dtype: torch.dtype) -> None:
    gate(0.0, dtype)
    gate(tolerances[dtype], dtype)
    for gap in (1.01 * tolerances[dtype], math.inf, math.nan):
        with pytest.raises(GateError, match="log-probabilities"):
            gate(gap, dtype)


@pytest.mark.trap(7)
def test_the_tolerance_notices_a_wrong_temperature_in_either_precision() -> None:
    """Even a small slip (0.9 for 1.0) on a moderately sharp distribution over 1000 tokens is above the bound."""
    logits = 2 * torch.randn(200, 1000, generator=torch.Generator().manual_seed(0))
    tokens = torch.multinomial(logits.softmax(-1), 1, generator=torch.Generator().manual_seed(1))
    a, b = (logits.div(t).log_softmax(-1).gather(1, tokens) for t in (1.0, 0.9))
    assert (a - b).abs().mean() > max(MISMATCH_TOLERANCE.values())


def test_a_reward_function_that_only_fails_is_named() -> None:
    counts = [{"": 3}, {"worker lost": 3}]
    require_some_valid(["exact", "math"], counts, [False, False])
    with pytest.raises(GateError, match=r"math.*worker lost"):
        require_some_valid(["exact", "math"], counts, [False, True])


def test_rollouts_without_signal_are_said_aloud() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_nothing_to_learn(mixed_groups=1, stopped=1, completions=8)
    with pytest.warns(UserWarning, match="no group has mixed rewards"):
        warn_nothing_to_learn(mixed_groups=0, stopped=1, completions=8)
    with pytest.warns(UserWarning, match="all 8 were truncated"):
        warn_nothing_to_learn(mixed_groups=1, stopped=0, completions=8)


# --- fingerprints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_fingerprint_repeats_and_sees_one_bit(dtype: torch.dtype) -> None:
    p = torch.randn(37, 5).to(dtype)
    (before,) = fingerprint([p])
    assert fingerprint([p.clone()]) == [before]
    bits = p.view(torch.int32 if dtype == torch.float32 else torch.int16)
    bits[3, 2] ^= 1
    assert fingerprint([p]) != [before]


def test_a_fingerprint_sees_swapped_values_anywhere() -> None:
    p = torch.arange(1, 2_500_001, dtype=torch.float32)  # several parts
    (before,) = fingerprint([p])
    for i, j in ((0, 1), (5, 5 + 2**20), (2**20 - 1, 2**20), (65520, 65521), (0, 65521), (0, 2_499_999)):
        swapped = p.clone()
        swapped[[i, j]] = p[[j, i]]
        assert fingerprint([swapped]) != [before], (i, j)


def test_fingerprints_are_one_a_parameter_and_leave_them_alone() -> None:
    network = torch.nn.Linear(3, 2)
    before = [p.detach().clone() for p in network.parameters()]
    assert len(fingerprint(network.parameters())) == 2
    assert all(torch.equal(p, b) for p, b in zip(network.parameters(), before, strict=True))
    assert fingerprint([torch.zeros(0)]) == [0]


def test_a_step_of_the_smallest_size_is_seen() -> None:
    """An update of one unit in the last place is a change."""
    p = torch.ones(1000)
    (before,) = fingerprint([p])
    p[999] = torch.nextafter(p[999], torch.tensor(2.0))
    assert fingerprint([p]) != [before]
