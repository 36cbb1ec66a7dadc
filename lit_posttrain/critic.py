"""PPO's value function: a network of its own, or a head on the policy's."""

import math
from dataclasses import dataclass
from typing import Any, final

from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import pad

from lit_posttrain import scoring
from lit_posttrain.beside import beside
from lit_posttrain.functional.log_probs import TokenLogProbs
from lit_posttrain.policy import Policy, PolicyConfig, causal_lm
from lit_posttrain.scalar_heads import ScoreNetwork
from lit_posttrain.types import Sequences

KEY = "model.init_args.critic"


@dataclass(frozen=True, kw_only=True)
class CriticConfig:
    """Which network estimates values, and how it learns.

    Args:
        model: Folder or hub name of a reward model (InstructGPT's choice: its scalar head goes on) or of a causal LM;
            null is the policy's, with a new head. Its tokenizer must be the policy's.
        shared: A head on the policy's own network instead, whose states then serve both.
        zero_head: Begin with a head of zeros, so that all values are 0 (Ziegler et al., 1909.08593, released code).
        lr: Peak learning rate of the critic's parameters; null is the policy's.
        warmup: Iterations at the beginning in which only the critic learns; no pretraining text is read in them, and
            the KL's coefficient stays.
        gradient_checkpointing: Recompute each block's activations in backward.
    """

    model: str | None = None
    shared: bool = False
    zero_head: bool = False
    lr: float | None = None
    warmup: int = 0
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: A value is out of range, or two contradict each other.
        """
        if self.shared and self.model is not None:
            raise ValueError(f"{KEY}.model: a shared critic has no network of its own; unset it, or set shared: false")
        if self.shared and self.gradient_checkpointing:
            raise ValueError(
                f"{KEY}.gradient_checkpointing: a shared critic has no network of its own; set "
                "model.init_args.policy.gradient_checkpointing instead"
            )
        if self.lr is not None and not 0 <= self.lr < math.inf:
            raise ValueError(f"{KEY}.lr: must be finite and not negative, is {self.lr}")
        if self.warmup < 0:
            raise ValueError(f"{KEY}.warmup: must not be negative, is {self.warmup}")


@final
class ValuePolicy(Policy):
    """A policy with a scalar head beside its vocabulary head.

    Args:
        config: What to load.
    """

    entry_points: tuple[str, ...] = ("next_logits", "with_values")

    def __init__(self, config: PolicyConfig):
        super().__init__(config)
        self.value_head = nn.Linear(self.hf_config.get_text_config().hidden_size, 1)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    def with_values(
        self, sequences: Sequences, mask: Bool[Tensor, "b t"], temperature: float, **arguments: Any
    ) -> tuple[TokenLogProbs, Float[Tensor, "b t"]]:
        """As :meth:`Policy.forward`, and V of the state that each masked token was drawn in; fp32, 0 elsewhere."""
        network = causal_lm(self._view().module)
        packed = self.packs(int(sequences.lengths.max()))
        states, scored = scoring.states_and_log_probs(
            network, sequences, mask, temperature, packed=packed, read=self.kept.read, **arguments
        )
        head = self.value_head
        values = head(states.to(head.weight.dtype))[:, 0].float()
        return scored, values.new_zeros(mask.shape).masked_scatter(mask, values)


def load_critic(policy: PolicyConfig, config: CriticConfig) -> ScoreNetwork:
    """The critic's own network.

    Args:
        policy: How the policy is loaded.
        config: What differs.

    Raises:
        ValueError: There is no such network; names the key.
    """
    try:
        critic = ScoreNetwork(beside(policy, config.model, gradient_checkpointing=config.gradient_checkpointing))
    except ValueError as error:
        mend = "" if config.model else f"; name another one in {KEY}.model, or set {KEY}.shared: true"
        raise ValueError(str(error).replace("model.init_args.policy.model", f"{KEY}.model") + mend) from error
    if config.zero_head:
        head: Any = causal_lm(critic.model).score
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
    return critic


def values_of(critic: ScoreNetwork, sequences: Sequences, mask: Bool[Tensor, "b t"]) -> Float[Tensor, "b t"]:
    """V of the state in which each masked token was drawn, in fp32 with gradient; 0 elsewhere.

    Token *i + 1* is drawn in the state after token *i*, so its value is read there.
    """
    values = critic(sequences, pad(mask, (0, 1)))
    return values.new_zeros(mask.shape).masked_scatter(mask, values)
