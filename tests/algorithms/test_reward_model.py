"""Reward models: the published loss, each completion scored once, scores as exported, labels and steps."""

import itertools
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from offline_runs import KINDS, data, fit, module, pair, trained, write
from tiny import byte_tokenizer
from tiny_runs import Recorder, curve
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast

from lit_posttrain.callbacks import CheckpointEvery
from lit_posttrain.data import Preferences
from lit_posttrain.export import export
from lit_posttrain.metrics import calibration_error
from lit_posttrain.policy import LoraConfig, PolicyConfig
from lit_posttrain.scalar_heads import ScoreNetwork, last_tokens
from lit_posttrain.types import ExampleBatch


def raw(model: Any, ids: Tensor, lengths: Tensor) -> Tensor:
    """Scores of a classifier's decoder and head, a row at a time, in fp64 behind the decoder."""
    scores = []
    for row, length in zip(ids, lengths, strict=True):
        with torch.no_grad():
            hidden = model.model(input_ids=row[None, :length]).last_hidden_state[0, -1].double()
        scores.append(hidden @ model.score.weight[0].double() + model.score.bias[0].double())
    return torch.stack(scores)


def started(model: Path) -> ScoreNetwork:
    """The network as a run begins with it."""
    return ScoreNetwork(PolicyConfig(model=str(model), compute_dtype="float32")).eval()


def recorded(kind: str, model: Path, folder: Path, steps: int = 1, examples: Any = None, **overrides: Any) -> Any:
    folder.mkdir(parents=True, exist_ok=True)
    run = module(kind, model, **overrides)
    run.recorder = Recorder(run)
    return fit(run, examples or data(kind, model, folder), folder, max_steps=steps)


def equation_one(batch: ExampleBatch, scores: Tensor, margin: float = 0.0) -> float:
    """InstructGPT Eq. 1: mean over prompts of the mean over their pairs; ties are no pairs."""
    prompts = []
    for g in batch.columns["group"].unique():
        rows = (batch.columns["group"] == g).nonzero()[:, 0].tolist()
        terms = []
        for i, j in itertools.combinations(rows, 2):
            a, b = batch.columns["preference"][i], batch.columns["preference"][j]
            if a != b:
                w, l = (i, j) if a > b else (j, i)  # noqa: E741
                terms.append(-logsigmoid(scores[w] - scores[l] - margin))
        if terms:
            prompts.append(sum(terms) / len(terms))
    return float(sum(prompts) / len(prompts))


@pytest.mark.trap(32)
@pytest.mark.parametrize("budget", [1, 4096])
def test_the_loss_is_equation_one_and_each_completion_is_scored_once(
    budget: int, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    forward = ScoreNetwork.forward

    def counted(self: Any, sequences: Any, at: Tensor) -> Tensor:
        assert torch.equal(at, last_tokens(sequences))
        seen.append(len(sequences.ids))
        return forward(self, sequences, at)

    monkeypatch.setattr(ScoreNetwork, "forward", counted)
    run = recorded("rm", tiny_model, tmp_path, token_budget=budget)
    batch = run.trainer.datamodule.batch(0)
    scores = raw(started(tiny_model).model, batch.sequences.ids, batch.sequences.lengths)
    (result,) = run.recorder.results
    assert result.metrics["loss"] == pytest.approx(equation_one(batch, scores), rel=1e-5)
    examples = run.trainer.datamodule
    assert sum(seen) == len(batch.sequences.ids) == sum(
        len(examples.examples("train")[i].completions) for i in examples._permutation(0)[:4]
    )  # fmt: skip
    assert len(seen) == (4 if budget == 1 else 1)  # a prompt's completions stay together
    pairs = [(i, j) for i, j in itertools.permutations(range(len(scores)), 2)
             if batch.columns["group"][i] == batch.columns["group"][j]
             and batch.columns["preference"][i] > batch.columns["preference"][j]]  # fmt: skip
    gaps = [float(scores[i] - scores[j]) for i, j in pairs]
    assert result.metrics["accuracy"] == pytest.approx(sum(g > 0 for g in gaps) / len(gaps))
    assert result.metrics["margin"] == pytest.approx(sum(gaps) / len(gaps), rel=1e-4, abs=1e-6)
    assert result.extremes["max_reward"] == pytest.approx(float(scores.max()), rel=1e-5)
    assert -result.extremes["min_reward"] == pytest.approx(float(scores.min()), rel=1e-5)


def test_margins_and_centring(tiny_model: Path, tmp_path: Path) -> None:
    def row(i: int) -> dict[str, Any]:
        return {**pair(i), "margin": 1.5}

    examples = data("rm", tiny_model, tmp_path, dataset=str(write(tmp_path / "m.jsonl", row)))
    run = recorded("rm", tiny_model, tmp_path, examples=examples, centring=0.1)
    batch = examples.batch(0)
    scores = raw(started(tiny_model).model, batch.sequences.ids, batch.sequences.lengths)
    added = 0.1 * (scores.view(-1, 2).sum(-1) ** 2).mean()
    expected = equation_one(batch, scores, 1.5) + float(added)
    assert run.recorder.results[0].metrics["loss"] == pytest.approx(expected, rel=1e-5)


def test_centring_of_rankings_is_a_mean_over_pairs(tiny_model: Path, tmp_path: Path) -> None:
    run = recorded("rm", tiny_model, tmp_path, centring=0.1)
    batch = run.trainer.datamodule.batch(0)
    scores = raw(started(tiny_model).model, batch.sequences.ids, batch.sequences.lengths)
    group, better = batch.columns["group"], batch.columns["preference"]
    pairs = [
        (i, j)
        for i, j in itertools.combinations(range(len(scores)), 2)
        if group[i] == group[j] and better[i] != better[j]
    ]
    added = 0.1 * sum(float(scores[i] + scores[j]) ** 2 for i, j in pairs) / len(pairs)
    expected = equation_one(batch, scores) + added
    assert run.recorder.results[0].metrics["loss"] == pytest.approx(expected, rel=1e-5)


def test_a_new_head_is_drawn_as_published(tiny_model: Path) -> None:
    """N(0, 1 / (d + 1)) and bias 0; the seed decides."""
    heads = [started(tiny_model).model.score for _ in range(2)]  # type: ignore[union-attr]
    assert torch.equal(heads[0].weight, heads[1].weight)  # type: ignore[union-attr]
    assert float(heads[0].bias) == 0.0  # type: ignore[union-attr]
    assert float(heads[0].weight.std()) == pytest.approx(1 / math.sqrt(33), rel=0.4)  # type: ignore[union-attr]


# --- export ---------------------------------------------------------------------------------------------------------


def demonstrations(folder: Path, count: int = 7) -> Path:
    return write(folder / "demos.jsonl", KINDS["sft"][2], count)


def sample(i: int) -> dict[str, Any]:
    return {"prompt": f"{i}", "completion": "y" * (i + 1)}


def exported(model: Path, folder: Path, lora: LoraConfig | None = None, **overrides: Any) -> tuple[Any, Any, Path]:
    folder.mkdir(parents=True, exist_ok=True)
    examples = Preferences(
        batch_size=4, tokenizer=str(model), held_out_percent=0, val_batch_size=3,
        dataset=str(write(folder / "rm.jsonl", KINDS["rm"][2])), demonstrations=str(demonstrations(folder)),
        reference_samples=str(write(folder / "samples.jsonl", sample, 9)),
    )  # fmt: skip
    policy = {"lora": lora} if lora else None
    run = module("rm", model, lr=0.05, policy=policy, **overrides)
    fit(run, examples, folder, CheckpointEvery(2), max_steps=2)
    described: dict[str, Any] = {"model": str(model), "compute_dtype": "float32"}
    if lora:
        described["lora"] = {"r": lora.r, "alpha": lora.alpha}
    config = {"class_path": "lit_posttrain.algorithms.RewardModel", "init_args": {"policy": described}}
    (folder / "version_0/config.yaml").write_text(yaml.safe_dump({"seed_everything": 1, "model": config}))
    export(str(folder / "version_0"), str(folder / "out"))
    network = AutoModelForSequenceClassification.from_pretrained(
        folder / "out", trust_remote_code=True, dtype=torch.float32
    )
    return run, network.eval(), folder / "out"


def texts(folder: Path, name: str) -> list[str]:
    import json

    rows = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    return [r["prompt"] + r["completion"] for r in rows]


def as_others_score(network: Any, out: Path, rows: list[str], side: str = "right") -> Tensor:
    """As any user of transformers would: the tokenizer of the folder pads, the end token is written out."""
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.pad_token_id == network.config.pad_token_id
    assert tokenizer.padding_side == "right"
    tokenizer.padding_side = side
    inputs = tokenizer([r + tokenizer.eos_token for r in rows], padding=True, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    if side == "left":
        inputs["position_ids"] = inputs["attention_mask"].cumsum(-1).sub(1).clamp(min=0)
    with torch.no_grad():
        return network(**inputs).logits[:, 0]


@pytest.mark.trap(31)
@pytest.mark.parametrize("lora", [None, LoraConfig(r=2)], ids=["whole", "adapters"])
@pytest.mark.parametrize("unit_variance", [False, True])
def test_exported_scores_are_the_normalised_ones(
    lora: LoraConfig | None, unit_variance: bool, tiny_model: Path, tmp_path: Path
) -> None:
    run, network, out = exported(tiny_model, tmp_path, lora, unit_variance=unit_variance)
    own = run.network()
    batches = run.trainer.datamodule.demonstrations()
    scores = as_others_score(network, out, texts(tmp_path, "demos.jsonl"))
    assert len(scores) == 7
    assert float(scores.mean()) == pytest.approx(0.0, abs=1e-4)
    assert float(scores.std()) > 1e-3
    by_left = as_others_score(network, out, texts(tmp_path, "demos.jsonl"), "left")
    torch.testing.assert_close(by_left, scores, rtol=1e-4, atol=1e-5)
    gain = float(own.gain)
    assert (gain == 1.0) == (not unit_variance)
    with torch.no_grad(), own.decoding():
        raw_scores = torch.cat([own(b.sequences, last_tokens(b.sequences)) for b in batches])
    torch.testing.assert_close(
        scores[:, None] - scores, gain * (raw_scores[:, None] - raw_scores), rtol=1e-4, atol=1e-5
    )
    again = ScoreNetwork(PolicyConfig(model=str(out), compute_dtype="float32")).eval()
    with torch.no_grad():
        read = torch.cat([again.normalised(again(b.sequences, last_tokens(b.sequences))) for b in batches])
    torch.testing.assert_close(read, scores, rtol=1e-4, atol=1e-5)
    if unit_variance:
        samples = as_others_score(network, out, texts(tmp_path, "samples.jsonl"))
        assert float(samples.var(correction=0)) == pytest.approx(1.0, rel=1e-3)


def test_a_checkpoint_holds_the_scale_of_its_weights(tiny_model: Path, tmp_path: Path) -> None:
    """Also where the weights were copied off an accelerator before the hook: what moves then is not what is saved."""
    run = recorded("rm", tiny_model, tmp_path, normalise=True)
    checkpoint = {"state_dict": {name: value.clone() for name, value in run.state_dict().items()}}
    assert float(checkpoint["state_dict"]["policy.shift"]) == 0.0
    run.on_save_checkpoint(checkpoint)
    batches = run.trainer.datamodule.demonstrations()
    scores = torch.cat([raw(run.network().model, b.sequences.ids, b.sequences.lengths) for b in batches])
    assert len(scores) == 16
    assert float(checkpoint["state_dict"]["policy.shift"]) == pytest.approx(float(scores.mean()), rel=1e-4)
    assert abs(float(scores.mean())) > 1e-3


def test_without_normalisation_scores_stay_raw(tiny_model: Path, tmp_path: Path) -> None:
    run, network, out = exported(tiny_model, tmp_path, normalise=False)
    assert float(run.network().gain) == 1.0
    assert float(run.network().shift) == 0.0
    rows = texts(tmp_path, "demos.jsonl")
    (batch, *_) = run.trainer.datamodule.demonstrations()
    expected = raw(run.network().model, batch.sequences.ids, batch.sequences.lengths)
    got = as_others_score(network, out, rows[: len(expected)])
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)
    assert abs(float(as_others_score(network, out, rows).mean())) > 1e-3


def test_the_chat_template_ends_where_training_did(tiny_model: Path, tmp_path: Path) -> None:
    _, _, out = exported(tiny_model, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(out)
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    assert tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)[-1] == tokenizer.eos_token_id
    own = AutoTokenizer.from_pretrained(tiny_model)
    asked: Any = {"tokenize": False, "add_generation_prompt": True}
    assert tokenizer.apply_chat_template(messages[:1], **asked) == own.apply_chat_template(messages[:1], **asked)


def test_what_cannot_be_is_refused(tiny_model: Path) -> None:
    with pytest.raises(ValueError, match=r"model.init_args.centring: must not be negative"):
        module("rm", tiny_model, centring=-0.1)
    with pytest.raises(ValueError, match=r"model.init_args.unit_variance: needs normalise"):
        module("rm", tiny_model, unit_variance=True, normalise=False)


# --- evaluation -----------------------------------------------------------------------------------------------------


def test_evaluation_is_the_loss_on_held_out_rankings(tiny_model: Path, tmp_path: Path) -> None:
    run = module("rm", tiny_model, lr=0.01)
    examples = data("rm", tiny_model, tmp_path, val_size=5, held_out_percent=40, val_batch_size=2)
    fit(run, examples, tmp_path, max_steps=2, limit_val_batches=1.0, val_check_interval=2)
    whole = examples.collate("val", list(range(examples.size("val"))), list(range(examples.size("val"))))
    assert examples.size("val") > 2
    scores = raw(run.network().model, whole.sequences.ids, whole.sequences.lengths)
    assert curve(tmp_path, "eval/loss") == [pytest.approx(equation_one(whole, scores), rel=1e-4)]
    better, group = whole.columns["preference"], whole.columns["group"]
    w, l = ((better[:, None] > better) & (group[:, None] == group)).nonzero(as_tuple=True)  # noqa: E741
    gaps = scores[w] - scores[l]
    assert curve(tmp_path, "eval/accuracy") == [pytest.approx(float((gaps > 0).double().mean()), rel=1e-5)]
    # Pairs of one ranking hang together: the variance of the ratio over rankings, and Wilson's interval with it.
    accuracy, of = float((gaps > 0).double().mean()), group[w].tolist()
    off = [sum(float(g > 0) - accuracy for g, i in zip(gaps, of, strict=True) if i == ranking) for ranking in set(of)]
    odds = 1.959964**2 * sum(x**2 for x in off) / len(of) ** 2 / (accuracy * (1 - accuracy))  # z^2 / effective number
    middle, root = (accuracy + odds / 2) / (1 + odds), (accuracy * (1 - accuracy) * odds + odds**2 / 4) ** 0.5
    assert len(set(of)) > 2
    assert 0 < accuracy < 1
    assert curve(tmp_path, "eval/accuracy_low") == [pytest.approx(middle - root / (1 + odds), rel=1e-4)]
    assert curve(tmp_path, "eval/accuracy_high") == [pytest.approx(middle + root / (1 + odds), rel=1e-4)]
    ece = calibration_error(gaps.abs().sigmoid().float(), gaps > 0)
    assert curve(tmp_path, "eval/ece") == [pytest.approx(ece, abs=1e-4)]
    assert curve(tmp_path, "eval/max_reward") == [pytest.approx(float(scores.max()), rel=1e-4)]
    assert curve(tmp_path, "eval/min_reward") == [pytest.approx(float(scores.min()), rel=1e-4)]


# --- labels ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [1, 4096])
def test_pointwise_is_cross_entropy_at_the_last_token(budget: int, tiny_model: Path, tmp_path: Path) -> None:
    run = recorded("safety", tiny_model, tmp_path, token_budget=budget)
    batch = run.trainer.datamodule.batch(0)
    scores = raw(started(tiny_model).model, batch.sequences.ids, batch.sequences.lengths)
    labels = batch.columns["label"].double()
    assert 0 < labels.sum() < len(labels)
    expected = -(labels * logsigmoid(scores) + (1 - labels) * logsigmoid(-scores)).mean()
    (result,) = run.recorder.results
    assert result.metrics["loss"] == pytest.approx(float(expected), rel=1e-5)
    assert result.metrics["accuracy"] == pytest.approx(float(((scores > 0) == (labels > 0)).double().mean()))
    assert result.metrics["mean_reward"] == pytest.approx(float(scores.mean()), rel=1e-4)


@pytest.mark.parametrize("budget", [1, 4096])
def test_process_rewards_are_read_at_each_steps_last_token(budget: int, tiny_model: Path, tmp_path: Path) -> None:
    run = recorded("prm", tiny_model, tmp_path, token_budget=budget)
    examples = run.trainer.datamodule
    network, tokenizer = started(tiny_model).model, AutoTokenizer.from_pretrained(tiny_model)
    terms = []
    for i in examples._permutation(0)[:4]:
        row = KINDS["prm"][2](i)
        text = row["prompt"]
        steps = row["completions"]
        for k, (step, label) in enumerate(zip(steps, row["labels"], strict=True)):
            text += step + ("\n" if k < len(steps) - 1 else tokenizer.eos_token)
            ids = torch.tensor([tokenizer.encode(text)])
            (score,) = raw(network, ids, torch.tensor([ids.shape[1]]))
            terms.append(-logsigmoid(score if label else -score))
    assert len(terms) > 4
    assert run.recorder.results[0].metrics["loss"] == pytest.approx(float(sum(terms)) / len(terms), rel=1e-5)


@pytest.mark.parametrize("kind", ["safety", "prm"])
def test_labelled_models_are_evaluated_and_saved(kind: str, tiny_model: Path, tmp_path: Path) -> None:
    examples = data(kind, tiny_model, tmp_path, val_size=4, held_out_percent=40)
    run = trained(kind, tiny_model, tmp_path, CheckpointEvery(2), data=examples)
    with torch.no_grad():
        run.trainer.limit_val_batches = 1.0
    assert (tmp_path / "version_0/checkpoints").is_dir()
    run = module(kind, tiny_model)
    fit(run, examples, tmp_path / "second", limit_val_batches=1.0, val_check_interval=2)
    assert 0 <= curve(tmp_path / "second", "eval/ece")[0] <= 1
    assert 0 <= curve(tmp_path / "second", "eval/accuracy")[0] <= 1


def test_a_tokenizer_that_scores_could_not_be_exported_with(tiny_model: Path, tmp_path: Path) -> None:
    """GPT-2's knows one special token, which ends texts."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    backend = json.loads(byte_tokenizer().backend_tokenizer.to_str())
    backend["added_tokens"] = [token for token in backend["added_tokens"] if token["content"] == "<|im_end|>"]
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(backend)), eos_token="<|im_end|>", pad_token="<|im_end|>"
    ).save_pretrained(folder)
    run = module("rm", folder)
    with pytest.raises(ValueError, match=r"policy\.model: the tokenizer has no special token besides its end token"):
        fit(run, data("rm", folder, tmp_path), tmp_path)
