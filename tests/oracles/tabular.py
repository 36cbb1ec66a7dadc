"""A language model small enough to enumerate, and the exact answers to what a trainer only samples.

Tokens a, b and $ (the end) are 0, 1, 2; an answer has at most 3 tokens, so there are 15. The policy is a softmax over
the rows of a table ``theta[7, 3]``, one row a state: '', a, b, aa, ab, ba, bb. Reward: the a's, less 1/2 without end.

Written with loops over plain numbers, from the papers' formulas, and independent of the package that it judges.
"""

import itertools
import math
import statistics
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
END, MAX_TOKENS, STATES, VOCABULARY = 2, 3, 7, 3
BETA = 0.5

THETA_REF: Array = np.array([[math.sin(1.7 * i + 0.9 * j) for j in range(VOCABULARY)] for i in range(STATES)])


def _answers() -> list[tuple[int, ...]]:
    ended = [(*body, END) for n in range(MAX_TOKENS) for body in itertools.product((0, 1), repeat=n)]
    return ended + list(itertools.product((0, 1), repeat=MAX_TOKENS))


ANSWERS = _answers()
REWARDS = [sum(token == 0 for token in y) - (0.0 if y[-1] == END else 0.5) for y in ANSWERS]


def state(prefix: tuple[int, ...]) -> int:
    """Row of the table for these tokens: '' 0, then the words of one letter, then those of two."""
    return {(): 0, (0,): 1, (1,): 2, (0, 0): 3, (0, 1): 4, (1, 0): 5, (1, 1): 6}[prefix]


def states(y: tuple[int, ...]) -> list[int]:
    """The state each token of the answer was drawn in."""
    return [state(y[:t]) for t in range(len(y))]


def token_log_probs(theta: Array, y: tuple[int, ...]) -> list[float]:
    """log pi of each token."""
    return [
        float(theta[s, k] - math.log(sum(math.exp(x) for x in theta[s]))) for s, k in zip(states(y), y, strict=True)
    ]


def token_gradients(theta: Array, y: tuple[int, ...]) -> list[Array]:
    """d log pi / d theta of each token: one-hot minus softmax in its state's row."""
    out = []
    for s, k in zip(states(y), y, strict=True):
        gradient = np.zeros_like(theta)
        weights = [math.exp(x) for x in theta[s]]
        for j in range(VOCABULARY):
            gradient[s, j] = (1.0 if j == k else 0.0) - weights[j] / sum(weights)
        out.append(gradient)
    return out


def probabilities(theta: Array) -> list[float]:
    """pi(y) of the 15 answers."""
    return [math.exp(sum(token_log_probs(theta, y))) for y in ANSWERS]


def expected_reward(theta: Array) -> float:
    """E[r] under the policy."""
    return sum(p * r for p, r in zip(probabilities(theta), REWARDS, strict=True))


def kl_from_reference(theta: Array, ref: Array = THETA_REF) -> float:
    """KL(pi || pi_ref) of whole answers."""
    return sum(p * math.log(p / q) for p, q in zip(probabilities(theta), probabilities(ref), strict=True))


def regularised_reward(theta: Array, beta: float = BETA) -> float:
    """J = E[r] - beta KL(pi || pi_ref)."""
    return expected_reward(theta) - beta * kl_from_reference(theta)


def gradient_of_regularised_reward(theta: Array, beta: float = BETA) -> Array:
    """grad J = sum_y pi(y) (r - beta log(pi / pi_ref)) grad log pi(y)."""
    total = np.zeros_like(theta)
    for y, p, q, r in zip(ANSWERS, probabilities(theta), probabilities(THETA_REF), REWARDS, strict=True):
        total += p * (r - beta * math.log(p / q)) * sum(token_gradients(theta, y))
    return total


def optimal_table(beta: float = BETA) -> Array:
    """Log-probability table of pi* = pi_ref exp(r / beta) / Z, by adding up the answers that begin with each prefix."""
    weights = [q * math.exp(r / beta) for q, r in zip(probabilities(THETA_REF), REWARDS, strict=True)]

    def mass(prefix: tuple[int, ...]) -> float:
        return sum(w for y, w in zip(ANSWERS, weights, strict=True) if y[: len(prefix)] == prefix)

    table = np.zeros((STATES, VOCABULARY))
    for n in range(MAX_TOKENS):
        for prefix in itertools.product((0, 1), repeat=n):
            for k in range(VOCABULARY):
                table[state(prefix), k] = math.log(mass((*prefix, k)) / mass(prefix))
    return table


def kl_term(d: float, estimator: str) -> tuple[float, float]:
    """An estimator of the KL at d = log pi - log pi_ref of one token, and its derivative by log pi."""
    return {
        "k1": (d, 1.0),
        "k2": (d * d / 2, d),
        "k3": (math.exp(-d) - 1 + d, 1 - math.exp(-d)),
    }[estimator]


def credit(rewards: list[float], baseline: str, scale: str) -> list[float]:
    """Advantages of one group."""
    if baseline == scale == "none":
        return rewards
    if all(r == rewards[0] for r in rewards):
        return [0.0] * len(rewards)
    divisor = 1.0
    if scale != "none":
        divisor = statistics.pstdev(rewards) if scale == "group_std" else statistics.stdev(rewards)
    out = []
    for i, r in enumerate(rewards):
        others = [x for j, x in enumerate(rewards) if j != i]
        b = {"none": 0.0, "group_mean": statistics.fmean(rewards), "leave_one_out": statistics.fmean(others)}[baseline]
        out.append((r - b) / divisor)
    return out


def expected_loss_gradient(
    theta: Array,
    *,
    group: int,
    baseline: str,
    scale: str,
    aggregation: str,
    level: str = "token",
    estimator: str = "k1",
    placement: str = "loss",
    coef: float = 0.0,
    constant_length: int = 1,
) -> Array:
    """E over all 15^group groups, sampled by the policy itself, of d loss / d theta at ratio 1.

    ``token_mean`` divides by the tokens of the group: each group is an optimizer step of its own.
    """
    log_ps = [token_log_probs(theta, y) for y in ANSWERS]
    ref_log_ps = [token_log_probs(THETA_REF, y) for y in ANSWERS]
    gradients = [token_gradients(theta, y) for y in ANSWERS]
    kls = [
        [kl_term(a - b, estimator) for a, b in zip(now, ref, strict=True)]
        for now, ref in zip(log_ps, ref_log_ps, strict=True)
    ]
    shaped = list(REWARDS)
    if placement == "reward":
        shaped = [r - coef * sum(value for value, _ in kl) for r, kl in zip(REWARDS, kls, strict=True)]
    in_loss = coef if placement == "loss" else 0.0

    weights: list[Any] = [[0.0] * len(y) for y in ANSWERS]  # of each token's gradient, probability included
    for members in itertools.product(range(len(ANSWERS)), repeat=group):
        probability = math.prod(math.exp(sum(log_ps[i])) for i in members)
        advantages = credit([shaped[i] for i in members], baseline, scale)
        tokens = sum(len(ANSWERS[i]) for i in members)
        for i, advantage in zip(members, advantages, strict=True):
            length = len(ANSWERS[i])
            share = {
                "sequence_mean": 1 / (group * length),
                "token_mean": 1 / tokens,
                "constant": 1 / (group * constant_length),
            }[aggregation]
            # Every token repeats the ratio of its answer, whose derivative is 1/|o| (mean) or 1 (product) a token.
            repeats = length if level == "sequence_product" else 1
            for t in range(length):
                weights[i][t] += probability * share * (in_loss * kls[i][t][1] - advantage * repeats)
    total = np.zeros_like(theta)
    for i in range(len(ANSWERS)):
        for t, gradient in enumerate(gradients[i]):
            total += weights[i][t] * gradient
    return total
