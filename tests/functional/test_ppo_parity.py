"""PPO's arithmetic against the last TRL that had a PPO trainer (1.12): its own lines, run on the same tensors."""

import ast
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lit_posttrain.functional.masked import Totals, aggregate, masked_whiten
from lit_posttrain.functional.policy_losses import clipped_policy_loss
from lit_posttrain.functional.returns import clipped_value_loss, generalised_advantages, token_rewards

PEER = Path(sys.prefix) / "peers/trl-1.12/trl/experimental/ppo/ppo_trainer.py"  # scripts/env.sh puts it there
ROWS, WIDTH = 6, 7
ARGUMENTS = {
    "kl_estimator": "k1", "kl_coef": 0.3, "whiten_rewards": False, "gamma": 0.97, "lam": 0.9,
    "cliprange": 0.2, "cliprange_value": 0.2,
}  # fmt: skip

pytestmark = pytest.mark.parity


def lines(first: str, after: str) -> str:
    """The trainer's lines from one that contains ``first`` up to one that contains ``after``, that one left out."""
    text = PEER.read_text().splitlines()
    start = next(i for i, line in enumerate(text) if first in line)
    end = next(i for i in range(start, len(text)) if after in text[i])
    return textwrap.dedent("\n".join(text[start:end]))


def functions() -> dict[str, Any]:
    tree = ast.parse(PEER.read_text())
    names = {"masked_mean", "masked_var", "masked_whiten"}
    wanted = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in names]
    space: dict[str, Any] = {"torch": torch, "np": np}
    exec(compile(ast.Module(wanted, []), str(PEER), "exec"), space)
    return space


def rollout(ends: list[int]) -> dict[str, Tensor]:
    """Answers whose last token stands at ``ends``; positions count from the first response token."""
    g = torch.Generator().manual_seed(0)
    positions = torch.arange(WIDTH).repeat(ROWS, 1)
    last = torch.tensor(ends)
    inside = positions <= last[:, None]
    own, ref, values, new, predicted = (torch.randn(ROWS, WIDTH, generator=g, dtype=torch.float64) for _ in range(5))
    return {
        "logprobs": own.where(inside, 1.0), "ref_logprobs": ref.where(inside, 1.0), "values": values,
        "scores": torch.randn(ROWS, generator=g, dtype=torch.float64), "last": last, "mask": inside,
        "new": (own + 0.5 * new).where(inside, 1.0), "predicted": values + 0.4 * predicted,
    }  # fmt: skip


def theirs(data: dict[str, Tensor], **overrides: Any) -> dict[str, Any]:
    """Token rewards, advantages and both losses as the trainer computes them."""
    padding = ~data["mask"]
    positions = torch.arange(WIDTH).repeat(ROWS, 1)
    one_more = positions > (data["last"] + 1)[:, None]
    space = functions() | {
        "args": SimpleNamespace(**{**ARGUMENTS, **overrides}),
        "logprobs": data["logprobs"], "ref_logprobs": data["ref_logprobs"], "scores": data["scores"],
        "values": data["values"].masked_fill(one_more, 0), "responses": positions,
        "sequence_lengths": data["last"], "sequence_lengths_p1": data["last"] + 1,
        "padding_mask": padding, "padding_mask_p1": one_more, "micro_batch_inds": slice(None),
        "new_logprobs": data["new"], "vpred": data["predicted"].masked_fill(one_more, 0),
    }  # fmt: skip
    exec(lines("logr = ref_logprobs - logprobs", "empty_cache()"), space)
    space |= {"mb_advantage": space["advantages"], "mb_return": space["returns"], "mb_values": space["values"]}
    space["mb_logprobs"] = space["logprobs"]
    exec(lines("vpredclipped = torch.clamp(", "loss = pg_loss + args.vf_coef"), space)
    return space


def ours(data: dict[str, Tensor], whiten_rewards: bool = False) -> dict[str, Tensor]:
    mask, a = data["mask"], ARGUMENTS
    rewards = token_rewards(data["scores"], data["logprobs"], data["ref_logprobs"], mask, a["kl_coef"])
    if whiten_rewards:
        rewards = masked_whiten(rewards, mask, shift_mean=False)
    credit = generalised_advantages(rewards, data["values"], mask, a["gamma"], a["lam"])
    totals = Totals(float(ROWS), float(mask.sum()))
    value = clipped_value_loss(data["predicted"], data["values"], credit.returns, a["cliprange_value"])
    return {
        "rewards": rewards, "plain": credit.advantages, "advantages": masked_whiten(credit.advantages, mask),
        "returns": credit.returns, "vf_loss": aggregate(value.per_token, mask, "token_mean", totals),
        "vf_clipfrac": aggregate(value.clipped.double(), mask, "token_mean", totals),
    }  # fmt: skip


def policy_loss(data: dict[str, Tensor], advantages: Tensor) -> Tensor:
    mask = data["mask"]
    terms = clipped_policy_loss(data["new"], data["logprobs"], advantages, mask, "token", 0.2, 0.2)
    return aggregate(terms.per_token, mask, "token_mean", Totals(float(ROWS), float(mask.sum())))


@pytest.mark.trap(22)
@pytest.mark.parametrize("whiten_rewards", [False, True])
def test_answers_of_full_length_agree_but_for_the_variance(whiten_rewards: bool) -> None:
    """TRL whitens with the sample variance, which is why its whitened values are smaller by sqrt((n - 1) / n)."""
    data = rollout([WIDTH - 1] * ROWS)
    peer, own = theirs(data, whiten_rewards=whiten_rewards), ours(data, whiten_rewards)
    n = float(data["mask"].sum())
    if whiten_rewards:
        mean = peer["rewards"].mean()
        torch.testing.assert_close(own["rewards"] - mean, (peer["rewards"] - mean) * (n / (n - 1)) ** 0.5)
        return
    torch.testing.assert_close(own["rewards"], peer["rewards"])
    torch.testing.assert_close(own["returns"], peer["returns"])
    torch.testing.assert_close(own["advantages"], peer["advantages"] * (n / (n - 1)) ** 0.5)
    torch.testing.assert_close(own["vf_loss"], peer["vf_loss"])
    torch.testing.assert_close(own["vf_clipfrac"], peer["vf_clipfrac"].double())
    torch.testing.assert_close(policy_loss(data, peer["advantages"]), peer["pg_loss"])
    assert 0 < float(peer["vf_clipfrac"]) < 1


@pytest.mark.trap(9)
def test_shorter_answers_differ_by_where_the_score_stands() -> None:
    """TRL puts it one token behind the last, beside a value of its own there; without those the two agree."""
    data = rollout([2, 3, 4, 1, 5, 0])
    peer, own = theirs(data), ours(data)
    behind = data["last"] + 1
    rows = torch.arange(ROWS)
    torch.testing.assert_close(peer["rewards"][rows, behind], data["scores"])
    moved = peer["rewards"].clone()
    moved[rows, behind] = 0.0
    moved[rows, data["last"]] += data["scores"]
    torch.testing.assert_close(own["rewards"], moved.where(data["mask"], 0.0))
    # Their advantage at the last token is ours with the value behind it in the score's place, discounted.
    a, v = ARGUMENTS, data["values"]
    ahead = data["scores"] - v[rows, behind]
    expected = moved[rows, data["last"]] - data["scores"] + a["gamma"] * v[rows, behind] - v[rows, data["last"]]
    expected = expected + a["gamma"] * a["lam"] * ahead
    got = (peer["returns"] - peer["values"])[rows, data["last"]]
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(own["plain"][rows, data["last"]], moved[rows, data["last"]] - v[rows, data["last"]])
