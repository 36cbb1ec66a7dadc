"""PPO for answers, as InstructGPT and its predecessors have it: a critic's values, token rewards with KL, GAE."""

import time
import warnings
from collections.abc import Callable, Container
from typing import Any, final

import torch
from torch import Tensor

from lit_posttrain.algorithms.measures import explained_variance, per_answer
from lit_posttrain.algorithms.online import OnlineModule
from lit_posttrain.algorithms.structure import size_of
from lit_posttrain.beside import require_fits
from lit_posttrain.critic import KEY, CriticConfig, ValuePolicy, load_critic, values_of
from lit_posttrain.functional.masked import Totals, aggregate, whiten
from lit_posttrain.functional.returns import (
    Credit,
    clipped_value_loss,
    ended_scores,
    generalised_advantages,
    token_rewards,
)
from lit_posttrain.policy import Policy, PolicyConfig
from lit_posttrain.ppo_objective import PPOObjective
from lit_posttrain.rewards.base import RewardFunction
from lit_posttrain.rollout.collect import Rollout
from lit_posttrain.rollout.engine import SamplingParams
from lit_posttrain.scalar_heads import ScoreNetwork
from lit_posttrain.sharding import all_reduce_sum, shard
from lit_posttrain.types import Loss, MicroBatch, StepResult, Stream

# The last TRL PPO's tags for what every online algorithm measures.
_TRL = {
    "loss/policy_avg": "policy_loss",
    "policy/clipfrac_avg": "clip_ratio/region_mean",
    "policy/entropy_avg": "entropy",
}


@final
class PPO(OnlineModule):
    """E[r(x, y) - beta log(pi / pi_ref)] + gamma E_pretrain[log pi] (InstructGPT, 2203.02155 Eq. 2; PPO, 1707.06347).

    An answer is an episode: a token's reward is -beta k1, the score is added at the last token, advantages are GAE's,
    and V is 0 behind the last token. With ``ptx`` it is PPO-ptx. Policy and critic have one optimizer, a parameter
    group each.
    """

    objective: PPOObjective  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(
        self,
        policy: PolicyConfig,
        objective: PPOObjective,
        rewards: list[RewardFunction],
        sampling: SamplingParams,
        critic: CriticConfig = CriticConfig(),  # noqa: B008 (frozen)
        group_size: int = 1,
        **kwargs: Any,
    ):
        """As :class:`~lit_posttrain.algorithms.online.OnlineModule`.

        Args:
            policy: The network that is trained.
            objective: Token rewards, GAE, ratio, KL, value loss and aggregation.
            rewards: Judge the samples; their weighted scores add up to the reward.
            sampling: How completions are drawn.
            critic: The value function.
            group_size: Completions of each prompt.
            **kwargs: Further arguments.
        """
        super().__init__(policy, objective, rewards, sampling, group_size, **kwargs)
        if critic.shared and policy.lora is not None:
            raise ValueError("model.init_args.critic.shared: not with LoRA; give the critic a network of its own")
        self.critic_config, self.waits = critic, critic.warmup
        if critic.shared:
            self.network_class = ValuePolicy
        self.critic: ScoreNetwork | None = None
        self._began = time.monotonic(), 0

    # --- building ---------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Also say so where the policy would never be trained."""
        super().setup(stage)
        steps = self.run_length() if stage == "fit" else None
        if steps is not None and steps <= self.waits:
            warnings.warn(
                f"{KEY}.warmup: the run has {steps} iterations, and in the first {self.waits} only the critic learns, "
                "so the policy is never trained; lower it",
                stacklevel=2,
            )

    def configure_model(self) -> None:
        """Load the critic beside the policy."""
        super().configure_model()
        config = self.critic_config
        if config.shared or self.critic is not None:
            return
        critic = load_critic(self.policy_config, config)
        if config.model is not None and self.policy is not None:
            data = getattr(self.trainer, "datamodule", None)
            require_fits(critic, self.policy, self.tokenizer, f"{KEY}.model", data, self.sampling.max_new_tokens)
        if self.device_mesh is not None:
            critic.build_view(self.trainer.strategy.root_device, sharded=True)
            assert critic.compute_dtype is not None
            shard(critic, self.device_mesh, critic.compute_dtype)
        self.critic = critic

    def on_train_start(self) -> None:
        """Also note when this process began: what a resumed run did before took none of its time."""
        super().on_train_start()
        self._began = time.monotonic(), self.episodes

    def built_critic(self) -> ScoreNetwork:
        """The critic, its compute view made on the device it is on by now."""
        assert self.critic is not None, "configure_model comes first"
        if self.critic.compute_dtype is None:
            self.critic.build_view(self.device, sharded=False)
        return self.critic

    def networks(self) -> list[Policy]:
        """Also the critic."""
        return super().networks() if self.critic is None else [*super().networks(), self.built_critic()]

    def sync_views(self) -> None:
        """Also the critic's."""
        super().sync_views()
        if self.critic is not None:
            self.built_critic().sync()

    def parameter_groups(self) -> list[Any]:
        """Policy and critic."""
        policy = self.built_policy()
        if isinstance(policy, ValuePolicy):
            critic = list(policy.value_head.parameters())
        else:
            critic = [p for _, p in self.built_critic().trainable()]
        rate = {} if self.critic_config.lr is None else {"lr": self.critic_config.lr}
        return [
            {"params": [p for _, p in policy.trainable()], "name": "policy"},
            {"params": critic, "name": "critic", **rate},
        ]

    # --- credit -----------------------------------------------------------------------------------------------

    def scorers(self) -> list[Callable[[MicroBatch], dict[str, Tensor]]]:
        """Also the values before the first update, unless the only update's own pass gives them."""
        scorers = super().scorers()
        if self._values_with_update():
            return scorers
        if self.critic is not None:
            return [*scorers, lambda b: {"old_values": values_of(self.built_critic(), b.sequences, b.mask)}]
        others = [s for s in scorers if s != self.old_policy]
        return [self._old_policy_and_values, *others]

    def _old_policy_and_values(self, batch: MicroBatch) -> dict[str, Tensor]:
        scored, values = self._shared().with_values(batch.sequences, batch.mask, self.sampling.temperature)
        return {"old_log_probs": scored.log_probs, "old_values": values}

    def _values_with_update(self) -> bool:
        """One update a rollout: its critic's pass comes first, and is then the first look at the values as well."""
        return self.critic is not None and self.num_epochs * self.num_minibatches == 1

    def credit(self, rollout: Rollout, scored: dict[str, Tensor]) -> dict[str, Tensor]:
        """Token rewards, then GAE; whitened with the moments of all ranks. Returns come before whitening.

        Values that come with the update are not known yet: what follows from them is then filled in by its streams.
        """
        objective, mask = self.objective, rollout.mask
        ended = torch.tensor([c.stop_reason == "stop" for c in rollout.completions])
        replacement, penalty = objective.missing_eos_reward, objective.missing_eos_penalty
        scores = ended_scores(rollout.judgement.rewards, ended, replacement, penalty)
        in_reward = objective.kl.placement == "reward"
        rewards = token_rewards(
            scores,
            scored.get("old_log_probs", torch.zeros(mask.shape)),
            scored.get("ref_log_probs") if in_reward else None,
            mask,
            self.kl_coef,
        )
        self._mask, self._scores, self._non_score = mask, scores, rewards.sum(-1) - scores * mask.any(-1)
        if objective.gae.whiten_rewards:
            rewards = self._whitened(rewards, mask, shift_mean=False)
        if self._values_with_update():
            later = {name: torch.zeros_like(rewards) for name in ("old_values", "returns", "advantages")}
            return {"token_rewards": rewards, **later}
        advantages, returns = self._generalised(rewards, scored["old_values"], mask)
        if objective.gae.whiten_advantages:
            advantages = self._whitened(advantages, mask, shift_mean=True)
        return {"advantages": advantages, "returns": returns}

    def _generalised(self, rewards: Tensor, values: Tensor, mask: Tensor) -> Credit:
        gae = self.objective.gae
        return generalised_advantages(rewards, values, mask, gae.gamma, gae.lam)

    def _whitened(self, x: Tensor, mask: Tensor, *, shift_mean: bool) -> Tensor:
        """Population moments over the answers' tokens of the whole rollout."""
        kept = x.where(mask, 0.0).double()
        total, count = all_reduce_sum([float(kept.sum()), int(mask.sum())], self.device)
        mean = total / max(count, 1.0)
        squares = all_reduce_sum([float((kept - mean).where(mask, 0.0).square().sum())], self.device)[0]
        return whiten(x, mask, x.new_tensor(mean), x.new_tensor(squares / max(count, 1.0)), shift_mean)

    def contributes(self, rollout: Rollout, columns: dict[str, Tensor], iteration: int) -> Tensor:
        """Every row teaches the critic."""
        return rollout.mask.any(-1)

    # --- one update -------------------------------------------------------------------------------------------

    def streams(
        self, batches: list[MicroBatch], totals: Totals, columns: dict[str, Tensor], iteration: int
    ) -> list[Stream]:
        """The critic's pass and the policy's, one after the other: their activations never exist together."""
        policy = Stream("rl", batches, totals, self.loss, columns)
        if self.critic is None:
            return [policy]
        critic = Stream("critic", batches, totals, self._critic_loss, columns)
        if self._values_with_update():
            critic = critic._replace(
                loss=lambda batch, totals: self._first_critic_loss(batch, totals, columns),
                done=lambda: self._hand_over(batches, columns),
            )
        return [critic] if "policy" in self.still(iteration) else [critic, policy]

    def still(self, iteration: int) -> Container[str]:
        """The policy waits while the critic warms up."""
        return ("policy",) if iteration < self.critic_config.warmup else ()

    def loss(self, batch: MicroBatch, totals: Totals) -> Loss:
        """The policy's loss, and with a shared critic the value loss."""
        arguments = batch.sequences, batch.mask, self.sampling.temperature
        if self.critic is not None:
            return self.policy_loss(batch, totals, self.built_policy()(*arguments, **self.scoring()))
        scored, values = self._shared().with_values(*arguments, **self.scoring())
        policy, critic = self.policy_loss(batch, totals, scored), self._value_loss(batch, totals, values)
        return Loss(policy.loss + critic.loss, {**policy.metrics, **critic.metrics}, policy.extremes)

    def _shared(self) -> ValuePolicy:
        policy = self.built_policy()
        assert isinstance(policy, ValuePolicy)
        return policy

    def _critic_loss(self, batch: MicroBatch, totals: Totals) -> Loss:
        return self._value_loss(batch, totals, values_of(self.built_critic(), batch.sequences, batch.mask))

    def _first_critic_loss(self, batch: MicroBatch, totals: Totals, columns: dict[str, Tensor]) -> Loss:
        """The same where this pass is also the first look at the values; ``columns`` learn what follows from them."""
        values = values_of(self.built_critic(), batch.sequences, batch.mask)
        old = values.detach().cpu()
        credit = self._generalised(batch.columns["token_rewards"].cpu(), old, batch.mask.cpu())
        found = {"old_values": old, **credit._asdict()}
        for name, each in found.items():
            columns[name][batch.rows, : each.shape[1]] = each[: len(batch.rows)]  # an idle micro-batch has no rows
        known = {**batch.columns, **{name: each.to(values.device) for name, each in found.items()}}
        return self._value_loss(batch._replace(columns=known), totals, values)

    def _hand_over(self, batches: list[MicroBatch], columns: dict[str, Tensor]) -> None:
        """All advantages are known by now: give them to the policy's micro-batches. Collective."""
        advantages = columns["advantages"]
        if self.objective.gae.whiten_advantages:
            advantages.copy_(self._whitened(advantages, self._mask, shift_mean=True))
        for batch in batches:
            batch.columns["advantages"] = advantages[batch.rows, : batch.mask.shape[1]]

    def _value_loss(self, batch: MicroBatch, totals: Totals, values: Tensor) -> Loss:
        config, how = self.objective.value, self.objective.aggregation
        length = self.objective.constant_length or self.sampling.max_new_tokens
        terms = clipped_value_loss(values, batch.columns["old_values"], batch.columns["returns"], config.clip)
        loss = aggregate(terms.per_token, batch.mask, how, totals, length)
        clipped = aggregate(terms.clipped.float(), batch.mask, "token_mean", totals)
        return Loss(config.coef * loss, {"loss/value_avg": loss.detach(), "val/clipfrac_avg": clipped}, {})

    # --- checkpoints and logging ------------------------------------------------------------------------------

    def structure(self) -> dict[str, Any]:
        """Also the critic."""
        kind = "a shared critic" if self.critic is None else "a critic of its own"
        critic = {f"{KEY}.shared": kind, f"{KEY}.model": None if self.critic is None else size_of(self.critic)}
        return {**super().structure(), **critic}

    def measure(
        self, rollout: Rollout, columns: dict[str, Tensor], results: list[StepResult], iteration: int
    ) -> dict[str, float]:
        """Also the last TRL PPO's tags, and how much of the returns' variance the values explained. Collective."""
        counts = rollout.mask.any(-1)
        stopped = sum(c.stop_reason == "stop" for c in rollout.completions)
        sums = [int(counts.sum()), float(self._scores[counts].sum()), float(self._non_score[counts].sum()), stopped]
        answers, scores, non_score, ended = all_reduce_sum(sums, self.device)
        answers = max(answers, 1.0)
        metrics = super().measure(rollout, columns, results, iteration)
        for name, ours in _TRL.items():
            if each := [r.metrics[ours] for r in results if ours in r.metrics]:
                metrics[name] = sum(each) / len(each)
        drawn = -columns["old_log_probs"] if "old_log_probs" in columns else None
        entropy = per_answer(rollout, drawn, results[0].metrics.get("drawn/entropy"), self.device)
        if entropy is not None:
            metrics["objective/entropy"] = entropy
        if self.critic_config.lr is not None:
            metrics["lr/critic"] = self.rates[1]
        began, before = self._began
        metrics |= {"lr": self.rates[0], "eps": (self.episodes - before) / max(time.monotonic() - began, 1e-9)}
        return {
            **metrics,
            "objective/scores": scores / answers,
            "objective/non_score_reward": non_score / answers,
            "objective/rlhf_reward": (scores + non_score) / answers,
            "val/num_eos_tokens": ended,
            "val/explained_variance": explained_variance(
                columns["returns"], columns["old_values"], rollout.mask, self.device
            ),
        }
