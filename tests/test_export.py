"""An exported folder, read back by transformers alone, computes what the checkpoint computed."""

from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_posttrain import cli
from lit_posttrain.checkpoint import write_checkpoint
from lit_posttrain.export import export, policy_config
from lit_posttrain.policy import LoraConfig, Policy, PolicyConfig

IDS = torch.tensor([[5, 80, 200, 7, 9, 33, 121]])


def trained(config: PolicyConfig) -> Policy:
    """A policy whose every trainable parameter differs from what its files hold."""
    policy = Policy(config).eval()
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(3)
        for _, parameter in policy.trainable():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return policy


def logits(network) -> torch.Tensor:
    with torch.no_grad():
        return network(input_ids=IDS).logits


def save_run(run: Path, policy: Policy, step: int = 4, only: str = "", **extra) -> Path:
    """What a training run leaves: its configuration and one checkpoint."""
    run.mkdir(parents=True, exist_ok=True)
    config = policy.config
    described = {"model": config.model, "lora": config.lora and {"r": config.lora.r, "alpha": config.lora.alpha}}
    model = {"class_path": "GRPO", "init_args": {"policy": {**described, "tokenizer": config.tokenizer}}}
    (run / "config.yaml").write_text(yaml.safe_dump({"seed_everything": 1, "model": model}))
    state = {f"policy.model.{k}": v for k, v in policy.model.state_dict().items() if only in k}

    def write(folder: Path) -> None:
        torch.save({"state_dict": {**state, **extra}, "global_step": step}, folder / "state.ckpt")

    write_checkpoint(run, write, step)
    return run


@pytest.fixture
def config(tiny_model) -> PolicyConfig:
    return PolicyConfig(model=str(tiny_model))


def test_weights_and_tokenizer_are_the_runs(config, tmp_path, capsys):
    policy = trained(config)
    run = save_run(tmp_path / "version_0", policy)
    cli.dispatch(["export", "--checkpoint", str(run), "--out", str(tmp_path / "out")], lambda: (object, object))
    assert "exported step 4" in capsys.readouterr().out
    assert (tmp_path / "out/model.safetensors").is_file()
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(reloaded), logits(policy.model), rtol=0, atol=1e-6)
    assert not torch.allclose(logits(reloaded), logits(Policy(config).model), atol=1e-2)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").encode("ab") == (
        AutoTokenizer.from_pretrained(config.model).encode("ab")
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "version_0"]


@pytest.mark.parametrize("only", ["lora_", ""])
def test_adapters_are_merged(config, tmp_path, only):
    policy = trained(PolicyConfig(model=config.model, lora=LoraConfig(r=2, alpha=8)))
    run = save_run(tmp_path / "version_0", policy, only=only)
    export(str(run), str(tmp_path / "out"))
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not [name for name, _ in reloaded.named_parameters() if "lora" in name]
    torch.testing.assert_close(logits(reloaded), logits(policy.model), rtol=0, atol=1e-3)
    assert not torch.allclose(logits(reloaded), logits(Policy(config).model), atol=1e-1)


def test_a_folder_that_reads_back_differently_is_not_left_behind(config, tmp_path, monkeypatch):
    run = save_run(tmp_path / "version_0", trained(config))
    monkeypatch.setattr(Policy, "save_pretrained", lambda self, out: Policy(config).model.save_pretrained(out))
    with pytest.raises(ValueError, match="other numbers than the checkpoint"):
        export(str(run), str(tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["version_0"]


def test_weights_that_are_not_numbers_are_not_exported(config, tmp_path):
    policy = trained(config)
    next(policy.model.parameters()).data.fill_(torch.nan)
    with pytest.raises(ValueError, match="nan"):
        export(str(save_run(tmp_path / "version_0", policy)), str(tmp_path / "out"))


def test_a_damaged_newest_checkpoint_is_passed_over(config, tmp_path, capsys):
    run = save_run(tmp_path / "version_0", trained(config))
    save_run(run, trained(config), step=8)
    state = run / "checkpoints/step-8/state.ckpt"
    state.write_bytes(state.read_bytes()[:-1] + b"?")
    export(str(run), str(tmp_path / "out"))
    assert "exported step 4" in capsys.readouterr().out
    with pytest.raises(ValueError, match="step-8"):
        export(str(state.parent), str(tmp_path / "other"))


def test_last_of_an_experiment(config, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_run(Path("logs/tiny/version_0"), trained(config))
    logger = {"class_path": "TensorBoardLogger", "init_args": {"save_dir": "logs", "name": "tiny"}}
    Path("exp.yaml").write_text(yaml.safe_dump({"trainer": {"logger": logger}}))
    words = ["export", "--checkpoint", "last", "--config", "exp.yaml", "--out", "out"]
    cli.dispatch(words, lambda: (object, object))
    assert "exported step 4 of logs/tiny/version_0 to out" in capsys.readouterr().out


def test_a_checkpoint_of_another_network_is_refused(config, tmp_path):
    policy = trained(config)
    out = str(tmp_path / "out")
    with pytest.raises(ValueError, match=r"does not fit .*model.layers.0.self_attn.q_proj.weight"):
        export(str(save_run(tmp_path / "version_0", policy, only="k_proj")), out)
    extra = {"policy.model.lm_tail.weight": torch.ones(1)}
    with pytest.raises(ValueError, match=r"does not fit .*lm_tail"):
        export(str(save_run(tmp_path / "version_1", policy, **extra)), out)
    extra = {"policy.model.model.norm.weight": torch.ones(3)}
    with pytest.raises(ValueError, match=r"(?s)does not fit .*size mismatch"):
        export(str(save_run(tmp_path / "version_2", policy, **extra)), out)
    adapted = trained(PolicyConfig(model=config.model, lora=LoraConfig(r=2)))
    with pytest.raises(ValueError, match=r"does not fit .*lora_B"):
        export(str(save_run(tmp_path / "version_3", adapted, only="lora_A")), out)


@pytest.mark.parametrize(("text", "part"), [(None, "not found"), ("a: 1", "describes no policy"), ("- 1", "no policy")])
def test_a_run_without_its_configuration_is_refused(config, tmp_path, text, part):
    run = save_run(tmp_path / "version_0", trained(config))
    (run / "config.yaml").unlink()
    if text is not None:
        (run / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=part):
        export(str(run), str(tmp_path / "out"))


def test_nothing_is_overwritten(config, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/precious").touch()
    with pytest.raises(ValueError, match="not an empty folder"):
        export(str(save_run(tmp_path / "version_0", trained(config))), str(tmp_path / "out"))
    assert (tmp_path / "out/precious").exists()


def test_the_policy_is_described_as_the_run_was(config, tmp_path):
    policy = Policy(PolicyConfig(model=config.model, tokenizer=config.model, lora=LoraConfig(r=3, alpha=5)))
    assert policy_config(save_run(tmp_path / "version_0", policy)) == (policy.config, Policy)


def test_a_moving_average_is_what_is_exported(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """After two steps it is d^2 w0 + d (1 - d) w1 + (1 - d) w2; the last weights on request; no critic in either."""
    from ppo_runs import ppo
    from tiny_runs import Watch, fit, prompts, weights

    from lit_posttrain.callbacks import CheckpointEvery
    from lit_posttrain.critic import CriticConfig

    seen: list[dict[str, torch.Tensor]] = []
    watch = Watch(lambda trainer, module: seen.append(weights(module)))
    module = ppo(tiny_model, lr=0.1, ema_decay=0.75, critic=CriticConfig(shared=True))
    fit(module, prompts(tiny_model, tmp_path), tmp_path, watch, CheckpointEvery(2), max_steps=2)
    given = {"policy": {"model": str(tiny_model)}, "critic": {"shared": True}}
    model = {"class_path": "lit_posttrain.algorithms.PPO", "init_args": given}
    (tmp_path / "version_0" / "config.yaml").write_text(yaml.safe_dump({"seed_everything": 1, "model": model}))
    start = dict(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).named_parameters())
    words = ["export", "--checkpoint", str(tmp_path / "version_0"), "--out"]
    cli.dispatch([*words, str(tmp_path / "average")], lambda: (object, object))
    assert "moving average" in capsys.readouterr().out
    cli.dispatch([*words, str(tmp_path / "last"), "--last_weights"], lambda: (object, object))
    assert "moving average" not in capsys.readouterr().out
    for name, parameter in AutoModelForCausalLM.from_pretrained(tmp_path / "average").named_parameters():
        expected = 0.5625 * start[name] + 0.1875 * seen[0][name] + 0.25 * seen[1][name]
        torch.testing.assert_close(parameter, expected, atol=1e-6, rtol=1e-5)
    for name, parameter in AutoModelForCausalLM.from_pretrained(tmp_path / "last").named_parameters():
        torch.testing.assert_close(parameter.detach(), seen[1][name])


def test_a_moving_average_of_adapters_is_merged_from_a_checkpoint_without_the_base(
    tiny_model: Path, tmp_path: Path
) -> None:
    from ppo_runs import ppo
    from tiny_runs import fit, prompts

    from lit_posttrain.callbacks import CheckpointEvery

    module = ppo(tiny_model, lr=0.5, ema_decay=0.75, policy={"lora": LoraConfig(r=2, alpha=4)})
    fit(module, prompts(tiny_model, tmp_path), tmp_path, CheckpointEvery(2), max_steps=2)
    given = {"policy": {"model": str(tiny_model), "lora": {"r": 2, "alpha": 4}}}
    model = {"class_path": "lit_posttrain.algorithms.PPO", "init_args": given}
    (tmp_path / "version_0" / "config.yaml").write_text(yaml.safe_dump({"seed_everything": 1, "model": model}))
    state = torch.load(tmp_path / "version_0/checkpoints/step-2/state.ckpt", weights_only=True)["state_dict"]
    saved = {name.removeprefix("average.") for name in state if name.startswith("average.")}
    assert saved == {f"model.{name}" for name, _ in module.built_policy().trainable()}
    export(str(tmp_path / "version_0"), str(tmp_path / "out"))
    assert module.average is not None
    module.average.save_pretrained(tmp_path / "expected")
    exported, expected, start = (
        dict(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).named_parameters())
        for folder in (tmp_path / "out", tmp_path / "expected", tiny_model)
    )
    for name, parameter in exported.items():
        torch.testing.assert_close(parameter, expected[name], atol=1e-6, rtol=1e-5)
    assert max(float((exported[n] - start[n]).abs().max()) for n in exported) > 1e-4
