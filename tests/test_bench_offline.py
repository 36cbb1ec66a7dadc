"""The benchmark's sections on fixed examples, on a tiny model: both sides must compute the same in every layout."""

import json
import math
import statistics
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

SCRIPTS = Path(__file__).parent.parent / "scripts"
sys.path.insert(0, str(SCRIPTS))

from benchmarks import cli, offline, offline_data, ours_offline, peer_offline, prepare, workers  # noqa: E402

TINY = ["--random_init", "tiny-llama", "--threads", "1", "--device", "cpu", "--dtype", "float32", "--quick"]


# --- the whole command ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Two sections in one run, beside TRL."""
    path = tmp_path_factory.mktemp("bench") / "results.json"
    command = [sys.executable, str(SCRIPTS / "bench.py"), "rm", "dpo", *TINY, "--json", str(path), "--peer", "trl"]
    command += ["--repeats", "2", "--micro_batches", "4", "--variants", "masters"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, cwd=path.parent, timeout=900)
    assert ran.returncode == 0, ran.stderr
    return SimpleNamespace(out=ran.stdout, results=json.loads(path.read_text()))


def test_sections_beside_trl(done: SimpleNamespace) -> None:
    assert set(done.results) == {"machine", "rm", "dpo"}
    assert done.results["machine"]["versions"]["trl"]
    for task, pairs in (("rm", 12), ("dpo", 4)):
        r = done.results[task]
        ours, trl = r["masters"]["ours"], r["masters"]["trl"]
        assert r["order"] == ["masters/ours", "masters/trl fp32"] * 2
        assert r["masters"]["data"]["pairs"] == pairs
        # The same useful tokens for both, although the peer computes prompts again and again.
        assert ours["tokens"] == trl["tokens"] == [r["masters"]["data"]["useful_tokens"]] * 2
        ratio = ours["tokens_per_s"]["median"] / trl["tokens_per_s"]["median"]
        assert r["speedup_vs_trl"] == r["masters"]["speedup"] == pytest.approx(ratio)
        memory = ours["activation_bytes"] / trl["activation_bytes"]
        assert r["masters"]["activation_memory_vs_trl"] == pytest.approx(memory)
        assert ours["first_step"] == pytest.approx(trl["first_step"], rel=1e-3)
        assert [row["contender"] for row in r["rows"]] == ["ours", "trl fp32"] * 2
        assert all(row["seconds"] > 0 and math.isfinite(row["loss"]) for row in r["rows"])
        floor, m = r["masters"]["floor_s"], r["masters"]
        assert 0 < floor < ours["seconds"]["median"]
        assert m["fraction_of_floor"] == pytest.approx(floor / ours["seconds"]["median"])
        assert m["speedup_at_floor"] == pytest.approx(trl["seconds"]["median"] / floor)


def test_both_sides_take_the_same_steps(done: SimpleNamespace) -> None:
    # The rows come after two warm-up steps: another gradient or optimizer would have led elsewhere by then.
    for task in ("rm", "dpo"):
        losses = [row["loss"] for row in done.results[task]["rows"]]
        assert losses[0] == pytest.approx(losses[1], rel=1e-3)
        assert losses[2] == pytest.approx(losses[3], rel=1e-3)
    first = done.results["rm"]["masters"]["ours"]["first_step"]["loss"]
    assert done.results["rm"]["rows"][-1]["loss"] < first - 1e-5


def test_a_reference_is_static_memory_and_optimizer_state_too(done: SimpleNamespace) -> None:
    for side in ("ours", "trl"):
        static = done.results["dpo"]["masters"][side]["static_bytes"]
        assert static["reference"] == static["parameters"] == static["gradients"]
        assert 0 <= static["optimizer"] - 2 * static["parameters"] < 1000  # and Adam's step counters
        assert "reference" not in done.results["rm"]["masters"][side]["static_bytes"]


def test_the_table_says_what_each_side_was_given(done: SimpleNamespace) -> None:
    assert "ours: 2 prompts with 4 ranked completions; trl: the same 12 comparisons as 12 pairs" in done.out
    assert "masters: 4 pairs on both sides" in done.out
    assert done.out.count("first step, loss") == 2


# --- both sides in this process -------------------------------------------------------------------------------


class Done(Exception):
    """No step is asked for any more."""


class Steps:
    """Stands for the pipe: asks for so many steps, and keeps the answers."""

    def __init__(self, count: int):
        self.left, self.answers = count, []

    def receive(self) -> dict[str, Any]:
        if self.left == 0:
            raise Done
        self.left -= 1
        return {}

    def reply(self, **values: Any) -> None:
        self.answers.append(values)


def test_ours_has_the_budget_that_its_algorithm_has() -> None:
    found = {"token_budget": 768, "together_budget": 1152}
    bench: Any = SimpleNamespace(args=SimpleNamespace(token_budget=None), found=found)
    assert [offline.token_budget(bench, task) for task in ("sft", "rm", "dpo")] == [768, 1152, 1152]
    bench.args.token_budget = 5
    assert [offline.token_budget(bench, task) for task in ("sft", "dpo")] == [5, 5]


@pytest.fixture(scope="module")
def prepared(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("prepared")
    asked = {"offline": ["sft", "rm", "dpo"], "seed": 3, "model": str(tiny_model), "folder": str(folder), "quick": True}
    return prepare.offline(AutoTokenizer.from_pretrained(tiny_model), asked)


def told(task: str, data: str, prepared: dict[str, Any], model: Path, folder: Path) -> dict[str, Any]:
    # The longest would not fit into the tiny model's 512 positions.
    examples = sorted(prepared["examples"][data], key=lambda e: len(e["prompt"]) + len(e["completions"][0]))[:4]
    return {
        "task": task, "model": prepared["classifier"] if task == "rm" else str(model), "examples": examples,
        "rate": 1e-3, "checked": list(offline.CHECKED[task]), "device": "cpu", "seed": 3, "folder": str(folder),
        "token_budget": 400, "dtype": "float32",
    }  # fmt: skip


def steps(train: Any, setup: dict[str, Any], count: int = 2) -> list[dict[str, float]]:
    """The metrics of the first steps."""
    channel = Steps(count)
    with pytest.raises(Done):
        train(setup, channel)
    assert len(channel.answers) == count + 1  # one is the greeting
    return [answer["metrics"] for answer in channel.answers[1:]]


def side(setup: dict[str, Any], prepared: dict[str, Any], **layout: Any) -> dict[str, Any]:
    more = {"padding": prepared["padding"], "cached": False, "weights": "float32", "autocast": False, "packed": False}
    return {**setup, **more, **layout}


@pytest.mark.parametrize(
    ("task", "data", "layouts"),
    [
        ("sft", "sft", [{"rows_at_once": 3}, {"rows_at_once": 1, "packed": True}]),
        ("rm", "rm", [{"rows_at_once": 4}]),
        ("rm", "pairs", [{"rows_at_once": 2}]),
        ("dpo", "dpo", [{"rows_at_once": 2}]),
    ],
)
def test_losses_and_gradients_agree(
    task: str, data: str, layouts: list[dict[str, Any]], prepared: dict[str, Any], tiny_model: Path, tmp_path: Path
) -> None:
    setup = told(task, data, prepared, tiny_model, tmp_path)
    ours = steps(ours_offline.train, {**setup, "reference_cache": None})
    for layout in layouts:
        peer = steps(peer_offline.train, side(setup, prepared, **layout))
        for mine, theirs in zip(ours, peer, strict=True):
            assert mine == pytest.approx(theirs, rel=2e-3), layout
    assert ours[0]["loss"] != pytest.approx(ours[1]["loss"], rel=2e-3)  # the second shows that the update agrees


def test_cached_references_agree_with_computed_ones(prepared: dict[str, Any], tiny_model: Path, tmp_path: Path) -> None:
    setup = told("dpo", "dpo", prepared, tiny_model, tmp_path)
    ours = steps(ours_offline.train, {**setup, "reference_cache": str(tmp_path / "references")})
    assert list((tmp_path / "references").iterdir())
    peer = steps(peer_offline.train, side(setup, prepared, rows_at_once=4, cached=True))
    for mine, theirs in zip(ours, peer, strict=True):
        assert mine == pytest.approx(theirs, rel=2e-3)


def test_the_first_step_is_what_the_formulas_say(prepared: dict[str, Any], tiny_model: Path, tmp_path: Path) -> None:
    sft = told("sft", "sft", prepared, tiny_model, tmp_path)
    network = AutoModelForCausalLM.from_pretrained(tiny_model)
    nll = tokens = 0.0
    with torch.no_grad():
        for e in sft["examples"]:
            p, c = e["prompt"], e["completions"][0]
            scores = network(torch.tensor([p + c])).logits[0].log_softmax(-1)
            nll -= float(scores[len(p) - 1 : -1].gather(1, torch.tensor(c)[:, None]).sum())
            tokens += len(c)
    assert steps(ours_offline.train, sft, 1)[0]["loss"] == pytest.approx(nll / tokens, rel=1e-4)
    rm = told("rm", "rm", prepared, tiny_model, tmp_path)
    scorer: Any = AutoModelForSequenceClassification.from_pretrained(prepared["classifier"])
    scorer.config.pad_token_id = None  # a row alone has no padding, and its end token would be taken for it
    terms = []
    with torch.no_grad():
        for e in rm["examples"]:
            s = [float(scorer(torch.tensor([e["prompt"] + c])).logits) for c in e["completions"]]
            terms += [math.log1p(math.exp(s[j] - s[i])) for i in range(4) for j in range(i + 1, 4)]
    assert steps(ours_offline.train, rm, 1)[0]["loss"] == pytest.approx(statistics.mean(terms), rel=1e-4)


# --- data -----------------------------------------------------------------------------------------------------


def test_demonstrations_are_as_long_as_real_ones(tiny_model: Path) -> None:
    made = offline_data.make("sft", AutoTokenizer.from_pretrained(tiny_model), 0)
    lengths = [len(e["prompt"]) + len(e["completions"][0]) for e in made]
    assert len(made) == 32
    assert 180 < statistics.mean(lengths) < 220
    assert 40 <= min(lengths) < 80
    assert 450 < max(lengths) <= 512
    assert all(len(e["completions"][0]) >= 8 for e in made)


@pytest.mark.parametrize(("name", "count", "each"), [("dpo", 16, 2), ("rm", 8, 4), ("pairs", 24, 2)])
def test_comparisons_share_prompts(name: str, count: int, each: int, tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    made = offline_data.make(name, tokenizer, 0)
    assert (len(made), {len(e["completions"]) for e in made}) == (count, {each})
    assert 100 < statistics.mean(len(e["prompt"]) for e in made) < 145
    completions = [c for e in made for c in e["completions"]]
    assert all(30 <= len(c) <= 200 and c[-1] == tokenizer.eos_token_id for c in completions)
    assert all(tokenizer.decode(e["prompt"]).startswith("<|im_start|>user") for e in made)
    assert len({tuple(e["prompt"]) for e in made}) == count


def test_a_seed_names_the_data(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    assert offline_data.make("dpo", tokenizer, 1) == offline_data.make("dpo", tokenizer, 1)
    assert offline_data.make("dpo", tokenizer, 1) != offline_data.make("dpo", tokenizer, 2)


def test_tokens_and_pairs_are_counted_once() -> None:
    examples = [
        {"prompt": [1] * 10, "completions": [[2] * 3, [3] * 4, [4], [5]]},
        {"prompt": [1], "completions": [[6]]},
    ]
    assert offline_data.useful_tokens(examples) == 10 + 3 + 4 + 1 + 1 + 1 + 1
    assert offline_data.pairs(examples) == 6
    assert offline_data.described(examples[:1])["completion_tokens"] == {"mean": 2.25, "min": 1, "max": 4}


def test_padding_is_a_token_that_occurs_nowhere(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    both = [{"prompt": [0, 1], "completions": [[2, 3, 5]]}]  # 0 and 1 are the special tokens
    assert tokenizer.convert_tokens_to_ids(offline_data.padding_token(tokenizer, both)) == 4
    assert offline_data.padding_token(tokenizer, [{"prompt": [0], "completions": [[9]]}]) == "<|im_end|>"


def test_the_peer_gets_every_comparison_from_long_to_short() -> None:
    example = {"prompt": [7], "completions": [[1], [2, 2], [3, 3, 3]]}
    assert peer_offline.rows("rm", [example]) == [
        {"chosen_ids": [7, 1], "rejected_ids": [7, 3, 3, 3]},
        {"chosen_ids": [7, 2, 2], "rejected_ids": [7, 3, 3, 3]},
        {"chosen_ids": [7, 1], "rejected_ids": [7, 2, 2]},
    ]
    assert peer_offline.rows("dpo", [example])[2] == {"prompt_ids": [7], "chosen_ids": [1], "rejected_ids": [2, 2]}
    assert peer_offline.rows("sft", [{"prompt": [7, 8], "completions": [[1, 2]]}]) == [
        {"input_ids": [7, 8, 1, 2], "labels": [-100, -100, 1, 2]}
    ]


# --- pieces ---------------------------------------------------------------------------------------------------


def test_a_mismatch_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    norm = {"grad_norm": 1.0}
    offline.check("sft", "masters", "bfloat16", {"loss": 2.0, **norm}, {"loss": 2.01, **norm})
    assert "ours     2.0000  trl     2.0100  0.50% apart" in capsys.readouterr().out
    for dtype, other in (("float32", 2.01), ("bfloat16", 2.1), ("bfloat16", math.nan)):
        with pytest.raises(workers.BenchError, match=r"sft masters: loss .* the two sides do not compute the same"):
            offline.check("sft", "masters", dtype, {"loss": 2.0, **norm}, {"loss": other, **norm})
    with pytest.raises(workers.BenchError, match="sft masters: grad_norm"):
        offline.check("sft", "masters", "bfloat16", {"loss": 2.0, **norm}, {"loss": 2.0, "grad_norm": 1.2})


def bench(examples: list[dict[str, Any]], sizes: list[int]) -> Any:
    found = {"offline": {"examples": dict.fromkeys(offline_data.SHAPES, examples)}}
    return SimpleNamespace(found=found, args=SimpleNamespace(micro_batches=sizes), dtype="float32")


def test_layouts_of_the_peer() -> None:
    pairs = [{"prompt": [1], "completions": [[1], [2]]}] * 6
    padded = {"packed": False}
    assert offline.layouts(bench(pairs, [2, 3, 4, 8, 12]), "dpo", offline.Comparison("dpo")) == {
        "2": {"rows_at_once": 1, **padded},
        "4": {"rows_at_once": 2, **padded},
        "12": {"rows_at_once": 6, **padded},
    }
    with pytest.raises(workers.BenchError, match=r"none of \[5, 8\] is even and divides the 2 \* 6 sequences of rm"):
        offline.layouts(bench(pairs, [5, 8]), "rm", offline.Comparison("rm"))
    shown = offline.layouts(bench(pairs[:4], [3, 8]), "sft", offline.Comparison("sft"))
    assert {name: layout["rows_at_once"] for name, layout in shown.items()} == {"3": 3, "8": 4, "packed": 1}


def test_the_fastest_layout_is_found_and_each_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds, open_now, asked = {4: [9.0, 2.0], 8: [1.0, 3.0], 1: [1.0, 5.0]}, [], []

    class Fake:
        name = "trl fp32"

        def __init__(self, layout: dict[str, Any]):
            self.times = list(seconds.get(layout["rows_at_once"], []))

        def __enter__(self) -> "Fake":
            assert not open_now
            open_now.append(self)
            return self

        def __exit__(self, *_: Any) -> None:
            open_now.remove(self)

        def ready(self) -> None:
            asked.append(self)

        def request(self) -> dict[str, Any]:
            if not self.times:
                raise workers.OutOfMemory("killed")
            return {"seconds": self.times.pop(0), "peak_bytes": 1}

    monkeypatch.setattr(offline, "start_peer", lambda bench, task, comparison, layout: Fake(layout))
    tried: dict[str, Any] = {}
    examples = [{"prompt": [1] * 5, "completions": [[1]]}] * 10
    best = offline.best_layout(bench(examples, [4, 6, 8]), "sft", offline.Comparison("sft"), tried)
    assert best == {"rows_at_once": 4, "packed": False}  # the last warm-up decides, not the first
    assert tried == {"trl fp32, sft": {"4": 30.0, "8": 20.0, "packed": 12.0}}
    assert len(asked) == 4
    del seconds[1]
    with pytest.raises(workers.OutOfMemory, match="no memory for any of"):
        offline.best_layout(bench(examples, [6, 7]), "sft", offline.Comparison("sft"), tried)


def test_comparisons_of_other_sections_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["sft", "dpo", *TINY, "--variants", "cached"]) == 1
    assert "--variants: none of them is one of sft, which has masters, bf16" in capsys.readouterr().err


@pytest.mark.parametrize(("asked", "model"), [(["sft", "dpo"], True), (["sft", "rollout"], False)])
def test_these_sections_have_a_default_model(
    asked: list[str], model: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(cli, "DEFAULT_MODEL", tmp_path)
    args = cli.parser().parse_args(asked)
    if model:
        cli.check(args)
        assert args.model == str(tmp_path)
    else:
        with pytest.raises(workers.BenchError, match="give either --model DIR or --random_init CONFIG"):
            cli.check(args)


def test_the_peer_knows_nothing_of_the_package() -> None:
    lines = (SCRIPTS / "benchmarks" / "peer_offline.py").read_text().splitlines()
    imports = [line for line in lines if line.lstrip().startswith(("import ", "from "))]
    assert not [line for line in imports if "lit_posttrain" in line]
    assert {line.split()[1] for line in imports if line.startswith("from .")} == {".protocol"}
