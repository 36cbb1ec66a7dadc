"""Learning from fixed examples: one batch is one optimizer step, and evaluation is the same loss on held-out ones."""

import time
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lit_posttrain import gates
from lit_posttrain.algorithms.base import PostTrainModule
from lit_posttrain.batching import TOGETHER_BUDGET, split, to_device
from lit_posttrain.functional.masked import Totals
from lit_posttrain.kept_prompts import prompts_once
from lit_posttrain.policy import Policy
from lit_posttrain.sharding import all_reduce_sum, same_number, world_size
from lit_posttrain.types import ExampleBatch, MicroBatch, StepResult, Stream


class OfflineModule(PostTrainModule):
    """Base of SFT, reward models and the preference losses; subclasses say what counts and what is lost.

    ``loss`` names its metrics by TRL's tags; those whose name begins with ``min_`` or ``max_`` are extremes.
    """

    # Whether the loss compares the rows of an example, which then stay in one micro-batch.
    together = False
    num_tokens = 0.0

    @abstractmethod
    def counts(self, batch: ExampleBatch) -> tuple[float, float]:
        """What of this rank's share counts: examples (in the loss's sense) and tokens."""

    def columns(self, batch: ExampleBatch, split: Any) -> dict[str, Tensor]:
        """Further columns that the loss reads and that take the whole step to compute. Collective."""
        return {}

    def further_counts(self, batch: ExampleBatch) -> dict[str, float]:
        """What else of this rank's share metrics are divided by, by column name."""
        return {}

    def further_columns(self, batch: ExampleBatch, split: Any) -> dict[str, Tensor]:
        """Those counts over all ranks and the whole step or, in an evaluation, over all of its batches. Collective."""
        counts = self._further if split == "val" else self._over_ranks([self.further_counts(batch)])
        return {name: torch.full((len(batch.sequences.ids),), count) for name, count in counts.items()}

    def rows(self, batch: ExampleBatch) -> Tensor | None:
        """Which rows the loss sees; all by default."""
        return None

    @property
    def token_budget(self) -> int:
        """The setting, or what suits the precision and rows that stay together."""
        return self._token_budget or (TOGETHER_BUDGET if self.together else super().token_budget)

    # --- one step ---------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Nothing to hold against the data before a model is loaded."""

    def prepare_policy(self, policy: Policy) -> None:
        """See that every example fits into the model."""
        data = getattr(self.trainer, "datamodule", None)
        if data is not None and policy.context_length and hasattr(data, "check_fits"):
            data.check_fits(policy.context_length)

    def on_train_start(self) -> None:
        """Take over what a checkpoint holds besides weights."""
        super().on_train_start()
        if self.loaded_counters is not None:
            self.restore_counters(self.loaded_counters)
            self.loaded_counters = None

    def training_step(self, batch: ExampleBatch, batch_idx: int) -> None:
        """Count over all ranks, add what the loss reads, step."""
        started, self.seconds = time.perf_counter(), defaultdict(float)
        iteration, rate = self.trainer.global_step, self.learning_rate()
        self.seed_iteration()
        whole = batch._replace(columns={**batch.columns, **self.columns(batch, "train")})
        totals = Totals(*all_reduce_sum(self.counts(whole), self.device))
        batches = self.micro_batches(whole)
        with self.timed_phase("update", len(batches)):
            result = self.optimize([Stream("update", batches, totals, self.loss, whole.columns)], last=True)
        if iteration < gates.GATED_ITERATIONS:
            self.require_change([result])
        tokens = all_reduce_sum([int(batch.sequences.lengths.sum())], self.device)[0]
        self.num_tokens += tokens
        self._log_step(result, iteration + 1, rate, tokens, time.perf_counter() - started)

    def micro_batches(self, batch: ExampleBatch) -> list[MicroBatch]:
        """The batch within the token budget."""
        packed = self.built_policy().packs(batch.sequences.ids.shape[1]) if len(batch.sequences.ids) else True
        return split(
            batch.sequences,
            batch.mask,
            batch.columns,
            self.token_budget,
            self.rows(batch),
            packed=packed,
            together=batch.columns["group"] if self.together else None,
        )

    def each(self, batch: ExampleBatch, rows: Tensor | None = None) -> Iterator[MicroBatch]:
        """Micro-batches on the device, for passes without gradient; as many on every rank."""
        packed = self.built_policy().packs(batch.sequences.ids.shape[1]) if len(batch.sequences.ids) else True
        # The loss's own layout: in low precision another one rounds otherwise, and reference and policy would differ.
        together = batch.columns["group"] if self.together else None
        batches = split(batch.sequences, batch.mask, {}, self.token_budget, rows, packed=packed, together=together)
        for micro_batch in prompts_once(same_number(batches, {}, self.device), self.networks()):
            yield to_device(micro_batch, self.device)
            self.advance()

    def _log_step(self, result: StepResult, step: int, rate: float, tokens: float, seconds: float) -> None:
        metrics = {**result.metrics, **_named(result.extremes)}
        metrics |= {"grad_norm": result.grad_norm, "learning_rate": rate, "num_tokens": self.num_tokens}
        metrics |= {"step_time": seconds, "epoch": self.epochs_done(), "skipped_updates": float(not result.applied)}
        tagged = {f"train/{name}": value for name, value in metrics.items()}
        tagged |= {f"time/{name}": value for name, value in self.seconds.items()}
        tagged["time/tokens_per_second"] = tokens / max(seconds, 1e-9)
        data = getattr(self.trainer, "datamodule", None)
        for name, count in (data.draws(step) if hasattr(data, "draws") else {}).items():  # pyright: ignore
            tagged[f"data/draws/{name}"] = float(count)
        self.log("loss", result.metrics["loss"], prog_bar=True, logger=False)
        if self.logger is not None:
            self.logger.log_metrics(tagged, step=step)

    # --- evaluation -------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Count the held-out examples that this evaluation sees, over all ranks."""
        data: Any = getattr(self.trainer, "datamodule", None)
        assert data is not None, "evaluation counts its examples beforehand, so it needs the project's DataModule"
        self._sums: dict[str, float] = defaultdict(float)
        self._extremes: dict[str, float] = {}
        counts, further = [(0.0, 0.0)], []
        for i in range(self._evaluation_batches(data)):
            batch = data.evaluation_batch("val", i)
            counts.append(self.counts(batch))
            further.append(self.further_counts(batch))
        totals = [sum(each) for each in zip(*counts, strict=True)]
        self._totals = Totals(*all_reduce_sum(totals, self.device))
        self._further = self._over_ranks(further)

    def _over_ranks(self, counts: list[dict[str, float]]) -> dict[str, float]:
        names = counts[0] if counts else {}
        sums = all_reduce_sum([sum(each[name] for each in counts) for name in names], self.device) if names else []
        return dict(zip(names, sums, strict=True))

    def _evaluation_batches(self, data: Any) -> int:
        trainer = self.trainer
        if trainer.sanity_checking:
            limits = trainer.num_sanity_val_batches
        else:
            limits = trainer.num_test_batches if trainer.testing else trainer.num_val_batches
        return int(min(data.evaluation_batches("val"), *limits))

    @torch.no_grad()
    def validation_step(self, batch: ExampleBatch, batch_idx: int) -> None:
        """Add up this batch's shares."""
        whole = batch._replace(columns={**batch.columns, **self.columns(batch, "val")})
        batches = self.micro_batches(whole) if len(whole.sequences.ids) else []
        self.phase("evaluation", len(batches))
        with self.built_policy().decoding():
            for micro_batch in same_number(batches, whole.columns, self.device):
                out = self.loss(to_device(micro_batch, self.device), self._totals)
                for name, value in {"loss": out.loss, **out.metrics}.items():
                    self._sums[name] += float(value)
                for name, value in out.extremes.items():
                    self._extremes[name] = max(float(value), self._extremes.get(name, -float("inf")))
                self.advance()
                if world_size() == 1:
                    self.poll()

    def on_validation_epoch_end(self) -> None:
        """Log what was held out."""
        self.finish_evaluation("eval")

    def on_test_epoch_start(self) -> None:
        """Like validation."""
        self.on_validation_epoch_start()

    def test_step(self, batch: ExampleBatch, batch_idx: int) -> None:
        """Like validation."""
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        """Like validation."""
        self.finish_evaluation("test")

    def finish_evaluation(self, prefix: str) -> None:
        """Reduce and log."""
        values = dict(zip(self._sums, all_reduce_sum(list(self._sums.values()), self.device), strict=True))
        for name, value in self._extremes.items():
            values |= _named({name: _largest(value, self.device)})
        values |= self.evaluated(values)
        if not self.trainer.sanity_checking:
            self.log_scores(prefix, values, self.step_of_weights())

    def evaluated(self, values: dict[str, float]) -> dict[str, float]:
        """What follows from an evaluation's sums. Collective."""
        return {}

    # --- resume -----------------------------------------------------------------------------------------------

    def counters(self) -> dict[str, Any]:
        """Also the tokens so far."""
        return {**super().counters(), "num_tokens": self.num_tokens}

    def restore_counters(self, counters: dict[str, Any]) -> None:
        """Also the tokens so far."""
        super().restore_counters(counters)
        self.num_tokens = counters["num_tokens"]


def _named(extremes: dict[str, float]) -> dict[str, float]:
    """Smallest values were kept as the largest of their negatives; what no row gave is left out."""
    return {
        name: -value if name.startswith("min_") else value
        for name, value in extremes.items()
        if abs(value) != float("inf")
    }


def _largest(value: float, device: torch.device) -> float:
    if world_size() == 1:
        return value
    tensor = torch.tensor(value, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(tensor, op=torch.distributed.ReduceOp.MAX)
    return float(tensor)
