"""The DPO family against worked numbers, their papers' identities and finite differences."""

import math
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from lit_posttrain.functional.preference_losses import (
    WHOLE_STEP,
    LossType,
    PairLossOptions,
    PairTerms,
    implicit_rewards,
    needs_reference,
    pair_loss,
    require_read,
)

KINDS: tuple[LossType, ...] = get_args(LossType)
DIVERGENCES: list[Any] = ["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]
READ_DIVERGENCE: list[LossType] = ["sigmoid", "hinge", "ipo", "exo_pair", "robust", "discopop", "sigmoid_norm"]
NO_REFERENCE: list[LossType] = ["sft", "simpo", "cpo", "orpo"]


def float64(values: Any) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float64)


def pair(policy: tuple[float, float] = (-10, -12), lengths: tuple[float, float] = (4, 5)) -> PairTerms:
    """One pair; c = 1 and -1/2, so that h = 3/2."""
    chosen, rejected = (float64([value]).requires_grad_() for value in policy)
    w, l = (float64([n]) for n in lengths)  # noqa: E741
    return PairTerms(chosen, rejected, float64([-11]), float64([-11.5]), w, l)


def sample(pairs: int = 6, seed: int = 0) -> PairTerms:
    g = torch.Generator().manual_seed(seed)
    chosen, rejected, ref_chosen, ref_rejected = (
        -4 - 6 * torch.rand(pairs, generator=g, dtype=torch.float64) for _ in range(4)
    )
    lengths = [torch.randint(2, 9, (pairs,), generator=g).double() for _ in range(2)]
    return PairTerms(chosen.requires_grad_(), rejected.requires_grad_(), ref_chosen, ref_rejected, *lengths)


def evaluate(terms: PairTerms, kind: LossType, options: PairLossOptions) -> tuple[float, float, float]:
    """Loss of one pair and its derivatives by log pi(y_w) and log pi(y_l)."""
    loss = pair_loss(terms, kind, options)
    assert loss.shape == (1,)
    gradients = torch.autograd.grad(loss.sum(), (terms.chosen, terms.rejected), materialize_grads=True)
    return loss.item(), gradients[0].item(), gradients[1].item()


def options_for(kind: LossType, **changes: Any) -> PairLossOptions:
    if kind == "exo_pair":
        changes = {"label_smoothing": 0.1} | changes
    return PairLossOptions(**changes)


GOLD: list[tuple[LossType, dict[str, Any], tuple[float, float, float]]] = [
    ("sigmoid", {}, (0.6209570478, -0.0462570155, 0.0462570155)),
    ("sigmoid", {"label_smoothing": 0.1}, (0.6359570478, -0.0362570155, 0.0362570155)),
    ("robust", {"label_smoothing": 0.1}, (0.6022070478, -0.0587570155, 0.0587570155)),
    ("ipo", {"ipo_average": False}, (12.25, -7.0, 7.0)),
    ("ipo", {}, (21.6225, -2.325, 1.86)),
    ("hinge", {}, (0.85, -0.1, 0.1)),
    ("exo_pair", {"label_smoothing": 0.1}, (0.4313884572, -0.0508937996, 0.0508937996)),
    ("nca_pair", {}, (1.3508248141, -0.0212531219, 0.0243751302)),
    ("bco_pair", {}, (1.3128563081, -0.0475020813, 0.0487502604)),
    ("sppo_hard", {}, (36.25, -8, 9)),
    ("apo_zero", {}, (0.9625234160, -0.0249376040, 0.0249843815)),
    ("apo_down", {}, (0.9875493421, 0.0000777034, 0.0248599007)),
    ("discopop", {}, (0.8493375793, -0.0625203020, 0.0625203020)),
    ("sigmoid_norm", {}, (0.6758002977, -0.0122812723, 0.0098250179)),
    ("simpo", {"beta": 2.0, "simpo_gamma": 1.0}, (1.4632824673, -0.3842623917, 0.3074099134)),
    ("cpo", {"cpo_alpha": 0.0}, (0.5981388694, -0.0450166003, 0.0450166003)),
    ("cpo", {}, (0.5981388694 + 2.5, -0.0450166003 - 0.25, 0.0450166003)),
    ("orpo", {"orpo_lambda": 1.0}, (0.7493685654 + 2.5, -0.1436230707 - 0.25, 0.1159893317)),
    ("orpo", {"orpo_lambda": 0.1}, (2.5749368565, -0.2643623071, 0.0115989332)),
    ("sft", {}, (10, -1, 0)),
    ("aot", {}, (0.6209570478, -0.0462570155, 0.0462570155)),  # of one pair: the sigmoid
    ("aot_unpaired", {"label_smoothing": 0.1}, (0.6359570478, -0.0362570155, 0.0362570155)),
]


@pytest.mark.parametrize(("kind", "changes", "expected"), GOLD)
def test_worked_values_and_gradients(
    kind: LossType, changes: dict[str, Any], expected: tuple[float, float, float]
) -> None:
    assert evaluate(pair(), kind, PairLossOptions(**changes)) == pytest.approx(expected, abs=1e-9)


def test_every_loss_has_a_worked_value() -> None:
    assert {kind for kind, _, _ in GOLD} == set(KINDS)


def test_implicit_rewards() -> None:
    chosen, rejected = implicit_rewards(pair(), PairLossOptions())
    assert (chosen.item(), rejected.item()) == pytest.approx((0.1, -0.05))
    assert not chosen.requires_grad
    assert not rejected.requires_grad
    chosen, rejected = implicit_rewards(pair(), PairLossOptions(beta=0.2, reference_free=True))
    assert (chosen.item(), rejected.item()) == pytest.approx((-2, -2.4))


@pytest.mark.parametrize(
    ("kind", "changes", "expected"),
    [
        *[("sigmoid", {}, math.log(2)), ("sigmoid", {"label_smoothing": 0.2}, math.log(2))],
        *[("robust", {"label_smoothing": 0.2}, math.log(2)), ("hinge", {}, 1), ("ipo", {"beta": 0.3}, 1 / 0.36)],
        *[("sppo_hard", {"beta": 0.3}, 2 / 0.36), ("apo_zero", {}, 1), ("apo_down", {}, 1)],
        *[("nca_pair", {}, 2 * math.log(2)), ("bco_pair", {}, 2 * math.log(2)), ("sigmoid_norm", {}, math.log(2))],
        *[("discopop", {}, (1 + math.log(2)) / 2), ("exo_pair", {"label_smoothing": 0.1}, -math.log(0.6))],
        *[("aot", {}, math.log(2)), ("aot_unpaired", {}, math.log(2))],
    ],
)
def test_at_the_reference(kind: LossType, changes: dict[str, Any], expected: float) -> None:
    loss, _, _ = evaluate(pair((-11, -11.5)), kind, PairLossOptions(**changes))
    assert loss == pytest.approx(expected, abs=1e-12)


def test_gradient_weighs_by_how_wrong_the_rewards_are() -> None:
    """2305.18290 Eq. 7 and the gradient below it: beta sigma(r_l - r_w)."""
    terms, options = sample(), PairLossOptions(beta=0.7)
    pair_loss(terms, "sigmoid", options).sum().backward()
    chosen, rejected = implicit_rewards(terms, options)
    assert terms.chosen.grad is not None
    assert terms.rejected.grad is not None
    torch.testing.assert_close(terms.chosen.grad, -0.7 * (rejected - chosen).sigmoid())
    torch.testing.assert_close(terms.rejected.grad, -terms.chosen.grad)


def swapped(t: PairTerms) -> PairTerms:
    return PairTerms(t.rejected, t.chosen, t.ref_rejected, t.ref_chosen, t.rejected_lengths, t.chosen_lengths)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.3])
def test_swapping_a_pair(smoothing: float) -> None:
    """-log sigma(-z) = z - log sigma(z); smoothing takes flipped shares off, the robust loss scales up by them."""
    terms, options = sample(), PairLossOptions(beta=0.4, label_smoothing=smoothing)
    z = 0.4 * ((terms.chosen - terms.ref_chosen) - (terms.rejected - terms.ref_rejected))

    def difference(kind: LossType) -> Tensor:
        return pair_loss(swapped(terms), kind, options) - pair_loss(terms, kind, options)

    torch.testing.assert_close(difference("sigmoid"), (1 - 2 * smoothing) * z)
    torch.testing.assert_close(difference("robust"), z / (1 - 2 * smoothing))


def test_robust_is_unbiased_under_noise() -> None:
    """2403.00409: its mean over flipped labels is the loss of the true ones."""
    terms, plain, noisy = sample(), PairLossOptions(), PairLossOptions(label_smoothing=0.2)
    mean = 0.8 * pair_loss(terms, "robust", noisy) + 0.2 * pair_loss(swapped(terms), "robust", noisy)
    torch.testing.assert_close(mean, pair_loss(terms, "sigmoid", plain))


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in NO_REFERENCE])
def test_a_constant_added_to_policy_and_reference_of_a_completion_cancels(kind: LossType) -> None:
    terms, options = sample(), options_for(kind)
    # AOT sorts the difference of the pair, so there the constant must be that of every pair.
    a, b = (3.0, -2.0) if kind == "aot" else (torch.arange(6.0), torch.arange(6.0).flip(0) * 2)
    moved = terms._replace(
        **{"chosen": terms.chosen + a, "ref_chosen": terms.ref_chosen + a},
        **{"rejected": terms.rejected + b, "ref_rejected": terms.ref_rejected + b},
    )
    torch.testing.assert_close(pair_loss(moved, kind, options), pair_loss(terms, kind, options))


@pytest.mark.parametrize("kind", KINDS)
def test_needs_reference_tells_which_losses_read_it(kind: LossType) -> None:
    terms, options = sample(), options_for(kind)
    other = terms._replace(ref_chosen=terms.ref_chosen - 1, ref_rejected=terms.ref_rejected + 0.5)
    reads = not torch.equal(pair_loss(terms, kind, options), pair_loss(other, kind, options))
    assert needs_reference(kind, options) is reads is (kind not in NO_REFERENCE)
    free = options_for(kind, reference_free=True)
    assert not needs_reference(kind, free)
    assert torch.equal(pair_loss(terms, kind, free), pair_loss(other, kind, free))
    zero = torch.zeros_like(terms.ref_chosen)
    at_zero = terms._replace(ref_chosen=zero, ref_rejected=zero)
    torch.testing.assert_close(pair_loss(terms, kind, free), pair_loss(at_zero, kind, options))


@pytest.mark.trap(29)
def test_ipo_on_means_and_on_sums() -> None:
    terms = sample()
    means, sums = PairLossOptions(), PairLossOptions(ipo_average=False)
    assert not torch.allclose(pair_loss(terms, "ipo", means), pair_loss(terms, "ipo", sums))
    ones = torch.ones_like(terms.chosen_lengths)
    single = terms._replace(chosen_lengths=ones, rejected_lengths=ones)
    torch.testing.assert_close(pair_loss(single, "ipo", means), pair_loss(single, "ipo", sums))


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in {"ipo", "sigmoid_norm", *NO_REFERENCE}])
def test_lengths_do_not_matter_to_losses_of_sums(kind: LossType) -> None:
    terms, options = sample(), options_for(kind)
    longer = terms._replace(chosen_lengths=terms.chosen_lengths + 3, rejected_lengths=terms.rejected_lengths * 2)
    assert torch.equal(pair_loss(longer, kind, options), pair_loss(terms, kind, options))


def test_of_equal_length_n_the_losses_of_means_are_those_of_sums_at_a_smaller_scale() -> None:
    terms = sample()
    four = torch.full_like(terms.chosen_lengths, 4)
    terms = terms._replace(chosen_lengths=four, rejected_lengths=four)
    norm = pair_loss(terms, "sigmoid_norm", PairLossOptions(beta=0.8))
    torch.testing.assert_close(norm, pair_loss(terms, "sigmoid", PairLossOptions(beta=0.2)))
    simpo = pair_loss(terms, "simpo", PairLossOptions(beta=0.8, simpo_gamma=0.0))
    torch.testing.assert_close(simpo, pair_loss(terms, "sigmoid", PairLossOptions(beta=0.2, reference_free=True)))
    cpo = pair_loss(terms, "cpo", PairLossOptions(beta=0.2, cpo_alpha=0.0))
    torch.testing.assert_close(cpo, simpo)
    means = pair_loss(terms, "ipo", PairLossOptions(beta=0.8))
    torch.testing.assert_close(means, pair_loss(terms, "ipo", PairLossOptions(beta=0.2, ipo_average=False)) / 16)


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_losses_of_a_whole_step_mix_pairs(kind: LossType) -> None:
    terms, options = sample(), options_for(kind)
    whole = pair_loss(terms, kind, options)
    alone = torch.cat([pair_loss(PairTerms(*(x[i : i + 1] for x in terms)), kind, options) for i in range(6)])
    assert torch.allclose(whole, alone) is (kind not in WHOLE_STEP)


def test_aot_compares_quantiles() -> None:
    chosen, rejected = float64([-1, -5, -3]), float64([-4, -2, -9])
    zero, ones = torch.zeros(3).double(), torch.ones(3).double()
    terms = PairTerms(chosen, rejected, float64([-2, -3, -1]), zero, ones, ones)
    expected = [[-3 + 3, 3 + 2, 6 + 1], [-2 + 9, -2 + 4, 1 + 2]]  # of pi: -3 3 6, of the reference: -3 -2 -1
    for kind, gaps in zip(("aot", "aot_unpaired"), expected, strict=True):
        z = float64(gaps) / 2
        torch.testing.assert_close(pair_loss(terms, kind, PairLossOptions(beta=0.5)), torch.log1p(torch.exp(-z)))


@pytest.mark.parametrize("alpha", [-0.5, 0.5, 2.0])
def test_divergences_put_the_slope_of_f_for_the_log_ratio(alpha: float) -> None:
    """f' by differentiating f of 2309.16240's table: u log u, -log u, u log u - (u+1) log((u+1)/2), alpha's."""
    fs: dict[Any, Any] = {
        "reverse_kl": lambda u: u * u.log(),
        "forward_kl": lambda u: -u.log(),
        "js_divergence": lambda u: u * u.log() - (u + 1) * ((u + 1) / 2).log(),
        "alpha_divergence": lambda u: (u**alpha - alpha * u - (1 - alpha)) / (alpha * (alpha - 1)),
    }
    terms = sample()
    for name, f in fs.items():
        slopes = []
        for c in (terms.chosen - terms.ref_chosen, terms.rejected - terms.ref_rejected):
            u = c.detach().exp().requires_grad_()
            slopes += torch.autograd.grad(f(u).sum(), u)
        hinge = pair_loss(terms, "hinge", PairLossOptions(beta=1e-4, f_divergence=name, alpha=alpha))  # never zero
        torch.testing.assert_close((1 - hinge.detach()) / 1e-4, slopes[0] - slopes[1], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_which_losses_read_the_divergence(kind: LossType) -> None:
    terms = sample()
    plain, other = (pair_loss(terms, kind, options_for(kind, f_divergence=f)) for f in ("reverse_kl", "js_divergence"))
    assert torch.equal(plain, other) is (kind not in READ_DIVERGENCE)


def test_alpha_divergence_holds_the_two_kls() -> None:
    terms = sample()
    cases: list[tuple[float, Any]] = [(0.0, "forward_kl"), (1.0, "reverse_kl"), (1 + 5e-7, "reverse_kl")]
    for alpha, name in cases:
        options = PairLossOptions(f_divergence="alpha_divergence", alpha=alpha)
        expected = pair_loss(terms, "sigmoid", PairLossOptions(f_divergence=name))
        torch.testing.assert_close(pair_loss(terms, "sigmoid", options), expected)


CASES = [(k, "reverse_kl") for k in KINDS] + [(k, f) for k in READ_DIVERGENCE for f in DIVERGENCES[1:]]


@pytest.mark.parametrize(("kind", "divergence"), CASES)
def test_gradients_are_those_of_finite_differences(kind: LossType, divergence: Any) -> None:
    terms, options = sample(), PairLossOptions(label_smoothing=0.1, f_divergence=divergence)

    def loss(chosen: Tensor, rejected: Tensor) -> Tensor:
        return pair_loss(terms._replace(chosen=chosen, rejected=rejected), kind, options)

    assert torch.autograd.gradcheck(loss, (terms.chosen, terms.rejected))


@pytest.mark.parametrize(("kind", "divergence"), CASES)
def test_far_from_the_reference_nothing_becomes_nan(kind: LossType, divergence: str) -> None:
    """Long completions of a policy that has moved: hundreds of nats in float32."""
    far = torch.tensor([-2000.0, -1.0, -900.0, -1e-9, 0.0])
    leaves = [far.clone().requires_grad_(), far.flip(0).clone().requires_grad_()]
    refs, lengths = torch.full((2, 5), -500.0), torch.full((2, 5), 2.0)
    options = options_for(kind, f_divergence=divergence)
    loss = pair_loss(PairTerms(*leaves, *refs, *lengths), kind, options)
    loss.sum().backward()
    assert not loss.isnan().any()
    assert all(leaf.grad is None or not leaf.grad.isnan().any() for leaf in leaves)


@pytest.mark.parametrize("kind", KINDS)
def test_no_pairs_sum_to_a_zero_with_a_graph(kind: LossType) -> None:
    parameter = torch.ones(3, requires_grad=True)
    none = parameter[:0]
    loss = pair_loss(PairTerms(none, none, *[none.detach()] * 4), kind, options_for(kind))
    assert loss.shape == (0,)
    loss.sum().backward()
    assert loss.sum().item() == 0
    assert parameter.grad is not None
    assert parameter.grad.eq(0).all()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        *[({"beta": 0.0}, "beta"), ({"beta": -1.0}, "beta"), ({"beta": math.nan}, "beta")],
        *[({"discopop_tau": 0.0}, "discopop_tau"), ({"label_smoothing": -0.1}, "label_smoothing")],
        *[({"label_smoothing": 0.5}, "label_smoothing"), ({"label_smoothing": math.nan}, "label_smoothing")],
        *[({"cpo_alpha": -0.1}, "cpo_alpha"), ({"orpo_lambda": -0.1}, "orpo_lambda")],
        ({"simpo_gamma": -0.1}, "simpo_gamma"),
    ],
)
def test_constants_out_of_range_are_refused_by_key(changes: dict[str, float], named: str) -> None:
    with pytest.raises(ValueError, match=rf"model\.init_args\.options\.{named}: .* is {changes[named]}"):
        PairLossOptions(**changes)  # type: ignore[arg-type]


def test_constants_at_the_edge_are_taken() -> None:
    PairLossOptions(
        beta=1e-9, discopop_tau=1e-9, label_smoothing=0.499, cpo_alpha=0.0, orpo_lambda=0.0, simpo_gamma=0.0
    )


def test_constants_are_checked_against_the_loss() -> None:
    with pytest.raises(ValueError, match=r"label_smoothing: exo_pair needs one above 0"):
        PairLossOptions().check("exo_pair")
    PairLossOptions(label_smoothing=1e-3).check("exo_pair")
    free = PairLossOptions(reference_free=True, f_divergence="js_divergence")
    with pytest.raises(ValueError, match=r"f_divergence: .*reference_free: false"):
        free.check("sigmoid")
    for kind in KINDS:
        options_for(kind).check(kind)
        options_for(kind, reference_free=True).check(kind)


@pytest.mark.parametrize(
    ("kinds", "changes", "message"),
    [
        (["ipo", "hinge"], {"label_smoothing": 0.1}, r"options\.label_smoothing: ipo, hinge would not read it"),
        (["simpo"], {"label_smoothing": 0.1}, r"options\.label_smoothing: simpo would not read it"),
        (["sigmoid"], {"simpo_gamma": 1.0}, r"options\.simpo_gamma: sigmoid would not read it"),
        (["sigmoid", "nca_pair"], {"f_divergence": "forward_kl"}, r"options\.f_divergence: nca_pair would not read it"),
        (["sigmod"], {}, r"loss_type: 'sigmod' is none of sigmoid, hinge"),
        (["exo_pair"], {}, r"label_smoothing: exo_pair needs one above 0"),
    ],
)
def test_what_no_loss_would_read_is_refused(kinds: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^model\.init_args\.{message}" if "exo" not in message else message):
        require_read(kinds, PairLossOptions(**changes))


def test_what_one_of_several_losses_reads_is_taken() -> None:
    require_read(["sigmoid", "ipo"], PairLossOptions(label_smoothing=0.1, ipo_average=False))
    require_read(["sigmoid", "sft"], PairLossOptions(f_divergence="js_divergence"))


@pytest.mark.parametrize("name", ["label_smoothing", "ipo_average", "discopop_tau", "simpo_gamma", "cpo_alpha",
                                  "orpo_lambda", "f_divergence"])  # fmt: skip
@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_reads_what_it_says_it_reads(kind: LossType, name: str) -> None:
    other = {"ipo_average": False, "f_divergence": "forward_kl"}.get(name, 0.3)
    terms, base = sample(), options_for(kind)
    changed = replace(base, **{name: other})
    reads = not torch.allclose(pair_loss(terms, kind, base), pair_loss(terms, kind, changed))
    plain = replace(changed, label_smoothing=other if name == "label_smoothing" else 0.0)
    if kind == "exo_pair" and name != "label_smoothing":
        return
    if reads:
        require_read([kind], plain)
    else:
        with pytest.raises(ValueError, match=rf"options\.{name}: {kind} would not read it"):
            require_read([kind], plain)
