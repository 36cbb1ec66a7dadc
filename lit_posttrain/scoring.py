"""How the log-probs of sequences come out of a HF causal LM: decoder, packed or padded, then the chunked head."""

import inspect
import warnings
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel

from lit_posttrain import attention
from lit_posttrain.batching import pack
from lit_posttrain.functional.log_probs import TokenLogProbs, token_log_probs
from lit_posttrain.kept_prompts import Reader, read_whole
from lit_posttrain.layout import Layout
from lit_posttrain.types import Sequences


def log_probs(
    network: PreTrainedModel,
    sequences: Sequences,
    mask: Bool[Tensor, "b t"],
    temperature: float,
    *,
    packed: bool,
    read: Reader = read_whole,
    with_entropy: bool = False,
    entropy_gradient: bool = False,
) -> TokenLogProbs:
    """Log p(token i+1 | tokens up to i) at ``temperature`` where ``mask`` is True, 0 elsewhere; fp32 ``[b, t]``.

    Args:
        network: Whose attention is switched by ``share_prompts`` where ``packed``.
        sequences: Right-padded rows.
        mask: Positions to score.
        temperature: Logits are divided by it.
        packed: Compute a prompt that several rows share once.
        read: Whether it is kept for other micro-batches.
        with_entropy: Also the entropy of each scored distribution.
        entropy_gradient: Whether gradients flow through it.
    """
    return states_and_log_probs(
        network, sequences, mask, temperature, packed=packed, read=read,
        with_entropy=with_entropy, entropy_gradient=entropy_gradient,
    )[1]  # fmt: skip


def states_and_log_probs(
    network: PreTrainedModel,
    sequences: Sequences,
    mask: Bool[Tensor, "b t"],
    temperature: float,
    *,
    packed: bool,
    read: Reader = read_whole,
    with_entropy: bool = False,
    entropy_gradient: bool = False,
) -> tuple[Float[Tensor, "n d"], TokenLogProbs]:
    """The same, after the states of the masked positions, row by row."""
    head = network.get_output_embeddings()
    assert head is not None, "a causal LM has a vocabulary head"
    arguments: dict[str, Any] = {"with_entropy": with_entropy, "entropy_gradient": entropy_gradient}
    arguments |= {"bias": getattr(head, "bias", None), **_logit_transform(network.config)}
    if not packed or not bool(mask.any()):
        hidden = _padded_states(network, sequences)
        scored = token_log_probs(hidden, head.weight, sequences.ids, temperature, mask=mask, **arguments)
        return hidden[:, :-1][mask], scored
    states = states_at(network, sequences, pad(mask, (0, 1)), packed=True, read=read)
    targets = sequences.ids[:, 1:][mask]
    # As one sequence whose state i predicts token i + 1, so that the shift stays in one place.
    line, targets = torch.cat((states, states[:1]))[None], torch.cat((targets[:1], targets))[None]
    flat = token_log_probs(line, head.weight, targets, temperature, **arguments)
    return states, TokenLogProbs(
        *(None if x is None else x.new_zeros(mask.shape).masked_scatter(mask, x) for x in flat)  # pyright: ignore[reportArgumentType]
    )


def states_at(
    network: PreTrainedModel, sequences: Sequences, at: Bool[Tensor, "b s"], *, packed: bool, read: Reader = read_whole
) -> Float[Tensor, "n d"]:
    """The decoder's last states at the tokens where ``at`` is True, row by row.

    Args:
        network: Whose attention is switched by ``share_prompts`` where ``packed``.
        sequences: Right-padded rows.
        at: Which tokens; none of the padding.
        packed: Compute a prompt that several rows share once.
        read: Whether it is kept for other micro-batches.
    """
    if not packed or not bool(at.any()):
        return _padded_states(network, sequences)[at]
    last = bool(at.gather(1, sequences.lengths[:, None] - 1).any())
    row = pack(sequences, last=last)
    # A mask that is already four-dimensional is passed on as it is, so that none is built; the layout replaces it.
    unread = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=row.ids.device)

    def decode(ids: Tensor, positions: Tensor, layout: Layout) -> Tensor:
        return _decoder(network)(
            input_ids=ids, position_ids=positions, attention_mask=unread, layout=layout, use_cache=False
        ).last_hidden_state

    return read(row, decode)[0, row.states[at]]


def _padded_states(network: PreTrainedModel, sequences: Sequences) -> Float[Tensor, "b s d"]:
    # Rows are right-padded and attention is causal: no real token ever sees padding, so no mask is needed.
    return _decoder(network)(input_ids=sequences.ids, use_cache=False).last_hidden_state


@torch.no_grad()
def share_prompts(network: PreTrainedModel) -> bool:
    """Switch to the attention that packed rows need, and see on a small example that it computes the same.

    Returns:
        False, after a warning that names the architecture, where it does not: rows are then padded.
    """
    before = network.config._attn_implementation
    size = network.config.get_text_config().vocab_size
    sequences = Sequences(
        torch.tensor([[5, 6, 7, 8, 9], [5, 6, 7, 10, 0], [11, 12, 13, 14, 15]]) % size,
        torch.tensor([3, 3, 2]),
        torch.tensor([5, 4, 5]),
    )
    mask = sequences.attention_mask()
    try:
        padded = states_at(network, sequences, mask, packed=False)
        network.set_attn_implementation(attention.NAME)
        packed = states_at(network, sequences, mask, packed=True)
        close = torch.allclose(padded, packed, atol=1e-3 * float(padded.abs().max()))
        reason = None if close else "it computes something else there"
    except (ValueError, TypeError, RuntimeError, AttributeError) as error:
        reason = str(error)
    if reason is None:
        return True
    network.set_attn_implementation(before or "eager")
    warnings.warn(
        f"{type(network).__name__} cannot share prompts in packed rows ({reason}): rows are padded, which is slower",
        stacklevel=2,
    )
    return False


def _decoder(network: PreTrainedModel) -> nn.Module:
    return getattr(network, network.base_model_prefix)


def _logit_transform(config: Any) -> dict[str, float | None]:
    """What stands between head and logits: Gemma caps them, Cohere and Granite scale them."""
    config = config.get_text_config()
    scale = getattr(config, "logit_scale", None)
    if scale is None and (divisor := getattr(config, "logits_scaling", None)) is not None:
        scale = 1.0 / divisor
    return {"softcap": getattr(config, "final_logit_softcapping", None), "scale": scale}


@torch.no_grad()
def check_network(network: PreTrainedModel) -> None:
    """Refuse an architecture that is not causal, lacks what decoding needs, or has logits that the head cannot compute.

    Raises:
        ValueError: Which of these.
    """
    kind = f"model.init_args.policy.model: {type(network).__name__}"
    missing = {"position_ids", "past_key_values", "logits_to_keep"} - inspect.signature(
        network.forward
    ).parameters.keys()
    if missing:
        raise ValueError(f"{kind} takes no {' and no '.join(sorted(missing))}, which sampling needs")
    ids = torch.arange(1, 9)[None] % network.config.get_text_config().vocab_size
    sequences = Sequences(ids, torch.ones(1, dtype=torch.long), torch.full((1,), 8))
    try:
        whole = network(input_ids=ids).logits.float().log_softmax(-1)
        half = network(input_ids=ids[:, :4]).logits.float().log_softmax(-1)
        expected = whole[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
        ours = log_probs(network, sequences, sequences.completion_mask(), 1.0, packed=False).log_probs
    except Exception as error:  # the architecture's own code may trip over anything
        raise ValueError(f"{kind} has no decoder and head as expected ({error})") from error
    if not torch.allclose(expected, ours, atol=1e-3):
        raise ValueError(
            f"{kind} computes its logits in a way that the chunked log-probability head does not reproduce "
            f"(log-probabilities differ by {(expected - ours).abs().max().item():.3g})"
        )
    if not torch.allclose(half, whole[:, :4], atol=1e-3, rtol=1e-3):
        raise ValueError(f"{kind} reads later tokens to predict earlier ones: it is no causal language model")
