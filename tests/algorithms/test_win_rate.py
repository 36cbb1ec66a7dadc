"""Win rates: the number, its interval, judges and their errors, as an evaluation and during training."""

import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from offline_runs import KINDS, data, fit, module, write
from tiny import byte_tokenizer, write_tiny_model
from tiny_runs import curve, grpo, prompts, trainer
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from two_processes import train_in_two

from lit_posttrain.algorithms.generations import GenerationConfig
from lit_posttrain.algorithms.win_rate import WinRate, WinRateDuringTraining, compare, given
from lit_posttrain.data import Preferences
from lit_posttrain.judges import Answer, Judge, PythonJudge, RewardJudge, RewardModelJudge, by_score
from lit_posttrain.metrics import WinRate as Metric
from lit_posttrain.metrics import calibration_error
from lit_posttrain.policy import PolicyConfig
from lit_posttrain.rewards import LearnedReward, PythonReward, RewardError
from lit_posttrain.scalar_heads import ScoreNetwork
from lit_posttrain.types import Sample

SHORT = GenerationConfig(max_new_tokens=5)


def answers(*lengths: int) -> list[Answer]:
    return [Answer([5, i + 1], [7] * n + [1], f"p{i}", "x" * n) for i, n in enumerate(lengths)]


class Recording(Judge):
    """The longer answer is better; keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, str]] = []

    def compare(self, first: Sequence[Answer], second: Sequence[Answer]) -> list[float]:
        assert [a.prompt for a in first] == [b.prompt for b in second]
        self.asked += [(a.prompt, a.text, b.text) for a, b in zip(first, second, strict=True)]
        return by_score([float(len(a.ids)) for a in first], [float(len(b.ids)) for b in second])


# --- comparing ------------------------------------------------------------------------------------------------------


def test_each_pair_is_asked_in_both_orders() -> None:
    judge, ours, theirs = Recording(), answers(*range(1, 9)), answers(*[4] * 8)
    outcomes = compare(judge, ours, theirs, seed=3)
    assert outcomes == [0.0, 0.0, 0.0, 0.5, 1.0, 1.0, 1.0, 1.0]
    expected = [(a.prompt, a.text, b.text) for a, b in zip(ours, theirs, strict=True)]
    expected += [(a.prompt, b.text, a.text) for a, b in zip(ours, theirs, strict=True)]
    assert sorted(judge.asked) == sorted(expected)
    # Which comes first is drawn: neither side leads in all pairs.
    leads = sum(asked == ours_first for asked, ours_first in zip(judge.asked[:8], expected[:8], strict=True))
    assert 0 < leads < 8


@pytest.mark.parametrize("favoured", ["first", "second", 0.8])
def test_a_position_biased_judge_comes_out_at_one_half(favoured: Any) -> None:
    judge = PythonJudge(lambda prompts, first, second: [favoured] * len(prompts))
    outcomes = compare(judge, answers(*range(9)), answers(*range(1, 10)), seed=1)
    assert outcomes == pytest.approx([0.5] * 9)


# --- the metric -----------------------------------------------------------------------------------------------------


def computed(*parts: list[float]) -> dict[str, float]:
    metric = Metric()
    for part in parts:
        metric.update(torch.tensor(part))
    return {name: float(value) for name, value in metric.compute().items()}


def test_a_tie_counts_half() -> None:
    got = computed([1.0, 0.5, 0.0], [1.0, 0.5])
    assert got["win_rate"] == pytest.approx(0.6)
    assert (got["wins"], got["ties"], got["losses"]) == pytest.approx((0.4, 0.4, 0.2))


def test_outcomes_that_were_gathered_from_several_processes() -> None:
    """A sync makes one tensor of the batches."""
    metric = Metric()
    metric.update(torch.tensor([1.0, 0.5]))
    metric.outcomes = torch.tensor([1.0, 0.5, 0.0, 0.5], dtype=torch.float64)  # type: ignore[assignment]
    assert float(metric.compute()["win_rate"]) == 0.5


def test_the_interval_of_wins_and_losses_is_wilsons() -> None:
    """36 of 60: 0.4737 to 0.7143, by the closed form."""
    got = computed([1.0] * 36 + [0.0] * 24)
    p, n, z = 0.6, 60, 1.959964
    centre, root = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    assert got["win_rate_low"] == pytest.approx((centre - root) / (1 + z * z / n), abs=1e-6)
    assert got["win_rate_high"] == pytest.approx((centre + root) / (1 + z * z / n), abs=1e-6)
    assert got["win_rate_low"] == pytest.approx(0.4737, abs=1e-3)


@pytest.mark.parametrize("values", [[1.0], [0.0] * 4, [0.5] * 10, [1.0, 0.5, 0.0], [0.5] * 9 + [1.0]])
def test_the_interval_contains_the_rate(values: list[float]) -> None:
    got = computed(values)
    assert 0 <= got["win_rate_low"] <= got["win_rate"] <= got["win_rate_high"] <= 1
    assert got["win_rate_high"] - got["win_rate_low"] > 0.01


def test_ties_make_the_interval_smaller_than_a_coins() -> None:
    def width(values: list[float]) -> float:
        got = computed(values)
        return got["win_rate_high"] - got["win_rate_low"]

    assert width([0.5] * 80 + [1.0, 0.0] * 10) < 0.6 * width([1.0, 0.0] * 50)


def test_the_interval_covers_what_it_says() -> None:
    """Of samples whose outcomes are 1, 0.5 and 0 with 0.3, 0.5 and 0.2, some 95% have 0.55 inside."""
    generator = torch.Generator().manual_seed(0)
    inside = 0
    for _ in range(400):
        draw = torch.multinomial(torch.tensor([0.3, 0.5, 0.2]), 80, replacement=True, generator=generator)
        got = computed(torch.tensor([1.0, 0.5, 0.0])[draw].tolist())
        inside += got["win_rate_low"] <= 0.55 <= got["win_rate_high"]
    assert 0.92 <= inside / 400 <= 0.98


def test_calibration_of_hand_made_values() -> None:
    """Two bins: three at 0.95 of which two are right, one at 0.65 that is right: 0.75 |0.95 - 2/3| + 0.25 * 0.35."""
    got = calibration_error(torch.tensor([0.95, 0.95, 0.95, 0.65]), torch.tensor([True, True, False, True]))
    assert got == pytest.approx(0.75 * (0.95 - 2 / 3) + 0.25 * 0.35, abs=1e-6)
    # Errors of opposite sign cancel within a bin only.
    assert calibration_error(torch.tensor([0.75, 0.75]), torch.tensor([True, False])) == pytest.approx(0.25)
    assert calibration_error(torch.tensor([0.5, 0.5]), torch.tensor([True, False])) == 0.0
    assert calibration_error(torch.tensor([1.0, 1.0]), torch.tensor([True, True])) == 0.0
    assert calibration_error(torch.tensor([0.05, 0.95]), torch.tensor([True, False])) == pytest.approx(0.95)
    one_bin = calibration_error(torch.tensor([0.05, 0.95]), torch.tensor([True, False]), bins=1)
    assert one_bin == pytest.approx(0.0, abs=1e-6)


# --- judges ---------------------------------------------------------------------------------------------------------


def test_verdicts_of_a_callable() -> None:
    said: list[Any] = ["first", "second", "tie", None, 1, 0, 0.5, True, 0.25, torch.tensor(1.0), numpy.float32(0.5)]
    judge = PythonJudge(lambda prompts, first, second: said)
    each = answers(*[1] * len(said))
    assert judge.compare(each, each) == [1.0, 0.0, 0.5, 0.5, 1.0, 0.0, 0.5, 1.0, 0.25, 1.0, 0.5]
    with pytest.raises(ValueError, match=r"judge.init_args.function: returned a NoneType"):
        PythonJudge(lambda prompts, first, second: None).compare(each, each)
    seen: list[Any] = []
    PythonJudge(lambda *texts: seen.append(texts) or [0.5]).compare(answers(2), answers(3))
    assert seen == [(["p0"], ["xx"], ["xxx"])]


@pytest.mark.parametrize(
    ("verdicts", "message"),
    [
        ([1.0, 0.0], r"judge.init_args.function: 2 verdicts for 1 pairs"),
        ([], r"0 verdicts for 1 pairs"),
        (["A"], r"judge.init_args.function: 'A' is none of 'first', 'second', 'tie' or a number from 0 to 1"),
        ([1.5], r"1.5 is none of"),
        ([float("nan")], r"nan is none of"),
        ([[1]], r"\[1\] is none of"),
    ],
)
def test_a_callable_that_says_something_else(verdicts: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PythonJudge(lambda prompts, first, second: verdicts).compare(answers(1), answers(2))


def test_rewards_judge_and_an_invalid_one_ties() -> None:
    def lengths(completions: list[str], **_: Any) -> list[float | None]:
        return [None if len(text) == 3 else float(len(text)) for text in completions]

    judge = RewardJudge([PythonReward(lengths, timeout=10.0)])
    assert judge.compare(answers(5, 1, 2), answers(1, 5, 2)) == [1.0, 0.0, 0.5]
    judge.close()
    with pytest.raises(ValueError, match=r"judge.init_args.rewards: name at least one"):
        RewardJudge([])


@pytest.mark.parametrize("budget", [1, 4096])
def test_a_reward_model_judges_by_its_scores(budget: int, tiny_model: Path, tmp_path: Path) -> None:
    network = ScoreNetwork(PolicyConfig(model=str(tiny_model)))
    network.gain.fill_(-2.0)
    network.shift.fill_(0.7)
    network.save_pretrained(tmp_path / "rm")
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm", trust_remote_code=True).eval()
    judge = RewardModelJudge(str(tmp_path / "rm"), token_budget=budget)
    judge.place(torch.device("cpu"))
    first, second = answers(1, 4, 2, 3), answers(3, 2, 2, 9)

    def score(a: Answer) -> float:
        theirs.config.pad_token_id = 250  # is nowhere in these rows
        with torch.no_grad():
            return float(theirs(input_ids=torch.tensor([a.prompt_ids + a.ids])).logits)

    assert judge.scores(first) == pytest.approx([score(a) for a in first], abs=2e-2)
    expected = [0.5 if a == b else float(score(a) > score(b)) for a, b in zip(first, second, strict=True)]
    assert judge.compare(first, second) == expected
    assert set(expected) == {0.0, 0.5, 1.0}


def test_a_language_model_is_no_judge(tiny_model: Path) -> None:
    """A head drawn at random would decide."""
    with pytest.raises(ValueError, match=r"judge\.init_args\.model: .* without a reward model's head"):
        RewardModelJudge(str(tiny_model)).place(torch.device("cpu"))


def reward_model(base: Path, folder: Path) -> Path:
    ScoreNetwork(PolicyConfig(model=str(base), compute_dtype="float32")).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def test_a_judge_with_another_tokenizer(tiny_model: Path, tmp_path: Path) -> None:
    folder = reward_model(tiny_model, tmp_path / "rm")
    policys = byte_tokenizer()
    RewardModelJudge(str(folder)).place(torch.device("cpu"), policys)
    policys.add_tokens(["of its own"])
    with pytest.raises(ValueError, match=r"judge\.init_args\.model: the tokenizer in .* is not the policy's"):
        RewardModelJudge(str(folder)).place(torch.device("cpu"), policys)


def test_answers_that_do_not_fit_into_the_judge(tmp_path: Path) -> None:
    """A long prompt loses its beginning, and a long answer ties, with a warning."""
    small = write_tiny_model(tmp_path / "small", max_position_embeddings=16)
    judge = RewardModelJudge(str(reward_model(small, tmp_path / "rm")), compute_dtype="float32")
    long, cut = Answer([9] * 20 + [5, 6, 7, 8], [3] * 12, "", ""), Answer([5, 6, 7, 8], [3] * 12, "", "")
    never = Answer([5], [3] * 40, "", "")
    scores = judge.scores([long, cut, never])
    assert scores[0] == pytest.approx(scores[1])
    assert scores[2] is None
    with pytest.warns(UserWarning, match="1 of 2 comparisons are ties"):
        assert judge.compare([never, long], [cut, cut])[0] == 0.5


def test_a_reward_judge_that_never_has_a_verdict_stops(tmp_path: Path) -> None:
    def boom(completions: list[str], **_: Any) -> list[float]:
        raise KeyError("x")

    judge = RewardJudge([PythonReward(boom, timeout=10.0)])
    with pytest.raises(RewardError, match=r"judge\.init_args\.rewards"):
        judge.compare(answers(5), answers(1))
    judge.close()
    missing = RewardJudge([LearnedReward(str(tmp_path / "nowhere"))])
    with pytest.raises(ValueError, match=r"judge\.init_args\.rewards\.init_args\.model: there is no folder"):
        missing.place(torch.device("cpu"))
    with pytest.raises(ValueError, match=r"judge\.init_args\.rewards: two functions are called 'LearnedReward'"):
        RewardJudge([LearnedReward("a"), LearnedReward("b")])


def test_a_learned_reward_judges_as_the_reward_model_does(tiny_model: Path, tmp_path: Path) -> None:
    """It reads the conversation and whether the answer ended, not a text that has lost both."""
    folder = reward_model(tiny_model, tmp_path / "rm")

    def said(text: str) -> list[dict[str, str]]:
        return [{"role": "assistant", "content": text}]

    asked = [{"role": "user", "content": "Say 1?"}]
    rows = [{"prompt": asked, "chosen": said(t), "rejected": said("no")} for t in ("one", "it is one", "1!")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = Preferences(
        dataset=str(tmp_path / "rows.jsonl"), batch_size=3, tokenizer=str(tiny_model), held_out_percent=0, val_size=0
    )
    source.setup("fit")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    examples = source.examples("train")
    ended = given(examples, tokenizer, [tokenizer.eos_token_id])
    assert [a.messages for a in ended] == [asked] * 3
    assert {a.stop_reason for a in ended} == {"stop"}
    cut = given([e._replace(completions=[c[:-1] for c in e.completions]) for e in examples], tokenizer, [1])
    assert {a.stop_reason for a in cut} == {"length"}
    by_tokens = RewardModelJudge(str(folder), compute_dtype="float32")
    by_text = RewardJudge([LearnedReward(str(folder), compute_dtype="float32")])
    scores = by_tokens.scores([*ended, *cut])
    for function in by_text.rewards:
        verdicts = function([Sample(a.messages or "", a.text, a.ids, a.stop_reason, None, {}) for a in (*ended, *cut)])
        assert [v.score for v in verdicts] == pytest.approx(scores, abs=1e-5)
    assert by_text.compare(ended, cut) == by_tokens.compare(ended, cut)


def test_of_a_conversation_the_first_answer_is_compared(tiny_model: Path, tmp_path: Path) -> None:
    """The policy gives one too; what the user says next is nobody's answer."""
    turns = [("user", "Say 1?"), ("assistant", "one"), ("user", "And 2?"), ("assistant", "two")]
    row = {"messages": [{"role": role, "content": text} for role, text in turns]}
    source = data("sft", tiny_model, tmp_path, dataset=str(write(tmp_path / "rows.jsonl", lambda i: row)))
    source.setup("fit")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    (answer,) = given(source.examples("train")[:1], tokenizer, [tokenizer.eos_token_id])
    assert (answer.text, answer.stop_reason) == ("one", "stop")
    assert answer.ids == tokenizer.encode("one<|im_end|>")
    (whole,) = given(source.examples("train")[:1], tokenizer, [])
    assert "two" in whole.text


# --- as an evaluation -----------------------------------------------------------------------------------------------


def held_out(model: Path, folder: Path, kind: str = "sft") -> Any:
    rows = str(write(folder / "held-out.jsonl", KINDS[kind][2], 6))
    return data(
        kind, model, folder, val_split=rows, val_size=None, dataset=str(write(folder / "t.jsonl", KINDS[kind][2], 16))
    )


def evaluated(model: Path, folder: Path, judge: Judge, kind: str = "sft", **overrides: Any) -> dict[str, float]:
    policy = PolicyConfig(model=str(model), compute_dtype="float32")
    run = WinRate(policy, judge, generations=SHORT, **overrides)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (got,) = trainer(folder, limit_val_batches=1.0).validate(run, held_out(model, folder, kind), verbose=False)
    return {k.removeprefix("eval/"): v for k, v in got.items()}


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_identical_policies_tie(tiny_model: Path, tmp_path: Path) -> None:
    judge = Recording()
    got = evaluated(tiny_model, tmp_path, judge, opponent=PolicyConfig(model=str(tiny_model), compute_dtype="float32"))
    assert (got["win_rate"], got["ties"]) == (0.5, 1.0)
    assert len(judge.asked) == 12
    assert all(a == b for _, a, b in judge.asked)
    assert len({a for _, a, _ in judge.asked}) > 1


def test_another_policy_answers_otherwise(tiny_model: Path, tmp_path: Path) -> None:
    other = write_tiny_model(tmp_path / "other", seed=5)
    judge = PythonJudge(lambda prompts, first, second: by_score([float(sum(map(ord, t))) for t in first],
                                                                [float(sum(map(ord, t))) for t in second]))  # fmt: skip
    forward = evaluated(tiny_model, tmp_path / "a", judge, opponent=PolicyConfig(model=str(other)))
    backward = evaluated(other, tmp_path / "b", judge, opponent=PolicyConfig(model=str(tiny_model)))
    assert forward["wins"] + forward["losses"] > 0
    assert forward["win_rate"] == pytest.approx(1 - backward["win_rate"], abs=0.34)  # one of A's dtypes differs
    assert all(row["a"] != row["b"] for row in lines(tmp_path / "a/version_0/evaluation/step-0.jsonl"))


def test_an_opponent_with_another_tokenizer_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    """It would be asked something else, and what it says would be read as something else."""
    other = write_tiny_model(tmp_path / "other", seed=5)
    backend = json.loads((other / "tokenizer.json").read_text())
    vocabulary = backend["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(backend))
    judge = Recording()
    with pytest.raises(
        ValueError, match=r"^model\.init_args\.opponent\.model: .* has another tokenizer than the policy"
    ):
        evaluated(tiny_model, tmp_path / "run", judge, opponent=PolicyConfig(model=str(other)))
    assert not judge.asked


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_against_the_datas_own_answers(kind: str, tiny_model: Path, tmp_path: Path) -> None:
    wanted = [KINDS[kind][2](i) for i in range(6)]
    texts = [row["chosen"] if kind == "dpo" else row["completion"] for row in wanted]
    judge = PythonJudge(lambda prompts, first, second: [float(t in texts) for t in first])
    got = evaluated(tiny_model, tmp_path, judge, kind, prompts=4)
    assert (got["win_rate"], got["losses"]) == (0.0, 1.0)
    rows = lines(tmp_path / "version_0/evaluation/step-0.jsonl")
    assert [row["b"] for row in rows] == texts[:4]
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in wanted[:4]]
    assert [row["outcome"] for row in rows] == [0.0] * 4
    assert got["win_rate_low"] <= got["win_rate"] <= got["win_rate_high"]


def test_it_does_not_train(tiny_model: Path, tmp_path: Path) -> None:
    run = WinRate(PolicyConfig(model=str(tiny_model)), Recording())
    with pytest.raises(ValueError, match=r"model.class_path: WinRate only evaluates"):
        fit(run, held_out(tiny_model, tmp_path), tmp_path)
    with pytest.raises(ValueError, match=r"model.init_args.prompts: must be at least 1"):
        WinRate(PolicyConfig(model=str(tiny_model)), Recording(), prompts=0)


# --- during training ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("against", ["start", "data"])
def test_during_training(against: str, tiny_model: Path, tmp_path: Path) -> None:
    """At the start the policy ties with itself; what it learns by heart then sets it apart."""
    judge = Recording()
    callback = WinRateDuringTraining(judge, against=against, prompts=3, generations=SHORT)
    run = module("sft", tiny_model, lr=0.5, scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 1, gamma=1.0))
    fit(run, held_out(tiny_model, tmp_path), tmp_path, callback, max_steps=4, limit_val_batches=1.0,
        val_check_interval=2)  # fmt: skip
    assert len(curve(tmp_path, "eval/win_rate")) == 2
    assert len(judge.asked) == 2 * 2 * 3
    rows = lines(tmp_path / "version_0/comparisons/step-4.jsonl")
    if against == "data":
        assert [row["b"] for row in rows] == [KINDS["sft"][2](i)["completion"] for i in range(3)]
    else:
        first = lines(tmp_path / "version_0/comparisons/step-2.jsonl")
        assert [row["b"] for row in rows] == [row["b"] for row in first]
        assert any(row["a"] != row["b"] for row in rows)
    assert curve(tmp_path, "eval/win_rate")[1] == pytest.approx(sum(row["outcome"] for row in rows) / 3)


def test_during_reinforcement_learning(tiny_model: Path, tmp_path: Path) -> None:
    """Its prompts come without answers, so the policy is held against what it was."""
    judge = Recording()
    run = grpo(tiny_model, lr=1.0, new_tokens=4)
    examples = prompts(tiny_model, tmp_path, val_size=3, held_out_percent=40)
    callback = WinRateDuringTraining(judge, against="start", prompts=2, generations=SHORT)
    fit(run, examples, tmp_path, callback, max_steps=2, limit_val_batches=1.0, val_check_interval=2)
    rows = lines(tmp_path / "version_0/comparisons/step-2.jsonl")
    held = examples.collate("val", [0, 1], [0, 1]).prompts
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    assert [row["prompt"] for row in rows] == [tokenizer.decode(p.token_ids) for p in held]
    assert len(judge.asked) == 2 * 2
    assert len(curve(tmp_path, "eval/win_rate")) == 1
    with pytest.raises(ValueError, match=r"^WinRateDuringTraining.against: VerifiablePrompts has prompts without"):
        fit(grpo(tiny_model), examples, tmp_path, WinRateDuringTraining(judge, generations=SHORT))


def test_a_network_that_does_not_answer(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"^trainer.callbacks: WinRateDuringTraining compares answers, and RewardModel"
    ):
        fit(module("rm", tiny_model), data("rm", tiny_model, tmp_path), tmp_path, WinRateDuringTraining(Recording()))


@pytest.mark.parametrize("strategy", ["fsdp2", "ddp"])
@pytest.mark.parametrize("training", [False, True])
def test_two_processes_judge_as_one(tiny_model: Path, tmp_path: Path, training: bool, strategy: str) -> None:
    """The same outcomes, in a file that one of them writes."""

    def judged(folder: Path, **more: Any) -> None:
        rows = held_out(tiny_model, folder / f"data{os.environ.get('LOCAL_RANK', '')}")
        if training:
            callback = WinRateDuringTraining(Recording(), against="data", prompts=3, generations=SHORT)
            run = module("sft", tiny_model, lr=0.5)
            fit(run, rows, folder, callback, max_steps=2, limit_val_batches=1.0, val_check_interval=2, **more)
            return
        other = PolicyConfig(model=str(other_model), compute_dtype="float32")
        run = WinRate(PolicyConfig(model=str(tiny_model), compute_dtype="float32"), Recording(), other, None, SHORT)
        trainer(folder, limit_val_batches=1.0, **more).validate(run, rows, verbose=False)

    other_model = write_tiny_model(tmp_path / "other", seed=5)
    judged(tmp_path / "one")
    train_in_two(strategy, lambda over: judged(tmp_path / "two", strategy=over, devices=2))
    name = "version_0/comparisons/step-2.jsonl" if training else "version_0/evaluation/step-0.jsonl"
    assert lines(tmp_path / "two" / name) == lines(tmp_path / "one" / name)
    for tag in ("win_rate", "win_rate_low", "win_rate_high"):
        assert curve(tmp_path / "two", f"eval/{tag}") == curve(tmp_path / "one", f"eval/{tag}")


def test_against_something_else() -> None:
    with pytest.raises(ValueError, match=r"WinRateDuringTraining.against: must be start or data"):
        WinRateDuringTraining(Recording(), against="nobody")
