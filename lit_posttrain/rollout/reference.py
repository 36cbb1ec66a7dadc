"""The reference engine: HF's forward with HF's cache, for any architecture; simple, and what others must equal."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.cache_utils import DynamicCache

from lit_posttrain.gates import GateError
from lit_posttrain.policy import Policy
from lit_posttrain.randomness import uniforms
from lit_posttrain.rollout.drafts import Drafts
from lit_posttrain.rollout.engine import RolloutEngine, SamplingParams, tried
from lit_posttrain.rollout.sampler import draw
from lit_posttrain.sharding import unsharded
from lit_posttrain.types import Completion, SamplingKey


class ReferenceEngine(RolloutEngine):
    """Samples in batches through the policy's own forward; a prompt is prefilled once for all its samples.

    Prompts are left-padded, so that the real tokens of a row stay contiguous and sliding-window and absolute
    positions come out right. Finished rows leave the batch.

    Args:
        max_rows: Most completions in one batch.
    """

    def __init__(self, max_rows: int = 64):
        if max_rows < 1:
            raise ValueError(f"engine.init_args.max_rows: must be at least 1, is {max_rows}")
        self.max_rows = max_rows
        self.policy: Policy | None = None
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.weight_version = 0

    def bind(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Keep the tokenizer for stop strings."""
        self.tokenizer = tokenizer

    def sync(self, policy: Policy) -> None:
        """Note the policy, whose forward passes always use its present weights; the first time see that it decodes.

        Raises:
            GateError: HF's cache cannot serve the architecture.
        """
        known, self.policy = policy is self.policy, policy
        self.weight_version += 1
        if known:
            return
        try:
            tried(self, policy)
        except ValueError as error:
            name = type(policy.decode_network()).__name__
            raise GateError(f"model.init_args.policy.model: {name} cannot be sampled ({error})") from error

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        keys: Sequence[SamplingKey],
        tick: Callable[[int], None] | None = None,
    ) -> list[Completion]:
        """See ``RolloutEngine.generate``."""
        assert self.policy is not None, "sync comes before generate"
        assert all(map(len, prompts)), "a prompt without tokens has no next token"
        completions: list[Completion] = []
        with unsharded(self.policy), self.policy.decoding():
            for start in range(0, len(prompts), self.max_rows):
                rows = slice(start, start + self.max_rows)
                drafts = Drafts(len(prompts[rows]), sampling, self.policy, self.tokenizer)
                batch = _Batch(self.policy, prompts[rows], keys[rows], sampling)
                batch.run(drafts, tick or (lambda finished: None))
                completions += drafts.completions(self.weight_version)
        return completions


class _Batch:
    """Rows decoded together. ``live`` maps the cache's rows to the completions they belong to."""

    def __init__(
        self,
        policy: Policy,
        prompts: Sequence[Sequence[int]],
        keys: Sequence[SamplingKey],
        sampling: SamplingParams,
    ):
        self.policy, self.sampling = policy, sampling
        self.uniforms = torch.stack([uniforms(k, sampling.max_new_tokens) for k in keys])
        unique = list(dict.fromkeys(tuple(p) for p in prompts))
        self.owner = torch.tensor([unique.index(tuple(p)) for p in prompts])
        self.ids, self.real = _left_pad(unique)

    def run(self, drafts: Drafts, tick: Callable[[int], None]) -> None:
        device = self.policy.device
        cache = DynamicCache(config=self.policy.hf_config)
        positions = (self.real.long().cumsum(-1) - 1).clamp_min(0)
        logits = self.policy.next_logits(self.ids.to(device), positions.to(device), self.real.long().to(device), cache)
        # From prompts to samples: every sample gets its prompt's cache, mask and next-token logits.
        live = torch.arange(len(self.owner))
        owner = self.owner.to(device)
        # Not batch_select_indices, which does not know the states of recurrent layers.
        cache.reorder_cache(owner)  # pyright: ignore[reportArgumentType]
        logits, mask = logits[owner], self.real.long().to(device)[owner]
        lengths = mask.sum(-1)
        for step in range(self.sampling.max_new_tokens):
            sampled = draw(logits, self.uniforms[live, step].to(device), self.sampling.temperature)
            samples = live.tolist()
            tick(drafts.add(samples, sampled.tokens.tolist(), sampled.log_probs.tolist()))
            keep = torch.tensor([not drafts.ended(i) for i in samples])
            if not keep.any():
                break
            tokens, mask = sampled.tokens, torch.nn.functional.pad(mask, (0, 1), value=1)
            if not keep.all():
                rows = keep.nonzero()[:, 0].to(device)
                cache.reorder_cache(rows)  # pyright: ignore[reportArgumentType]
                live, tokens, mask, lengths = live[keep], tokens[rows], mask[rows], lengths[rows]
            logits = self.policy.next_logits(tokens[:, None], (lengths + step)[:, None], mask, cache)


def _left_pad(prompts: Sequence[Sequence[int]]) -> tuple[Int[Tensor, "p s"], Bool[Tensor, "p s"]]:
    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    real = torch.zeros(len(prompts), width, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        real[row, width - len(prompt) :] = True
    return ids, real
