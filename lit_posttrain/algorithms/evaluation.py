"""Sampling and scoring held-out prompts, the same way in ``validate``, ``test``, ``predict`` and during training."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from lit_posttrain.algorithms.measures import reported
from lit_posttrain.algorithms.samples import evaluation_markdown
from lit_posttrain.metrics import ConsensusAtK, PassAtK
from lit_posttrain.rewards.base import RewardFunction, Verifier, judge
from lit_posttrain.rollout.collect import generate, to_samples
from lit_posttrain.rollout.engine import RolloutEngine, SamplingParams
from lit_posttrain.sharding import all_reduce_sum, world_size
from lit_posttrain.types import Completion, PromptBatch, Sample, Verdict


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How held-out prompts are sampled. The same prompts meet the same random numbers at every evaluation.

    Args:
        samples: Completions of each prompt.
        k: For which k pass@k is reported, each at most ``samples``; by default 1 and ``samples``.
        temperature: Sampling temperature; that of training by default, 0 takes the likeliest token.
    """

    samples: int = 4
    k: list[int] | None = None
    temperature: float | None = None

    def __post_init__(self):
        """Check the ranges."""
        if self.samples < 1:
            raise ValueError(f"evaluation.samples: must be at least 1, is {self.samples}")
        if any(not 1 <= k <= self.samples for k in self.k or []):
            raise ValueError(f"evaluation.k: {self.k} must lie between 1 and evaluation.samples = {self.samples}")

    @property
    def tries(self) -> list[int]:
        """Every k of pass@k."""
        return self.k or sorted({1, self.samples})


class Evaluation:
    """One evaluation: rows of every sample and verdict, and the metrics over them.

    A sample is right where the first ``Verifier`` among the rewards gives 1 (without one: the first reward does).

    Args:
        config: How prompts are sampled.
        sampling: Sampling of training, whose limits and stops hold here too.
        rewards: Judge the samples.
    """

    def __init__(self, config: EvaluationConfig, sampling: SamplingParams, rewards: Sequence[RewardFunction]):
        self.config = config
        temperature = sampling.temperature if config.temperature is None else config.temperature
        self.sampling = replace(sampling, temperature=temperature)
        self.rewards = rewards
        verifiers = [i for i, f in enumerate(rewards) if isinstance(f, Verifier)]
        self.judge_index = verifiers[0] if verifiers else 0
        self.verifier = rewards[verifiers[0]] if verifiers else None
        self.rows: list[dict[str, Any]] = []

    def begin(self, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int], device: torch.device) -> None:
        """Forget the last evaluation."""
        self.tokenizer, self.stop_ids, self.device = tokenizer, stop_ids, device
        self.rows = []
        self.pass_at = {k: PassAtK(k).to(device) for k in self.config.tries}
        self.consensus = ConsensusAtK(self.config.samples).to(device)

    def add(self, engine: RolloutEngine, batch: PromptBatch, seed: int, tick: Callable[[int], None]) -> None:
        """Sample and judge these prompts. Under sharding every rank calls it, perhaps with no prompts."""
        n = self.config.samples
        completions = generate(engine, batch.prompts, n, self.sampling, seed, "evaluate", 0, tick)
        samples = to_samples(self.tokenizer, batch.prompts, completions, self.stop_ids)
        verdicts = judge(self.rewards, samples).verdicts if samples else []
        for i, prompt in enumerate(batch.prompts):
            rows = [
                self._row(prompt.id, prompt.question, j, completions[j], samples[j], verdicts[j])
                for j in range(i * n, (i + 1) * n)
            ]
            self.rows += rows
            self._measure([r for r in rows if r["correct"] is not None])

    def _row(
        self, prompt_id: int, question: str, index: int, completion: Completion, sample: Sample, verdicts: list[Verdict]
    ) -> dict[str, Any]:
        decided = verdicts[self.judge_index]
        return {
            "prompt_id": prompt_id,
            "question": question,
            "answer": sample.answer,
            "sample": index % self.config.samples,
            "completion": sample.completion,
            "stop_reason": completion.stop_reason,
            "tokens": len(completion.token_ids),
            "rewards": {
                f.name: v.score if v.status == "scored" else None for f, v in zip(self.rewards, verdicts, strict=True)
            },
            "reasons": {f.name: v.reason for f, v in zip(self.rewards, verdicts, strict=True) if v.reason},
            "vote": self.verifier.extract(sample) if isinstance(self.verifier, Verifier) else None,
            "correct": decided.score >= 1.0 if decided.status == "scored" else None,
        }

    def _measure(self, rows: list[dict[str, Any]]) -> None:
        correct = torch.tensor([r["correct"] for r in rows], dtype=torch.bool, device=self.device)
        for k, metric in self.pass_at.items():
            if len(rows) >= k:
                metric.update(correct)
        if self.verifier is not None and len(rows) == self.config.samples:
            self.consensus.update([r["vote"] for r in rows], correct)

    def so_far(self) -> dict[str, float]:
        """pass@1 of this rank's prompts until now, for the progress bar."""
        correct = [row["correct"] for row in self.rows if row["correct"] is not None]
        return {"pass@1 so far": sum(correct) / len(correct)} if correct else {}

    def finish(self, folder: Path, step: int, rank: int) -> tuple[dict[str, float], str]:
        """Write ``step-<n>.jsonl`` (a file a rank where there are several) and return the metrics over all ranks.

        Returns:
            Values by tag without prefix, and some samples as markdown.
        """
        folder.mkdir(parents=True, exist_ok=True)
        suffix = f".rank-{rank}" if world_size() > 1 else ""
        partial = folder / f".step-{step}{suffix}.part"
        with partial.open("w", encoding="utf-8") as file:
            for row in self.rows:
                file.write(json.dumps(row, ensure_ascii=True) + "\n")
        partial.replace(folder / f"step-{step}{suffix}.jsonl")
        values = {f"pass@{k}": float(metric.compute()) for k, metric in self.pass_at.items()}
        if self.verifier is not None:
            values[f"maj@{self.config.samples}"] = float(self.consensus.compute())
        values = {name: value for name, value in values.items() if value == value}  # of no prompt with enough verdicts
        return {**values, **self._means(), **reported(self.rewards)}, evaluation_markdown(self.rows)

    def _means(self) -> dict[str, float]:
        """Sample means over all ranks; what no sample has is left out."""
        sums = {
            "completions/mean_length": ([r["tokens"] for r in self.rows]),
            "completions/clipped_ratio": ([r["stop_reason"] == "length" for r in self.rows]),
            "invalid": ([r["correct"] is None for r in self.rows]),
            **{
                f"rewards/{f.name}/mean": [r["rewards"][f.name] for r in self.rows if r["rewards"][f.name] is not None]
                for f in self.rewards
            },
        }
        flat = [float(x) for values in sums.values() for x in (sum(values), len(values))]
        reduced = all_reduce_sum(flat, self.device)
        pairs = zip(sums, reduced[::2], reduced[1::2], strict=True)
        return {name: total / count for name, total, count in pairs if count}
