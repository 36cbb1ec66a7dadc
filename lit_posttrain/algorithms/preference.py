"""What losses over completions' log-probs share: the reference, its cache, and KL on samples."""

import warnings
from abc import ABC
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torch.nn.functional import logsigmoid

from lit_posttrain import randomness
from lit_posttrain.algorithms.generations import GenerationConfig, answer, as_sequences, as_text
from lit_posttrain.algorithms.offline import OfflineModule
from lit_posttrain.batching import split as split_rows
from lit_posttrain.batching import to_device
from lit_posttrain.functional.log_probs import TokenLogProbs
from lit_posttrain.functional.masked import Totals
from lit_posttrain.functional.preference_losses import (
    PairLossOptions,
    PairTerms,
    implicit_rewards,
    log_odds,
    pair_indices,
    per_token,
)
from lit_posttrain.policy import Policy, PolicyConfig
from lit_posttrain.reference import Reference, ReferenceConfig
from lit_posttrain.reference_cache import ReferenceCache
from lit_posttrain.rollout.engine import RolloutEngine
from lit_posttrain.rollout.native import NativeEngine
from lit_posttrain.sharding import all_reduce_sum, same_number
from lit_posttrain.types import ExampleBatch, MicroBatch, Sequences

COLUMN = "ref_log_probs"


class PreferenceModule(OfflineModule, ABC):
    """Log-ratios of completions to a frozen reference.

    Args:
        policy: The network that is trained.
        reference: What the policy is held close to; None where the loss reads none.
        reference_cache: Folder of precomputed log-probs, or None.
        generations: Answers that each evaluation samples.
        engine: Generates them.
        optimizer: Gets the trainable parameters.
        scheduler: Learning-rate schedule.
        max_grad_norm: Gradients are clipped to this global norm.
        token_budget: Most tokens, padding included, in one forward pass; null is 768 in fp32 and 1,152 in
            bf16. Sets memory, never the objective.
    """

    def __init__(
        self,
        policy: PolicyConfig,
        reference: ReferenceConfig | None,
        reference_cache: str | None,
        generations: GenerationConfig,
        engine: RolloutEngine | None,
        optimizer: OptimizerCallable,
        scheduler: LRSchedulerCallable | None,
        max_grad_norm: float | None,
        token_budget: int | None,
    ):
        super().__init__(policy, optimizer, scheduler, max_grad_norm, token_budget)
        if reference is not None and reference.refresh_every is not None:
            raise ValueError("model.init_args.reference.refresh_every: the reference of fixed data is fixed; unset it")
        if reference_cache is not None and reference is None:
            raise ValueError("model.init_args.reference_cache: this loss reads no reference; unset it")
        self.reference_config = reference
        self.cache_folder = reference_cache
        self.generations = generations
        self.engine = engine or NativeEngine()
        self.cache: ReferenceCache | None = None

    # --- the reference ----------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Refuse a cache of data that nobody sees whole."""
        super().setup(stage)
        if self.cache_folder is not None and getattr(getattr(self.trainer, "datamodule", None), "streaming", False):
            raise ValueError(
                "model.init_args.reference_cache: data.init_args.streaming reads rows while training, so there is no "
                "whole data set to score beforehand; unset one of them"
            )

    def prepare_policy(self, policy: Policy) -> None:
        """Load the reference from its files: a resume begins with the weights the run began with, too."""
        super().prepare_policy(policy)
        self.engine.bind(self.tokenizer)
        data = self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        given = all(COLUMN in e.columns for split in ("train", "val") for e in data.examples(split))
        if self.reference_config is not None and not given:
            self.reference = Reference(policy, self.reference_config)
            self.reference.require_fits(self.tokenizer, data)

    def on_fit_start(self) -> None:
        """Place the reference beside the policy, and fill its cache."""
        super().on_fit_start()
        self._place_reference()

    def on_validation_start(self) -> None:
        """A stand-alone validation has no other place for it."""
        super().on_validation_start()
        if self.trainer.state.fn != "fit":
            self._place_reference()

    def on_test_start(self) -> None:
        """Likewise."""
        self.on_validation_start()

    def _place_reference(self) -> None:
        if self.reference is None:
            return
        self.reference.place(self.device, self.device_mesh)
        if self.cache_folder is None:
            return
        data = self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        self.cache = ReferenceCache(self.cache_folder, self.reference, str(self.built_policy().compute_dtype))
        self.fill(self.cache, data)
        self.reference.release()

    def fill(self, cache: ReferenceCache, data: Any) -> None:
        """Have the cache hold every row of the data. Collective."""
        for split in ("train", "val"):
            if examples := data.examples(split):
                contents = [(e.prompt, e.completions, e.masks) for e in examples]
                rows = sum(len(e.completions) for e in examples)

                def batch_of(items: list[int], split: Any = split) -> ExampleBatch:
                    return data.collate(split, items, list(range(len(items))))

                cache.fill(split, contents, rows, batch_of, self._sums_of, self.phase)

    def cached(self, cache: ReferenceCache, batch: ExampleBatch, split: Any) -> Tensor:
        """Each row's sum, from the cache."""
        return cache.read(split, batch.columns["row"])

    def reference_columns(self, batch: ExampleBatch, split: Any) -> dict[str, Tensor]:
        """Each row's sum of reference log-probs: from the data, the cache, or computed now."""
        if self.reference_config is None or COLUMN in batch.columns:
            return {}
        if self.cache is not None:
            return {COLUMN: self.cached(self.cache, batch, split)}
        with self.timed_phase("reference", 0):
            return {COLUMN: self._sums_of(batch)}

    @torch.no_grad()
    def _sums_of(self, batch: ExampleBatch, rows: Tensor | None = None) -> Tensor:
        assert self.reference is not None
        self.reference.recall(self.device, self.device_mesh)  # released once the data of an earlier stage was scored
        sums = torch.zeros(len(batch.sequences.ids))
        for micro_batch in self.each(batch, rows):
            scored = self.reference.log_probs(micro_batch.sequences, micro_batch.mask, 1.0)
            sums[micro_batch.rows] = scored.sum(-1).cpu()
        return sums

    # --- KL on samples ----------------------------------------------------------------------------------------

    def evaluated(self, values: dict[str, float]) -> dict[str, float]:
        """KL(policy || reference) a sequence, estimated on the policy's own answers (Gao et al., 2210.10760)."""
        if not self.generations.prompts or self.trainer.sanity_checking:
            return {}
        data = self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        examples = _distinct_prompts(data.examples("val"), self.generations.prompts)
        self.phase("generations", len(examples))
        self.engine.sync(self.built_policy())
        completions = answer(self.engine, examples, self.generations, randomness.run_seed(), self.advance)
        self.engine.rest()
        shown = self.generations.shown
        text = as_text(self.tokenizer, examples[:shown], completions[:shown])
        self.log_text("eval/generations", text, self.step_of_weights())
        if self.reference is None or not self._recall(self.reference):
            return {}
        kl = self._kl_on(self.reference, *as_sequences(examples, completions))
        if self.cache is not None:
            self.reference.release()
        return {"objective/kl": kl}

    def _recall(self, reference: Reference) -> bool:
        try:
            reference.recall(self.device, self.device_mesh)
        except ValueError as error:  # training goes on from its cache
            warnings.warn(f"this evaluation has no objective/kl: {error}", stacklevel=2)
            return False
        return True

    def _kl_on(self, reference: Reference, sequences: Sequences, mask: Tensor) -> float:
        """Mean of log pi / pi_ref over the sampled answers; every rank holds all of them."""
        total = 0.0
        packed = self.built_policy().packs(sequences.ids.shape[1])
        batches = split_rows(sequences, mask, {}, self.token_budget, packed=packed)
        for batch in same_number(batches, {}, self.device):
            moved = to_device(batch, self.device)
            arguments = moved.sequences, moved.mask, self.generations.temperature or 1.0
            with torch.no_grad(), self.built_policy().decoding():
                own = self.built_policy()(*arguments).log_probs
            total += float((own - reference.log_probs(*arguments)).sum())
        summed, count = all_reduce_sum([total, len(sequences.ids)], self.device)
        return summed / max(count, 1.0)

    def teardown(self, stage: str) -> None:
        """End what the engine started."""
        self.engine.close()

    # --- resume -----------------------------------------------------------------------------------------------

    def counters(self) -> dict[str, Any]:
        """Also which reference."""
        state = self.reference.state() if self.reference is not None else None
        return {**super().counters(), "reference": state}

    def restore_counters(self, counters: dict[str, Any]) -> None:
        """Refuse another reference than the run began with."""
        super().restore_counters(counters)
        if self.reference is not None and counters["reference"] is not None:
            self.reference.restore(counters["reference"], self.run_dir())


def _distinct_prompts(examples: Any, count: int) -> list[Any]:
    """The first examples of different prompts."""
    chosen: dict[tuple[int, ...], Any] = {}
    for example in examples:
        if len(chosen) == count:
            break
        chosen.setdefault(tuple(example.prompt), example)
    return list(chosen.values())


def pair_metrics(
    scored: TokenLogProbs,
    batch: MicroBatch,
    terms: PairTerms,
    options: PairLossOptions,
    totals: Totals,
    kinds: frozenset[str],
) -> dict[str, Tensor]:
    """TRL's DPO, CPO and ORPO tags as shares of the step's means over pairs, or over their completions' tokens."""
    pairs, tokens = max(totals.sequences, 1.0), max(totals.tokens, 1.0)
    rows: dict[str, Tensor] = {}
    if kinds & {"cpo", "orpo"}:
        rows["nll_loss"] = -per_token(terms).chosen.detach()
    if "orpo" in kinds:
        odds = log_odds(terms).detach()
        rows |= {"log_odds_chosen": odds, "log_odds_ratio": logsigmoid(odds)}
    if kinds - {"sft"} and kinds <= {"simpo", "orpo", "sft"}:
        terms = per_token(terms)
    chosen, rejected = implicit_rewards(terms, options)
    rows |= {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/accuracies": (chosen > rejected).float(),
        "rewards/margins": chosen - rejected,
        "logps/chosen": terms.chosen.detach(),
        "logps/rejected": terms.rejected.detach(),
    }
    metrics = {name: value.sum() / pairs for name, value in rows.items()}
    if scored.entropy is None or scored.likeliest is None or scored.mean_logits is None:
        return metrics
    winners, losers = pair_indices(batch.columns["preference"], batch.columns["group"])
    other = batch.columns["rejected_tokens"].amax().clamp(min=1.0)
    logits = scored.mean_logits.sum(-1)
    metrics |= {"logits/chosen": logits[winners].sum() / tokens, "logits/rejected": logits[losers].sum() / other}
    entropy = scored.entropy.sum(-1)
    metrics["entropy"] = (entropy[winners].sum() + entropy[losers].sum()) / (tokens + other)
    metrics["mean_token_accuracy"] = scored.likeliest.sum(-1)[winners].sum() / tokens
    return metrics
