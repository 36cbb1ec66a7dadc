"""The benchmark's PPO section on a tiny model, beside GRPO and the last TRL that has PPO."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

SCRIPTS = Path(__file__).parent.parent / "scripts"
sys.path.insert(0, str(SCRIPTS))

from benchmarks import cli, models, ppo  # noqa: E402

TINY = ["--random_init", "tiny-llama", "--threads", "1", "--prompts", "2", "--samples", "4", "--prompt_tokens", "12"]
TINY += ["--new_tokens", "16", "--device", "cpu", "--dtype", "float32", "--micro_batches", "4,8"]
TOKENS = 2 * 4 * 16


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    path = tmp_path_factory.mktemp("bench") / "results.json"
    command = [sys.executable, str(SCRIPTS / "bench.py"), "ppo", *TINY, "--repeats", "2", "--peer", "trl"]
    ran = subprocess.run(
        [*command, "--json", str(path)], capture_output=True, text=True, check=False, cwd=path.parent, timeout=900
    )
    assert ran.returncode == 0, ran.stderr
    return SimpleNamespace(out=ran.stdout, results=json.loads(path.read_text()))


def test_a_step_beside_grpo_on_the_same_tokens(done: SimpleNamespace) -> None:
    r = done.results["ppo"]
    ours, grpo = r["grpo"]["ppo"], r["grpo"]["grpo"]
    assert ours["tokens"] == grpo["tokens"] == [TOKENS] * 2
    ratio = grpo["tokens_per_s"]["median"] / ours["tokens_per_s"]["median"]
    assert r["step_vs_grpo"] == pytest.approx(ratio)
    # One update a rollout: the critic's pass in it gives the values, and nothing else is scored.
    assert {"rollout", "reward", "update"} <= set(ours["phases_s"])
    assert not {"scoring"} & set(ours["phases_s"])
    assert r["order"][:4] == ["grpo/ours", "grpo/ours grpo"] * 2


def test_beside_trl(done: SimpleNamespace) -> None:
    r = done.results["ppo"]
    ours, trl = r["headline"]["ours"], r["headline"]["trl"]
    assert done.results["machine"]["versions"]["trl (ppo)"] == "1.12.0"
    assert r["speedup_vs_trl"] == pytest.approx(ours["tokens_per_s"]["median"] / trl["tokens_per_s"]["median"])
    assert r["speedup_vs_trl_bf16"] is None  # both compute in fp32
    assert r["activation_memory_vs_trl"] > 0
    assert r["peak_memory_vs_trl"] == pytest.approx(ours["peak_bytes"] / trl["peak_bytes"])
    assert list(r["micro_batches"]["trl fp32"]) == ["4", "8"]
    assert all(0 < n <= TOKENS for n in (*ours["tokens"], *trl["tokens"]))
    assert trl["phases_s"]["rollout"] > 0


def test_both_sides_hold_the_same_networks(done: SimpleNamespace) -> None:
    """Policy, critic, reference and reward model: fp32, of the published shape."""
    c = models.CONFIGS["tiny-llama"]
    hidden, inner, kv = c["hidden_size"], c["intermediate_size"], c["hidden_size"] // 2
    layer = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * inner + 2 * hidden
    policy = c["vocab_size"] * hidden + c["num_hidden_layers"] * layer + hidden
    ours, trl = (done.results["ppo"]["headline"][side]["static_bytes"] for side in ("ours", "trl"))
    assert ours["reference"] == trl["reference"] == 4 * policy
    assert trl["reward_model"] == 4 * (policy + hidden)
    assert abs(ours["reward_model"] - trl["reward_model"]) <= 4  # ours has a bias
    assert trl["parameters"] == trl["gradients"] == 4 * (2 * policy + hidden)
    assert ours["parameters"] == ours["gradients"] == 4 * policy
    assert abs(ours["critic"] - 2 * 4 * (policy + hidden)) <= 8
    assert abs(ours["optimizer"] - trl["optimizer"]) < 1000


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["ppo", *TINY, "--variants", "masters"]) == 1
    assert "none of them is one of ppo, which has grpo, headline, bf16" in capsys.readouterr().err
    monkeypatch.setattr(ppo, "PEERS", Path("/nowhere"))
    assert cli.main(["ppo", *TINY, "--variants", "headline", "--peer", "trl"]) == 1
    assert "scripts/env.sh dev installs it" in capsys.readouterr().err
    assert cli.main(["ppo", *TINY[:-1], "3", "--variants", "headline", "--peer", "trl"]) == 1
    assert "none of [3] divides prompts * samples = 8" in capsys.readouterr().err
