"""What is watched in every online iteration: gates at the beginning, curves, samples, the KL and its weight."""

from typing import Any

from torch import Tensor

from lit_posttrain import gates, randomness
from lit_posttrain.algorithms.measures import per_answer, reported, rollout_metrics
from lit_posttrain.algorithms.samples import as_markdown
from lit_posttrain.algorithms.sampling import SamplingModule
from lit_posttrain.functional.returns import adapted_coef
from lit_posttrain.objective import PolicyObjective
from lit_posttrain.rewards.base import deciding
from lit_posttrain.rewards.learned import LearnedReward
from lit_posttrain.rollout.collect import Rollout, generate, to_samples
from lit_posttrain.sharding import all_reduce_sum, world_size
from lit_posttrain.types import StepResult


class WatchedModule(SamplingModule):
    """Below every online algorithm."""

    objective: PolicyObjective
    group_size: int
    log_samples_every: int
    kl_coef: float
    rates: list[float]  # of the parameter groups, in the present iteration
    num_tokens = 0.0
    episodes = 0
    waits = 0  # iterations before the policy is trained

    def calibrate_rewards(self) -> None:
        """Learned rewards that count from the mean of the untrained policy's answers: sample those answers."""
        learned = [f for f in self.rewards if isinstance(f, LearnedReward) and f.calibration]
        if not learned:
            return
        data: Any = self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        count = min(max(f.calibration for f in learned), data.size("train"))
        prompts = data.collate("train", list(range(count)), list(range(count))).prompts
        with self.timed_phase("calibration", count):
            self.engine.sync(self.built_policy())
            seed = randomness.run_seed()
            completions = generate(self.engine, prompts, 1, self.sampling, seed, "calibration", 0, self._tick)
            self.engine.rest()
        samples = to_samples(self.tokenizer, prompts, completions, self._stop_ids())
        for function in learned:
            function.calibrate(samples[: function.calibration])

    def require_verdicts(self, rollout: Rollout) -> None:
        """Stop where a reward function, or every one of a sample's, failed. Collective."""
        verdicts = rollout.judgement.verdicts
        judged = [sum(row[j].status != "invalid" for row in verdicts) for j in range(len(self.rewards))]
        *counts, valid = all_reduce_sum([*judged, int(rollout.judgement.valid.sum())], self.device)
        names, reasons = rollout.judgement.names, rollout.judgement.reasons
        learned_from = deciding(self.rewards)
        gates.require_some_valid(names, reasons, [not n and j in learned_from for j, n in enumerate(counts)])
        gates.require_valid_sample(names, reasons, int(valid))

    def check_gates(self, rollout: Rollout, results: list[StepResult], iteration: int) -> None:
        """Stop in the first iterations where nothing could be learned. Collective."""
        if not self.waits <= iteration < self.waits + gates.GATED_ITERATIONS:
            return
        dtype = self.built_policy().compute_dtype
        assert dtype is not None
        first = results[0].metrics  # without both where none of the first minibatch's samples is valid
        if "sampling/sampling_logp_difference/mean" in first:
            gates.require_engine_agrees(first["sampling/sampling_logp_difference/mean"], dtype)
        reference = self.reference
        if "reference_gap" in first and iteration == self.waits and reference and reference.equals_initial_policy:
            gates.require_reference_is_policy(first["reference_gap"], dtype)
        if iteration < gates.GATED_ITERATIONS:
            self.require_change(results)
        groups = rollout.judgement.rewards.view(-1, self._compared(rollout))
        stopped = sum(c.stop_reason == "stop" for c in rollout.completions)
        gates.warn_nothing_to_learn(int((groups.amax(1) > groups.amin(1)).sum()), stopped, len(rollout.completions))

    def _compared(self, rollout: Rollout) -> int:
        """Answers that are compared with each other: a prompt's, or all of this rank's."""
        return self.group_size if self.objective.compares else len(rollout.rows)

    # --- logging ----------------------------------------------------------------------------------------------

    def measure(
        self, rollout: Rollout, columns: dict[str, Tensor], results: list[StepResult], iteration: int
    ) -> dict[str, float]:
        """Further tags of an iteration. Collective: counts answers, and adapts the KL's weight where it is to be."""
        samples = int(all_reduce_sum([len(rollout.rows)], self.device)[0])
        self.episodes += samples
        metrics = {"episode": float(self.episodes)}
        old, ref, config = columns.get("old_log_probs"), columns.get("ref_log_probs"), self.objective.kl
        if ref is None:
            return metrics
        metrics["objective/kl_coef"] = self.kl_coef
        kl = per_answer(rollout, None if old is None else old - ref, results[0].metrics.get("drawn/kl"), self.device)
        if kl is None:
            return metrics
        if config.target is not None and config.horizon is not None and iteration >= self.waits:
            self.kl_coef = adapted_coef(self.kl_coef, kl, config.target, config.horizon, samples)
        return {**metrics, "objective/kl": kl}

    def log_iteration(
        self,
        rollout: Rollout,
        columns: dict[str, Tensor],
        results: list[StepResult],
        measured: dict[str, float],
        iteration: int,
        seconds: float,
    ) -> None:
        """Curves and samples of an iteration. Collective."""
        metrics = rollout_metrics(rollout, self._compared(rollout), results, self.device)
        self.num_tokens += metrics.pop("tokens_processed")
        metrics |= {"num_tokens": self.num_tokens, "step_time": seconds, "learning_rate": self.rates[0], **measured}
        metrics |= reported(self.rewards)
        metrics["epoch"] = self.epochs_done()
        tagged = {f"train/{name}": value for name, value in metrics.items()}
        tagged |= {f"time/{name}": value for name, value in self.seconds.items()}
        generated = metrics["completions/mean_length"] * len(rollout.completions) * world_size()
        tagged["time/rollout_tokens_per_second"] = generated / max(self.seconds["rollout"], 1e-9)
        tagged["time/update_tokens_per_second"] = generated / max(self.seconds["update"], 1e-9)
        step = iteration + 1
        self.log("reward", metrics["reward"], prog_bar=True, logger=False)
        if self.logger is not None:
            self.logger.log_metrics(tagged, step=step)
        if self.log_samples_every and (iteration == 0 or step % self.log_samples_every == 0):
            credit = columns["advantages"].sum(-1) / rollout.mask.sum(-1).clamp(min=1)
            self.log_text("train/samples", as_markdown(rollout, credit.tolist()), step)
