"""The DPO family and KTO on sums of log-probs; every function returns unreduced terms, one a pair or a completion."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import logsigmoid

LossType = Literal[
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm", "simpo", "cpo", "orpo",
]  # fmt: skip
WHOLE_STEP = frozenset({"aot", "aot_unpaired"})
"""Losses that sort: they are given the pairs of the whole optimizer step over all ranks."""
_READ_BY: dict[str, tuple[str, ...]] = {
    "label_smoothing": ("sigmoid", "robust", "aot", "aot_unpaired", "exo_pair", "cpo"),
    "f_divergence": ("sigmoid", "hinge", "ipo", "exo_pair", "robust", "discopop", "sigmoid_norm"),
    "ipo_average": ("ipo",), "discopop_tau": ("discopop",), "simpo_gamma": ("simpo",), "cpo_alpha": ("cpo",),
    "orpo_lambda": ("orpo",),
}  # fmt: skip
_WITHOUT_REFERENCE = frozenset({"sft", "simpo", "cpo", "orpo"})
_KEY = "model.init_args.options"


class PairTerms(NamedTuple):
    """What a loss of pairs may read.

    Attributes:
        chosen: Sum of log pi over the tokens of the preferred completion, its end token included.
        rejected: Of the other.
        ref_chosen: The same of the reference, without gradient; 0 where there is none.
        ref_rejected: Likewise.
        chosen_lengths: Tokens in those sums.
        rejected_lengths: Likewise.
    """

    chosen: Float[Tensor, " p"]
    rejected: Float[Tensor, " p"]
    ref_chosen: Float[Tensor, " p"]
    ref_rejected: Float[Tensor, " p"]
    chosen_lengths: Float[Tensor, " p"]
    rejected_lengths: Float[Tensor, " p"]


@dataclass(frozen=True, kw_only=True)
class PairLossOptions:
    """Constants of the preference losses; each is read by the losses that it names, and else must not be set.

    Args:
        beta: Strength of the pull to the reference; above 0.
        label_smoothing: Probability that a preference is the wrong way round, at least 0 and below 0.5: makes
            ``sigmoid`` cDPO; of ``robust``, ``aot``, ``aot_unpaired`` and ``cpo`` too, and epsilon of ``exo_pair``
            (above 0).
        ipo_average: ``ipo`` compares means over tokens, as TRL does; false compares sums, as the authors of DPO do.
        discopop_tau: Temperature of the mixture of ``discopop``.
        simpo_gamma: Target margin of ``simpo``.
        cpo_alpha: Weight of the chosen completion's NLL in ``cpo``.
        orpo_lambda: Weight of the odds ratio in ``orpo``.
        reference_free: Put the reference's log-ratio at 0.
        f_divergence: Divergence that stands for the KL of the DPO objective (2309.16240): ``sigmoid``, ``hinge``,
            ``ipo``, ``exo_pair``, ``robust``, ``discopop`` and ``sigmoid_norm`` read it.
        alpha: Of ``alpha_divergence``.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    ipo_average: bool = True
    discopop_tau: float = 0.05
    simpo_gamma: float = 0.5
    cpo_alpha: float = 1.0
    orpo_lambda: float = 0.1
    reference_free: bool = False
    f_divergence: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = "reverse_kl"
    alpha: float = 0.5

    def __post_init__(self):
        """Check the ranges."""
        for name in ("beta", "discopop_tau"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{_KEY}.{name}: must be above 0 and finite, is {getattr(self, name)}")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"{_KEY}.label_smoothing: must be at least 0 and below 0.5, is {self.label_smoothing}")
        for name in ("cpo_alpha", "orpo_lambda", "simpo_gamma"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{_KEY}.{name}: must not be negative, is {getattr(self, name)}")

    def check(self, kind: str) -> None:
        """See that a loss can be computed with these constants.

        Raises:
            ValueError: It cannot.
        """
        if kind == "exo_pair" and self.label_smoothing == 0:
            raise ValueError(f"{_KEY}.label_smoothing: exo_pair needs one above 0 (2402.00856 uses 0.001)")
        if self.reference_free and self.f_divergence != "reverse_kl":
            raise ValueError(f"{_KEY}.f_divergence: a divergence needs a reference; set reference_free: false")


def require_read(kinds: Sequence[str], options: PairLossOptions) -> None:
    """See that each loss is known, and that constants which were set are read by one of them.

    A divergence has to be read by every one, but for ``sft``, which has no reference.

    Raises:
        ValueError: One is not.
    """
    for kind in kinds:
        if kind not in _LOSSES:
            raise ValueError(f"model.init_args.loss_type: {kind!r} is none of {', '.join(_LOSSES)}")
        options.check(kind)
    for name, readers in _READ_BY.items():
        if getattr(options, name) == getattr(PairLossOptions, name):
            continue
        deaf = [kind for kind in kinds if kind not in readers]
        if len(deaf) == len(kinds) or (name == "f_divergence" and set(deaf) - {"sft"}):
            raise ValueError(f"{_KEY}.{name}: {', '.join(deaf)} would not read it; it is of {', '.join(readers)}")


def needs_reference(kind: LossType, options: PairLossOptions) -> bool:
    """Whether a loss reads the reference's log-probs."""
    return kind not in _WITHOUT_REFERENCE and not options.reference_free


def pair_loss(terms: PairTerms, kind: LossType, options: PairLossOptions) -> Float[Tensor, " p"]:
    """A loss's terms, one a pair.

    ``sft`` is -log pi(y_w), a sum over tokens: the caller divides by the tokens of the preferred completions instead
    of by pairs. ``aot`` and ``aot_unpaired`` sort, so they need the pairs of the whole step.

    Args:
        terms: Log-probs and lengths.
        kind: Which loss.
        options: Its constants.
    """
    if options.reference_free:
        zero = torch.zeros_like(terms.ref_chosen)
        terms = terms._replace(ref_chosen=zero, ref_rejected=zero)
    return _LOSSES[kind](terms, options)


def implicit_rewards(terms: PairTerms, options: PairLossOptions) -> tuple[Float[Tensor, " p"], Float[Tensor, " p"]]:
    """Beta (log pi - log pi_ref) of the preferred completions and of the others (2305.18290 Eq. 5), detached."""
    free = options.reference_free
    chosen = terms.chosen if free else terms.chosen - terms.ref_chosen
    rejected = terms.rejected if free else terms.rejected - terms.ref_rejected
    return options.beta * chosen.detach(), options.beta * rejected.detach()


def per_token(terms: PairTerms) -> PairTerms:
    """Of losses without a reference whose rewards are means over tokens: SimPO (2405.14734 Eq. 4) and ORPO."""
    chosen, rejected = _means(terms)
    return terms._replace(chosen=chosen, rejected=rejected)


def log_odds(t: PairTerms) -> Float[Tensor, " p"]:
    """Log of the completions' odds ratio, their probabilities means over tokens (2403.07691 Eq. 4)."""
    w, l = (x.clamp(max=-1e-7) for x in _means(t))  # noqa: E741
    return (w - l) - (torch.log(-torch.expm1(w)) - torch.log(-torch.expm1(l)))


def pair_indices(preference: Float[Tensor, " b"], group: Int[Tensor, " b"]) -> tuple[Tensor, Tensor]:
    """Rows (winners, losers) of every pair within a group whose preference differs, by winner and then loser.

    Args:
        preference: Higher is better; equal is a tie.
        group: Rows of the same number are compared.
    """
    better = (preference[:, None] > preference[None]) & (group[:, None] == group[None])
    winners, losers = better.nonzero(as_tuple=True)
    return winners, losers


# --- one function a loss; c = log pi - log pi_ref, h = c_w - c_l ----------------------------------------------------


def _ratios(t: PairTerms) -> tuple[Tensor, Tensor]:
    return t.chosen - t.ref_chosen, t.rejected - t.ref_rejected


def _scores(t: PairTerms, o: PairLossOptions) -> tuple[Tensor, Tensor]:
    """f'(pi / pi_ref) of both (2309.16240), up to constants that cancel; the log-ratio for the reverse KL."""
    w, l = _ratios(t)  # noqa: E741
    return _slope(w, o), _slope(l, o)


def _slope(c: Tensor, o: PairLossOptions) -> Tensor:
    if o.f_divergence == "forward_kl":
        return -torch.expm1((-c).clamp(max=80.0))
    if o.f_divergence == "js_divergence":
        return math.log(2) + logsigmoid(c)
    if o.f_divergence == "alpha_divergence" and abs(o.alpha - 1) >= 1e-6:
        return torch.expm1(((o.alpha - 1) * c).clamp(max=80.0)) / (o.alpha - 1)
    return c


def _h(t: PairTerms, o: PairLossOptions) -> Tensor:
    w, l = _scores(t, o)  # noqa: E741
    return w - l


def _smoothed(z: Tensor, o: PairLossOptions) -> Tensor:
    return -(1 - o.label_smoothing) * logsigmoid(z) - o.label_smoothing * logsigmoid(-z)


def _sigmoid(t: PairTerms, o: PairLossOptions) -> Tensor:
    """DPO (2305.18290 Eq. 7); with label smoothing cDPO."""
    return _smoothed(o.beta * _h(t, o), o)


def _hinge(t: PairTerms, o: PairLossOptions) -> Tensor:
    """SLiC's hinge on DPO's margin (2309.06657)."""
    return torch.relu(1 - o.beta * _h(t, o))


def _ipo(t: PairTerms, o: PairLossOptions) -> Tensor:
    """IPO (2310.12036 Eq. 17)."""
    w, l = _scores(t, o)  # noqa: E741
    if o.ipo_average:
        w, l = w / t.chosen_lengths.clamp(min=1), l / t.rejected_lengths.clamp(min=1)  # noqa: E741
    return (w - l - 1 / (2 * o.beta)).square()


def _exo_pair(t: PairTerms, o: PairLossOptions) -> Tensor:
    """EXO for two completions (2402.00856 Eq. 16): KL from the policy's preference to the smoothed label."""
    z, eps = o.beta * _h(t, o), o.label_smoothing
    return z.sigmoid() * (logsigmoid(z) - math.log1p(-eps)) + (-z).sigmoid() * (logsigmoid(-z) - math.log(eps))


def _nca_pair(t: PairTerms, o: PairLossOptions) -> Tensor:
    """NCA (2402.05369)."""
    w, l = (o.beta * c for c in _ratios(t))  # noqa: E741
    return -logsigmoid(w) - 0.5 * logsigmoid(-w) - 0.5 * logsigmoid(-l)


def _robust(t: PairTerms, o: PairLossOptions) -> Tensor:
    """Robust DPO (2403.00409): unbiased under label noise."""
    z, eps = o.beta * _h(t, o), o.label_smoothing
    return (-(1 - eps) * logsigmoid(z) + eps * logsigmoid(-z)) / (1 - 2 * eps)


def _bco_pair(t: PairTerms, o: PairLossOptions) -> Tensor:
    """BCO (2404.04656) with its running mean at 0."""
    w, l = (o.beta * c for c in _ratios(t))  # noqa: E741
    return -logsigmoid(w) - logsigmoid(-l)


def _sppo_hard(t: PairTerms, o: PairLossOptions) -> Tensor:
    """SPPO with hard labels (2405.00675)."""
    w, l = _ratios(t)  # noqa: E741
    return (w - 0.5 / o.beta).square() + (l + 0.5 / o.beta).square()


def _aot(t: PairTerms, o: PairLossOptions) -> Tensor:
    """AOT, paired (2406.05882)."""
    policy, reference = (t.chosen - t.rejected).sort().values, (t.ref_chosen - t.ref_rejected).sort().values
    return _smoothed(o.beta * (policy - reference), o)


def _aot_unpaired(t: PairTerms, o: PairLossOptions) -> Tensor:
    """AOT, unpaired (2406.05882)."""
    w, l = (c.sort().values for c in _ratios(t))  # noqa: E741
    return _smoothed(o.beta * (w - l), o)


def _apo_zero(t: PairTerms, o: PairLossOptions) -> Tensor:
    """APO-zero (2408.06266 Eq. 7)."""
    w, l = (o.beta * c for c in _ratios(t))  # noqa: E741
    return 1 - w.sigmoid() + l.sigmoid()


def _apo_down(t: PairTerms, o: PairLossOptions) -> Tensor:
    """APO-down (2408.06266 Eq. 8)."""
    w, l = (o.beta * c for c in _ratios(t))  # noqa: E741
    return w.sigmoid() + 1 - (w - l).sigmoid()


def _discopop(t: PairTerms, o: PairLossOptions) -> Tensor:
    """DiscoPOP (2406.08414 Eq. 5)."""
    z = o.beta * _h(t, o)
    u = z / o.discopop_tau
    return -logsigmoid(z) * (-u).sigmoid() + (logsigmoid(u) - z).exp()  # e^-z alone may overflow where its share is 0


def _sft(t: PairTerms, o: PairLossOptions) -> Tensor:
    return -t.chosen


def _sigmoid_norm(t: PairTerms, o: PairLossOptions) -> Tensor:
    """DPO on means over tokens (Tulu 3, 2411.15124)."""
    w, l = _scores(t, o)  # noqa: E741
    return -logsigmoid(o.beta * (w / t.chosen_lengths.clamp(min=1) - l / t.rejected_lengths.clamp(min=1)))


def _means(t: PairTerms) -> tuple[Tensor, Tensor]:
    return t.chosen / t.chosen_lengths.clamp(min=1), t.rejected / t.rejected_lengths.clamp(min=1)


def _simpo(t: PairTerms, o: PairLossOptions) -> Tensor:
    """SimPO (2405.14734 Eq. 6)."""
    w, l = _means(t)  # noqa: E741
    return -logsigmoid(o.beta * (w - l) - o.simpo_gamma)


def _cpo(t: PairTerms, o: PairLossOptions) -> Tensor:
    """CPO (2401.08417): the reference put at uniform, and the mean NLL of the chosen completion."""
    return _smoothed(o.beta * (t.chosen - t.rejected), o) - o.cpo_alpha * _means(t)[0]


def _orpo(t: PairTerms, o: PairLossOptions) -> Tensor:
    """ORPO (2403.07691 Eq. 6): mean NLL of the chosen completion and the log odds ratio of the means."""
    return -_means(t)[0] - o.orpo_lambda * logsigmoid(log_odds(t))


_LOSSES: dict[LossType, Callable[[PairTerms, PairLossOptions], Tensor]] = {
    "sigmoid": _sigmoid, "hinge": _hinge, "ipo": _ipo, "exo_pair": _exo_pair, "nca_pair": _nca_pair,
    "robust": _robust, "bco_pair": _bco_pair, "sppo_hard": _sppo_hard, "aot": _aot, "aot_unpaired": _aot_unpaired,
    "apo_zero": _apo_zero, "apo_down": _apo_down, "discopop": _discopop, "sft": _sft, "sigmoid_norm": _sigmoid_norm,
    "simpo": _simpo, "cpo": _cpo, "orpo": _orpo,
}  # fmt: skip


# --- KTO ------------------------------------------------------------------------------------------------------------


def kto_loss(
    log_ratio: Float[Tensor, " b"],
    desirable: Bool[Tensor, " b"],
    z: Float[Tensor, ""],
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> Float[Tensor, " b"]:
    """lambda_D (1 - sigma(beta (c - z))) or lambda_U (1 - sigma(beta (z - c))) (2402.01306 Eq. 8).

    Args:
        log_ratio: c = log pi - log pi_ref of each completion.
        desirable: Which are good.
        z: The reference point, without gradient.
        beta: Scale.
        desirable_weight: lambda_D.
        undesirable_weight: lambda_U.
    """
    gain = beta * (log_ratio - z.detach())
    return torch.where(desirable, desirable_weight * (1 - gain.sigmoid()), undesirable_weight * (1 - (-gain).sigmoid()))
