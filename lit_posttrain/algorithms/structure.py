"""What a run is made of: its checkpoints go on only in a run that is made alike."""

from typing import Any

from lit_posttrain.model_files import configuration_hash
from lit_posttrain.policy import Policy, causal_lm


def size_of(network: Policy) -> str:
    """A network's class, size and configuration, its adapters aside."""
    size = sum(p.numel() for name, p in network.model.named_parameters() if "lora_" not in name)
    kind, said = type(causal_lm(network.model)).__name__, configuration_hash(network.hf_config)
    return f"{kind} with {size:,} parameters (hash of its configuration {said[:12]})"


def structure_of(policy: Policy) -> dict[str, Any]:
    """The policy's part."""
    lora = policy.config.lora
    return {
        "model.init_args.policy.lora": lora and f"r {lora.r}, alpha {lora.alpha}, target_modules {lora.target_modules}",
        "model.init_args.policy.model": size_of(policy),
    }


def require_same(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Compare what a checkpoint is from with what it would be loaded into.

    Args:
        before: By YAML key; of the run that saved.
        now: Of this one.

    Raises:
        ValueError: They differ; names the first such key.
    """
    for key in {**before, **now}:
        old, new = before.get(key), now.get(key)
        if old != new:
            raise ValueError(
                f"{key}: the checkpoint is of a run with {_shown(old)} here, and this one has {_shown(new)}, so it "
                "cannot be resumed; set it back, or start a new run from exported weights (lit-posttrain export)"
            )


def _shown(value: Any) -> str:
    return "nothing" if value is None else str(value)
