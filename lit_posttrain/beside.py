"""Networks beside the policy that read its tokens (a reference, a critic): their description, and whether they fit."""

from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from lit_posttrain.model_files import model_folder
from lit_posttrain.policy import Policy, PolicyConfig, causal_lm, load_tokenizer


def beside(policy: PolicyConfig, model: str | None, **changes: Any) -> PolicyConfig:
    """How a network beside the policy is loaded: without adapters, else as the policy is.

    Args:
        policy: Whose revision and tokenizer go with its own model only.
        model: Folder or hub name; None is the policy's.
        **changes: Further fields.
    """
    if model is not None and model != policy.model:
        changes = {"model": model, "revision": None, "tokenizer": None, **changes}
    return replace(policy, lora=None, **changes)


def require_fits(
    network: Policy, policy: Policy, tokenizer: PreTrainedTokenizerBase, key: str, data: Any, *more: int
) -> None:
    """See that a network can read whatever the policy reads and writes, and means the same by it.

    Args:
        network: Freshly loaded.
        policy: The policy.
        tokenizer: The policy's.
        key: The YAML key that names the network.
        data: Knows the lengths; may be None.
        *more: What its ``check_fits`` takes besides the positions there are.

    Raises:
        ValueError: It cannot, or its tokenizer has other ids.
    """
    model = network.config.model
    used = {token: i for token, i in tokenizer.get_vocab().items() if i < _vocabulary(policy)}
    needed, known = max(used.values()) + 1, _vocabulary(network)
    if known < needed:
        raise ValueError(
            f"{key}: {model} knows {known} tokens and the policy's tokenizer has {needed}; give a model with the "
            "policy's vocabulary"
        )
    theirs = _own_vocabulary(network.config, key)
    other = [token for token, i in used.items() if theirs.get(token) != i] if theirs else []
    if other:
        token = other[0]
        raise ValueError(
            f"{key}: {model} has another tokenizer than the policy: {len(other)} tokens have other ids there "
            f"({token!r} {theirs.get(token)} instead of {used[token]}); give a model with the policy's tokenizer"
        )
    room, enough = network.context_length, policy.context_length
    if room and (not enough or room < enough) and hasattr(data, "check_fits"):
        try:
            data.check_fits(room, *more)
        except ValueError as error:
            raise ValueError(f"{key}: {model} has fewer positions than the policy. {error}") from error


def _vocabulary(network: Policy) -> int:
    embeddings: Any = causal_lm(network.model).get_input_embeddings()
    return embeddings.weight.shape[0]


def _own_vocabulary(config: PolicyConfig, key: str) -> dict[str, int]:
    """Ids by token; empty where the model comes without a tokenizer."""
    folder = model_folder(config.model, key, revision=config.revision)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        return {}
    return load_tokenizer(config).get_vocab()
