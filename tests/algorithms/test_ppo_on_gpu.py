"""PPO-ptx on a GPU: in fp32 the weights a CPU gives, own critic or shared head; in bf16 it runs and moves both."""

from pathlib import Path
from typing import Any

import pytest
import torch
from ppo_runs import ppo, ppo_objective
from test_ptx import ptx
from tiny_runs import curve, fit, prompts

from lit_posttrain.critic import CriticConfig
from lit_posttrain.policy import PolicyConfig

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


def trained(model: Path, folder: Path, accelerator: str, dtype: Any = "float32", **overrides: Any) -> dict[str, Any]:
    folder.mkdir()
    module = ppo(model, objective=ppo_objective(kl=0.2), ptx=ptx(folder, 0.5), token_budget=60, **overrides)
    module.policy_config = PolicyConfig(model=str(model), compute_dtype=dtype)
    fit(module, prompts(model, folder), folder, accelerator=accelerator)
    return {name: p.detach().cpu().clone() for name, p in module.named_parameters()}


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("epochs", [1, 2])
def test_a_gpu_trains_as_a_cpu(tiny_model: Path, tmp_path: Path, shared: bool, epochs: int) -> None:
    how = {"critic": CriticConfig(shared=shared), "num_epochs": epochs}
    ours, theirs = (trained(tiny_model, tmp_path / kind, kind, **how) for kind in ("gpu", "cpu"))
    for tag in ("reward", "loss/value_avg", "objective/kl", "val/explained_variance"):
        values = [curve(tmp_path / kind, f"train/{tag}") for kind in ("gpu", "cpu")]
        assert values[0] == pytest.approx(values[1], rel=1e-3, abs=1e-5), tag
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=1e-4, atol=1e-5)


def test_bf16_moves_policy_and_critic(tiny_model: Path, tmp_path: Path) -> None:
    start = trained(tiny_model, tmp_path / "still", "gpu", "bfloat16", lr=0.0)
    moved = trained(tiny_model, tmp_path / "moved", "gpu", "bfloat16", lr=0.1)
    for part in ("policy.", "critic."):
        assert any(not torch.equal(w, start[name]) for name, w in moved.items() if name.startswith(part))
    assert all(bool(w.isfinite().all()) for w in moved.values())
