"""Kahneman-Tversky optimisation on single completions that are labelled good or bad."""

import math
from collections.abc import Iterator
from typing import Any, final

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from lit_posttrain.algorithms.generations import GenerationConfig
from lit_posttrain.algorithms.preference import COLUMN, PreferenceModule
from lit_posttrain.functional.masked import Totals
from lit_posttrain.functional.preference_losses import kto_loss
from lit_posttrain.policy import PolicyConfig
from lit_posttrain.reference import ReferenceConfig
from lit_posttrain.reference_cache import ReferenceCache
from lit_posttrain.rollout.engine import RolloutEngine
from lit_posttrain.sharding import all_reduce_sum
from lit_posttrain.types import ExampleBatch, Loss, MicroBatch


@final
class KTO(PreferenceModule):
    """L = E[lambda_y - v(x, y)], v = lambda_D sigma(beta (r - z)) or lambda_U sigma(beta (z - r)) (2402.01306 Eq. 8).

    r = log pi/pi_ref of the completion. z = max(0, mean r of mismatched prompts and completions), over the whole
    optimizer step and all ranks, without gradient: each prompt with the completion of the example before it.

    Args:
        policy: The network that is trained.
        beta: How close the policy stays to the reference.
        desirable_weight: lambda_D.
        undesirable_weight: lambda_U.
        reference: What the policy is held close to; by default the policy as it was at the start.
        reference_cache: Folder in which the reference's log-probs are kept, those of the mismatched completions of
            every step included, under a hash of its weights and the data: computed once before the first step. After
            that the reference is in memory only while an evaluation estimates KL on samples. Null computes them every
            step.
        generations: Answers that each evaluation samples: shown as text, and KL to the reference is estimated on them.
        engine: Generates them; the native engine by default.
        optimizer: Gets the trainable parameters.
        scheduler: Learning-rate schedule, stepped once an iteration.
        max_grad_norm: Gradients are clipped to this global norm; null leaves them.
        token_budget: Most tokens, padding included, in one forward pass; null is 768 in fp32 and 1,152 in
            bf16. Sets memory, never the objective.
    """

    def __init__(
        self,
        policy: PolicyConfig,
        beta: float = 0.1,
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
        reference: ReferenceConfig = ReferenceConfig(),  # noqa: B008 (frozen)
        reference_cache: str | None = None,
        generations: GenerationConfig = GenerationConfig(),  # noqa: B008 (frozen)
        engine: RolloutEngine | None = None,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-6, weight_decay=0.0, fused=True),
        scheduler: LRSchedulerCallable | None = None,
        max_grad_norm: float | None = 1.0,
        token_budget: int | None = None,
    ):
        for name, value in (("beta", beta), ("desirable_weight", desirable_weight)):
            if not 0 < value < math.inf:
                raise ValueError(f"model.init_args.{name}: must be above 0 and finite, is {value}")
        if not 0 <= undesirable_weight < math.inf:
            raise ValueError(
                f"model.init_args.undesirable_weight: must be finite and not negative, is {undesirable_weight}"
            )
        super().__init__(
            policy, reference, reference_cache, generations, engine, optimizer, scheduler, max_grad_norm, token_budget
        )
        self._exchanged: dict[tuple[str, int, int], float] = {}
        self.beta = beta
        self.desirable_weight, self.undesirable_weight = desirable_weight, undesirable_weight

    def counts(self, batch: ExampleBatch) -> tuple[float, float]:
        """Real completions and their tokens."""
        real = batch.columns["role"] == 0
        return float(real.sum()), float(batch.mask[real].sum())

    def further_counts(self, batch: ExampleBatch) -> dict[str, float]:
        """Completions of each kind."""
        real, good = batch.columns["role"] == 0, batch.columns["label"] > 0
        return {"chosen": float((real & good).sum()), "rejected": float((real & ~good).sum())}

    def rows(self, batch: ExampleBatch) -> Tensor:
        """Mismatched completions only make z."""
        return (batch.columns["role"] == 0).nonzero()[:, 0]

    def setup(self, stage: str) -> None:
        """Refuse a cache of a run without an end before anything is computed for it."""
        super().setup(stage)
        if stage == "fit" and self.cache_folder is not None and self.run_length() is None:
            raise ValueError(
                "model.init_args.reference_cache: which completions change places is known only for so many steps; "
                "set trainer.max_steps or trainer.max_epochs, or unset it"
            )

    def fill(self, cache: ReferenceCache, data: Any) -> None:
        """Also every prompt with a completion of another that the steps and evaluations to come will hold."""
        super().fill(cache, data)
        steps = self.run_length() if self.trainer.state.fn == "fit" else 0
        for part, split, batches in _parts(data, steps or 0):
            exchanged = [(whole, data.exchanged(split, whole)) for whole in batches]
            pairs = sorted({pair for each in exchanged for pair in zip(*each, strict=True)})
            lines = (data.mismatched_line(split, *pair) for pair in pairs)
            contents = [(line.prompt, line.completion, line.mask) for line in lines]

            def batch_of(items: list[int], split: Any = split, pairs: Any = pairs) -> ExampleBatch:
                return data.mismatched(split, [pairs[i] for i in items], items[0] if items else 0)

            cache.fill(part, contents, len(pairs), batch_of, self._sums_of, self.phase)
            values = cache.read(part, torch.arange(len(pairs))).tolist()
            self._exchanged |= {(split, *pair): value for pair, value in zip(pairs, values, strict=True)}

    def cached(self, cache: ReferenceCache, batch: ExampleBatch, split: Any) -> Tensor:
        """A mismatched row follows the one whose prompt it has."""
        rows = batch.columns["row"]
        values = cache.read(split, rows.clamp(min=0))
        other = rows < 0
        pairs = zip(rows.roll(1)[other].tolist(), (-1 - rows[other]).tolist(), strict=True)
        values[other] = torch.tensor([self._exchanged[split, *pair] for pair in pairs], dtype=values.dtype)
        return values

    @torch.no_grad()
    def columns(self, batch: ExampleBatch, split: Any) -> dict[str, Tensor]:
        """The reference's log-probs, and z."""
        columns = self.reference_columns(batch, split)
        reference = columns.get(COLUMN, batch.columns.get(COLUMN))
        assert reference is not None
        mismatched = (batch.columns["role"] == 1).nonzero()[:, 0]
        own = torch.zeros(len(batch.sequences.ids))
        with self.timed_phase("mismatched", 0):
            for micro_batch in self.each(batch, mismatched):
                scored = self.built_policy()(micro_batch.sequences, micro_batch.mask, 1.0).log_probs
                own[micro_batch.rows] = scored.sum(-1).cpu()
        total, count = all_reduce_sum(
            [float((own - reference)[mismatched].double().sum()), len(mismatched)], self.device
        )
        z = max(0.0, total / max(count, 1.0))
        return {**columns, **self.further_columns(batch, split), "z": torch.full_like(own, z)}

    def loss(self, batch: MicroBatch, totals: Totals) -> Loss:
        """Mean over the completions of the whole step, of either kind."""
        scored = self.built_policy()(batch.sequences, batch.mask, 1.0, with_entropy=self.logger is not None)
        sums, columns = scored.log_probs.sum(-1), batch.columns
        real, good = batch.mask.any(-1), columns["label"] > 0
        ratio = sums - columns[COLUMN]
        z = columns["z"].amax()
        terms = kto_loss(ratio, good, z, self.beta, self.desirable_weight, self.undesirable_weight)
        count, tokens = max(totals.sequences, 1.0), max(totals.tokens, 1.0)
        metrics = {"kl": z * real.sum() / count}
        for name, values in (("rewards", self.beta * ratio.detach()), ("logps", sums.detach())):
            for kind, mine in (("chosen", real & good), ("rejected", real & ~good)):
                metrics[f"{name}/{kind}"] = values.where(mine, 0.0).sum() / columns[kind].amax().clamp(min=1.0)
        if scored.entropy is not None:
            metrics["entropy"] = scored.entropy.sum() / tokens
        return Loss(terms.where(real, 0.0).sum() / count, metrics, {})

    def evaluated(self, values: dict[str, float]) -> dict[str, float]:
        """Also the margin between the two kinds."""
        return {
            **super().evaluated(values),
            "rewards/margins": values.get("rewards/chosen", 0.0) - values.get("rewards/rejected", 0.0),
        }


def _parts(data: Any, steps: int) -> Iterator[tuple[str, Any, list[list[int]]]]:
    """The run's batches by epoch, so that a longer run computes further epochs alone; and the evaluation's."""
    for epoch, first in enumerate(range(0, steps, max(1, data.iterations_per_epoch))):
        last = min(first + data.iterations_per_epoch, steps)
        yield f"train-mismatched-{epoch}", "train", [data.whole(i) for i in range(first, last)]
    if count := data.evaluation_batches("val"):
        yield "val-mismatched", "val", [data.whole_of_evaluation("val", i) for i in range(count)]
