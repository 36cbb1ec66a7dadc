"""Every section of the benchmark on a tiny model, with Hugging Face and TRL as peers in this Python."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

SCRIPTS = Path(__file__).parent.parent / "scripts"
sys.path.insert(0, str(SCRIPTS))

from benchmarks import cli, grpo, limits_worker, models, prepare, protocol, rows, scale, settings, train, workers  # noqa: E402

TINY = ["--random_init", "tiny-llama", "--threads", "1", "--prompts", "2", "--samples", "4", "--prompt_tokens", "12"]
TINY += ["--new_tokens", "16", "--device", "cpu", "--quick"]
TOKENS = 2 * 4 * 16  # of an iteration at fixed length


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """All sections in one run, into a file that holds another already."""
    path = tmp_path_factory.mktemp("bench") / "results.json"
    path.write_text(json.dumps({"scale": {"kept": True}}))
    command = [sys.executable, str(SCRIPTS / "bench.py"), "all", *TINY, "--repeats", "2", "--json", str(path)]
    command += ["--peer", "trl", "--micro_batches", "8", "--variants", "headline,fixed"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, cwd=path.parent, timeout=900)
    assert ran.returncode == 0, ran.stderr
    return SimpleNamespace(out=ran.stdout, results=json.loads(path.read_text()))


def positive(*values: float) -> bool:
    return all(math.isfinite(v) and v > 0 for v in values)


def test_the_file_holds_every_section_and_what_it_held_before(done: SimpleNamespace) -> None:
    assert set(done.results) == {"machine", "limits", "rollout", "grpo", "train", "scale"}
    assert done.results["scale"] == {"kept": True}
    machine = done.results["machine"]
    assert machine["threads"] == 1
    assert machine["allocator"] == "mallopt"
    assert machine["dtype"] in ("float32", "bfloat16")
    assert machine["versions"]["torch"] == torch.__version__
    assert machine["versions"]["trl"]
    assert machine["cpu"]
    # The printed JSON is the file's.
    assert json.loads(done.out[done.out.rindex("\n{\n") :]) == done.results


def test_rollout(done: SimpleNamespace) -> None:
    r = done.results["rollout"]
    for kind, key in (("fixed", ""), ("ragged", "_ragged"), ("greedy", "_greedy")):
        ours, hf = r[kind]["ours"], r[kind]["hf"]
        ratio = ours["tokens_per_s"]["median"] / hf["tokens_per_s"]["median"]
        assert r["speedup_vs_hf" + key] == pytest.approx(ratio)
        for side in (ours, hf):
            assert positive(side["tokens_per_s"]["min"], side["peak_bytes"])
            assert side["tokens_per_s"]["min"] <= side["tokens_per_s"]["median"] <= side["tokens_per_s"]["max"]
    assert r["fixed"]["ours"]["tokens"] == r["fixed"]["hf"]["tokens"] == [TOKENS] * 2
    # A hundredth of the vocabulary stops: some of 16 completions do within 16 tokens, and not all at the first.
    for side in ("ours", "hf"):
        assert all(8 < n <= TOKENS for n in r["ragged"][side]["tokens"])
        assert sum(r["ragged"][side]["tokens"]) < 2 * TOKENS
    assert r["order"][:4] == ["fixed/ours", "fixed/hf generate"] * 2
    assert r["order"][4:8] == ["ragged/ours", "ragged/hf generate"] * 2


def test_grpo_beside_trl(done: SimpleNamespace) -> None:
    g = done.results["grpo"]
    assert g["speedup_vs_trl_bf16"] is None  # was not asked for
    for variant, key in (("headline", "speedup_vs_trl"), ("fixed", "speedup_vs_trl_fixed")):
        ours, trl = g[variant]["ours"], g[variant]["trl"]
        assert g[key] == pytest.approx(ours["tokens_per_s"]["median"] / trl["tokens_per_s"]["median"])
        for side in (ours, trl):
            assert positive(side["seconds"]["min"], side["phases_s"]["rollout"], side["phases_s"]["update"])
            assert side["phases_s"]["rollout"] + side["phases_s"]["update"] <= 1.01 * side["seconds"]["max"]
            assert side["peak_bytes"] > side["baseline_bytes"] > 2**27
    assert g["fixed"]["ours"]["tokens"] == g["fixed"]["trl"]["tokens"] == [TOKENS] * 2
    ours, trl = g["headline"]["ours"], g["headline"]["trl"]
    assert g["peak_memory_vs_trl"] == pytest.approx(ours["peak_bytes"] / trl["peak_bytes"])
    assert g["activation_memory_vs_trl"] == pytest.approx(ours["activation_bytes"] / trl["activation_bytes"])
    contenders = [name.split("/")[1] for name in g["order"][:4]]
    assert contenders[0] == contenders[2] == "ours"
    assert contenders[1] == contenders[3]
    assert contenders[1].startswith("trl fp32")
    assert [list(rates) for rates in g["micro_batches"].values()] == [["8"], ["8"]]


def test_static_memory_is_that_of_the_tensors(done: SimpleNamespace) -> None:
    c = models.CONFIGS["tiny-llama"]
    hidden, inner, kv = c["hidden_size"], c["intermediate_size"], c["hidden_size"] // 2
    layer = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * inner + 2 * hidden
    size = c["vocab_size"] * hidden + c["num_hidden_layers"] * layer + hidden  # tied head
    ours, trl = (done.results["grpo"]["headline"][side]["static_bytes"] for side in ("ours", "trl"))
    view = 2 * size if done.results["machine"]["dtype"] == "bfloat16" else 0
    assert ours["parameters"] == 4 * size + view
    assert trl["parameters"] == 4 * size
    for side in (ours, trl):
        assert side["gradients"] == 4 * size
        assert 0 <= side["optimizer"] - 8 * size < 1000  # and Adam's step counters


def test_train_and_its_floor(done: SimpleNamespace) -> None:
    t, limits = done.results["train"], done.results["limits"]
    assert t["speedup_vs_hf"] == pytest.approx(t["ours"]["tokens_per_s"]["median"] / t["hf"]["tokens_per_s"]["median"])
    assert t["ours"]["tokens"] == t["hf"]["tokens"] == [t["useful_tokens"]] * 2
    assert t["fraction_of_floor"] == pytest.approx(t["tokens_per_s"] / limits["train_floor_tok_s"])
    assert t["order"] == ["ragged/ours", "ragged/hf padded"] * 2


def test_limits_and_the_rollout_floor(done: SimpleNamespace) -> None:
    limits, r = done.results["limits"], done.results["rollout"]
    assert limits["mean_context"] == round(11.5 + 8)
    step = min(v for v in limits["linears_s"]["8"].values() if v is not None and v != limits["linears_s"]["8"]["tok_s"])
    assert limits["rollout_floor_tok_s"] == pytest.approx(8 / (step + limits["attention_s"]["20"]))
    assert r["fraction_of_floor"] == pytest.approx(r["tokens_per_s"] / limits["rollout_floor_tok_s"])
    assert positive(*limits["peaks"].values(), limits["train_floor_tok_s"])
    assert {"gemm_float32_gflops", "copy_gb_s"} <= set(limits["peaks"])


def test_scale(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "s.json"
    assert cli.main(["scale", *TINY, "--repeats", "1", "--json", str(path)]) == 0, capsys.readouterr().err
    s = json.loads(path.read_text())["scale"]
    assert s["settings"]["token_budget"] == scale.TOKEN_BUDGET
    assert "unfinished" not in s
    assert set(s["exponents"]) == {"prompt", "group", "completion"}
    assert all(math.isfinite(e) for e in s["exponents"].values())
    for axis, points in s["points"].items():
        assert [p["value"] for p in points] == list(scale.QUICK_AXES[axis])
        assert all(positive(p["seconds"], p["us_per_token"]) for p in points)
        assert all(abs(p["budget_tokens"] - scale.QUICK_TOKENS) < 0.1 * scale.QUICK_TOKENS for p in points)
    seconds = s["processes"]["seconds"]
    assert positive(*seconds.values())
    assert s["processes"]["speedup"] == pytest.approx(seconds["1"] / seconds["2"])
    assert Path(s["plot"]).read_bytes().startswith(b"\x89PNG")


# --- errors ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--random_init", "gpt-9"], "gpt-9: no such configuration; there are tiny-llama, smollm2-135m, qwen2.5-0.5b"),
        (["--random_init", "tiny-llama", "--model", "somewhere"], "give either --model DIR or --random_init CONFIG"),
        ([], "give either --model DIR or --random_init CONFIG"),
        (["--model", "/nowhere"], "no config.json there"),
        (["--random_init", "tiny-llama", "--peer_python", "/nowhere/python"], "/nowhere/python: no such file"),
        (["--random_init", "tiny-llama", "--samples", "1"], "a group has at least 2"),
    ],
)
def test_mistakes_are_named_before_anything_runs(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["rollout", *arguments]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--repeats", "0"], "must be at least 1"),
        (["--variants", "headline,int8"], "int8: no such comparison; there are headline, bf16, fixed"),
        (["--micro_batches", "8,x"], "micro_batches"),
    ],
)
def test_impossible_values(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["grpo", *TINY, *arguments])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_a_file_of_something_else_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "notes.json"
    for text in ("not json", "[1]"):
        path.write_text(text)
        assert cli.main(["rollout", *TINY, "--json", str(path)]) == 1
        assert "name another file" in capsys.readouterr().err
        assert path.read_text() == text


def test_results_of_two_machines_are_not_mixed() -> None:
    machine = {"cpu": "A", "gpu": None, "device": "cpu", "versions": {"torch": "2"}}
    other = {"machine": {**machine, "versions": {"trl": "1"}}, "rollout": {}}
    merged = cli.merge(None, other, machine)
    assert merged["machine"]["versions"] == {"torch": "2", "trl": "1"}
    assert "rollout" in merged
    with pytest.raises(workers.BenchError, match="another machine"):
        cli.merge(None, {"machine": {**machine, "cpu": "B"}}, machine)


def test_a_worker_that_dies_is_shown(tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    peer = tmp_path / "python"
    peer.write_text("#!/bin/sh\nread request\necho 'no module named anything' >&2\nexit 3\n")
    peer.chmod(0o755)

    def start(args: Any) -> None:
        workers.Worker("hf generate", "peer_hf", {}, workers.environment(1, "default"), args.peer_python)

    monkeypatch.setattr(cli, "run", start)
    assert cli.main(["rollout", *TINY, "--peer_python", str(peer)]) == 1
    error = capsys.readouterr().err
    assert "bench.py: the worker 'hf generate' ended with status 3" in error
    assert "  | no module named anything" in error


@pytest.mark.parametrize("death", ["kill -9 $$", "echo 'torch.OutOfMemoryError: CUDA out of memory' >&2; exit 1"])
def test_a_worker_without_memory_is_told_apart(death: str, tmp_path: Path) -> None:
    peer = tmp_path / "python"
    peer.write_text(f"#!/bin/sh\nread request\n{death}\n")
    peer.chmod(0o755)
    with pytest.raises(workers.OutOfMemory, match="'trl' ended with status"):
        workers.Worker("trl", "peer_trl", {}, workers.environment(1, "default"), str(peer))


def test_a_missing_allocator_names_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "TCMALLOC", ("libnone.so.1",))
    with pytest.raises(workers.BenchError, match="libtcmalloc-minimal4"):
        workers.allocator_environment("tcmalloc")


# --- pieces ---------------------------------------------------------------------------------------------------


def test_every_worker_has_the_same_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    foreign = {"MALLOC_TRIM_THRESHOLD_", "LD_PRELOAD", "GLIBC_TUNABLES", "THP_MEM_ALLOC_ENABLE"}
    for name in foreign:
        monkeypatch.setenv(name, "1")
    assert not foreign & set(workers.environment(3, "default"))
    kept = workers.environment(3, "mallopt")
    assert {k: kept[k] for k in workers.KEEP_FREED_MEMORY} == workers.KEEP_FREED_MEMORY
    assert kept["OMP_NUM_THREADS"] == "3"


@pytest.mark.parametrize("name", ["peer_hf.py", "peer_trl.py", "protocol.py"])
def test_peers_know_nothing_of_the_package(name: str) -> None:
    lines = (SCRIPTS / "benchmarks" / name).read_text().splitlines()
    imports = [line for line in lines if line.lstrip().startswith(("import ", "from "))]
    assert not [line for line in imports if "lit_posttrain" in line]
    assert {line.split()[1] for line in imports if line.startswith("from .")} <= {".protocol"}


def test_the_fastest_micro_batch_is_kept_and_the_others_end(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds, started = {4: 3.0, 8: 1.0, 16: 2.0}, []

    class Fake:
        def __init__(self, name: str, module: str, setup: dict[str, Any], *_: Any):
            self.size, self.open = setup["micro_batch"], True
            assert sum(fake.open for fake in started) <= 1  # no more than two in memory
            started.append(self)

        def request(self) -> dict[str, Any]:
            if self.size not in seconds:
                raise workers.OutOfMemory("killed")
            return {"tokens": 10, "seconds": seconds[self.size], "peak_bytes": 1}

        def close(self) -> None:
            self.open = False

    monkeypatch.setattr(grpo, "Worker", Fake)
    args = SimpleNamespace(prompts=4, samples=4, micro_batches=[4, 8, 1, 16, 3])
    bench: Any = SimpleNamespace(args=args, dtype="float32", env={}, peer_python=None)
    bench.setup, bench.prompts = lambda **more: more, lambda kind: []
    tried: dict[str, Any] = {}
    best: Any = grpo.best_peer(bench, "ragged", False, tried)
    assert (best.size, best.open) == (8, True)
    assert [fake.open for fake in started] == [False, True, False, False]
    assert tried == {"trl fp32, ragged": {"4": 10 / 3, "8": 10.0, "16": 5.0}}
    args.micro_batches = [3]
    with pytest.raises(workers.BenchError, match=r"none of .* divides .* = 16"):
        grpo.best_peer(bench, "ragged", False, tried)
    args.micro_batches = [2]
    with pytest.raises(workers.OutOfMemory, match=r"no memory for any of \[2\]"):
        grpo.best_peer(bench, "ragged", False, tried)


def test_results_name_a_model_by_its_place_in_the_repository() -> None:
    root = SCRIPTS.parent
    assert settings._from_here(str(root / "models" / "a")) == str(Path("models", "a"))
    assert settings._from_here("/elsewhere/a") == "/elsewhere/a"


def test_floors_of_a_step_without_backward_or_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every product and every group's attention counts once, and each call is said to take a second."""
    shape = limits_worker.Shape([(4, 4)] * 3 + [(9, 4)], layers=2, heads=2, kv_heads=1, width=2)
    meter = limits_worker.Meter("cpu", torch.float32, shape)
    called: list[Any] = []
    monkeypatch.setattr(meter, "seconds", lambda call, budget=0.0: called.append(call()) or 1.0)
    groups = [[[3, 2, 2], [2, 5]], [[4, 1]]]
    assert meter.training(groups) == {"linears": 2 * (3 + 1), "attention": 3 * 2}
    assert meter.training(groups, head=False) == {"linears": 2 * 3, "attention": 3 * 2}
    called.clear()
    assert meter.training(groups, backward=False) == {"linears": 2 * (3 + 1), "attention": 3 * 2}
    assert [len(x) for x in called[:2]] == [
        3 + 2 + 2 + 2 + 5,
        2 + 2 + 5,
    ]  # a forward product gives a row for each token


def test_useful_tokens_end_with_the_first_stop() -> None:
    completions = torch.tensor([[5, 6, 7, 8], [9, 5, 9, 9], [5, 6, 7, 9], [8, 8, 8, 8]])
    assert protocol.useful_tokens(completions, [9]) == 4 + 1 + 4 + 4
    assert protocol.useful_tokens(completions, [9, 8]) == 4 + 1 + 4 + 1
    assert protocol.useful_tokens(completions, []) == 16


def test_the_reward_tells_samples_apart() -> None:
    draws = torch.randint(0, 300, (200, 16), generator=torch.Generator().manual_seed(0)).tolist()
    values = [protocol.reward(ids) for ids in draws]
    assert len(set(values)) > 190
    assert all(0 <= v < 1 for v in values)
    assert protocol.reward([1, 2]) != protocol.reward([2, 1])


def test_bytes_count_each_storage_once() -> None:
    a = torch.zeros(10)
    assert protocol.tensor_bytes([a, a, torch.zeros(3, dtype=torch.bfloat16)]) == 46


def test_medians_and_ratios(capsys: pytest.CaptureFixture[str]) -> None:
    r = rows.Rows("x")
    for name, seconds in (("ours", 1.0), ("peer", 4.0), ("ours", 2.0), ("peer", 8.0), ("ours", 100.0)):
        r.add("case", name, {"tokens": 8, "seconds": seconds, "peak_bytes": 2**30})
    assert r.summary("case", "ours")["tokens_per_s"] == {"median": 4.0, "min": 0.08, "max": 8.0}
    assert r.speedup("case", "ours", "peer") == pytest.approx(4.0 / 1.5)
    assert len(capsys.readouterr().out.splitlines()) == 5  # each as it comes
    assert len(r.table().splitlines()) == 3


def test_exponents_of_known_powers() -> None:
    for power in (1.0, 2.0):
        points = [(n, 3e-4 * n**power) for n in (64, 128, 512)]
        assert scale.exponent(points) == pytest.approx(power)


def test_micro_batches_of_the_floor_hold_whole_groups_within_the_budget() -> None:
    bench: Any = SimpleNamespace(args=SimpleNamespace(samples=2), setup=lambda: {"token_budget": 30})
    batches = train.micro_batches(bench, [[0] * 4] * 3, [[0] * n for n in (3, 5, 2, 6, 9, 9)])
    assert batches == [[[4, 3, 5], [4, 2, 6]], [[4, 9, 9]]]


def test_chat_questions_are_about_sixty_tokens_and_never_equal(tiny_model: Path) -> None:
    from transformers import AutoTokenizer

    prompts = prepare.chat_prompts(AutoTokenizer.from_pretrained(tiny_model), 40)
    assert prompts is not None
    assert len({tuple(p) for p in prompts}) == 40


@pytest.mark.parametrize("name", sorted(models.CONFIGS))
def test_named_shapes_have_the_published_sizes(name: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    known = {"smollm2-135m": 134_515_008, "qwen2.5-0.5b": 494_032_768, "llama-3.2-1b": 1_235_814_400}
    config = AutoConfig.for_model(**{**models.CONFIGS[name], "tie_word_embeddings": True})
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(config)
    size = sum(p.numel() for p in network.parameters())
    assert size == known.get(name, size)


def test_nothing_is_checked_without_a_gpu(tmp_path: Path) -> None:
    blind = tmp_path / "nvidia-smi"
    blind.write_text("#!/bin/sh\nexit 9\n")
    blind.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    command = ["bash", str(SCRIPTS / "gpu_check.sh"), str(tmp_path / "out.json")]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "PATH": path})
    assert ran.returncode == 0
    assert ran.stdout.splitlines() == ["[gpu_check] no GPU here: nothing to check"]
    assert not (tmp_path / "out.json").exists()
