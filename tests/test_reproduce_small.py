"""Reproductions in the small world: quick runs, and what decides a verdict."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch


def quick(reproduce: ModuleType, identifier: str, folder: Path) -> dict[str, Any]:
    """Figures of a quick run with one seed, which leaves a picture."""
    reproduce.main([identifier, "--quick", "--seeds", "0", "--output", str(folder)])
    assert (folder / identifier / f"{identifier.lower()}.png").stat().st_size > 5000
    (f,) = json.loads((folder / identifier / "result.json").read_text())["seeds"]
    return f


def test_every_arm_of_the_frontiers(reproduce: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("BETAS", "COEFS", "LEARNED_COEFS"):  # a run of each, not four
        monkeypatch.setattr(reproduce.load("E3"), name, (0.1,))
    f = quick(reproduce, "E3", tmp_path)
    for beta, kl, reward in ((0.1, 4.216675, 2.484760), (0.5, 1.198484, 1.707256), (2, 0.078321, 0.767740)):
        assert f[f"tabular_kl_{beta}"] == pytest.approx(kl, abs=2e-3)
        assert f[f"tabular_reward_{beta}"] == pytest.approx(reward, abs=2e-3)
    runs = {name.removeprefix("kl_").rsplit("_", 1)[0] for name in f if name.startswith("kl_")}
    assert runs == {"dpo_0.1", "ppo_0.1", "learned_0.1", "preferred_ft"}
    assert f["dpo_minus_ppo_low"] <= f["dpo_minus_ppo_high"]


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


def test_forgetting_with_and_without_the_mix(reproduce: ModuleType, tmp_path: Path) -> None:
    f = quick(reproduce, "E1", tmp_path)
    assert f["removed"] == pytest.approx(1 - f["rise_ptx"] / f["rise_ppo"])
    for variant in ("ppo", "ptx"):
        rises = [f[f"loss_{d}_{variant}"] - f[f"loss_{d}_base"] for d in ("prose", "sums", "recall")]
        assert f[f"rise_{variant}"] == pytest.approx(sum(rises) / 3)
        assert -1 <= f[f"reward_{variant}"] <= 1
    assert f["loss_sums_ppo"] != f["loss_sums_ptx"]


def test_friendly_counts_to_three(reproduce: ModuleType) -> None:
    texts = ["the kind cat .", "the sad cat sees the dull dog .", "kind warm calm brave happy", "the cat ."]
    assert reproduce.load("E1").friendly(texts) == pytest.approx([1 / 3, -2 / 3, 1.0, 0.0])


GOOD: dict[str, dict[str, float]] = {
    "E1": {"rise_ppo": 1.0, "removed": 0.9, "reward_ptx": 0.9, "reward_ppo": 0.91},
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
