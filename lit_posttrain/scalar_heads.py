"""Networks that give numbers instead of tokens: reward models, as HF sequence classifiers with one label."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import Bool, Float
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
from transformers.utils import logging as transformers_logging

from lit_posttrain import randomness, scoring
from lit_posttrain.batching import pad_sequences, split, to_device
from lit_posttrain.dropout import disable_dropout
from lit_posttrain.kept_prompts import prompts_once
from lit_posttrain.model_files import model_folder
from lit_posttrain.policy import Policy, PolicyConfig, causal_lm
from lit_posttrain.types import Sequences

KEY = "model.init_args.policy.model"


class ScoreNetwork(Policy):
    """A language model whose vocabulary head gave way to a scalar projection (InstructGPT, 2203.02155, section 3.5).

    The head's weights begin as N(0, 1 / (d + 1)) and its bias at 0 (Stiennon et al., 2009.01325, released code); a
    folder that holds a head keeps it. ``gain`` and ``shift`` normalise scores that are reported and exported; losses
    see the raw ones.

    Args:
        config: What to load: a causal LM's folder, or a reward model's.
    """

    entry_points: tuple[str, ...] = ()
    lora_task = "SEQ_CLS"
    key = KEY
    needs_head = False
    gain: Tensor
    shift: Tensor

    def __init__(self, config: PolicyConfig):
        super().__init__(config)
        self.register_buffer("gain", torch.ones(()))
        self.register_buffer("shift", torch.zeros(()))

    def load(self, config: PolicyConfig) -> PreTrainedModel:
        """The network as a sequence classifier in fp32, dropout off, in training mode."""
        return load_classifier(config.model, self.key, config.revision, needs_head=self.needs_head)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]: scores, not log-probs
        self, sequences: Sequences, at: Bool[Tensor, "b s"]
    ) -> Float[Tensor, " n"]:
        """Raw scores at the tokens where ``at`` is True, row by row; fp32, with gradient.

        Args:
            sequences: Right-padded rows.
            at: Which tokens; a score depends on the tokens up to its own.
        """
        network = causal_lm(self._view().module)
        packed = self.packs(int(sequences.lengths.max()))
        states = scoring.states_at(network, sequences, at, packed=packed, read=self.kept.read)
        head: Any = network.score
        return head(states)[:, 0].float()

    def normalised(self, scores: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """``gain * score - shift``."""
        return self.gain * scores - self.shift

    @torch.no_grad()
    def save_pretrained(self, out: str | Path) -> None:
        """Write a HF sequence classifier whose scores are the normalised ones; not for sharded parameters."""
        from lit_posttrain.export_scores import write_classifier

        write_classifier(self, Path(out))


def last_tokens(sequences: Sequences) -> Bool[Tensor, "b s"]:
    """True at each row's last real token, which a reward is read at; by lengths, so padding plays no part."""
    positions = torch.arange(sequences.ids.shape[1], device=sequences.ids.device)
    return positions == sequences.lengths[:, None] - 1


@final
class TrainedScoreNetwork(ScoreNetwork):
    """A reward model's, head included: a language model is none.

    Args:
        config: What to load.
        key: The YAML key that names it.
    """

    needs_head = True

    def __init__(self, config: PolicyConfig, key: str):
        self.key = key
        super().__init__(config)


class Scorer:
    """A frozen reward model that scores rows within a token budget.

    Args:
        config: What to load.
        device: Where to.
        token_budget: Most tokens, padding included, in one forward pass.
        key: The YAML key that names it.
    """

    def __init__(self, config: PolicyConfig, device: torch.device, token_budget: int, key: str):
        self.device, self.token_budget = device, token_budget
        self.network = TrainedScoreNetwork(config, key).requires_grad_(False).eval().to(device)
        self.network.build_view(device, sharded=False)

    @torch.no_grad()
    def __call__(self, prompts: Sequence[list[int]], answers: Sequence[list[int]]) -> list[float]:
        """The normalised score of each answer, read at its last token (at the prompt's where it is empty)."""
        sequences = pad_sequences(prompts, answers)
        packed = self.network.packs(sequences.ids.shape[1])
        scores = torch.zeros(len(sequences.ids))
        batches = split(sequences, sequences.completion_mask(), {}, self.token_budget, packed=packed)
        for batch in prompts_once(batches, [self.network]):
            rows = to_device(batch, self.device).sequences
            scores[batch.rows] = self.network.normalised(self.network(rows, last_tokens(rows))).cpu()
        return scores.tolist()


def load_classifier(model: str, key: str, revision: str | None = None, *, needs_head: bool = False) -> PreTrainedModel:
    """A HF sequence classifier with one label and a biased head, from a causal LM's folder or a classifier's.

    Raises:
        ValueError: transformers has no such class for the architecture, or the files do not fit it; or ``needs_head``
            and they hold no head.
    """
    folder = model_folder(model, key, revision=revision, weights=True)
    config = AutoConfig.from_pretrained(folder)
    config.num_labels = 1
    network_class = biased(config, key)
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # a new head is no news; what else is missing is said below
    try:
        network, found = network_class.from_pretrained(
            folder, config=config, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{key}: {folder} cannot be loaded as a sequence classifier ({error})") from error
    finally:
        transformers_logging.set_verbosity(level)
    missing = sorted(found["missing_keys"])
    if lacking := [name for name in missing if not name.startswith("score.")]:
        raise ValueError(
            f"{key}: the files in {folder} lack {len(lacking)} of the weights of a {network_class.__name__}, "
            f"{lacking[0]} among them"
        )
    if needs_head and "score.weight" in missing:
        raise ValueError(
            f"{key}: {folder} is a language model without a reward model's head, and its scores would be random; name "
            "a folder that `lit-posttrain export` wrote of a reward model"
        )
    if "score.weight" in missing:
        _initialise(network.score, config.get_text_config().hidden_size)
    elif "score.bias" in missing:
        nn.init.zeros_(network.score.bias)
    disable_dropout(network)
    return network.train()


def biased(config: Any, key: str) -> type[Any]:
    """The architecture's sequence classifier, its head with a bias: HF's have none, and a shift needs one."""
    try:
        base: Any = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)]
    except KeyError:
        raise ValueError(f"{key}: transformers has no sequence classifier for {config.model_type!r}") from None

    class Classifier(base):
        def __init__(self, config: Any):
            super().__init__(config)
            if not isinstance(getattr(self, "score", None), nn.Linear):
                raise ValueError(f"{key}: {base.__name__} has no linear layer 'score'")
            self.score = nn.Linear(config.get_text_config().hidden_size, 1)

    Classifier.__name__ = Classifier.__qualname__ = base.__name__
    return Classifier


def _initialise(head: nn.Linear, size: int) -> None:
    try:
        seed = randomness.run_seed()
    except ValueError:  # no run: a checkpoint's weights are about to take the place of these
        seed = 0
    generator = randomness.generator(seed, "score head")
    with torch.no_grad():
        head.weight.copy_(torch.randn(head.weight.shape, generator=generator) / (size + 1) ** 0.5)
        head.bias.zero_()


def split_scores(scores: Float[Tensor, " n"], groups: Sequence[int]) -> list[list[float]]:
    """Scores as lists of so many each."""
    return [part.tolist() for part in scores.split(list(groups))]
