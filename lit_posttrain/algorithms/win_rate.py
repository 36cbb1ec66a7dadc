"""Which of two policies answers better: as ``validate``, and during training."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, final

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from transformers import PreTrainedTokenizerBase

from lit_posttrain import randomness
from lit_posttrain.algorithms.base import PostTrainModule
from lit_posttrain.algorithms.generations import GenerationConfig, as_prompts
from lit_posttrain.algorithms.samples import code_block
from lit_posttrain.beside import require_fits
from lit_posttrain.functional.masked import Totals
from lit_posttrain.judges import Answer, Judge
from lit_posttrain.metrics import WinRate as WinRateMetric
from lit_posttrain.policy import Policy, PolicyConfig
from lit_posttrain.rollout.collect import generate
from lit_posttrain.rollout.engine import RolloutEngine
from lit_posttrain.rollout.native import NativeEngine
from lit_posttrain.rollout.stops import EXACT_TEXT
from lit_posttrain.types import Example, Loss, MicroBatch, Prompt, StopReason

_SHOWN = 4


def compare(judge: Judge, ours: Sequence[Answer], theirs: Sequence[Answer], seed: int) -> list[float]:
    """Each pair's mean over both orders, 1 where ours is better.

    Which order is asked first is drawn for each pair, so that a judge whose state drifts favours neither side.
    """
    coins = torch.rand(len(ours), generator=randomness.generator(seed, "order of a comparison")) < 0.5
    values = [0.0] * len(ours)
    for flip in (False, True):
        first = [b if c != flip else a for a, b, c in zip(ours, theirs, coins.tolist(), strict=True)]
        second = [a if c != flip else b for a, b, c in zip(ours, theirs, coins.tolist(), strict=True)]
        for i, verdict in enumerate(judge.compare(first, second)):
            values[i] += 0.5 * (1 - verdict if bool(coins[i]) != flip else verdict)
    return values


def sampled(
    engine: RolloutEngine,
    policy: Policy,
    examples: Sequence[Example],
    config: GenerationConfig,
    tokenizer: PreTrainedTokenizerBase,
    tick: Callable[[int], None] | None = None,
) -> list[Answer]:
    """A policy's answers to the examples' prompts; the same prompts meet the same random numbers for every policy."""
    engine.sync(policy)
    completions = generate(
        engine, as_prompts(examples), 1, config.sampling(), randomness.run_seed(), "comparison", 0,
        tick or (lambda finished: None),
    )  # fmt: skip
    engine.rest()
    stops = policy.stop_token_ids
    return [
        _answer(tokenizer, e, c.token_ids, stops, c.stop_reason) for e, c in zip(examples, completions, strict=True)
    ]


def given(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, stops: Sequence[int]) -> list[Answer]:
    """The data's own answers: the preferred completion of a comparison, else the only one; of a conversation the first.

    They end where a policy's would, at the first stop token.
    """
    answers = []
    for e in examples:
        scores: Any = e.columns.get("preference") or [0.0] * len(e.completions)
        best = max(range(len(scores)), key=lambda i: scores[i])
        whole = e.completions[best]
        end = next((i for i, token in enumerate(whole, 1) if token in stops), None)
        answers.append(_answer(tokenizer, e, whole[:end], stops, "length" if end is None else "stop"))
    return answers


def _answer(
    tokenizer: PreTrainedTokenizerBase, example: Example, ids: list[int], stops: Sequence[int], stop_reason: StopReason
) -> Answer:
    shown = ids[:-1] if ids and ids[-1] in stops else ids
    prompt = tokenizer.decode(example.prompt, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    text = tokenizer.decode(shown, **EXACT_TEXT)
    return Answer(example.prompt, ids, str(prompt), str(text), example.messages, stop_reason)


def as_table(outcomes: Sequence[float], ours: Sequence[Answer], theirs: Sequence[Answer]) -> str:
    """A few comparisons as markdown."""
    blocks = []
    for value, a, b in list(zip(outcomes, ours, theirs, strict=True))[:_SHOWN]:
        word = "wins" if value > 0.5 else "loses" if value < 0.5 else "ties"
        blocks.append(
            f"**A {word}**\n\n{code_block(a.prompt)}\n\nA\n\n{code_block(a.text)}\n\nB\n\n{code_block(b.text)}"
        )
    return "\n\n---\n\n".join(blocks)


@final
class WinRate(PostTrainModule):
    """How often the policy's answers to held-out prompts beat another's; only ``validate`` and ``test`` make sense.

    Each pair is judged in both orders and a tie counts half. Every comparison is written to
    ``evaluation/step-<n>.jsonl`` of the run.

    Args:
        policy: A.
        judge: Decides.
        opponent: B, of the same tokenizer; null compares with the data's own completions.
        prompts: How many held-out prompts, the first ones; null for all.
        generations: How answers are sampled; its ``prompts`` and ``shown`` are not read.
        engine: Generates them; the native engine by default.
    """

    def __init__(
        self,
        policy: PolicyConfig,
        judge: Judge,
        opponent: PolicyConfig | None = None,
        prompts: int | None = None,
        generations: GenerationConfig = GenerationConfig(),  # noqa: B008 (frozen)
        engine: RolloutEngine | None = None,
    ):
        super().__init__(policy)
        if prompts is not None and prompts < 1:
            raise ValueError(f"model.init_args.prompts: must be at least 1, is {prompts}; null for all")
        self.judge, self.opponent_config, self.prompts, self.generations = judge, opponent, prompts, generations
        self.engine = engine or NativeEngine()
        self.metric = WinRateMetric(sync_on_compute=False)  # every process judges all

    def setup(self, stage: str) -> None:
        """Refuse to train."""
        if stage not in ("validate", "test"):
            raise ValueError("model.class_path: WinRate only evaluates; use `lit-posttrain validate`")

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Is never reached; Lightning would ask for one before ``setup`` says what is wrong."""

    def prepare_policy(self, policy: Policy) -> None:
        """Give the engine its tokenizer."""
        self.engine.bind(self.tokenizer)

    def loss(self, batch: MicroBatch, totals: Totals) -> Loss:
        """There is none."""
        raise NotImplementedError

    def on_validation_epoch_start(self) -> None:
        """Answer and judge everything at once: rollouts are fastest in large batches."""
        data: Any = self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        examples = data.examples("val")[: self.prompts]
        policy, opponent = self.built_policy(), None
        if self.opponent_config is not None:
            opponent = Policy(self.opponent_config).requires_grad_(False).eval()
            require_fits(opponent, policy, self.tokenizer, "model.init_args.opponent.model", data)
        self.judge.place(self.device, self.tokenizer)
        self.phase("answers of A", len(examples))
        ours = sampled(self.engine, policy, examples, self.generations, self.tokenizer, self.advance)
        if opponent is None:
            theirs = given(examples, self.tokenizer, policy.stop_token_ids)
        else:
            opponent.to(self.device).build_view(self.device, sharded=False)
            self.phase("answers of B", len(examples))
            theirs = sampled(self.engine, opponent, examples, self.generations, self.tokenizer, self.advance)
            del opponent
        outcomes = compare(self.judge, ours, theirs, randomness.run_seed())
        self.metric.reset()
        self.metric.update(torch.tensor(outcomes))
        self._write(outcomes, ours, theirs)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Nothing is left to do."""

    def on_validation_epoch_end(self) -> None:
        """Log the rate and its interval."""
        values = {name: float(value) for name, value in self.metric.compute().items()}
        self.log_scores("eval", values, self.step_of_weights())

    def on_test_epoch_start(self) -> None:
        """Like validation."""
        self.on_validation_epoch_start()

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Like validation."""

    def on_test_epoch_end(self) -> None:
        """Like validation."""
        self.on_validation_epoch_end()

    def _write(self, outcomes: list[float], ours: list[Answer], theirs: list[Answer]) -> None:
        folder = self.run_dir()
        if not self.trainer.is_global_zero:
            return
        step = self.step_of_weights()
        write_comparisons(folder / "evaluation" / f"step-{step}.jsonl", outcomes, ours, theirs)
        self.log_text("eval/comparisons", as_table(outcomes, ours, theirs), step)

    def teardown(self, stage: str) -> None:
        """End what judge and engine started."""
        self.judge.close()
        self.engine.close()


def write_comparisons(file: Path, outcomes: list[float], ours: list[Answer], theirs: list[Answer]) -> None:
    """One JSON line a prompt."""
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {"prompt": a.prompt, "a": a.text, "b": b.text, "outcome": value}
        for value, a, b in zip(outcomes, ours, theirs, strict=True)
    ]
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


@final
class WinRateDuringTraining(Callback):
    """After each validation of a run, its policy's answers against the data's own completions or the first policy's.

    Args:
        judge: Decides.
        against: ``start``: what the policy answered before training; ``data``: the data's own completions.
        prompts: How many held-out prompts, the first ones.
        generations: How answers are sampled.
    """

    def __init__(
        self,
        judge: Judge,
        against: str = "data",
        prompts: int = 64,
        generations: GenerationConfig = GenerationConfig(),  # noqa: B008 (frozen)
    ):
        if against not in ("start", "data"):
            raise ValueError(f"WinRateDuringTraining.against: must be start or data, is {against}")
        self.judge, self.against, self.prompts, self.generations = judge, against, prompts, generations
        self._theirs: list[Answer] | None = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """The opponent's answers; a resume makes the same ones again, from the files that the run began with."""
        examples = self._examples(trainer, pl_module)
        self.judge.place(pl_module.device, pl_module.tokenizer)
        policy = pl_module.built_policy()
        if self.against == "data":
            self._theirs = given(examples, pl_module.tokenizer, policy.stop_token_ids)
            return
        first = Policy(pl_module.policy_config).requires_grad_(False).eval().to(pl_module.device)
        first.build_view(pl_module.device, sharded=False)
        self._theirs = sampled(pl_module.engine, first, examples, self.generations, pl_module.tokenizer)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Answer, judge and log."""
        if trainer.sanity_checking or self._theirs is None:
            return
        examples = self._examples(trainer, pl_module)
        ours = sampled(pl_module.engine, pl_module.built_policy(), examples, self.generations, pl_module.tokenizer)
        outcomes = compare(self.judge, ours, self._theirs, randomness.run_seed())
        metric = WinRateMetric(sync_on_compute=False)
        metric.update(torch.tensor(outcomes))
        values = {name: float(value) for name, value in metric.compute().items()}
        pl_module.log_scores("eval", values, pl_module.step_of_weights())
        folder = pl_module.run_dir()
        if trainer.is_global_zero:
            step = pl_module.step_of_weights()
            write_comparisons(folder / "comparisons" / f"step-{step}.jsonl", outcomes, ours, self._theirs)
            pl_module.log_text("eval/comparisons", as_table(outcomes, ours, self._theirs), step)

    def _examples(self, trainer: pl.Trainer, pl_module: Any) -> list[Example]:
        """The first held-out prompts, with the data's completions where it has some."""
        data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        if not hasattr(pl_module, "engine"):
            raise ValueError(
                f"trainer.callbacks: WinRateDuringTraining compares answers, and {type(pl_module).__name__} trains a "
                "network that gives scores; remove it"
            )
        if hasattr(data, "examples"):
            return data.examples("val")[: self.prompts]
        if self.against == "data":
            raise ValueError(
                f"WinRateDuringTraining.against: {type(data).__name__} has prompts without answers; set it to start"
            )
        count = list(range(min(self.prompts, data.size("val"))))
        found: list[Prompt] = data.collate("val", count, count).prompts
        return [
            Example(p.token_ids, [], [], {}, p.question, None if isinstance(p.prompt, str) else p.prompt) for p in found
        ]

    def teardown(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        """End what the judge started."""
        self.judge.close()
