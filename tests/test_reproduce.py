import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts" / "reproduce.py"


def recorded(folder: Path, identifier: str) -> dict[str, Any]:
    return json.loads((folder / identifier / "result.json").read_text())


def test_the_command_prints_and_records_a_claim(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "E8", "--quick", "--seeds", "2", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    record = recorded(tmp_path, "E8")
    assert set(record) == {"claim", "criterion", "seeds", "passed", "config_hash", "quick"}
    assert [f["seed"] for f in record["seeds"]] == [0, 1]
    assert record["passed"]
    for text in (record["claim"], record["criterion"], "ratio_0.05", "E8: PASSED"):
        assert text in done.stdout


def test_a_claim_that_does_not_hold_exits_with_one(
    reproduce: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Twenty steps are too few for the final lengths, but enough for their direction.
    assert reproduce.main(["E7a", "--quick", "--seeds", "1", "--first", "3", "--output", str(tmp_path)]) == 1
    assert "E7a: FAILED" in capsys.readouterr().out
    record = recorded(tmp_path, "E7a")
    assert not record["passed"]
    (f,) = record["seeds"]
    assert f["grpo_wrong"] > 15
    assert f["grpo_right"] < 5
    assert f["dr_wrong"] == pytest.approx(10, abs=1)
    assert f["dr_right"] == pytest.approx(10, abs=1)


def test_quick_runs_of_the_enumerable_model(reproduce: ModuleType, tmp_path: Path) -> None:
    assert reproduce.main(["E0", "--quick", "--seeds", "1", "--output", str(tmp_path)]) == 1
    (f,) = recorded(tmp_path, "E0")["seeds"]
    assert f["gradient_error"] < 1e-6
    assert f["exact_k1_reward"] == pytest.approx(1.108014, abs=1e-6)
    assert 0.9 < f["rloo_k1_reward_J"] < 1.108015  # from .468664 at the reference; nothing lies above the optimum


def test_every_run_is_recorded_and_says_what_it_lacks(
    reproduce: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(reproduce, "RESULTS", tmp_path)
    for arguments, seeds, note in (
        (["--quick", "--seeds", "1"], [0], "a quick run, 4 seeds missing"),
        (["--seeds", "2", "--first", "7"], [7, 8], "5 seeds missing"),
        ([], [0, 1, 2, 3, 4], ""),
        (["--seeds", "6"], [0, 1, 2, 3, 4, 5], ""),
    ):
        assert reproduce.main(["E8", *arguments]) == 0
        assert [f["seed"] for f in recorded(tmp_path, "E8")["seeds"]] == seeds
        assert ("git checkout" in capsys.readouterr().out) == bool(note)
        assert reproduce.main(["check"]) == 0
        said = f"with {len(seeds)} seeds" + (f" ({note})" if note else "")
        assert capsys.readouterr().out.strip().endswith(said)
    with pytest.raises(SystemExit):
        reproduce.main(["E8", "--seeds", "0"])


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("passed", False, "do not give"),
        ("config_hash", "0" * 64, "source has changed"),
        ("claim", "Something else.", "claim or criterion are not"),
        ("criterion", "", "claim or criterion are not"),
        ("seeds", [], "there are no figures"),
        ("seeds", [{"seed": 0}], "no readable record (KeyError"),
    ],
)
def test_check_finds_records_that_were_tampered_with(
    reproduce: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], field: str, value: Any, message: str
) -> None:
    reproduce.main(["E8", "--quick", "--seeds", "1", "--output", str(tmp_path)])
    assert reproduce.main(["check", "--output", str(tmp_path)]) == 0
    path = tmp_path / "E8" / "result.json"
    path.write_text(json.dumps(recorded(tmp_path, "E8") | {field: value}))
    assert reproduce.main(["check", "--output", str(tmp_path)]) == 1
    assert message in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", '{"claim": "cut', "[]", "{}"])
def test_check_of_a_broken_record(
    reproduce: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    for name in ("E8", "E99"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_text(text)
    assert reproduce.main(["check", "--output", str(tmp_path)]) == 1
    assert capsys.readouterr().out.count("no readable record") == 2


def test_a_shared_module_is_part_of_the_experiment(
    reproduce: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tests" / "package").mkdir(parents=True)
    for name, text in (
        ("e1", "from first import x\nfrom json import loads"),
        ("first", "from second import x"),
        ("second", "import third\nfrom package import fourth"),
        ("tests/third", "x = 1"),
        ("tests/package/fourth", "x = 1"),
    ):
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.setattr(reproduce, "EXPERIMENTS", tmp_path)
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    before = reproduce.config_hash("E1")
    assert reproduce.config_hash("E1") == before
    for name in ("second", "tests/third", "tests/package/fourth"):
        before, text = reproduce.config_hash("E1"), (tmp_path / f"{name}.py").read_text()
        (tmp_path / f"{name}.py").write_text(text + "\n")
        assert reproduce.config_hash("E1") != before


def test_check_of_nothing_is_no_success(reproduce: ModuleType, tmp_path: Path) -> None:
    assert reproduce.main(["check", "--output", str(tmp_path)]) == 1


def test_the_results_in_the_repository_are_sound(reproduce: ModuleType) -> None:
    assert reproduce.check(reproduce.RESULTS)
    for path in reproduce.RESULTS.glob("*/result.json"):  # what is reported has all its seeds
        assert not reproduce.partial(json.loads(path.read_text()), reproduce.load(path.parent.name)), path


@pytest.mark.parametrize("identifier", ["E0", "E7a", "E8"])
def test_every_figure_of_every_seed_decides(reproduce: ModuleType, identifier: str) -> None:
    figures, module = recorded(reproduce.RESULTS, identifier)["seeds"], reproduce.load(identifier)
    assert [f["seed"] for f in figures] == module.SEEDS
    assert module.passed(figures)
    assert not module.passed([])
    for i, f in enumerate(figures):
        for name in set(f) - {"seed"}:
            for spoilt in (f[name] + 2, float("nan")):
                assert not module.passed([*figures[:i], {**f, name: spoilt}, *figures[i + 1 :]]), name


@pytest.mark.parametrize(("p", "weight"), [(0.05, 2.4731), (0.125, 2.2642), (0.25, 2.0261), (0.5, 1.8557)])
def test_difficulty_weights_in_closed_form(reproduce: ModuleType, p: float, weight: float) -> None:
    predicted = reproduce.load("E8").predicted
    assert predicted(p) * 7 / 8 == pytest.approx(weight, abs=1e-4)
    assert predicted(1 - p) == pytest.approx(predicted(p), rel=1e-12)
    assert predicted(p, 1000) == pytest.approx((p * (1 - p)) ** -0.5, rel=0.02)  # large groups: 1 / sqrt(p (1 - p))


def test_an_unknown_claim_lists_the_known(reproduce: ModuleType) -> None:
    with pytest.raises(ValueError, match="E0, E1, E13, E14, E2, E2b, E3, E4, E7a, E8"):
        reproduce.load("E99")


def test_ppo_on_the_enumerable_model(reproduce: ModuleType, tmp_path: Path) -> None:
    """Fifty steps tell k1 in the reward from k3 in the loss already, and leave a picture."""
    assert reproduce.main(["E13", "--quick", "--seeds", "1", "--output", str(tmp_path)]) == 1
    (f,) = recorded(tmp_path, "E13")["seeds"]
    assert f["J_k1_reward"] > f["J_k3_loss"] + 0.01
    assert f["J_k1_reward"] > 0.7
    assert (tmp_path / "E13" / "e13.png").stat().st_size > 5000
