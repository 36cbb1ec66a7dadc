"""Per-token estimators of KL(pi || pi_ref) from samples of pi."""

from typing import Literal

from jaxtyping import Float
from torch import Tensor

KLEstimator = Literal["k1", "k2", "k3"]


def kl_estimate(
    log_probs: Float[Tensor, "*dims"], ref_log_probs: Float[Tensor, "*dims"], estimator: KLEstimator
) -> Float[Tensor, "*dims"]:
    """With d = log pi - log pi_ref: k1 = d, k2 = d^2 / 2, k3 = exp(-d) + d - 1 (Schulman 2020; k3 is 2402.03300 Eq. 4).

    On-policy, k1 and k3 have the mean KL(pi || pi_ref). Their *gradients* differ: differentiated inside a loss, k1
    gives 0 in expectation (no regularisation at all), k2 the gradient of KL(pi || pi_ref), and k3 that of
    KL(pi_ref || pi). Nothing is clamped here: a clamp removes the gradient just where the policy has drifted furthest.

    Args:
        log_probs: log pi of the sampled tokens; gradients flow through it.
        ref_log_probs: log pi_ref of the same tokens, detached here.
        estimator: Which of the three.

    Returns:
        The unreduced estimate of each token, in nats.
    """
    difference = log_probs - ref_log_probs.detach()
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return difference.square() / 2
    if estimator == "k3":
        return (-difference).expm1() + difference  # expm1: no cancellation where the policies almost agree
    raise ValueError(f"estimator: {estimator!r} is none of 'k1', 'k2', 'k3'")
