"""One iteration of every online algorithm: collect, credit, then epochs and minibatches of ``optimize``."""

import time
from abc import abstractmethod
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from lit_posttrain import gates, randomness
from lit_posttrain.algorithms.evaluation import EvaluationConfig
from lit_posttrain.algorithms.measures import reported, rollout_metrics, rollout_sums
from lit_posttrain.algorithms.samples import as_markdown
from lit_posttrain.algorithms.sampling import SamplingModule
from lit_posttrain.batching import split, to_device
from lit_posttrain.functional.masked import Totals
from lit_posttrain.objective import Objective
from lit_posttrain.policy import Policy, PolicyConfig
from lit_posttrain.reference import Reference, ReferenceConfig
from lit_posttrain.rewards.base import RewardFunction, judge
from lit_posttrain.rollout.collect import Rollout, assemble, generate, to_samples
from lit_posttrain.rollout.engine import RolloutEngine, SamplingParams
from lit_posttrain.sharding import all_reduce_sum, same_number, world_size
from lit_posttrain.types import MicroBatch, PromptBatch, StepResult


class OnlineModule(SamplingModule):
    """Reinforcement learning on the policy's own samples; subclasses say ``advantages`` and ``loss``.

    Args:
        policy: The network that is trained.
        objective: Advantage, ratio, KL and aggregation.
        rewards: Judge the samples; their weighted scores add up to the reward.
        sampling: How completions are drawn.
        group_size: Completions of each prompt.
        engine: Generates the completions; the native engine by default.
        num_epochs: Passes over each rollout (the paper's mu).
        num_minibatches: Optimizer steps in each pass; must divide ``batch_size * group_size``.
        reference: What KL is measured against.
        evaluation: How held-out prompts are sampled and scored.
        optimizer: Gets the trainable parameters.
        scheduler: Learning-rate schedule, stepped once an iteration.
        max_grad_norm: Gradients are clipped to this global norm; null leaves them.
        token_budget: Most tokens, padding included, in one forward pass. Sets memory, never the objective.
        log_samples_every: Iterations between two rollouts shown as text in TensorBoard; 0 shows none.
    """

    def __init__(
        self,
        policy: PolicyConfig,
        objective: Objective,
        rewards: list[RewardFunction],
        sampling: SamplingParams,
        group_size: int,
        engine: RolloutEngine | None = None,
        num_epochs: int = 1,
        num_minibatches: int = 1,
        reference: ReferenceConfig = ReferenceConfig(),  # noqa: B008 (frozen)
        evaluation: EvaluationConfig = EvaluationConfig(),  # noqa: B008 (frozen)
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-6, weight_decay=0.0, fused=True),
        scheduler: LRSchedulerCallable | None = None,
        max_grad_norm: float | None = 1.0,
        token_budget: int = 1024,
        log_samples_every: int = 5,
    ):
        super().__init__(
            policy, rewards, sampling, engine, evaluation, optimizer, scheduler, max_grad_norm, token_budget
        )
        for name, value in (("num_epochs", num_epochs), ("num_minibatches", num_minibatches)):
            if value < 1:
                raise ValueError(f"model.init_args.{name}: must be at least 1, is {value}")
        if group_size < 2 and objective.advantage.baseline != "none":
            raise ValueError(
                f"model.init_args.group_size: {group_size} leaves nothing to compare a sample with; set at least 2"
            )
        if sampling.temperature == 0:
            raise ValueError("model.init_args.sampling.temperature: 0 draws the same sample every time; set it above 0")
        if reference.refresh_every is not None and objective.kl.coef == 0:
            raise ValueError(
                "model.init_args.reference.refresh_every: objective.kl.coef is 0, so nothing reads a reference"
            )
        if reference.refresh_every is not None and reference.model is not None and policy.lora is not None:
            raise ValueError("model.init_args.reference.refresh_every: with LoRA leave reference.model out")
        self.objective = objective
        self.group_size = group_size
        self.num_epochs = num_epochs
        self.num_minibatches = num_minibatches
        self.reference_config = reference
        self.log_samples_every = log_samples_every
        self.num_tokens = 0.0
        self.reference: Reference | None = None  # not a module: out of optimizer, state_dict and checkpoint

    @abstractmethod
    def advantages(
        self, rollout: Rollout, log_probs: Tensor | None, ref_log_probs: Tensor | None
    ) -> Float[Tensor, " b"]:
        """The algorithm's credit rule: one number a completion of this rank's rollout."""

    # --- building ---------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Check the data against rewards and batch sizes before any model is loaded."""
        super().setup(stage)
        data = getattr(self.trainer, "datamodule", None)
        if stage == "fit" and data is not None:
            total = data.batch_size * self.group_size
            if total % self.num_minibatches:
                raise ValueError(
                    f"model.init_args.num_minibatches: {self.num_minibatches} does not divide batch_size * group_size "
                    f"= {data.batch_size} * {self.group_size} = {total}"
                )

    def prepare_policy(self, policy: Policy) -> None:
        """See that prompts and completions fit, and load the reference where the objective has a KL."""
        super().prepare_policy(policy)
        if self.objective.needs_reference and self.trainer.state.fn == "fit":
            self.reference = Reference(policy, self.reference_config)

    def on_fit_start(self) -> None:
        """Place the reference beside the policy."""
        super().on_fit_start()
        if self.reference is not None:
            self.reference.place(self.device, self.device_mesh)

    def on_train_start(self) -> None:
        """Take over what a checkpoint holds besides weights, on the device and sharded."""
        super().on_train_start()
        if self.loaded_counters is not None:
            self.restore_counters(self.loaded_counters)
            self.loaded_counters = None

    # --- one iteration ----------------------------------------------------------------------------------------

    def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """One iteration: refresh the reference, collect, score, credit, then every update."""
        started, self.seconds = time.perf_counter(), defaultdict(float)
        iteration, rate = self.trainer.global_step, self.learning_rate()
        self.seed_iteration()
        self._refresh_reference(iteration)
        rollout = self.collect(batch, iteration)
        self._require_verdicts(rollout)
        old, ref = self.score(rollout)
        advantages = self.advantages(rollout, old, ref)
        results = self.update(rollout, advantages, old, ref, iteration)
        self._check_gates(rollout, advantages, results, iteration)
        self._log_iteration(rollout, advantages, results, iteration, rate, time.perf_counter() - started)

    def collect(self, batch: PromptBatch, iteration: int) -> Rollout:
        """(1) Sample a group of completions for each prompt and have them judged."""
        with self.timed_phase("rollout", len(batch.prompts) * self.group_size):
            self.engine.sync(self.built_policy())
            completions = generate(
                self.engine, batch.prompts, self.group_size, self.sampling,
                randomness.run_seed(), "rollout", iteration, self._tick,
            )  # fmt: skip
            self.engine.rest()
        with self.timed_phase("reward", 1):
            samples = to_samples(self.tokenizer, batch.prompts, completions, self._stop_ids())
            for function in self.rewards:
                function.begin_iteration(iteration)
            judgement = judge(self.rewards, samples)
        return assemble(batch.prompts, batch.positions, completions, samples, judgement)

    @torch.no_grad()
    def score(self, rollout: Rollout) -> tuple[Tensor | None, Tensor | None]:
        """Old and reference log-probs of all rows, before the first update; what nothing reads is not computed."""
        kl_in_reward = self.objective.kl.placement == "reward" and self.objective.kl.coef > 0
        need_old = self.num_epochs * self.num_minibatches > 1 or kl_in_reward
        if not need_old and self.reference is None:
            return None, None
        policy = self.built_policy()
        old = torch.zeros(rollout.mask.shape) if need_old else None
        ref = torch.zeros(rollout.mask.shape) if self.reference is not None else None
        # The same micro-batches as a single update's, so that in low precision both round alike.
        batches = split(rollout.sequences, rollout.mask, {}, self.token_budget, packed=self._packs(rollout))
        with self.timed_phase("scoring", len(batches)):
            for batch in same_number(batches, {}, self.device):
                moved, width = to_device(batch, self.device), batch.mask.shape[1]
                arguments = moved.sequences, moved.mask, self.sampling.temperature
                if old is not None:
                    old[batch.rows, :width] = policy(*arguments).log_probs.cpu()
                if ref is not None and self.reference is not None:
                    ref[batch.rows, :width] = self.reference.log_probs(*arguments).cpu()
                self.advance()
        return old, ref

    def update(
        self, rollout: Rollout, advantages: Tensor, old: Tensor | None, ref: Tensor | None, iteration: int
    ) -> list[StepResult]:
        """(3) ``num_epochs`` passes of ``num_minibatches`` optimizer steps."""
        columns = {
            "advantages": advantages[:, None] * rollout.mask,
            "engine_log_probs": rollout.engine_log_probs,
            **({"old_log_probs": old} if old is not None else {}),
            **({"ref_log_probs": ref} if ref is not None else {}),
        }
        steps = [(e, m) for e in range(self.num_epochs) for m in range(self.num_minibatches)]
        results = []
        for number, (epoch, minibatch) in enumerate(steps):
            rows = self._minibatch(rollout, iteration, epoch, minibatch)
            mask = rollout.mask[rows]
            totals = Totals(*all_reduce_sum([int(mask.any(-1).sum()), int(mask.sum())], self.device))
            kept = rows[self._contributes(rollout, advantages, iteration)[rows]]
            # The policy that sampled is the present one until the first update: the ratio is then exactly 1.
            present = {k: v for k, v in columns.items() if number > 0 or k != "old_log_probs"}
            batches = split(
                rollout.sequences, rollout.mask, present, self.token_budget, kept, packed=self._packs(rollout)
            )
            with self.timed_phase("update", len(batches)):
                last = number == len(steps) - 1
                results.append(self.optimize(batches, totals, self.loss, last=last, idle_columns=present))
        return results

    def _minibatch(self, rollout: Rollout, iteration: int, epoch: int, number: int) -> Tensor:
        """This rank's rows of a random share of the whole batch, the same whatever the world size."""
        if self.num_minibatches == 1:
            return torch.arange(len(rollout.rows))
        total = len(rollout.rows) * world_size()
        order = randomness.permutation(total, randomness.run_seed(), "minibatches", iteration, epoch)
        chosen = set(order.view(self.num_minibatches, -1)[number].tolist())
        return torch.tensor([i for i, row in enumerate(rollout.rows) if row in chosen], dtype=torch.long)

    def _packs(self, rollout: Rollout) -> bool:
        return self.built_policy().packs(rollout.sequences.ids.shape[1])

    def _contributes(self, rollout: Rollout, advantages: Tensor, iteration: int) -> Tensor:
        """Rows whose gradient is not exactly zero. The others stay in every denominator but cost no forward."""
        counts = rollout.mask.any(-1)
        if iteration < gates.GATED_ITERATIONS or (
            self.objective.needs_reference and self.objective.kl.placement == "loss"
        ):
            return counts
        return counts & (advantages != 0)

    def loss_inputs(self, batch: MicroBatch) -> tuple[Tensor, Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """Log-probs with gradient, old log-probs, and sums and largest values of what is measured on the way."""
        entropy_is_read = self.logger is not None
        scored = self.built_policy()(
            batch.sequences, batch.mask, self.sampling.temperature, with_entropy=entropy_is_read
        )
        log_probs = scored.log_probs
        first = "old_log_probs" not in batch.columns
        old = log_probs.detach() if first else batch.columns["old_log_probs"]
        return log_probs, old, *rollout_sums(batch, log_probs.detach(), scored.entropy, first)

    def _refresh_reference(self, iteration: int) -> None:
        every = self.reference_config.refresh_every
        if self.reference is not None and every is not None and iteration > 0 and iteration % every == 0:
            self.reference.refresh(iteration)

    def _require_verdicts(self, rollout: Rollout) -> None:
        verdicts = rollout.judgement.verdicts
        judged = [sum(row[j].status != "invalid" for row in verdicts) for j in range(len(self.rewards))]
        *counts, valid = all_reduce_sum([*judged, int(rollout.judgement.valid.sum())], self.device)
        names, reasons = rollout.judgement.names, rollout.judgement.reasons
        gates.require_some_valid(names, reasons, [count == 0 for count in counts])
        gates.require_valid_sample(names, reasons, int(valid))

    def _check_gates(self, rollout: Rollout, advantages: Tensor, results: list[StepResult], iteration: int) -> None:
        if iteration >= gates.GATED_ITERATIONS:
            return
        dtype = self.built_policy().compute_dtype
        assert dtype is not None
        first = results[0].metrics  # empty where none of the first minibatch's samples is valid
        if first:
            gates.require_engine_agrees(first["sampling/sampling_logp_difference/mean"], dtype)
        if first and iteration == 0 and self.reference is not None and self.reference.equals_initial_policy:
            gates.require_reference_is_policy(first["reference_gap"], dtype)
        self.require_change(results)
        groups = rollout.judgement.rewards.view(-1, self.group_size)
        stopped = sum(c.stop_reason == "stop" for c in rollout.completions)
        gates.warn_nothing_to_learn(int((groups.amax(1) > groups.amin(1)).sum()), stopped, len(rollout.completions))

    # --- logging ----------------------------------------------------------------------------------------------

    def _log_iteration(
        self,
        rollout: Rollout,
        advantages: Tensor,
        results: list[StepResult],
        iteration: int,
        rate: float,
        seconds: float,
    ) -> None:
        metrics = rollout_metrics(rollout, self.group_size, results, self.device)
        self.num_tokens += metrics.pop("tokens_processed")
        metrics |= {"num_tokens": self.num_tokens, "step_time": seconds, "learning_rate": rate}
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
            self.log_text("train/samples", as_markdown(rollout, advantages.tolist()), step)

    # --- checkpoints ------------------------------------------------------------------------------------------

    def counters(self) -> dict[str, Any]:
        """Also the tokens so far and which reference."""
        reference = self.reference.state() if self.reference is not None else None
        return {**super().counters(), "num_tokens": self.num_tokens, "reference": reference}

    def restore_counters(self, counters: dict[str, Any]) -> None:
        """Also the tokens so far and the reference."""
        super().restore_counters(counters)
        self.num_tokens = counters["num_tokens"]
        if self.reference is not None and counters["reference"] is not None:
            assert self.trainer.ckpt_path is not None
            # <run>/checkpoints/step-<n>/state...: the run that the checkpoint is from, not always this one.
            self.reference.restore(counters["reference"], Path(self.trainer.ckpt_path).parents[2])

    def checkpoint_artefacts(self) -> list[str]:
        """The reference, where it is not the initial one; saved now if it has not been."""
        return self.reference.artefacts(self.run_dir()) if self.reference is not None else []
