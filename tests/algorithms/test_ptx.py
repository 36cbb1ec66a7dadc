"""The pretraining loss beside an update: gradients add up, nothing else changes, its position is the iteration's."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ppo_runs import GROUP, ppo
from tiny_runs import BATCH, Failing, Recorder, curve, fit, gap, grpo, prompts, scalars, weights
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_posttrain.algorithms.pretraining import Pretraining, PtxConfig
from lit_posttrain.critic import CriticConfig
from lit_posttrain.data import Preferences, SupervisedExamples, UnpairedPreferences
from lit_posttrain.data.mixture import Source

LR = 1e-2
TEXTS = [f"{i}{'abcdefgh'[: i % 7 + 1]} {i * 37 % 101}" for i in range(48)]


def text(path: Path, texts: list[str] = TEXTS) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return str(path)


def ptx(folder: Path, coef: float = 1.0, ratio: float = 2.0, **overrides: Any) -> PtxConfig:
    arguments: dict[str, Any] = {
        "batch_size": int(ratio * BATCH * GROUP), "held_out_percent": 0, "val_size": 0, "supervise": "all",
    }  # fmt: skip
    if "datasets" not in overrides:
        arguments["dataset"] = text(folder / "text.jsonl")
    return PtxConfig(coef=coef, ratio=ratio, data=SupervisedExamples(**{**arguments, **overrides}))


def run(build: Any, tiny: Path, folder: Path, steps: int = 1, **overrides: Any) -> Any:
    folder.mkdir(parents=True, exist_ok=True)
    module = build(tiny, lr=LR, max_grad_norm=None, **overrides)
    return fit(module, prompts(tiny, folder), folder, max_steps=steps)


@pytest.mark.trap(36)
@pytest.mark.parametrize("build", [ppo, grpo])
@pytest.mark.parametrize("budget", [1024, 30])
def test_the_step_is_the_sum_of_both_gradients(build: Any, tiny_model: Path, tmp_path: Path, budget: int) -> None:
    """With SGD the weights move by -lr (g_rl + coef g_text): the text's by HF's own loss, token mean over the batch."""
    start = dict(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).named_parameters())
    alone = weights(run(build, tiny_model, tmp_path / "rl"))
    both = weights(run(build, tiny_model, tmp_path / "both", ptx=ptx(tmp_path, 3.0), token_budget=budget))
    seen = PtxConfig.__dataclass_fields__ and ptx(tmp_path).data
    seen.tokenizer = str(tiny_model)
    seen.setup("fit")
    batch = seen.batch(0)
    network = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    total, count = torch.zeros(()), 0
    for ids, length in zip(batch.sequences.ids, batch.sequences.lengths.tolist(), strict=True):
        row = ids[None, :length]
        total = total + network(input_ids=row, labels=row).loss * (length - 1)  # HF's mean over the row's tokens
        count += length - 1
    (total / count).backward()
    for name, p in network.named_parameters():
        expected = alone[name] - LR * 3.0 * p.grad
        torch.testing.assert_close(both[name], expected, atol=1e-6, rtol=1e-5)
    assert gap(alone, both) > 1e-3
    assert gap(start, alone) > 1e-5
    values = scalars(tmp_path / "both")
    assert values["train/loss/ptx"][0][1] == pytest.approx(float(total / count), rel=1e-5)
    norm = sum(float(p.grad.square().sum()) for p in network.parameters()) ** 0.5
    assert values["train/grad_norm/ptx"][0][1] == pytest.approx(3.0 * norm, rel=1e-4)
    rl = sum(float((alone[n] - start[n]).square().sum()) for n in alone) ** 0.5 / LR
    assert values["train/grad_norm/rl"][0][1] == pytest.approx(rl, rel=1e-3)


@pytest.mark.parametrize("build", [ppo, grpo])
def test_a_coefficient_of_zero_is_bit_identical_to_none(build: Any, tiny_model: Path, tmp_path: Path) -> None:
    without = run(build, tiny_model, tmp_path / "without", steps=3, num_minibatches=2)
    with_zero = run(build, tiny_model, tmp_path / "zero", steps=3, num_minibatches=2, ptx=ptx(tmp_path, 0.0))
    for a, b in zip(without.parameters(), with_zero.parameters(), strict=True):
        assert torch.equal(a, b)
    assert curve(tmp_path / "without", "train/loss") == curve(tmp_path / "zero", "train/loss")


def test_minibatches_and_epochs_share_out_the_text(tiny_model: Path, tmp_path: Path) -> None:
    """Every example of a pass is read once in each epoch, and the next pass goes on behind it."""
    config = ptx(tmp_path, ratio=1.0)
    module = ppo(tiny_model, ptx=config, num_minibatches=4, num_epochs=2)
    read: list[tuple[int, ...]] = []
    stream = module.pretraining.stream  # type: ignore[union-attr]

    def watching(*arguments: Any) -> Any:
        found = stream(*arguments)
        rows = [i for b in found.micro_batches for i in b.sequences.ids.tolist()]
        read.append((len(rows), int(found.totals.tokens), *sorted(hash(tuple(r)) for r in rows)))
        return found

    module.pretraining.stream = watching  # type: ignore[union-attr]
    fit(module, prompts(tiny_model, tmp_path), tmp_path, max_steps=3)
    assert [n for n, *_ in read] == [2] * 24  # 8 examples over 4 minibatches, 3 iterations of 2 epochs
    for i in range(24):
        wanted = config.data.batch(i // 4).sequences
        rows = slice(i % 4, None, 4)
        assert read[i][1] == int((wanted.lengths[rows] - 1).sum())
    assert len({r[2:] for r in read}) == 24


@pytest.mark.parametrize("shared", [False, True])
def test_no_text_is_read_while_the_policy_rests(tiny_model: Path, tmp_path: Path, shared: bool) -> None:
    """Afterwards it begins where it would have been: its position follows from the iteration."""
    module = ppo(tiny_model, ptx=ptx(tmp_path), critic=CriticConfig(shared=shared, warmup=1), num_epochs=2)
    read: list[int] = []
    batch = module.pretraining.data.batch  # type: ignore[union-attr]
    module.pretraining.data.batch = lambda number: (read.append(number), batch(number))[1]  # type: ignore[union-attr]
    fit(module, prompts(tiny_model, tmp_path), tmp_path, max_steps=2)
    assert read == [2, 3]
    assert [step for step, _ in scalars(tmp_path)["train/loss/ptx"]] == [2]


def test_a_first_minibatch_without_a_valid_answer_is_trained_on_its_text(tiny_model: Path, tmp_path: Path) -> None:
    seen = [0]

    def rarely(_: Any) -> bool:
        seen[0] += 1
        return seen[0] % (BATCH * GROUP) != 1

    module = ppo(tiny_model, [Failing(rarely)], ptx=ptx(tmp_path), num_minibatches=8)
    recorder = Recorder(module)
    fit(module, prompts(tiny_model, tmp_path), tmp_path, max_steps=2)
    assert "loss/ptx" in recorder.results[0].metrics
    assert "sampling/sampling_logp_difference/mean" not in recorder.results[0].metrics


def test_comparisons_are_no_text(tiny_model: Path, tmp_path: Path) -> None:
    """Chosen and rejected completions would be learned alike."""
    rows = [{"prompt": f"{i}", "chosen": "b", "rejected": "c"} for i in range(48)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for kind in (Preferences, UnpairedPreferences):
        data = kind(dataset=str(tmp_path / "pairs.jsonl"), batch_size=16, held_out_percent=0, val_size=0)
        module = ppo(tiny_model, ptx=PtxConfig(coef=1.0, ratio=2.0, data=data))
        with pytest.raises(ValueError, match=rf"model\.init_args\.ptx\.data: {kind.__name__} .*pairs\.jsonl"):
            fit(module, prompts(tiny_model, tmp_path), tmp_path)


def test_a_ratio_that_floats_cannot_hold(tiny_model: Path, tmp_path: Path) -> None:
    """1.1 x 10 is a little more than 11."""
    config = ptx(tmp_path, ratio=1.1, batch_size=11)
    module: Any = SimpleNamespace(num_minibatches=1, trainer=None)
    Pretraining(config).setup(module, 10, AutoTokenizer.from_pretrained(tiny_model))


def test_a_mixture_is_drawn_by_weight(tiny_model: Path, tmp_path: Path) -> None:
    a, b = text(tmp_path / "a.jsonl", ["aaaa"] * 40), text(tmp_path / "b.jsonl", ["bbbbbb"] * 40)
    config = ptx(tmp_path, datasets=[Source(path=a, weight=3.0), Source(path=b, weight=1.0)], batch_size=16)
    module = ppo(tiny_model, ptx=config)
    fit(module, prompts(tiny_model, tmp_path), tmp_path, max_steps=3)
    drawn = config.data.draws(3)
    assert sum(drawn.values()) == 48
    assert sorted(drawn.values())[1] > 24


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 15}, r"ptx\.data\.init_args\.batch_size: 15 is not ratio x answers.* = 2 x 8 = 16"),
        ({"tokenizer": "elsewhere"}, r"ptx\.data\.init_args\.tokenizer"),
        ({"dataset": "nowhere.jsonl"}, r"ptx\.data\.init_args\.dataset"),
    ],
)
def test_what_does_not_fit_is_said_before_a_model_is_loaded(
    tiny_model: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    module = ppo(tiny_model, ptx=ptx(tmp_path, **change))
    with pytest.raises(ValueError, match=message):
        fit(module, prompts(tiny_model, tmp_path), tmp_path)
    assert module.policy is None


@pytest.mark.parametrize(("name", "value"), [("coef", -1.0), ("ratio", 0.0), ("coef", float("nan"))])
def test_values_out_of_range_are_refused(tmp_path: Path, name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"ptx\.{name}"):
        ptx(tmp_path, **{name: value} if name == "coef" else {}) if name == "coef" else PtxConfig(
            coef=1.0, ratio=value, data=ptx(tmp_path).data
        )


def test_long_texts_become_several_examples_without_a_gap(tiny_model: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    texts = ["abcdefghijklmnopqrstuvwxyz", "xy", "0123456789"]
    data = SupervisedExamples(
        dataset=text(tmp_path / "t.jsonl", texts), batch_size=2, held_out_percent=0, val_size=0, supervise="all",
        max_length=10, long_examples="split", tokenizer=str(tiny_model),
    )  # fmt: skip
    data.setup("fit")
    rows = [e.prompt + e.completions[0] for e in data.examples("train")]
    whole = [[tokenizer.bos_token_id, *tokenizer(t).input_ids, tokenizer.eos_token_id] for t in texts]
    bos = 0 if rows[0][0] == tokenizer.bos_token_id else 1
    for parts in whole:
        ids, joined = parts[bos:], []
        while len(joined) < len(ids) - (len(ids) % 10 == 1):
            joined += rows.pop(0)
        assert joined == ids[: len(joined)]
    assert not rows
    assert all(all(e.masks[0]) and len(e.prompt) == 1 for e in data.examples("train"))
