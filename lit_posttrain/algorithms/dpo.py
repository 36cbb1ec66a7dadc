"""Direct preference optimisation and its family, on pairs or on whole rankings."""

import math
from typing import Any, final

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from lit_posttrain.algorithms.generations import GenerationConfig
from lit_posttrain.algorithms.preference import PreferenceModule, pair_metrics
from lit_posttrain.functional.masked import Totals
from lit_posttrain.functional.preference_losses import (
    WHOLE_STEP,
    LossType,
    PairLossOptions,
    PairTerms,
    needs_reference,
    pair_indices,
    pair_loss,
    require_read,
)
from lit_posttrain.policy import PolicyConfig
from lit_posttrain.reference import ReferenceConfig
from lit_posttrain.rollout.engine import RolloutEngine
from lit_posttrain.sharding import gather_objects
from lit_posttrain.types import ExampleBatch, Loss, MicroBatch


@final
class DPO(PreferenceModule):
    """L = -E log sigma(beta (log pi(y_w)/pi_ref(y_w) - log pi(y_l)/pi_ref(y_l))) (2305.18290 Eq. 7), and its family.

    Log-probs are sums over a completion's tokens, its end token included. Of a prompt with K ranked completions every
    pair that is not tied counts, at the cost of K forward passes.

    Args:
        policy: The network that is trained.
        loss_type: Which loss; several are added up with ``loss_weights``.
        loss_weights: One a loss; by default 1 each.
        options: Constants of the losses, beta among them.
        reference: What the policy is held close to; by default the policy as it was at the start.
        reference_cache: Folder in which the reference's log-probs are kept, under a hash of its weights and the data:
            computed once before the first step. After that the reference is in memory only while an evaluation
            estimates KL on samples. Null computes them every step.
        generations: Answers that each evaluation samples: shown as text, and KL to the reference is estimated on them.
        engine: Generates them; the native engine by default.
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
        loss_type: LossType | list[LossType] = "sigmoid",
        loss_weights: list[float] | None = None,
        options: PairLossOptions = PairLossOptions(),  # noqa: B008 (frozen)
        reference: ReferenceConfig = ReferenceConfig(),  # noqa: B008 (frozen)
        reference_cache: str | None = None,
        generations: GenerationConfig = GenerationConfig(),  # noqa: B008 (frozen)
        engine: RolloutEngine | None = None,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-6, weight_decay=0.0, fused=True),
        scheduler: LRSchedulerCallable | None = None,
        max_grad_norm: float | None = 1.0,
        token_budget: int | None = None,
    ):
        kinds: list[LossType] = [loss_type] if isinstance(loss_type, str) else list(loss_type)
        weights = [1.0] * len(kinds) if loss_weights is None else loss_weights
        if not kinds or len(weights) != len(kinds):
            raise ValueError(
                f"model.init_args.loss_weights: {len(weights)} weights for {len(kinds)} losses; give one for each"
            )
        self.losses: list[tuple[LossType, float]] = list(zip(kinds, weights, strict=True))
        if not all(map(math.isfinite, weights)) or not any(weights):
            raise ValueError(f"model.init_args.loss_weights: must be finite and not all 0, are {weights}")
        require_read(kinds, options)
        needed = any(needs_reference(kind, options) for kind in kinds)
        super().__init__(
            policy, reference if needed else None, reference_cache, generations, engine, optimizer, scheduler,
            max_grad_norm, token_budget,
        )  # fmt: skip
        self.options = options

    def counts(self, batch: ExampleBatch) -> tuple[float, float]:
        """Pairs, and tokens of the preferred completions, once a pair."""
        winners, _ = pair_indices(batch.columns["preference"], batch.columns["group"])
        return float(len(winners)), float(batch.mask.sum(-1)[winners].sum())

    def further_counts(self, batch: ExampleBatch) -> dict[str, float]:
        """Tokens of the other completions, once a pair."""
        _, losers = pair_indices(batch.columns["preference"], batch.columns["group"])
        return {"rejected_tokens": float(batch.mask.sum(-1)[losers].sum())}

    def columns(self, batch: ExampleBatch, split: Any) -> dict[str, Tensor]:
        """The reference's log-probs; and where a loss ranks over the whole step, its gradient by every row's."""
        columns = {**self.reference_columns(batch, split), **self.further_columns(batch, split)}
        ranking: list[tuple[LossType, float]] = [(kind, weight) for kind, weight in self.losses if kind in WHOLE_STEP]
        if not ranking:
            return columns
        own = torch.zeros(len(batch.sequences.ids))
        for micro_batch in self.each(batch):
            scored = self.built_policy()(micro_batch.sequences, micro_batch.mask, 1.0).log_probs
            own[micro_batch.rows] = scored.detach().sum(-1).cpu()
        local = ExampleBatch(batch.sequences, batch.mask, {**batch.columns, **columns})
        terms = self._terms(own, local.mask, local.columns)
        shares = gather_objects([t.detach() for t in terms])
        first = sum(len(s[0]) for s in shares[: self.global_rank])
        mine = slice(first, first + len(terms.chosen))
        with torch.inference_mode(False), torch.enable_grad():  # Trainer.validate is in inference mode
            whole = PairTerms(*(torch.cat(each) for each in zip(*shares, strict=True)))
            chosen, rejected = (x.clone().requires_grad_() for x in (whole.chosen, whole.rejected))
            moving = whole._replace(chosen=chosen, rejected=rejected)
            values = torch.stack([w * pair_loss(moving, k, self.options) for k, w in ranking]).sum(0)
            by_chosen, by_rejected = torch.autograd.grad(values.sum(), (chosen, rejected))
        winners, losers = pair_indices(batch.columns["preference"], batch.columns["group"])
        slope = torch.zeros_like(own).index_add_(0, winners, by_chosen[mine]).index_add_(0, losers, by_rejected[mine])
        # Sorting moves a term from pair to pair; only their sum is a loss, so each row carries a share of it.
        value = torch.full_like(own, float(values.detach().sum()) / max(1, len(values)))
        pairs = torch.zeros_like(own).index_add_(0, winners, torch.ones(len(winners)))
        return {**columns, "step_slope": slope, "step_value": value * pairs}

    def loss(self, batch: MicroBatch, totals: Totals) -> Loss:
        """Mean over the pairs of the whole step."""
        scored = self.built_policy()(batch.sequences, batch.mask, 1.0, with_entropy=self.logger is not None)
        sums = scored.log_probs.sum(-1)
        terms = self._terms(sums, batch.mask, batch.columns)
        pairs, tokens = max(totals.sequences, 1.0), max(totals.tokens, 1.0)
        total = sums.sum() * 0.0
        for kind, weight in self.losses:
            if kind not in WHOLE_STEP:
                divisor = tokens if kind == "sft" else pairs
                total = total + weight * pair_loss(terms, kind, self.options).sum() / divisor
        if "step_slope" in batch.columns:
            change = batch.columns["step_slope"] * (sums - sums.detach())
            total = total + (change + batch.columns["step_value"]).sum() / pairs
        kinds = frozenset(kind for kind, _ in self.losses)
        return Loss(total, pair_metrics(scored, batch, terms, self.options, totals, kinds), {})

    def _terms(self, sums: Tensor, mask: Tensor, columns: dict[str, Tensor]) -> PairTerms:
        winners, losers = pair_indices(columns["preference"], columns["group"])
        lengths = mask.sum(-1).to(sums.dtype)
        reference = columns.get("ref_log_probs", torch.zeros_like(sums)).to(sums.dtype)
        return PairTerms(
            sums[winners], sums[losers], reference[winners], reference[losers], lengths[winners], lengths[losers]
        )
