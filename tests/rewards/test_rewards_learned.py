"""Rewards from reward models: the scores are those of the model's own forward pass, whatever comes between."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from ppo_runs import ppo
from tiny import byte_tokenizer, write_tiny_model
from tiny_runs import curve, fit, gap, prompts, trainer, weights
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
)

from lit_posttrain.callbacks import CheckpointEvery
from lit_posttrain.checkpoint import newest_checkpoint
from lit_posttrain.data import Template
from lit_posttrain.export_scores import write_tokenizer
from lit_posttrain.policy import PolicyConfig
from lit_posttrain.rewards import LearnedReward, PythonReward, RewardError, judge
from lit_posttrain.scalar_heads import ScoreNetwork
from lit_posttrain.types import Sample

CPU = torch.device("cpu")


def sample(prompt: Any, completion: str, stop: Any = "stop") -> Sample:
    return Sample(prompt, completion, [1], stop, None, {})


def chat(*texts: str) -> list[dict[str, str]]:
    return [{"role": "user" if i % 2 == 0 else "assistant", "content": t} for i, t in enumerate(texts)]


SAMPLES = [
    sample("Say 1:", " one"),
    sample("Say 1:", " two, or three"),
    sample("Say 1:", ""),
    sample("Another prompt.", "cut off here", "length"),
    sample("Another prompt.", "<|im_end|> spelled <|im_start|>"),
]


@pytest.fixture(scope="module")
def model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported reward model whose scores are shifted and scaled."""
    os.environ["PL_GLOBAL_SEED"] = "1"
    network = ScoreNetwork(PolicyConfig(model=str(tiny_model), compute_dtype="float32"))
    network.gain.fill_(3.0)
    network.shift.fill_(0.7)
    folder = tmp_path_factory.mktemp("rm") / "model"
    network.save_pretrained(folder)
    write_tokenizer(AutoTokenizer.from_pretrained(tiny_model), folder)
    return folder


def learned(model: Path, **overrides: Any) -> LearnedReward:
    reward = LearnedReward(str(model), compute_dtype="float32", **overrides)
    reward.place(CPU)
    return reward


def by_hf(folder: Path, rows: list[list[int]]) -> list[float]:
    """Each row alone, unpadded."""
    network: Any = AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=True
    ).eval()
    with torch.no_grad():
        return [float(network(input_ids=torch.tensor([row])).logits[0, 0]) for row in rows]


@pytest.mark.trap(31)
@pytest.mark.parametrize("budget", [1, 60, 4096])
def test_scores_of_texts_are_the_models(model: Path, budget: int) -> None:
    """BOS in front, the end token where the policy ended the answer, and nowhere else."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = []
    for s in SAMPLES:
        ids = tokenizer(s.prompt).input_ids
        answer = tokenizer(s.completion, add_special_tokens=False).input_ids
        rows.append([*ids, *answer, *([tokenizer.eos_token_id] if s.stop_reason == "stop" else [])])
    got = judge([learned(model, token_budget=budget, weight=2.0)], SAMPLES)
    assert got.valid.all()
    assert got.rewards.tolist() == pytest.approx([2 * v for v in by_hf(model, rows)], abs=2e-5)
    assert len(set(got.rewards.tolist())) == len(SAMPLES)


def test_scores_of_conversations_go_through_the_models_own_template(model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    first, second = chat("Hello"), chat("Hello", "Hi.", "And now?")
    samples = [sample(first, "I am fine."), sample(second, "Well,", "length")]
    texts = [
        "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nI am fine.<|im_end|>",
        "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nHi.<|im_end|>\n"
        "<|im_start|>user\nAnd now?<|im_end|>\n<|im_start|>assistant\nWell,",
    ]
    expected = by_hf(model, [tokenizer(t, add_special_tokens=False).input_ids for t in texts])
    assert learned(model).scores(samples) == pytest.approx(expected, abs=2e-5)


def test_another_architecture_with_another_vocabulary(tmp_path: Path) -> None:
    """GPT-2 with left-over space in its vocabulary, and BERT, which is no causal model at all."""
    tokenizer = byte_tokenizer(None)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        gpt2 = GPT2ForSequenceClassification(
            GPT2Config(vocab_size=300, n_embd=16, n_layer=1, n_head=2, n_positions=64, num_labels=1, pad_token_id=299)
        )
        bert = BertForSequenceClassification(
            BertConfig(
                vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
                max_position_embeddings=64, num_labels=3,
            )
        )  # fmt: skip
    for name, network in (("gpt2", gpt2), ("bert", bert)):
        network.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    samples = [sample("ab", "cd"), sample("ab", "cdefg"), sample(chat("q"), "r")]
    with pytest.raises(RewardError, match="chat template"):
        learned(tmp_path / "gpt2").scores(samples)
    rows = [[*tokenizer(s.prompt).input_ids, *tokenizer(s.completion).input_ids, 1] for s in samples[:2]]
    gpt2.eval()
    with torch.no_grad():
        expected = [float(gpt2(input_ids=torch.tensor([row])).logits[0, 0]) for row in rows]
    assert learned(tmp_path / "gpt2").scores(samples[:2]) == pytest.approx(expected, abs=1e-5)
    with pytest.raises(ValueError, match=r"rewards\.init_args\.label: .* 3 outputs"):
        learned(tmp_path / "bert")
    bert.eval()
    with torch.no_grad():
        expected = [
            float(bert(**tokenizer(p, c, return_tensors="pt")).logits[0, 2])
            for p, c in (("ab", "cd"), ("ab", "cdefg"), ("q", "r"))
        ]
    got = learned(tmp_path / "bert", label=2, token_budget=20).scores(samples)
    assert got == pytest.approx(expected, abs=1e-5)


def test_answers_that_do_not_fit(tmp_path: Path) -> None:
    """A long prompt keeps its end; a long answer has no score, and harms nobody else."""
    os.environ["PL_GLOBAL_SEED"] = "1"
    small = write_tiny_model(tmp_path / "small", max_position_embeddings=24)
    reward = learned(_as_reward_model(small, tmp_path / "rm"))
    whole = reward.scores([sample("x" * 10 + "abcdefgh", "ijkl")])
    long, never, fine = reward.scores(
        [sample("y" * 50 + "x" * 10 + "abcdefgh", "ijkl"), sample("a", "b" * 40), SAMPLES[0]]
    )
    assert isinstance(long, float)
    assert isinstance(fine, float)
    assert never.status == "invalid"  # type: ignore[union-attr]
    assert len(whole) == 1


def _as_reward_model(base: Path, folder: Path) -> Path:
    ScoreNetwork(PolicyConfig(model=str(base), compute_dtype="float32")).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def test_calibration_makes_the_untrained_policys_answers_score_0(tiny_model: Path, model: Path, tmp_path: Path) -> None:
    """The mean is taken over one answer to each of the first prompts; what follows counts from it."""
    reward = LearnedReward(str(model), calibration=6, compute_dtype="float32")
    seen: list[Any] = []
    calibrate = reward.calibrate
    reward.calibrate = lambda samples: (seen.append(list(samples)), calibrate(samples))[1]  # type: ignore
    fit(ppo(tiny_model, [reward], lr=0.0), prompts(tiny_model, tmp_path), tmp_path, max_steps=2)
    (samples,) = seen
    assert len({s.prompt for s in samples}) == len(samples) == 6
    raw = learned(model).scores(samples)
    assert reward.mean == pytest.approx(sum(raw) / 6, abs=1e-5)  # type: ignore[arg-type]
    assert abs(reward.mean) > 0.1
    means = curve(tmp_path, "train/rewards/LearnedReward/mean")
    assert max(abs(m) for m in means) < abs(reward.mean)
    again = LearnedReward(str(model), calibration=6, compute_dtype="float32")
    again.restore(reward.state())
    assert judge([again], SAMPLES).rewards.tolist() == judge([reward], SAMPLES).rewards.tolist()


@pytest.mark.parametrize(
    ("arguments", "key"),
    [({"calibration": -1}, "calibration"), ({"token_budget": 0}, "token_budget"), ({"weight": float("nan")}, "weight")],
)
def test_arguments_out_of_range(model: Path, arguments: dict[str, Any], key: str) -> None:
    with pytest.raises(ValueError, match=key):
        LearnedReward(str(model), **arguments)


def test_what_is_no_classifier_is_refused_before_anything_is_sampled(tiny_model: Path, tmp_path: Path) -> None:
    for wrong, message in (
        (tiny_model, "not a sequence classifier"),
        (tmp_path / "nowhere", r"rewards\.init_args\.model"),
    ):
        module = ppo(tiny_model, [LearnedReward(str(wrong))])
        folder = tmp_path / f"{wrong.name}-run"
        folder.mkdir()
        with pytest.raises(ValueError, match=message):
            fit(module, prompts(tiny_model, folder), folder)


def test_a_classifier_without_some_of_its_weights_is_refused(tmp_path: Path) -> None:
    """transformers would only warn, and score with random numbers."""
    from safetensors.torch import load_file, save_file

    config = BertConfig(vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_labels=1)
    BertForSequenceClassification(config).save_pretrained(tmp_path / "bert")
    byte_tokenizer(None).save_pretrained(tmp_path / "bert")
    learned(tmp_path / "bert")
    file = tmp_path / "bert" / "model.safetensors"
    save_file({n: t for n, t in load_file(file).items() if n != "classifier.weight"}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"rewards\.init_args\.model: .* lack 1 weights, classifier\.weight"):
        learned(tmp_path / "bert")


def test_an_evaluation_of_a_checkpoint_counts_from_its_mean(tiny_model: Path, model: Path, tmp_path: Path) -> None:
    def evaluated(folder: Path, state: Path | None) -> LearnedReward:
        reward = LearnedReward(str(model), calibration=6, compute_dtype="float32")
        folder.mkdir()
        data = prompts(tiny_model, folder, held_out_percent=40, val_size=2, batch_size=2)
        trainer(folder, limit_val_batches=1).validate(ppo(tiny_model, [reward]), data, ckpt_path=state, verbose=False)
        return reward

    trained = LearnedReward(str(model), calibration=6, compute_dtype="float32")
    run = {"max_steps": 1, "limit_val_batches": 0}
    fit(ppo(tiny_model, [trained]), prompts(tiny_model, tmp_path), tmp_path, CheckpointEvery(1), **run)
    found = newest_checkpoint(tmp_path / "version_0")
    assert found is not None
    assert trained.mean is not None
    assert evaluated(tmp_path / "with", found.state).mean == trained.mean
    with pytest.warns(UserWarning, match=r"rewards\.init_args\.calibration: no checkpoint"):
        assert evaluated(tmp_path / "without", None).mean is None


def test_a_watched_reward_that_fails_changes_nothing(tiny_model: Path, tmp_path: Path) -> None:
    def boom(completions: list[str], **_: Any) -> list[float]:
        raise KeyError("x")

    def length(completions: list[str], **_: Any) -> list[float]:
        return [float(len(text) % 7) for text in completions]

    found = []
    for name, watched in (("alone", []), ("watched", [PythonReward(boom, timeout=10.0, weight=0.0, name="boom")])):
        (tmp_path / name).mkdir()
        rewards = [PythonReward(length, timeout=10.0, name="length"), *watched]
        found.append(weights(fit(ppo(tiny_model, rewards), prompts(tiny_model, tmp_path / name), tmp_path / name)))
    assert gap(*found) == 0.0


def test_two_rewards_of_one_name_are_refused_at_once(tiny_model: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.init_args\.rewards: two functions are called 'LearnedReward'"):
        ppo(tiny_model, [LearnedReward("a"), LearnedReward("b")])
    ppo(tiny_model, [LearnedReward("a"), second := LearnedReward("b", name="second")])
    with pytest.raises(ValueError, match=r"model\.init_args\.rewards\[1\]\.init_args\.model: there is no folder"):
        second.place(CPU)


def test_prompts_that_the_reward_model_cannot_read_stop_the_run_early(
    tiny_model: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(model, bare)
    byte_tokenizer(None).save_pretrained(bare)
    (bare / "chat_template.jinja").unlink(missing_ok=True)
    module = ppo(tiny_model, [LearnedReward(str(bare), compute_dtype="float32")])
    monkeypatch.setattr(module, "collect", lambda *_: pytest.fail("something was sampled"))
    with pytest.raises(ValueError, match=r"rewards\.init_args\.model: .* cannot read the prompts .*no chat template"):
        fit(module, prompts(tiny_model, tmp_path, template=Template(kind="chat")), tmp_path)
