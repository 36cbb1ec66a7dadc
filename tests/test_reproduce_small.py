"""Reproductions in the small world: quick runs, and what decides a verdict."""

import importlib
import itertools
import json
import math
import random
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM


def quick(reproduce: ModuleType, identifier: str, folder: Path) -> dict[str, Any]:
    """Figures of a quick run with one seed, which leaves a picture."""
    reproduce.main([identifier, "--quick", "--seeds", "1", "--first", "0", "--output", str(folder)])
    assert (folder / identifier / f"{identifier.lower()}.png").stat().st_size > 5000
    (f,) = json.loads((folder / identifier / "result.json").read_text())["seeds"]
    return f


def test_every_arm_of_the_frontiers(reproduce: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (
        ("BETAS", 0.1),
        ("NOISY_BETAS", 0.1),
        ("COEFS", 0.1),
        ("TARGETS", 3.0),
        ("LEARNED_TARGETS", 3.0),
    ):
        monkeypatch.setattr(reproduce.load("E3"), name, (value,))  # a run of each, not four
    f = quick(reproduce, "E3", tmp_path)
    for beta, kl, reward in ((0.1, 4.216675, 2.484760), (0.5, 1.198484, 1.707256), (2, 0.078321, 0.767740)):
        assert f[f"tabular_kl_{beta}"] == pytest.approx(kl, abs=2e-3)
        assert f[f"tabular_reward_{beta}"] == pytest.approx(reward, abs=2e-3)
    runs = {name.removeprefix("kl_").rsplit("_", 1)[0] for name in f if name.startswith("kl_")}
    assert runs == {"dpo_0.1", "noisy_0.1", "ppo_c0.1", "ppo_3", "learned_3", "preferred_ft"}
    for end in ("", "_to_4"):
        assert f[f"dpo_minus_ppo{end}"] == pytest.approx(f[f"height_dpo{end}"] - f[f"height_ppo{end}"], abs=1e-6)
        assert f[f"dpo_minus_ppo{end}_low"] <= f[f"dpo_minus_ppo{end}"] <= f[f"dpo_minus_ppo{end}_high"]
    reached = [max(v for n, v in f.items() if n.startswith(f"kl_{arm}_")) for arm in ("dpo", "ppo")]
    assert f["common_kl"] == pytest.approx(max(1e-3, min(10.0, *reached)))


def test_a_frontier_is_the_concave_envelope(reproduce: ModuleType) -> None:
    height = reproduce.load("E3").height
    assert height([(0.0, 0.0), (1.0, 1.0)], 1.0) == pytest.approx(0.5)
    assert height([(0.0, 0.0), (1.0, 1.0)], 2.0) == pytest.approx(0.75)  # level beyond the highest
    assert height([(3.0, 1.0), (1.0, 0.2), (2.0, 2.0), (0.0, 0.0)], 4.0) == pytest.approx(1.5)  # neither dip counts
    assert height([(0.0, 0.0), (1.0, 1.0), (3.0, 2.0)], 2.0) == pytest.approx((0.5 + 1.25) / 2)  # cut inside a segment


def test_win_rates_at_every_temperature(reproduce: ModuleType, tmp_path: Path) -> None:
    f = quick(reproduce, "E4", tmp_path)
    assert all(0 <= f[f"win_{arm}_{t}"] <= 1 for arm in ("dpo", "ppo") for t in ("0", "0.25", "0.5", "0.75", "1"))
    assert f["flatter"] == pytest.approx(abs(f["slope_ppo"]) - abs(f["slope_dpo"]), abs=1e-6)


def test_the_slope_is_least_squares(reproduce: ModuleType) -> None:
    e4 = reproduce.load("E4")
    t = torch.tensor(e4.TEMPERATURES)
    assert float(e4.slope(0.9 - 0.3 * t)) == pytest.approx(-0.3, abs=1e-6)
    assert e4.slope(torch.stack([t, -t])).tolist() == pytest.approx([1.0, -1.0])


def test_forgetting_by_weight_of_mix_and_kl(
    reproduce: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = {name: pair for name, pair in reproduce.load("E1").VARIANTS.items() if name in ("ppo", "ptx", "kl_100")}
    monkeypatch.setattr(reproduce.load("E1"), "VARIANTS", kept)
    f = quick(reproduce, "E1", tmp_path)
    for variant in kept:
        rises = [f[f"loss_{d}_{variant}"] - f[f"loss_{d}_base"] for d in ("prose", "sums", "recall")]
        assert f[f"rise_{variant}"] == pytest.approx(sum(rises) / 3)
        assert -1 <= f[f"reward_{variant}"] <= 1
    for variant in ("kl_100", "ptx"):
        assert f[f"removed_{variant}"] == pytest.approx(1 - f[f"rise_{variant}"] / f["rise_ppo"])
        assert f[f"kept_{variant}"] == pytest.approx(f[f"reward_{variant}"] / f["reward_ppo"])
    assert len({f[f"loss_sums_{v}"] for v in ("base", *kept)}) == 4


def test_e1_varies_one_weight_at_a_time(reproduce: ModuleType) -> None:
    e1 = reproduce.load("E1")
    assert {mix for mix, kl in e1.VARIANTS.values() if kl == e1.KL} == {0.0, 0.1, 0.3, 1.0, 10.0}
    assert {kl / e1.KL for mix, kl in e1.VARIANTS.values() if not mix} == {1.0, 10.0, 100.0}
    assert [e1.label_of(v) for v in ("ppo", "ptx_10", "kl_100")] == ["PPO", "PPO-ptx, 10", "PPO, KL x 100"]


def test_friendly_counts_to_three(reproduce: ModuleType) -> None:
    texts = ["the kind cat .", "the sad cat sees the dull dog .", "kind warm calm brave happy", "the cat ."]
    assert reproduce.load("E1").friendly(texts) == pytest.approx([1 / 3, -2 / 3, 1.0, 0.0])


def test_over_optimisation_of_every_reward_model(
    reproduce: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reproduce.load("E2"), "COMPARISONS", (20, 60))
    f = quick(reproduce, "E2", tmp_path)
    for n in (20, 60):
        golds = [f[f"n{n}_gold_{i}"] for i in range(3)]
        assert f[f"n{n}_kl_0"] == pytest.approx(0.0, abs=1e-5)
        best = golds.index(max(golds))
        near = 0.1 * (golds[best] - golds[0]) / f[f"n{n}_rise"] if f[f"n{n}_rise"] else 0.0
        kept = [f[f"n{n}_kl_{i}"] for i in range(3) if golds[i] >= golds[best] - near]
        assert f[f"n{n}_peak_kl"] == max(kept) >= f[f"n{n}_kl_{best}"]
        assert f[f"n{n}_fall"] * (golds[best] - golds[0]) == pytest.approx(f[f"n{n}_rise"] * (golds[best] - golds[-1]))
        gain = f[f"n{n}_proxy_2"] - f[f"n{n}_proxy_{best}"]
        assert f[f"n{n}_proxy_gain_after_peak"] == pytest.approx(gain)
    assert f["n20_gold_0"] == f["n60_gold_0"]
    assert f["n20_proxy_0"] != f["n60_proxy_0"]


def test_too_much_of_a_good_thing(reproduce: ModuleType) -> None:
    texts = ["the cat .", "kind", "kind warm calm", "kind warm calm brave", "kind " * 4 + "warm", "warm " * 9]
    assert [reproduce.load("E2").gold(t) for t in texts] == [0.0, 1.0, 3.0, 1.5, 0.0, -3.0]


def test_the_best_of_every_size(reproduce: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    e2b = reproduce.load("E2b")
    monkeypatch.setattr(e2b, "N", 16)
    monkeypatch.setattr(e2b, "AT_ONCE", 3)
    monkeypatch.setattr(e2b, "COMPARISONS", (20, 60))
    monkeypatch.setattr(e2b, "MODELS", [(20, 64), (60, 64), (60, 8)])
    f = quick(reproduce, "E2b", tmp_path)
    for label in ("n20_w64", "n60_w64", "n60_w8"):
        assert f[f"{label}_gold_1"] == f["n20_w64_gold_1"]  # the mean of the same samples
        proxies = [f[f"{label}_proxy_{n}"] for n in (1, 2, 4, 8, 16)]
        assert proxies == sorted(proxies)
        assert 0 <= f[f"{label}_accuracy"] <= 1
        assert f[f"{label}_fall"] >= 0
        assert 0 <= f[f"{label}_peak_kl"] <= math.log(16) - 15 / 16
    assert len({f[f"{label}_gold_16"] for label in ("n20_w64", "n60_w64", "n60_w8")}) > 1


def test_the_best_of_n_is_the_mean_over_all_subsets(reproduce: ModuleType) -> None:
    best_of = reproduce.load("E2b").best_of
    proxy, golds = torch.randn(2, 6, generator=torch.Generator().manual_seed(0)), torch.arange(12.0).view(2, 6) ** 2
    for n in range(1, 7):
        for row in range(2):
            subsets = list(itertools.combinations(range(6), n))
            best = [float(golds[row, max(s, key=lambda i: proxy[row, i])]) for s in subsets]
            assert float(best_of(proxy, golds, n)[row]) == pytest.approx(sum(best) / len(best), rel=1e-6)


def test_the_kl_of_the_best_of_n(reproduce: ModuleType) -> None:
    e2b = reproduce.load("E2b")
    # Over many equally likely answers the best of n has the density n u^(n-1) of its rank u in (0, 1).
    u = (torch.arange(1_000_000, dtype=torch.float64) + 0.5) / 1_000_000
    for n in (1, 2, 64):
        density = n * u ** (n - 1)
        assert e2b.kl_of(n) == pytest.approx(float((density * density.clamp(min=1e-300).log()).mean()), abs=1e-4)


def test_the_curve_of_best_of_n_is_fitted(reproduce: ModuleType) -> None:
    e2b = reproduce.load("E2b")
    d = [0.1 * i for i in range(12)]
    assert e2b.quadratic(d, [x * (2.0 - 0.5 * x) for x in d]) == pytest.approx((2.0, 0.5, 1.0))
    alpha, beta, r2 = e2b.quadratic([0.0, 1.0, 2.0, 3.0], [0.0, 1.0, 0.0, 1.0])
    assert r2 < 0.9
    x, y = torch.tensor([0.0, 1.0, 2.0, 3.0]), torch.tensor([0.0, 1.0, 0.0, 1.0])
    residual = y - x * (alpha - beta * x)
    assert [float((residual * x**k).sum()) for k in (1, 2)] == pytest.approx([0.0, 0.0], abs=1e-5)  # normal equations


def test_pairs_that_gold_ties_do_not_count(reproduce: ModuleType) -> None:
    golds = torch.tensor([[1.0, 2.0, 3.0, 3.0, 2.0, 0.0]])
    proxy = torch.tensor([[0.0, 5.0, 1.0, 0.0, 0.0, 1.0]])
    assert reproduce.load("E2b").accuracy(proxy, golds) == pytest.approx(0.5)


def test_comparisons_go_by_gold(reproduce: ModuleType, tmp_path: Path) -> None:
    e2, world = reproduce.load("E2"), importlib.import_module("small_world")
    world.pretrain(tmp_path, 0, 20, layers=2, width=64)
    words = world.tokenizer()
    network = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    rows = e2.comparisons(network, ["<s> the kind", "<s> the cold cat sees"], 1000, 0, e2.gold)
    assert 0 < len(rows) <= 12
    assert e2.comparisons(network, ["<s> the kind", "<s> the cold cat sees"], 2, 0, e2.gold) == rows[:2]
    for row in rows:
        better, worse = (e2.gold(words.decode(row[f"{side}_ids"])) for side in ("chosen", "rejected"))
        assert better > worse
        assert words.decode(row["prompt_ids"]) in ("<s> the kind", "<s> the cold cat sees")


def test_every_duel_of_the_headline(reproduce: ModuleType, tmp_path: Path) -> None:
    f = quick(reproduce, "E14", tmp_path)
    assert f["times"] == f["parameters_large"] / f["parameters_small"] >= 8
    for a, b in reproduce.load("E14").DUELS:
        rate, low, high = (f[f"{a}_over_{b}{end}"] for end in ("", "_low", "_high"))
        assert 0 <= rate <= 1
        assert low <= rate <= high
    assert f["gold_ppo"] != f["gold_sft"]
    assert f["loss_prose_sft"] != f["loss_prose_base"]


def test_a_win_rate_and_its_interval(reproduce: ModuleType) -> None:
    ours, theirs = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[0.0, 2.0], [1.0, 0.0]])
    # Prompts win .75 and .25: mean .5, standard deviation .5 / sqrt(2), standard error .25.
    assert reproduce.load("E14").win_rate(ours, theirs) == pytest.approx((0.5, 0.5 - 0.49, 0.5 + 0.49))


def test_demonstrations_go_on_where_the_prompt_ends(reproduce: ModuleType) -> None:
    e14 = reproduce.load("E14")
    prompts, _ = e14.prefixes(0, 50, 1)
    sentence = re.compile(r"the \w+ \w+ \w+ the \w+ \w+ \.")
    for prompt in prompts:
        whole = prompt.removeprefix("<s> ") + " " + e14.demonstration(prompt, random.Random(prompt))
        assert sentence.sub("", whole).strip() == "", whole


GOOD: dict[str, dict[str, float]] = {
    "E2b": {
        "n300_w64_peak_kl": 1.0,
        "n10000_w64_peak_kl": 2.0,
        **{f"n{n}_w64_r2": 0.95 for n in (300, 1000, 3000, 10000)},
    },
    "E2": {
        "n1000_rise": 1.0,
        "n1000_fall": 1.0,
        "n1000_peak_kl": 1.0,
        "n10000_peak_kl": 2.0,
        **{f"n{n}_proxy_gain_after_peak": 0.0 for n in (1000, 3000, 10000)},
    },
    "E14": {
        "times": 8.0,
        **{f"{duel}_low": 0.51 for duel in ("ppo_over_sft", "ptx_over_sft", "sft_over_base", "ptx_over_large_base")},
    },
    "E3": {"dpo_minus_ppo_low": 0.01, **{f"tabular_gap_{b}": 0.0 for b in ("0.1", "0.25", "0.5", "1", "2")}},
    "E4": {"flatter": 0.1, "flatter_low": 0.01, "kl_dpo": 3.0, "kl_ppo": 3.0},
}


@pytest.mark.parametrize("identifier", GOOD)
def test_every_figure_decides(reproduce: ModuleType, identifier: str) -> None:
    passed, good = reproduce.load(identifier).passed, GOOD[identifier]
    assert passed([good, good])
    assert not passed([])
    for name in good:
        for spoilt in (-2.0, float("nan")):
            assert not passed([good, {**good, name: spoilt}]), name


def test_a_kl_that_does_what_the_mix_does_decides(reproduce: ModuleType) -> None:
    passed = reproduce.load("E1").passed
    needed = {"rise_ppo": 1.0, "removed_ptx": 0.9, "kept_ptx": 0.97}
    good = {**needed, "removed_kl_10": 0.9, "kept_kl_10": 0.5, "removed_kl_100": 0.2, "kept_kl_100": 1.0}
    assert passed([good, good])
    assert not passed([])
    for name in needed:
        assert not passed([good, {**good, name: -2.0}]), name
    for name, value in (
        ("kept_kl_10", 0.96),
        ("removed_kl_100", 0.71),
        ("kept_kl_10", float("nan")),
        ("kept_ptx", 1.06),
    ):
        assert not passed([good, {**good, name: value}]), name
