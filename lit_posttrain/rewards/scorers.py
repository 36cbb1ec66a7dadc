"""How a reward model gives scores: packed rows of a causal network, or any HF classifier's own forward pass."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple, final

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from lit_posttrain.policy import PolicyConfig
from lit_posttrain.scalar_heads import Scorer
from lit_posttrain.types import Sample, Verdict

TOO_LONG = Verdict(0.0, "invalid", "too_long")

Tokens = Callable[[Sample], tuple[list[int], list[int]]]


class Row(NamedTuple):
    """One answer after its prompt, as a model reads it.

    Attributes:
        prompt: Tokens.
        answer: Tokens.
        segments: Token types of both, where the model has them.
    """

    prompt: list[int]
    answer: list[int]
    segments: list[int] | None = None

    @property
    def ids(self) -> list[int]:
        """Both."""
        return self.prompt + self.answer


class RowScorer(ABC):
    """A loaded model: reads samples one by one, and scores what it has read together."""

    @abstractmethod
    def read(self, sample: Sample) -> Row | Verdict:
        """A sample's tokens; a verdict where its answer does not fit into the model. A long prompt keeps its end."""

    @abstractmethod
    def score(self, rows: Sequence[Row]) -> list[float]:
        """The model's own scores."""


def fitted(prompt: list[int], answer: list[int], limit: int | None) -> Row | Verdict:
    """A row of at most ``limit`` tokens: the prompt's beginning is left out, but not all of it."""
    over = max(0, len(prompt) + len(answer) - limit) if limit is not None else 0
    return Row(prompt[over:], answer) if over < len(prompt) else TOO_LONG


@final
class PackedScorer(RowScorer):
    """A causal network with one linear output: answers of a prompt share it.

    Args:
        config: What to load.
        device: Where to.
        token_budget: Most tokens, padding included, in one forward pass.
        key: The YAML key that names it.
        tokens: Prompt and answer of a sample.
    """

    def __init__(self, config: PolicyConfig, device: torch.device, token_budget: int, key: str, tokens: Tokens):
        self.scorer, self.tokens = Scorer(config, device, token_budget, key), tokens

    def read(self, sample: Sample) -> Row | Verdict:
        """Its tokens."""
        return fitted(*self.tokens(sample), self.scorer.network.context_length)

    def score(self, rows: Sequence[Row]) -> list[float]:
        """At the last tokens."""
        return self.scorer([r.prompt for r in rows], [r.answer for r in rows]) if rows else []


@final
class PaddedScorer(RowScorer):
    """Any other classifier, through its own tokenizer and forward pass, in fp32.

    Args:
        folder: What to load.
        tokenizer: Its own.
        device: Where to.
        token_budget: Most tokens, padding included, in one forward pass.
        key: The YAML key that names it.
        output: Which of its outputs is the score.
        tokens: Prompt and answer of a sample for a model that continues texts; an encoder reads a pair of them.
    """

    def __init__(
        self,
        folder: Path,
        tokenizer: PreTrainedTokenizerBase,
        device: torch.device,
        token_budget: int,
        key: str,
        output: int,
        tokens: Tokens | None,
    ):
        try:
            network, found = AutoModelForSequenceClassification.from_pretrained(
                folder, dtype=torch.float32, output_loading_info=True
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise ValueError(f"{key}: {folder} cannot be loaded as a sequence classifier ({error})") from error
        if missing := sorted(found["missing_keys"]):  # from_pretrained would go on with random numbers in their place
            raise ValueError(f"{key}: the files in {folder} lack {len(missing)} weights, {missing[0]} among them")
        self.network = network.requires_grad_(False).eval().to(device)
        self.tokenizer, self.device, self.token_budget, self.output = tokenizer, device, token_budget, output
        self.limit = positions(network, tokenizer)
        # HF's decoders call their head `score`.
        continues = isinstance(getattr(network, "score", None), nn.Linear) or tokenizer.chat_template is not None
        self.tokens = tokens if continues else None

    def read(self, sample: Sample) -> Row | Verdict:
        """Its tokens, as a text that goes on or as a pair of texts."""
        if self.tokens is not None:
            return fitted(*self.tokens(sample), self.limit)
        prompt = sample.prompt
        if not isinstance(prompt, str):
            prompt = "\n\n".join(message["content"] for message in prompt)
        own = self.tokenizer.num_special_tokens_to_add(pair=True)
        answer = len(self.tokenizer.encode(sample.completion, add_special_tokens=False, verbose=False))
        how: dict[str, Any] = {"verbose": False}
        if self.limit is not None:
            if answer + own >= self.limit:
                return TOO_LONG
            self.tokenizer.truncation_side = "left"
            how |= {"truncation": "only_first", "max_length": self.limit}
        encoded = self.tokenizer(prompt, sample.completion, **how)
        return Row(list(encoded["input_ids"]), [], encoded.get("token_type_ids"))

    @torch.no_grad()
    def score(self, rows: Sequence[Row]) -> list[float]:
        """In batches of rows of like length."""
        order = sorted(range(len(rows)), key=lambda i: (-len(rows[i].ids), i))
        scores = [0.0] * len(rows)
        while order:
            size = max(1, self.token_budget // max(len(rows[order[0]].ids), 1))
            batch, order = order[:size], order[size:]
            logits = self._logits([rows[i] for i in batch])
            for i, value in zip(batch, logits[:, self.output].tolist(), strict=True):
                scores[i] = value
        return scores

    def _logits(self, rows: Sequence[Row]) -> Tensor:
        """Padded on the right, whatever side the tokenizer prefers: encoders count positions from the left."""
        config = self.network.config
        ids = [row.ids for row in rows]
        taken = {token for row in ids for token in row}
        before = config.pad_token_id
        # A decoder looks for each row's last token by the padding's id; without one of its own it takes one row only.
        padding = before if before is not None else next(i for i in count() if i not in taken)
        width = max(map(len, ids))

        def padded(values: Sequence[list[int]], filler: int) -> Tensor:
            return torch.tensor([v + [filler] * (width - len(v)) for v in values], device=self.device)

        inputs = {"input_ids": padded(ids, padding), "attention_mask": padded([[1] * len(row) for row in ids], 0)}
        if rows[0].segments is not None:
            inputs["token_type_ids"] = padded([row.segments or [] for row in rows], 0)
        config.pad_token_id = padding
        try:
            return self.network(**inputs).logits.float()
        finally:
            config.pad_token_id = before


def positions(network: Any, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Most tokens that a classifier reads; None for no limit."""
    limits = [getattr(network.config, "max_position_embeddings", None)]
    for name, module in network.named_modules():
        # RoBERTa's family counts positions from behind the padding's.
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            first = 0 if module.padding_idx is None else module.padding_idx + 1
            limits.append(module.num_embeddings - first)
    limits.append(tokenizer.model_max_length if tokenizer.model_max_length < 10**9 else None)  # HF: 10^30 for none
    return min((limit for limit in limits if limit), default=None)
