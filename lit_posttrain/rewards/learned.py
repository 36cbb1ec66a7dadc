"""Rewards from a reward model: one of this project's, or any HF sequence classifier."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, final

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from lit_posttrain.data.dialogue import Encoder
from lit_posttrain.data.messages import Extras
from lit_posttrain.model_files import model_folder
from lit_posttrain.policy import PolicyConfig
from lit_posttrain.precision import ComputeDtype
from lit_posttrain.rewards.base import RewardError, RewardFunction
from lit_posttrain.scalar_heads import Scorer
from lit_posttrain.types import Sample, Verdict

KEY = "model.init_args.rewards.init_args"


@final
class LearnedReward(RewardFunction):
    """r(x, y) of a reward model, minus its mean over the first policy's answers where ``calibration`` is set.

    Between policy and reward model stands text: its tokenizer may be another one. A prompt of messages is rendered by
    its own chat template. An answer that was cut gets no end token.

    Args:
        model: Folder or hub name of a sequence classifier.
        calibration: Training prompts whose answers by the untrained policy are made to score 0 on average (InstructGPT,
            2203.02155, appendix C.2, has mean 0 on demonstrations; Ziegler et al., 1909.08593, on such samples); 0
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
        self._scorer: _Packed | _Padded | None = None

    def place(self, device: torch.device) -> None:
        """Load the model onto the device, once.

        Raises:
            ValueError: It cannot be loaded, or has several outputs and no ``label``.
        """
        self.device = device
        if self._scorer is not None:
            return
        folder = model_folder(self.model, f"{KEY}.model", revision=None, weights=True)
        try:
            config: Any = AutoConfig.from_pretrained(folder)
            tokenizer = AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise ValueError(f"{KEY}.model: {folder} holds no model with its tokenizer ({error})") from error
        outputs = config.num_labels if "SequenceClassification" in str(config.architectures) else 0
        if not outputs:
            raise ValueError(f"{KEY}.model: {folder} is {config.architectures}, not a sequence classifier")
        if outputs > 1 and (self.label is None or not 0 <= self.label < outputs):
            names = ", ".join(f"{i} {name}" for i, name in config.id2label.items())
            raise ValueError(f"{KEY}.label: the model has {outputs} outputs, so say which one is the score: {names}")
        self._encoder = Encoder(tokenizer) if tokenizer.eos_token_id is not None else None
        try:
            self._scorer = _Packed(self, str(folder)) if outputs == 1 and self._encoder else None
        except ValueError:
            self._scorer = None
        if self._scorer is None:
            self._scorer = _Padded(self, str(folder), tokenizer)

    def __call__(self, samples: Sequence[Sample]) -> list[Verdict]:
        """Scores all samples in batches within the token budget."""
        return [v if isinstance(v, Verdict) else Verdict(v - (self.mean or 0.0)) for v in self.scores(samples)]

    def scores(self, samples: Sequence[Sample]) -> list[float | Verdict]:
        """The model's own scores; a verdict for an answer that does not fit into it."""
        self.place(self.device)
        assert self._scorer is not None
        return self._scorer(samples)

    def calibrate(self, samples: Sequence[Sample]) -> None:
        """Make these samples' mean score 0.

        Raises:
            RewardError: None of them has a score.
        """
        found = [s for s in self.scores(samples) if not isinstance(s, Verdict)]
        if not found:
            raise RewardError(f"reward function {self.name}: no sample of the calibration has a score")
        self.mean = sum(found) / len(found)

    def state(self) -> dict[str, Any]:
        """The mean that scores are counted from."""
        return {"mean": self.mean}

    def restore(self, state: dict[str, Any]) -> None:
        """Count from it again."""
        self.mean = state.get("mean")

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


class _Packed:
    """A causal network with a linear head: answers of a prompt share it."""

    def __init__(self, reward: LearnedReward, folder: str):
        self.reward = reward
        config = PolicyConfig(model=folder, compute_dtype=reward.compute_dtype)
        self.scorer = Scorer(config, reward.device, reward.token_budget)

    def __call__(self, samples: Sequence[Sample]) -> list[float | Verdict]:
        limit = self.scorer.network.context_length
        prompts, answers, fits = [], [], []
        for sample in samples:
            prompt, answer = self.reward.tokens(sample)
            over = max(0, len(prompt) + len(answer) - limit) if limit is not None else 0
            fits.append(over < len(prompt))
            if fits[-1]:
                prompts.append(prompt[over:])  # a long prompt keeps its end
                answers.append(answer)
        found = iter(self.scorer(prompts, answers) if prompts else [])
        return [next(found) if fit else Verdict(0.0, "invalid", "too_long") for fit in fits]


class _Padded:
    """Any other classifier, through its own tokenizer and forward pass."""

    def __init__(self, reward: LearnedReward, folder: str, tokenizer: Any):
        self.reward, self.tokenizer = reward, tokenizer
        try:
            network, found = AutoModelForSequenceClassification.from_pretrained(
                folder, dtype=torch.float32, output_loading_info=True
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise ValueError(f"{KEY}.model: {folder} cannot be loaded as a sequence classifier ({error})") from error
        if missing := sorted(found["missing_keys"]):  # from_pretrained would go on with random numbers in their place
            raise ValueError(f"{KEY}.model: the files in {folder} lack {len(missing)} weights, {missing[0]} among them")
        self.network = network.requires_grad_(False).eval().to(reward.device)

    @torch.no_grad()
    def __call__(self, samples: Sequence[Sample]) -> list[float | Verdict]:
        limit = getattr(self.network.config, "max_position_embeddings", None)
        ids = [self._ids(sample)[-limit:] if limit else self._ids(sample) for sample in samples]
        order = sorted(range(len(ids)), key=lambda i: (-len(ids[i]), i))
        scores: list[float | Verdict] = [0.0] * len(ids)
        while order:
            count = max(1, self.reward.token_budget // max(len(ids[order[0]]), 1))
            rows, order = order[:count], order[count:]
            padded = self.tokenizer.pad({"input_ids": [ids[i] for i in rows]}, return_tensors="pt")
            logits = self.network(**padded.to(self.reward.device)).logits.float()
            for i, value in zip(rows, logits[:, self.reward.label or 0].tolist(), strict=True):
                scores[i] = value
        return scores

    def _ids(self, sample: Sample) -> list[int]:
        prompt = sample.prompt
        if not isinstance(prompt, str):
            prompt = "\n\n".join(message["content"] for message in prompt)
        return list(self.tokenizer(prompt, sample.completion)["input_ids"])
