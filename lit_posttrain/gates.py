"""What stops a run in its first two iterations instead of letting it train on nothing, and what is only said aloud."""

import warnings
from collections.abc import Iterable

import torch
from torch import Tensor

GATED_ITERATIONS = 2
_FINGERPRINT_PART = 2**20
# Mean |log p_engine - log p_trainer| per token. Two fp32 forwards agree to 1e-5; two bf16 ones differ by about 0.04,
# and a wrong temperature, mask or position by far more than either bound.
MISMATCH_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.15}
REFERENCE_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.02}


class GateError(RuntimeError):
    """A run that could not have learned anything, stopped with a sentence that says why."""


def require_trainable(names: Iterable[str]) -> None:
    """At least one parameter is trainable."""
    if not list(names):
        raise GateError("no parameter is trainable: the optimizer would own nothing (look at model.init_args.policy)")


def require_change(before: list[int], after: list[int], lr: float, grad_norm: float) -> None:
    """Some parameter changed in an update whose learning rate and gradient were above 0."""
    if lr > 0 and grad_norm > 0 and before == after:
        raise GateError(
            f"no parameter changed although the learning rate is {lr:g} and the gradient norm {grad_norm:g}: "
            "the optimizer does not own the parameters that the loss trains, or the steps vanish in rounding"
        )


def require_engine_agrees(mismatch: float, dtype: torch.dtype) -> None:
    """The engine's log-probs of its own tokens are the trainer's, up to the precision's rounding."""
    tolerance = MISMATCH_TOLERANCE[dtype]
    if not mismatch <= tolerance:
        raise GateError(
            f"the rollout engine's log-probabilities differ from the trainer's by {mismatch:.4g} a token on average, "
            f"more than {tolerance:g} that {dtype} explains: weights, temperature, mask or positions do not match"
        )


def require_reference_is_policy(gap: float, dtype: torch.dtype) -> None:
    """At the start, a reference that is configured to be the policy gives the policy's log-probs."""
    tolerance = REFERENCE_TOLERANCE[dtype]
    if not gap <= tolerance:
        raise GateError(
            f"the reference is configured to equal the policy at the start, but their log-probabilities differ by "
            f"{gap:.4g} a token on average (at most {tolerance:g} expected): KL would be wrong from the first step"
        )


def require_some_valid(names: list[str], verdict_counts: list[dict[str, int]], all_invalid: list[bool]) -> None:
    """No reward function failed on every sample of the iteration."""
    for name, reasons, failed in zip(names, verdict_counts, all_invalid, strict=True):
        if failed:
            raise GateError(f"reward function {name} gave only invalid verdicts in this iteration ({reasons})")


def require_valid_sample(names: list[str], verdict_counts: list[dict[str, int]], valid: int) -> None:
    """At least one sample of the iteration has a reward."""
    if not valid:
        given = ", ".join(f"{name}: {reasons}" for name, reasons in zip(names, verdict_counts, strict=True))
        raise GateError(
            f"no sample of this iteration has a reward ({given}): for each one some reward function failed or none "
            "applies; look at model.init_args.rewards and at the data's columns"
        )


def warn_nothing_to_learn(mixed_groups: int, stopped: int, completions: int) -> None:
    """Say when the first rollouts give no signal."""
    if mixed_groups == 0:
        warnings.warn(
            "no group has mixed rewards: every sample of each prompt scored alike, so nothing can be learned from "
            "this iteration; the task may be too hard or too easy, or the prompt's format is not followed",
            stacklevel=2,
        )
    if stopped == 0:
        warnings.warn(
            f"no completion ended by itself: all {completions} were truncated at sampling.max_new_tokens; raise it, "
            "or check the stop tokens and stop_strings",
            stacklevel=2,
        )


def fingerprint(parameters: Iterable[Tensor]) -> list[int]:
    """A checksum of each parameter's bits (its local shard's)."""
    sums = []
    for p in parameters:
        local = p.detach()
        local = getattr(local, "to_local", lambda local=local: local)()
        bits = local.contiguous().view(torch.int32 if local.element_size() == 4 else torch.int16).flatten()
        # Weighted by position, so that swapped values count as a change too; in parts, because int64 copies of a
        # whole embedding would take several times its memory.
        total = 0
        for i, part in enumerate(bits.split(_FINGERPRINT_PART)):
            weights = torch.arange(1, len(part) + 1, device=bits.device) + i * _FINGERPRINT_PART
            total += int((part.long() * weights).sum())
        sums.append(total)
    return sums
