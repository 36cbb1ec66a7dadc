"""Reward models: from comparisons (InstructGPT), from labels (safety), and step by step (process supervision)."""

from abc import ABC
from typing import Any, final

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from lit_posttrain.algorithms.offline import OfflineModule
from lit_posttrain.functional.masked import Totals
from lit_posttrain.functional.preference_losses import pair_indices
from lit_posttrain.functional.reward_losses import binary_loss, bradley_terry
from lit_posttrain.metrics import calibration_error, share_interval
from lit_posttrain.policy import Policy, PolicyConfig
from lit_posttrain.scalar_heads import ScoreNetwork, last_tokens
from lit_posttrain.sharding import all_reduce_sum, gather_objects
from lit_posttrain.types import ExampleBatch, Loss, MicroBatch

_DATA = "data.init_args"


class ScoringModule(OfflineModule, ABC):
    """A network with a scalar head, its probabilities held against what happened.

    Args:
        policy: The network that is trained, without its vocabulary head.
        optimizer: Gets the trainable parameters.
        scheduler: Learning-rate schedule, stepped once an iteration.
        max_grad_norm: Gradients are clipped to this global norm; null leaves them.
        token_budget: Most tokens, padding included, in one forward pass; null is 768 in fp32 and 1,152 in
            bf16. Sets memory, never the objective.
    """

    network_class: type[Policy] = ScoreNetwork

    def __init__(
        self,
        policy: PolicyConfig,
        optimizer: OptimizerCallable,
        scheduler: LRSchedulerCallable | None,
        max_grad_norm: float | None,
        token_budget: int | None,
    ):
        super().__init__(policy, optimizer, scheduler, max_grad_norm, token_budget)
        self.observed: dict[str, list[Tensor]] = {}

    def prepare_policy(self, policy: Policy) -> None:
        """See that the scores can be exported, before anything is trained."""
        super().prepare_policy(policy)
        from lit_posttrain.export_scores import padding_token

        try:
            padding_token(self.tokenizer)
        except ValueError as error:
            raise ValueError(f"model.init_args.policy.model: {error}") from error

    def network(self) -> ScoreNetwork:
        """The trained network."""
        network = self.built_policy()
        assert isinstance(network, ScoreNetwork)
        return network

    def on_validation_epoch_start(self) -> None:
        """Begin to collect predictions."""
        super().on_validation_epoch_start()
        self.observed = {}

    def observe(self, **values: Tensor) -> None:
        """Keep what an evaluation looks at as a whole; nothing in training."""
        if not self.trainer.training:
            for name, value in values.items():
                self.observed.setdefault(name, []).append(value.detach().float().cpu())

    def collected(self) -> dict[str, Tensor]:
        """What all ranks kept, and forget it. Collective."""
        mine = {name: torch.cat(parts) for name, parts in self.observed.items()}
        self.observed = {}
        ranks = gather_objects(mine)
        names = {name: None for each in ranks for name in each}
        return {name: torch.cat([each[name] for each in ranks if name in each]) for name in names}

    def show_histograms(self, values: dict[str, Tensor]) -> None:
        """Scores in TensorBoard."""
        if not self.trainer.sanity_checking:
            for name, scores in values.items():
                self.log_histogram(f"eval/scores/{name}", scores, self.step_of_weights())


@final
class RewardModel(ScoringModule):
    """L = -1/|pairs| sum_pairs log sigma(r_w - r_l), mean over prompts (InstructGPT, 2203.02155 Eq. 1).

    The K ranked completions of a prompt are one element: K forward passes over one shared prompt, every pair that is
    not tied. Prompts without such a pair count nowhere. r is read at a completion's last token.

    When a checkpoint is written the scores are normalised: ``shift`` so that demonstrations have mean 0, and where
    ``unit_variance`` is set ``gain`` so that they have variance 1 (Ziegler et al., 1909.08593, on samples of the
    reference). The loss never sees either.

    Args:
        policy: The network that is trained, without its vocabulary head.
        centring: Coefficient of the mean of (r_w + r_l)^2 over pairs (2312.09244), which keeps scores near 0.
        normalise: Whether scores are normalised on the data module's demonstrations.
        unit_variance: Whether normalised scores also have variance 1 on its reference samples.
        optimizer: Gets the trainable parameters.
        scheduler: Learning-rate schedule, stepped once an iteration.
        max_grad_norm: Gradients are clipped to this global norm; null leaves them.
        token_budget: Most tokens, padding included, in one forward pass; null is 1,152. Sets memory, never the
            objective.
    """

    together = True

    def __init__(
        self,
        policy: PolicyConfig,
        centring: float = 0.0,
        normalise: bool = True,
        unit_variance: bool = False,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=9e-6, weight_decay=0.0, fused=True),
        scheduler: LRSchedulerCallable | None = None,
        max_grad_norm: float | None = 1.0,
        token_budget: int | None = None,
    ):
        super().__init__(policy, optimizer, scheduler, max_grad_norm, token_budget)
        if centring < 0:
            raise ValueError(f"model.init_args.centring: must not be negative, is {centring}")
        if unit_variance and not normalise:
            raise ValueError("model.init_args.unit_variance: needs normalise: true")
        self.centring, self.normalise, self.unit_variance = centring, normalise, unit_variance

    def counts(self, batch: ExampleBatch) -> tuple[float, float]:
        """Prompts with a pair that is not tied, and such pairs."""
        winners, _ = pair_indices(batch.columns["preference"], batch.columns["group"])
        return float(len(batch.columns["group"][winners].unique())), float(len(winners))

    def loss(self, batch: MicroBatch, totals: Totals) -> Loss:
        """This micro-batch's prompts, each weighing the same."""
        scores = self.network()(batch.sequences, last_tokens(batch.sequences))
        group = batch.columns["group"]
        winners, losers = pair_indices(batch.columns["preference"], group)
        margin = batch.columns.get("margin")
        terms = bradley_terry(scores[winners], scores[losers], None if margin is None else margin[winners])
        of_prompt = torch.bincount(group[winners], minlength=int(group.max()) + 1)
        prompts, pairs = max(totals.sequences, 1.0), max(totals.tokens, 1.0)
        total = (terms / of_prompt[group[winners]]).sum() / prompts + scores.sum() * 0.0
        if self.centring:
            total = total + self.centring * (scores[winners] + scores[losers]).square().sum() / pairs
        gap = (scores[winners] - scores[losers]).detach()
        counted = torch.isin(group, group[winners])
        right = torch.zeros(len(of_prompt), device=gap.device).index_add_(0, group[winners], (gap > 0).float())
        self.observe(gaps=gap, chosen=scores[winners], rejected=scores[losers], right=right, pairs=of_prompt)
        rows = scores.detach()[counted]
        metrics = {"accuracy": (gap > 0).sum() / pairs, "margin": gap.sum() / pairs}
        metrics["mean_reward"] = (0.5 * (scores[winners] + scores[losers])).detach().sum() / pairs
        none = rows.new_full((1,), -torch.inf)
        extremes = {"min_reward": torch.cat((-rows, none)).amax(), "max_reward": torch.cat((rows, none)).amax()}
        return Loss(total, metrics, extremes)

    def evaluated(self, values: dict[str, float]) -> dict[str, float]:
        """Calibration of sigma(r_w - r_l) as the probability that the better one wins; the accuracy's 95% interval."""
        seen = self.collected()
        if "gaps" not in seen or not len(seen["gaps"]):
            return {}
        self.show_histograms({"chosen": seen["chosen"], "rejected": seen["rejected"], "difference": seen["gaps"]})
        confidence = torch.sigmoid(seen["gaps"].abs())
        low, high = share_interval(seen["right"].double(), seen["pairs"].double())
        ece = calibration_error(confidence, seen["gaps"] > 0)
        return {"ece": ece, "accuracy_low": low, "accuracy_high": high}

    # --- normalisation ----------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Normalise with the weights that are saved. Every rank enters."""
        if self.normalise:
            self.calibrate()
            network = self.network()
            checkpoint["state_dict"] |= {"policy.gain": network.gain, "policy.shift": network.shift}
        super().on_save_checkpoint(checkpoint)

    @torch.no_grad()
    def calibrate(self) -> None:
        """Set ``gain`` and ``shift`` so that demonstrations have mean score 0."""
        data: Any = self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        network = self.network()
        mean, _ = self._moments(data.demonstrations())
        gain = 1.0
        if self.unit_variance:
            _, variance = self._moments(data.reference_samples())
            gain = variance**-0.5 if variance > 0 else 1.0
        network.gain.fill_(gain)
        network.shift.fill_(gain * mean)

    def _moments(self, batches: list[ExampleBatch]) -> tuple[float, float]:
        """Mean and population variance of the raw scores over all ranks."""
        total = squares = count = 0.0
        with self.built_policy().decoding():
            for batch in batches:
                for micro_batch in self.each(batch):
                    real = micro_batch.mask.any(-1)
                    scores = self.network()(micro_batch.sequences, last_tokens(micro_batch.sequences)).double()[real]
                    total, squares = total + float(scores.sum()), squares + float(scores.square().sum())
                    count += len(scores)
        total, squares, count = all_reduce_sum([total, squares, count], self.device)
        mean = total / max(count, 1.0)
        return mean, max(0.0, squares / max(count, 1.0) - mean**2)


class _LabelModule(ScoringModule, ABC):
    """Binary cross-entropy between sigma(score) and 0/1 labels."""

    def _loss(self, logits: Tensor, labels: Tensor, count: float) -> Loss:
        self.observe(logits=logits, labels=labels)
        right = (logits.detach() > 0) == (labels > 0.5)
        total = binary_loss(logits, labels).sum() / count
        sign = 2 * labels - 1
        metrics = {"accuracy": right.sum() / count, "margin": (sign * logits.detach()).sum() / count}
        metrics["mean_reward"] = logits.detach().sum() / count
        return Loss(total, metrics, {})

    def evaluated(self, values: dict[str, float]) -> dict[str, float]:
        """Calibration of sigma(score) as the probability of the label 1."""
        seen = self.collected()
        if "logits" not in seen or not len(seen["logits"]):
            return {}
        logits, labels = seen["logits"], seen["labels"] > 0.5
        self.show_histograms({"positive": logits[labels], "negative": logits[~labels]})
        return {"ece": calibration_error(torch.sigmoid(logits.abs()), (logits > 0) == labels)}


@final
class PointwiseRewardModel(_LabelModule):
    """L = -E[l log sigma(r) + (1 - l) log sigma(-r)]: DeepSeek-R1's safety model (2501.12948, section 3.1).

    r is read at the completion's last token; label 1 is safe.

    Args:
        policy: The network that is trained, without its vocabulary head.
        optimizer: Gets the trainable parameters.
        scheduler: Learning-rate schedule, stepped once an iteration.
        max_grad_norm: Gradients are clipped to this global norm; null leaves them.
        token_budget: Most tokens, padding included, in one forward pass; null is 768 in fp32 and 1,152 in
            bf16. Sets memory, never the objective.
    """

    def __init__(
        self,
        policy: PolicyConfig,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=6e-6, weight_decay=0.0, fused=True),
        scheduler: LRSchedulerCallable | None = None,
        max_grad_norm: float | None = 1.0,
        token_budget: int | None = None,
    ):
        super().__init__(policy, optimizer, scheduler, max_grad_norm, token_budget)

    def counts(self, batch: ExampleBatch) -> tuple[float, float]:
        """Completions, twice."""
        count = float(batch.mask.any(-1).sum())
        return count, count

    def loss(self, batch: MicroBatch, totals: Totals) -> Loss:
        """Mean over completions."""
        real = batch.mask.any(-1)
        scores = self.network()(batch.sequences, last_tokens(batch.sequences))
        out = self._loss(scores[real], batch.columns["label"][real], max(totals.sequences, 1.0))
        return out._replace(loss=out.loss + scores.sum() * 0.0)


@final
class ProcessRewardModel(_LabelModule):
    """L = -E over steps of l log sigma(r) + (1 - l) log sigma(-r): a process reward model (2305.20050).

    r is read at each step's last token. DeepSeekMath's process supervision (2402.03300, section 4.1.3) sums it up.

    Args:
        policy: The network that is trained, without its vocabulary head.
        optimizer: Gets the trainable parameters.
        scheduler: Learning-rate schedule, stepped once an iteration.
        max_grad_norm: Gradients are clipped to this global norm; null leaves them.
        token_budget: Most tokens, padding included, in one forward pass; null is 768 in fp32 and 1,152 in
            bf16. Sets memory, never the objective.
    """

    def __init__(
        self,
        policy: PolicyConfig,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=2e-5, weight_decay=0.0, fused=True),
        scheduler: LRSchedulerCallable | None = None,
        max_grad_norm: float | None = 1.0,
        token_budget: int | None = None,
    ):
        super().__init__(policy, optimizer, scheduler, max_grad_norm, token_budget)

    def counts(self, batch: ExampleBatch) -> tuple[float, float]:
        """Chains and their steps."""
        return float(batch.mask.any(-1).sum()), float(batch.mask.sum())

    def loss(self, batch: MicroBatch, totals: Totals) -> Loss:
        """Mean over all steps."""
        # Position i of the mask is about token i + 1, whose own state sees the whole step.
        at = torch.nn.functional.pad(batch.mask, (1, 0))
        if not bool(at.any()):
            scores = self.network()(batch.sequences, last_tokens(batch.sequences))
            empty = self._loss(scores[:0], scores[:0].detach(), 1.0)
            return empty._replace(loss=empty.loss + scores.sum() * 0.0)
        scores = self.network()(batch.sequences, at)
        return self._loss(scores, batch.columns["step_labels"][batch.mask], max(totals.tokens, 1.0))
