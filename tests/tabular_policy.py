"""The tabular language model of ``oracles.tabular`` in torch, trained and differentiated through the production loss.

Shared by the tests and by ``scripts/experiments``. Only the policy is built here: credit, ratio, KL and aggregation are
``lit_posttrain.objective``'s.
"""

import torch
from oracles import tabular
from torch import Tensor

from lit_posttrain.functional.masked import Totals
from lit_posttrain.objective import AdvantageConfig, KLConfig, Objective, RatioConfig

LENGTHS = torch.tensor([len(y) for y in tabular.ANSWERS])
MASK = torch.arange(tabular.MAX_TOKENS) < LENGTHS[:, None]
TOKENS, STATES = (
    torch.tensor([[*row, *[0] * (tabular.MAX_TOKENS - len(row))] for row in rows])
    for rows in (tabular.ANSWERS, [tabular.states(y) for y in tabular.ANSWERS])
)
REWARDS = torch.tensor(tabular.REWARDS, dtype=torch.float64)
THETA_REF = torch.from_numpy(tabular.THETA_REF)


def objective(
    baseline: str = "group_mean",
    scale: str = "none",
    aggregation: str = "constant",
    estimator: str = "k1",
    placement: str = "loss",
    coef: float = 0.0,
    level: str = "token",
    clip: float = 0.2,
) -> Objective:
    """An objective in one line; ``constant`` divides by 1, so that it sums over an answer's tokens."""
    return Objective(
        advantage=AdvantageConfig(baseline=baseline, scale=scale),  # type: ignore[arg-type]
        ratio=RatioConfig(level=level, clip_low=clip, clip_high=clip),  # type: ignore[arg-type]
        kl=KLConfig(estimator=estimator, placement=placement, coef=coef),  # type: ignore[arg-type]
        aggregation=aggregation,  # type: ignore[arg-type]
        constant_length=1 if aggregation == "constant" else None,
    )


def log_probs(theta: Tensor) -> Tensor:
    """log pi of every token of the 15 answers, [15, 3]; what stands in the padding is a real but irrelevant number."""
    return theta.log_softmax(-1)[STATES, TOKENS]


def answer_log_probs(theta: Tensor) -> Tensor:
    """log pi(y) of the 15 answers."""
    return log_probs(theta).where(MASK, 0.0).sum(-1)


def all_groups(group: int) -> Tensor:
    """Every group of answers there is, [15^group, group]."""
    index = torch.arange(len(tabular.ANSWERS))
    return torch.cartesian_prod(*[index] * group).view(-1, group)


def credit(o: Objective, now: Tensor, rows: Tensor, group: int) -> Tensor:
    """Advantage of each token of the rows under the log-probs that sampled them."""
    shaped = o.shaped_rewards(REWARDS[rows], now[rows], log_probs(THETA_REF)[rows], MASK[rows])
    advantages = o.advantages(shaped, torch.ones(len(rows), dtype=torch.bool), group)
    return advantages[:, None].expand(-1, tabular.MAX_TOKENS)


def step_loss(o: Objective, theta: Tensor, members: Tensor) -> Tensor:
    """The loss of one on-policy optimizer step on these groups."""
    rows, now = members.flatten(), log_probs(theta)
    totals = Totals(float(len(rows)), float(LENGTHS[rows].sum()))
    advantages = credit(o, now.detach(), rows, members.shape[1])
    picked = now[rows]
    return o.policy_loss(picked, picked.detach(), log_probs(THETA_REF)[rows], advantages, MASK[rows], totals).loss


def expected_loss_gradient(o: Objective, theta: Tensor, group: int) -> Tensor:
    """E[d loss / d theta] over all groups, each an optimizer step of its own, weighed by its probability.

    The production loss is evaluated on all groups in one call (on those of equal token count, where the denominator
    depends on it); its gradient by each row's log-probs is then weighed and carried on to the table.
    """
    theta = theta.detach().requires_grad_()
    now, members = log_probs(theta), all_groups(group)
    weights = answer_log_probs(theta).detach()[members].sum(1).exp()
    tokens = LENGTHS[members].sum(1)
    total = torch.zeros_like(theta)
    for count in tokens.unique().tolist() if o.aggregation == "token_mean" else [None]:
        chosen = members if count is None else members[tokens == count]
        weight = weights if count is None else weights[tokens == count]
        rows = chosen.flatten()
        leaf = now.detach()[rows].requires_grad_()
        totals = Totals(float(group), float(count or 0))
        advantages = credit(o, now.detach(), rows, group)
        loss = o.policy_loss(leaf, leaf.detach(), log_probs(THETA_REF)[rows], advantages, MASK[rows], totals).loss
        (by_log_prob,) = torch.autograd.grad(loss, leaf)
        upstream = by_log_prob * weight.repeat_interleave(group)[:, None]
        total += torch.autograd.grad(now[rows], theta, upstream, retain_graph=True)[0]
    return total


def stationary_point(o: Objective, group: int, theta: Tensor, ascent: int = 60, newton: int = 7) -> Tensor:
    """Where the expected gradient of the production loss is zero: ascent into the basin, then Newton's method.

    The Jacobian is by central differences; least squares, because a constant added to a row of the table is free.
    """

    def field(flat: Tensor) -> Tensor:
        return -expected_loss_gradient(o, flat.view_as(theta), group).flatten()

    x = theta.detach().flatten().clone()
    for _ in range(ascent):
        x += 2 * field(x)
    for _ in range(newton):
        step = 1e-5 * torch.eye(len(x), dtype=x.dtype)
        jacobian = torch.stack([(field(x + e) - field(x - e)) / 2e-5 for e in step], 1)
        x -= torch.linalg.lstsq(jacobian, field(x)[:, None], driver="gelsd").solution[:, 0]
    return x.view_as(theta)
