"""Supervised fine-tuning on demonstrations."""

import math
from typing import Literal, final

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable

from lit_posttrain import randomness
from lit_posttrain.algorithms.generations import GenerationConfig, answer, as_text
from lit_posttrain.algorithms.offline import OfflineModule
from lit_posttrain.dropout import add_residual_dropout
from lit_posttrain.functional.masked import Totals
from lit_posttrain.policy import Policy, PolicyConfig, causal_lm
from lit_posttrain.rollout.engine import RolloutEngine
from lit_posttrain.rollout.native import NativeEngine
from lit_posttrain.types import ExampleBatch, Loss, MicroBatch


@final
class SFT(OfflineModule):
    """L = -1/N sum_i sum_t log pi(y_it | y_i<t) over supervised tokens (InstructGPT, 2203.02155, section 3.5).

    Args:
        policy: The network that is trained.
        normalisation: N is the number of supervised tokens of the whole step (``token_mean``), or of its sequences
            (``sequence_sum``: long demonstrations then weigh more).
        dropout: Residual dropout; InstructGPT trains with 0.2 (appendix C.1).
        generations: Answers that each evaluation shows.
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
        normalisation: Literal["token_mean", "sequence_sum"] = "token_mean",
        dropout: float = 0.0,
        generations: GenerationConfig = GenerationConfig(),  # noqa: B008 (frozen)
        engine: RolloutEngine | None = None,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-5, weight_decay=0.0, fused=True),
        scheduler: LRSchedulerCallable | None = None,
        max_grad_norm: float | None = 1.0,
        token_budget: int | None = None,
    ):
        super().__init__(policy, optimizer, scheduler, max_grad_norm, token_budget)
        self.normalisation = normalisation
        self.dropout = dropout
        self.generations = generations
        self.engine = engine or NativeEngine()

    def prepare_policy(self, policy: Policy) -> None:
        """Add the dropout, before the compute view copies the network."""
        super().prepare_policy(policy)
        add_residual_dropout(causal_lm(policy.model), self.dropout)
        self.engine.bind(self.tokenizer)

    def counts(self, batch: ExampleBatch) -> tuple[float, float]:
        """Sequences and supervised tokens."""
        return float(batch.mask.any(-1).sum()), float(batch.mask.sum())

    def loss(self, batch: MicroBatch, totals: Totals) -> Loss:
        """-sum log pi over this micro-batch, divided by the counts of the whole step."""
        measured = self.logger is not None
        scored = self.built_policy()(batch.sequences, batch.mask, 1.0, with_entropy=measured)
        total = -scored.log_probs.sum()
        tokens = max(totals.tokens, 1.0)
        metrics = {} if self.normalisation == "token_mean" else {"nll": total.detach() / tokens}
        if scored.entropy is not None and scored.likeliest is not None:
            metrics["entropy"] = scored.entropy.sum() / tokens
            metrics["mean_token_accuracy"] = scored.likeliest.sum() / tokens
        divisor = tokens if self.normalisation == "token_mean" else max(totals.sequences, 1.0)
        return Loss(total / divisor, metrics, {})

    def evaluated(self, values: dict[str, float]) -> dict[str, float]:
        """Perplexity, and answers to held-out prompts as text."""
        self._show_generations()
        return {"perplexity": math.exp(min(values.get("nll", values["loss"]), 700.0))}

    def _show_generations(self) -> None:
        shown = min(self.generations.prompts, self.generations.shown)
        if not shown or self.trainer.sanity_checking:
            return
        data = self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        examples = data.examples("val")[:shown]
        self.phase("generations", len(examples))
        self.engine.sync(self.built_policy())
        completions = answer(self.engine, examples, self.generations, randomness.run_seed(), self.advance)
        self.engine.rest()
        self.log_text("eval/generations", as_text(self.tokenizer, examples, completions), self.step_of_weights())

    def teardown(self, stage: str) -> None:
        """End what the engine started."""
        self.engine.close()
