"""One iteration of every online algorithm: collect, credit, then epochs and minibatches of ``optimize``."""

import time
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from lit_posttrain import gates, randomness
from lit_posttrain.algorithms.averaging import begin_average, move_average
from lit_posttrain.algorithms.evaluation import EvaluationConfig
from lit_posttrain.algorithms.measures import rollout_sums
from lit_posttrain.algorithms.pretraining import Pretraining, PtxConfig
from lit_posttrain.algorithms.watching import WatchedModule
from lit_posttrain.batching import split, to_device
from lit_posttrain.functional.log_probs import TokenLogProbs
from lit_posttrain.functional.masked import Totals
from lit_posttrain.kept_prompts import prompts_once
from lit_posttrain.objective import PolicyObjective
from lit_posttrain.policy import Policy, PolicyConfig, load_tokenizer
from lit_posttrain.reference import Reference, ReferenceConfig
from lit_posttrain.rewards.base import RewardFunction, judge
from lit_posttrain.rollout.collect import Rollout, assemble, generate, minibatch_rows, to_samples
from lit_posttrain.rollout.engine import RolloutEngine, SamplingParams
from lit_posttrain.sharding import all_reduce_sum, same_number, shard
from lit_posttrain.types import Loss, MicroBatch, PromptBatch, StepResult, Stream


class OnlineModule(WatchedModule):
    """Reinforcement learning on the policy's own samples; subclasses say ``credit`` and ``loss``.

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
        ptx: Pretraining text that every update also learns from; null for none.
        ema_decay: Keep a moving average of the policy's weights, which ``export`` then writes; 0 to 1, null keeps none.
        evaluation: How held-out prompts are sampled and scored.
        optimizer: Gets the trainable parameters.
        scheduler: Learning-rate schedule, stepped once an iteration.
        max_grad_norm: Gradients are clipped to this global norm; null leaves them.
        token_budget: Most tokens, padding included, in one forward pass; null is 768 in fp32 and 1,152 in
            bf16. Sets memory, never the objective.
        log_samples_every: Iterations between two rollouts shown as text in TensorBoard; 0 shows none.
    """

    def __init__(
        self,
        policy: PolicyConfig,
        objective: PolicyObjective,
        rewards: list[RewardFunction],
        sampling: SamplingParams,
        group_size: int,
        engine: RolloutEngine | None = None,
        num_epochs: int = 1,
        num_minibatches: int = 1,
        reference: ReferenceConfig = ReferenceConfig(),  # noqa: B008 (frozen)
        ptx: PtxConfig | None = None,
        ema_decay: float | None = None,
        evaluation: EvaluationConfig = EvaluationConfig(),  # noqa: B008 (frozen)
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-6, weight_decay=0.0, fused=True),
        scheduler: LRSchedulerCallable | None = None,
        max_grad_norm: float | None = 1.0,
        token_budget: int | None = None,
        log_samples_every: int = 5,
    ):
        super().__init__(
            policy, rewards, sampling, engine, evaluation, optimizer, scheduler, max_grad_norm, token_budget
        )
        for name, value in (("num_epochs", num_epochs), ("num_minibatches", num_minibatches)):
            if value < 1:
                raise ValueError(f"model.init_args.{name}: must be at least 1, is {value}")
        if ema_decay is not None and not 0 < ema_decay < 1:
            raise ValueError(f"model.init_args.ema_decay: must lie between 0 and 1, is {ema_decay}; null keeps none")
        if group_size < 1 + objective.compares:
            raise ValueError(
                f"model.init_args.group_size: {group_size} leaves nothing to compare a sample with; set at least "
                f"{1 + objective.compares}"
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
        self.pretraining = Pretraining(ptx) if ptx is not None and ptx.coef else None
        self.ema_decay = ema_decay
        self.average: Policy | None = None
        self.log_samples_every = log_samples_every
        self.kl_coef = objective.kl.coef

    @abstractmethod
    def credit(self, rollout: Rollout, scored: dict[str, Tensor]) -> dict[str, Tensor]:
        """The algorithm's credit rule: per-token columns that ``loss`` reads, ``advantages`` among them.

        Args:
            rollout: This rank's.
            scored: What ``score`` gave. Collective.
        """

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
            self.objective.kl.check_answers(data.batch_size, self.group_size)
            if self.pretraining is not None:
                self.pretraining.setup(self, total, load_tokenizer(self.policy_config))

    def prepare_policy(self, policy: Policy) -> None:
        """See that prompts and completions fit, and load the reference where the objective has a KL."""
        super().prepare_policy(policy)
        if self.pretraining is not None and policy.context_length:
            self.pretraining.check_fits(policy.context_length)
        if self.objective.needs_reference and self.trainer.state.fn == "fit":
            self.reference = Reference(policy, self.reference_config)
            data = getattr(self.trainer, "datamodule", None)
            self.reference.require_fits(self.tokenizer, data, self.sampling.max_new_tokens)

    def configure_model(self) -> None:
        """Also the average of the weights."""
        super().configure_model()
        if self.ema_decay is not None and self.average is None:
            self.average = self.network_class(self.policy_config).requires_grad_(False)
            if self.device_mesh is not None:
                shard(self.average, self.device_mesh, torch.float32, frozen=True)
            assert self.policy is not None
            begin_average(self.average, self.policy)

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
        else:
            self.calibrate_rewards()

    # --- one iteration ----------------------------------------------------------------------------------------

    def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """One iteration: refresh the reference, collect, score, credit, then every update."""
        started, self.seconds = time.perf_counter(), defaultdict(float)
        iteration, self.rates = self.trainer.global_step, self.learning_rates()
        self.seed_iteration()
        if self.reference is not None:
            self.reference.refresh_if_due(iteration)
        rollout = self.collect(batch, iteration)
        self.require_verdicts(rollout)
        scored = self.score(rollout)
        columns = self.credit(rollout, scored)
        results = self.update(rollout, {**scored, **columns}, iteration)
        if self.average is not None and self.ema_decay is not None:
            move_average(self.average, self.built_policy(), self.ema_decay)
        self.check_gates(rollout, results, iteration)
        measured = self.measure(rollout, {**scored, **columns}, results, iteration)
        self.log_iteration(rollout, columns, results, measured, iteration, time.perf_counter() - started)

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
    def score(self, rollout: Rollout) -> dict[str, Tensor]:
        """What is known of all rows before the first update, by column; what nothing reads is not computed."""
        scorers = self.scorers()
        columns: dict[str, Tensor] = {}
        if not scorers:
            return columns
        # The same micro-batches as a single update's, so that in low precision both round alike.
        batches = split(rollout.sequences, rollout.mask, {}, self.token_budget, packed=self._packs(rollout))
        with self.timed_phase("scoring", len(batches)):
            for batch in prompts_once(same_number(batches, {}, self.device), self.networks()):
                moved, width = to_device(batch, self.device), batch.mask.shape[1]
                for scorer in scorers:
                    for name, values in scorer(moved).items():
                        column = columns.setdefault(name, torch.zeros(rollout.mask.shape))
                        column[batch.rows, :width] = values.cpu()
                self.advance()
        return columns

    def scorers(self) -> list[Callable[[MicroBatch], dict[str, Tensor]]]:
        """What scores a rollout's micro-batches: the policy where it has to, the reference where there is one."""
        kl_in_reward = self.objective.kl.placement == "reward" and self.objective.kl.coef > 0
        scorers: list[Callable[[MicroBatch], dict[str, Tensor]]] = []
        if self.num_epochs * self.num_minibatches > 1 or kl_in_reward:
            scorers.append(self.old_policy)
        reference = self.reference
        if reference is not None:
            scorers.append(
                lambda b: {"ref_log_probs": reference.log_probs(b.sequences, b.mask, self.sampling.temperature)}
            )
        return scorers

    def old_policy(self, batch: MicroBatch) -> dict[str, Tensor]:
        """The sampling policy's log-probs."""
        policy = self.built_policy()
        return {"old_log_probs": policy(batch.sequences, batch.mask, self.sampling.temperature).log_probs}

    def update(self, rollout: Rollout, columns: dict[str, Tensor], iteration: int) -> list[StepResult]:
        """``num_epochs`` passes of ``num_minibatches`` optimizer steps."""
        columns = {**columns, "engine_log_probs": rollout.engine_log_probs}
        contributes = self.contributes(rollout, columns, iteration)
        steps = [(e, m) for e in range(self.num_epochs) for m in range(self.num_minibatches)]
        results = []
        for number, (epoch, minibatch) in enumerate(steps):
            rows = minibatch_rows(rollout, iteration, epoch, minibatch, self.num_minibatches)
            mask = rollout.mask[rows]
            totals = Totals(*all_reduce_sum([int(mask.any(-1).sum()), int(mask.sum())], self.device))
            kept = rows[contributes[rows]]
            # The policy that sampled is the present one until the first update: the ratio is then exactly 1.
            present = {k: v for k, v in columns.items() if number > 0 or k != "old_log_probs"}
            batches = split(
                rollout.sequences, rollout.mask, present, self.token_budget, kept, packed=self._packs(rollout)
            )
            streams = self.streams(batches, totals, present, iteration)
            if self.pretraining is not None and "policy" not in self.still(iteration):
                streams.append(self.pretraining.stream(self, iteration, epoch, minibatch))
            with self.timed_phase("update", sum(len(s.micro_batches) for s in streams)):
                last = number == len(steps) - 1
                results.append(self.optimize(streams, last=last, still=self.still(iteration)))
        return results

    def streams(
        self, batches: list[MicroBatch], totals: Totals, columns: dict[str, Tensor], iteration: int
    ) -> list[Stream]:
        """What a minibatch goes through."""
        return [Stream("rl", batches, totals, self.loss, columns)]

    def still(self, iteration: int) -> Container[str]:
        """Names of parameter groups that do not move in this iteration."""
        return ()

    def _packs(self, rollout: Rollout) -> bool:
        return self.built_policy().packs(rollout.sequences.ids.shape[1])

    def contributes(self, rollout: Rollout, columns: dict[str, Tensor], iteration: int) -> Tensor:
        """Rows whose gradient is not exactly zero. The others stay in every denominator but cost no forward."""
        counts = rollout.mask.any(-1)
        in_loss = self.objective.needs_reference and self.objective.kl.placement == "loss"
        if iteration < gates.GATED_ITERATIONS or in_loss or self.objective.entropy_coef:
            return counts
        return counts & (columns["advantages"] != 0).any(-1)

    def policy_loss(self, batch: MicroBatch, totals: Totals, scored: TokenLogProbs) -> Loss:
        """The objective's policy loss on one micro-batch, and what is measured on the way."""
        log_probs = scored.log_probs
        first = "old_log_probs" not in batch.columns
        old = log_probs.detach() if first else batch.columns["old_log_probs"]
        entropy = None if scored.entropy is None else scored.entropy.detach()
        sums, extremes = rollout_sums(batch, log_probs.detach(), old, entropy, first)
        out = self.objective.policy_loss(
            log_probs,
            old,
            batch.columns.get("ref_log_probs"),
            batch.columns["advantages"],
            batch.mask,
            totals,
            self.sampling.max_new_tokens,
            scored.entropy,
        )
        tokens = max(totals.tokens, 1.0)
        return Loss(out.loss, {**{name: value / tokens for name, value in sums.items()}, **out.metrics}, extremes)

    def scoring(self) -> dict[str, Any]:
        """How the policy's forward pass is called in a loss."""
        gradient = self.objective.entropy_coef > 0
        return {"with_entropy": gradient or self.logger is not None, "entropy_gradient": gradient}

    # --- checkpoints ------------------------------------------------------------------------------------------

    def structure(self) -> dict[str, Any]:
        """Also average and text, whose position follows from the number of updates."""
        updates = f"num_epochs {self.num_epochs}, num_minibatches {self.num_minibatches}"
        return {
            **super().structure(),
            "model.init_args.ema_decay": None if self.average is None else "a moving average",
            "model.init_args.ptx": None if self.pretraining is None else f"text for {updates}",
        }

    def counters(self) -> dict[str, Any]:
        """Also what was counted, the KL's weight, which reference, and how far the pretraining text was read."""
        reference = self.reference.state() if self.reference is not None else None
        state = {"num_tokens": self.num_tokens, "episodes": self.episodes, "kl_coef": self.kl_coef}
        ptx = self.pretraining.state(self) if self.pretraining is not None else None
        rewards = {function.name: function.state() for function in self.rewards}
        return {**super().counters(), **state, "reference": reference, "ptx": ptx, "rewards": rewards}

    def restore_counters(self, counters: dict[str, Any]) -> None:
        """Also all of that."""
        super().restore_counters(counters)
        self.num_tokens, self.episodes = counters["num_tokens"], counters["episodes"]
        if self.objective.kl.target is not None:
            self.kl_coef = counters["kl_coef"]
        self.restore_rewards()
        if self.pretraining is not None:
            self.pretraining.restore(counters["ptx"])
        if self.reference is not None and counters["reference"] is not None:
            assert self.trainer.ckpt_path is not None
            # <run>/checkpoints/step-<n>/state...: the run that the checkpoint is from, not always this one.
            self.reference.restore(counters["reference"], Path(self.trainer.ckpt_path).parents[2])

    def checkpoint_artefacts(self) -> list[str]:
        """The reference, where it is not the initial one; saved now if it has not been."""
        return self.reference.artefacts(self.run_dir()) if self.reference is not None else []
