"""Rewards from a reward model: one of this project's, or any HF sequence classifier."""

import logging
import math
import warnings
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, final

import torch
from transformers import AutoConfig, AutoTokenizer

from lit_posttrain.data.dialogue import Encoder
from lit_posttrain.data.messages import Extras
from lit_posttrain.model_files import model_folder
from lit_posttrain.policy import PolicyConfig
from lit_posttrain.precision import ComputeDtype
from lit_posttrain.rewards.base import KEY, RewardError, RewardFunction, raised
from lit_posttrain.rewards.scorers import PackedScorer, PaddedScorer, Row, RowScorer
from lit_posttrain.types import Sample, Verdict

logger = logging.getLogger(__name__)


@final
class LearnedReward(RewardFunction):
    """r(x, y) of a reward model, minus its mean over the first policy's answers where ``calibration`` is set.

    Between policy and reward model stands text: its tokenizer may be another one. A prompt of messages is rendered by
    its own chat template. An answer that was cut gets no end token.

    Args:
        model: Folder or hub name of a sequence classifier.
        calibration: Training prompts whose answers by the untrained policy are made to score 0 on average (InstructGPT,
            2203.02155, section 3.5, has mean 0 on demonstrations; Ziegler et al., 1909.08593, on such samples); 0
            leaves scores as they are.
        label: Which output is the score of a classifier with several.
        token_budget: Most tokens, padding included, in one forward pass.
        compute_dtype: As of the policy.
        weight: Factor of the score in the reward of a sample.
        name: Name in logs. Default: the class name.
    """

    def __init__(
        self,
        model: str,
        calibration: int = 0,
        label: int | None = None,
        token_budget: int = 4096,
        compute_dtype: ComputeDtype = "auto",
        weight: float = 1.0,
        name: str | None = None,
    ):
        super().__init__(weight, name)
        if calibration < 0:
            raise ValueError(f"{KEY}.calibration: must not be negative, is {calibration}")
        if token_budget < 1:
            raise ValueError(f"{KEY}.token_budget: must be at least 1, is {token_budget}")
        self.model, self.calibration, self.label = model, calibration, label
        self.token_budget = token_budget
        self.compute_dtype: ComputeDtype = compute_dtype
        self.mean: float | None = None
        self.device = torch.device("cpu")
        self._encoder: Encoder | None = None
        self._scorer: RowScorer | None = None

    def place(self, device: torch.device) -> None:
        """Load the model onto the device, once.

        Raises:
            ValueError: It cannot be loaded, or ``label`` is not one of its outputs.
        """
        self.device = device
        if self._scorer is not None:
            return
        key = f"{self.key}.model"
        folder = model_folder(self.model, key, revision=None, weights=True)
        try:
            config: Any = AutoConfig.from_pretrained(folder)
            tokenizer = AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise ValueError(f"{key}: {folder} holds no model with its tokenizer ({error})") from error
        if len(tokenizer) <= len(tokenizer.all_special_ids):  # what transformers makes of a folder without files of one
            raise ValueError(f"{key}: there is no tokenizer in {folder}; copy its files to the model's")
        outputs = config.num_labels if "SequenceClassification" in str(config.architectures) else 0
        if not outputs:
            raise ValueError(f"{key}: {folder} is {config.architectures}, not a sequence classifier")
        if (self.label is None and outputs > 1) or not 0 <= (self.label or 0) < outputs:
            names = ", ".join(f"{i} {name}" for i, name in config.id2label.items())
            raise ValueError(f"{self.key}.label: the model has {outputs} outputs; say which one is the score: {names}")
        self._encoder = Encoder(tokenizer) if tokenizer.eos_token_id is not None else None
        self._scorer = self._load(folder, tokenizer, key, outputs)

    def _load(self, folder: Path, tokenizer: Any, key: str, outputs: int) -> RowScorer:
        tokens = self.tokens if self._encoder else None
        if outputs == 1 and tokens is not None:
            policy = PolicyConfig(model=str(folder), compute_dtype=self.compute_dtype)
            try:
                return PackedScorer(policy, self.device, self.token_budget, key, tokens)
            except ValueError as error:
                logger.info("%s: scored by its own forward pass in padded rows, since %s", folder, error)
        return PaddedScorer(folder, tokenizer, self.device, self.token_budget, key, self.label or 0, tokens)

    def check_prompt(self, prompt: str | list[dict[str, str]]) -> None:
        """Stops where the model cannot read a prompt, before anything is sampled.

        Raises:
            ValueError: Its tokenizer has no chat template for a conversation, or one that refuses it.
        """
        self.place(self.device)
        assert self._scorer is not None
        try:
            self._scorer.read(Sample(prompt, "", [], "stop", None, {}))
        except (RewardError, ValueError, TypeError) as error:
            raise ValueError(
                f"{self.key}.model: {self.model} cannot read the prompts ({error}); use a reward model whose chat "
                "template takes these messages, or prompts of plain text"
            ) from error

    def __call__(self, samples: Sequence[Sample]) -> list[Verdict]:
        """Scores all samples in batches within the token budget."""
        return [v if isinstance(v, Verdict) else Verdict(v - (self.mean or 0.0)) for v in self.scores(samples)]

    def scores(self, samples: Sequence[Sample]) -> list[float | Verdict]:
        """The model's own scores; a verdict for an answer that it cannot read or that does not fit into it."""
        self.place(self.device)
        assert self._scorer is not None
        read = [self._read(sample) for sample in samples]
        found = iter(self._scorer.score([row for row in read if not isinstance(row, Verdict)]))
        return [row if isinstance(row, Verdict) else next(found) for row in read]

    def _read(self, sample: Sample) -> Row | Verdict:
        assert self._scorer is not None
        try:
            return self._scorer.read(sample)
        except RewardError:
            raise
        except Exception as error:  # a lone surrogate, or messages that the template refuses: this sample's alone
            return raised(self, error)

    def calibrate(self, samples: Sequence[Sample]) -> None:
        """Make these samples' mean score 0.

        Raises:
            RewardError: None of them has a score.
        """
        found = [s for s in self.scores(samples) if not isinstance(s, Verdict) and math.isfinite(s)]
        if not found:
            raise RewardError(f"reward function {self.name}: no sample of the calibration has a score")
        self.mean = sum(found) / len(found)

    def state(self) -> dict[str, Any]:
        """The mean that scores are counted from."""
        return {"mean": self.mean}

    def restore(self, state: dict[str, Any]) -> None:
        """Count from it again.

        Raises:
            ValueError: Scores are to be calibrated, and the checkpoint knows no mean of a reward by this name.
        """
        self.mean = state.get("mean")
        if self.calibration and self.mean is None:
            raise ValueError(
                f"{self.key}.name: the checkpoint holds no calibration of a reward called {self.name!r}, and the "
                "policy is no longer the untrained one; keep the name, or set calibration: 0"
            )

    def warn_uncalibrated(self) -> None:
        """Scores are the model's own."""
        if self.calibration:
            warnings.warn(
                f"{self.key}.calibration: no checkpoint says what the untrained policy's answers score, so the scores "
                "here are the reward model's own; --ckpt_path takes that from a run",
                stacklevel=2,
            )

    def tokens(self, sample: Sample) -> tuple[list[int], list[int]]:
        """Prompt and answer as the reward model reads them.

        Raises:
            RewardError: The prompt is a conversation and the model's tokenizer has no chat template.
        """
        encoder = self._encoder
        assert encoder is not None
        if isinstance(sample.prompt, str):
            prompt, end = encoder.start(sample.prompt), encoder.eos
        else:
            if encoder.tokenizer.chat_template is None:
                raise RewardError(f"reward function {self.name}: {self.model} has no chat template for its prompts")
            prompt, end = encoder.question(sample.prompt, "a prompt", Extras()), self._end_of_turn
        answer = encoder.then(sample.completion) if sample.completion else []
        return prompt, [*answer, end] if sample.stop_reason == "stop" else answer

    @cached_property
    def _end_of_turn(self) -> int:
        assert self._encoder is not None
        turn = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}]
        return self._encoder.dialogue(turn, "the chat template", first=1).completion[-1]
