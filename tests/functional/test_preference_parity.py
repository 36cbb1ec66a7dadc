"""Every loss against the code of TRL's trainers, run on a stand-in for the trainer and for its model."""

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_posttrain.algorithms.preference import pair_metrics
from lit_posttrain.batching import idle
from lit_posttrain.functional.log_probs import TokenLogProbs
from lit_posttrain.functional.masked import Totals
from lit_posttrain.functional.preference_losses import (
    LossType,
    PairLossOptions,
    PairTerms,
    implicit_rewards,
    kto_loss,
    pair_loss,
)

pytestmark = pytest.mark.parity
PAIRS, WIDTH = 5, 7
LOSSES: list[LossType] = [
    *["sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"],
    *["apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"],
]
READ_SMOOTHING = {"exo_pair", "robust", "aot", "aot_unpaired"}
ACCELERATOR = SimpleNamespace(device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x)


def ragged(rows: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Per-token log-probs (a leaf) and their mask, of 1 to 7 tokens a row, and a reference's sums."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, WIDTH + 1, (rows,), generator=g)
    mask = torch.arange(WIDTH) < lengths[:, None]
    log_probs = -2 * torch.rand(rows, WIDTH, generator=g, dtype=dtype)
    reference = -2 * torch.rand(rows, WIDTH, generator=g, dtype=dtype)
    return log_probs.requires_grad_(), mask, reference.where(mask, 0.0).sum(-1)


def trainer(log_probs: Tensor, mask: Tensor, **fields: Any) -> tuple[SimpleNamespace, Any, dict[str, Tensor]]:
    """A stand-in for `self`, a model that answers with these log-probs, and a batch with a prompt of one token."""
    zero = torch.zeros(log_probs.shape)
    out = SimpleNamespace(
        log_probs=log_probs.where(mask, 0.0), entropy=zero, mean_logits=zero, is_top1=zero.bool(), aux_loss=None
    )
    stub = SimpleNamespace(
        **{"model": SimpleNamespace(training=True), "accelerator": ACCELERATOR, "aux_loss_enabled": False},
        **{"precompute_ref_logps": True, "_metrics": {"train": defaultdict(list)}, "_total_train_tokens": 0},
        **{"_tp_size": 1},
        **fields,
    )
    whole = torch.cat([torch.zeros(len(mask), 1), mask], dim=1).long()
    inputs = {"completion_mask": whole, "input_ids": whole, "attention_mask": torch.ones_like(whole)}
    return stub, lambda **_: out, inputs


def dpo_of_trl(log_probs: Tensor, mask: Tensor, refs: Tensor, kind: str, o: PairLossOptions) -> tuple[Tensor, Any]:
    trainer_class = pytest.importorskip("trl").DPOTrainer
    stub, model, inputs = trainer(
        log_probs,
        mask,
        **{"ld_alpha": None, "f_divergence_type": o.f_divergence, "f_alpha_divergence_coef": o.alpha},
        **{"beta": o.beta, "label_smoothing": o.label_smoothing, "loss_types": [kind], "loss_weights": [1.0]},
        **{"use_weighting": False, "args": SimpleNamespace(discopop_tau=o.discopop_tau)},
    )
    inputs["ref_chosen_logps"], inputs["ref_rejected_logps"] = refs.chunk(2)
    return trainer_class._compute_loss(stub, model, inputs, False), stub._metrics["train"]


def ours(log_probs: Tensor, mask: Tensor, refs: Tensor) -> PairTerms:
    sums, lengths = log_probs.where(mask, 0.0).sum(-1), mask.sum(-1).to(log_probs.dtype)
    return PairTerms(*sums.chunk(2), *refs.chunk(2), *lengths.chunk(2))


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"])
@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("seed", [0, 1])
def test_dpo_trainer(kind: LossType, divergence: Any, seed: int) -> None:
    """The alpha divergence of TRL knows no float64."""
    double = divergence != "alpha_divergence"
    log_probs, mask, refs = ragged(2 * PAIRS, torch.float64 if double else torch.float32, seed)
    options = PairLossOptions(
        **{"beta": 0.3, "label_smoothing": 0.2 if kind in READ_SMOOTHING else 0.0},
        **{"discopop_tau": 0.07, "f_divergence": divergence, "alpha": 0.4 + seed},
    )
    theirs, metrics = dpo_of_trl(log_probs, mask, refs, kind, options)
    terms = ours(log_probs, mask, refs)
    loss = pair_loss(terms, kind, options)
    loss = loss.sum() / terms.chosen_lengths.sum() if kind == "sft" else loss.mean()
    tolerance: Any = {"rtol": 1e-6, "atol": 1e-7} if double else {"rtol": 3e-5, "atol": 3e-6}
    torch.testing.assert_close(loss, theirs, **tolerance)
    (expected,) = torch.autograd.grad(theirs, log_probs)
    (gradient,) = torch.autograd.grad(loss, log_probs)
    torch.testing.assert_close(gradient, expected, **tolerance)
    chosen, rejected = implicit_rewards(terms, options)
    assert [chosen.mean().item()] == pytest.approx(metrics["rewards/chosen"], rel=1e-5)
    assert [rejected.mean().item()] == pytest.approx(metrics["rewards/rejected"], rel=1e-5)


@pytest.mark.parametrize("far", [0.0, 6.0, -6.0], ids=["near", "above", "below"])
@pytest.mark.parametrize("labels", [[1, 0, 1, 1, 0], [1] * 5, [0] * 5], ids=["mixed", "good", "bad"])
def test_kto_trainer(labels: list[int], far: float) -> None:
    """The reference point is the mean over mismatched pairs, at least 0: it is so in one of the three cases."""
    trainer_class = pytest.importorskip("trl").KTOTrainer
    log_probs, mask, refs = ragged(PAIRS, torch.float64, 3)
    g = torch.Generator().manual_seed(4)
    mismatched, of_reference = -9 * torch.rand(2, PAIRS, generator=g, dtype=torch.float64)
    mismatched = mismatched + far
    stub, model, inputs = trainer(
        log_probs,
        mask,
        **{"calculate_KL": True, "loss_type": "kto", "beta": 0.3, "desirable_weight": 1.3, "undesirable_weight": 0.7},
        _compute_kl_logps=lambda *_: mismatched,
    )
    inputs |= {"ref_logps": refs, "ref_KL_logps": of_reference, "label": torch.tensor(labels)}
    theirs = trainer_class._compute_loss(stub, model, inputs, False)
    z = (mismatched - of_reference).mean().clamp(min=0)
    ratio = log_probs.where(mask, 0.0).sum(-1) - refs
    loss = kto_loss(ratio, torch.tensor(labels).bool(), z, 0.3, 1.3, 0.7).mean()
    torch.testing.assert_close(loss, theirs)
    for gradient, expected in zip(
        torch.autograd.grad(loss, log_probs), torch.autograd.grad(theirs, log_probs), strict=True
    ):
        torch.testing.assert_close(gradient, expected)


def one_pair(seed: int) -> tuple[Tensor, dict[str, Tensor], PairTerms]:
    """Logits of a pair of 3 and 5 tokens behind a prompt of one, the batch that TRL makes of it, and its sums.

    One pair at a time: TRL's NLL is a mean over the tokens of all pairs, ours over each completion's own. A prompt of
    one token has nothing to predict, and ORPO's NLL, which in TRL covers the prompt, covers the completion.
    """
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 6, 11, generator=g, requires_grad=True)
    ids = torch.randint(1, 11, (2, 6), generator=g)
    batch: dict[str, Tensor] = {}
    sums: list[Tensor] = []
    for row, (side, length) in enumerate((("chosen", 3), ("rejected", 5))):
        tokens = ids[row : row + 1, : length + 1]
        labels = tokens.clone()
        labels[:, 0] = -100
        batch |= {f"{side}_input_ids": tokens, f"{side}_attention_mask": torch.ones_like(tokens)}
        batch[f"{side}_labels"] = labels
        sums.append(logits[row, :length].log_softmax(-1).gather(-1, tokens[0, 1:, None]).sum()[None])
    zero = torch.zeros(1)
    chosen, rejected = sums
    return logits, batch, PairTerms(chosen, rejected, zero, zero, torch.tensor([3.0]), torch.tensor([5.0]))


def compare_experimental(trainer_class: Any, kind: LossType, options: PairLossOptions, **fields: Any) -> None:
    for seed in range(4):
        logits, batch, terms = one_pair(seed)
        stub = SimpleNamespace(
            **{"is_encoder_decoder": False, "pad_token_id": 0, "padding_value": 0, "aux_loss_enabled": False},
            **{
                "accelerator": ACCELERATOR,
                "beta": options.beta,
                "label_smoothing": options.label_smoothing,
                "alpha": 0.0,
            },
            **{
                "concatenated_inputs": trainer_class.concatenated_inputs,
                "get_batch_logps": trainer_class.get_batch_logps,
            },
            **fields,
        )
        for name in ("concatenated_forward", "cpo_loss", "odds_ratio_loss"):
            if hasattr(trainer_class, name):
                setattr(stub, name, getattr(trainer_class, name).__get__(stub))
        model = lambda *_, **__: SimpleNamespace(logits=logits)  # noqa: B023, E731
        theirs, logged = trainer_class.get_batch_loss_metrics(stub, model, batch)
        scored = TokenLogProbs(torch.zeros(1, 1), None)
        metrics = pair_metrics(scored, idle({}), terms, options, Totals(1.0, 3.0), frozenset({kind}))
        # Of SimPO the NLL that TRL's trainer may add is the weight of ``sft``.
        absent = {"logits/chosen", "logits/rejected", *(("nll_loss",) if kind == "simpo" else ())}
        assert metrics.keys() == logged.keys() - absent
        for name, value in metrics.items():
            assert float(value) == pytest.approx(logged[name], rel=1e-5), name
        loss = pair_loss(terms, kind, options).mean()
        torch.testing.assert_close(loss, theirs)
        expected, gradient = torch.autograd.grad(theirs, logits), torch.autograd.grad(loss, logits)
        torch.testing.assert_close(gradient[0], expected[0])


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_cpo_trainer(smoothing: float) -> None:
    module = pytest.importorskip("trl.experimental.cpo")
    options = PairLossOptions(beta=0.4, label_smoothing=smoothing, cpo_alpha=0.6)
    compare_experimental(module.CPOTrainer, "cpo", options, loss_type="sigmoid", cpo_alpha=0.6)


def test_simpo_of_the_cpo_trainer() -> None:
    module = pytest.importorskip("trl.experimental.cpo")
    options = PairLossOptions(beta=2.0, simpo_gamma=0.9)
    compare_experimental(module.CPOTrainer, "simpo", options, loss_type="simpo", cpo_alpha=0, simpo_gamma=0.9)


def test_orpo_trainer() -> None:
    """The weight that the paper calls lambda is TRL's beta."""
    module = pytest.importorskip("trl.experimental.orpo")
    compare_experimental(module.ORPOTrainer, "orpo", PairLossOptions(beta=0.25, orpo_lambda=0.25))
