"""DPO on pairs and rankings: which pairs, which reference, and losses that rank over the whole step."""

import os
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from offline_runs import KINDS, data, fit, module, ranking, write
from tiny import write_tiny_model
from tiny_runs import Recorder, curve, gap, scalars, trainer, weights
from torch.nn.functional import logsigmoid

from lit_posttrain.algorithms.generations import answer
from lit_posttrain.batching import pad_sequences
from lit_posttrain.data import Preferences
from lit_posttrain.functional.preference_losses import PairLossOptions
from lit_posttrain.policy import LoraConfig, load_network
from lit_posttrain.reference import ReferenceConfig

BETA = 0.1


def sums(network: Any, batch: Any) -> torch.Tensor:
    """Log-probs of completions by transformers' own logits, in fp64, a row at a time."""
    values = []
    for ids, prompt, length in zip(*batch.sequences, strict=True):
        row = ids[:length]
        with torch.no_grad():
            logits = network(input_ids=row[None]).logits[0, :-1].double().log_softmax(-1)
        values.append(logits.gather(-1, row[1:, None])[int(prompt) - 1 :, 0].sum())
    return torch.stack(values)


def naive(kind: str, batch: Any, own: torch.Tensor, reference: torch.Tensor, beta: float = BETA) -> float:
    """Over a whole batch at once, pair by pair."""
    preference, group = batch.columns["preference"].tolist(), batch.columns["group"].tolist()
    n = range(len(group))
    pairs = [(i, j) for i in n for j in n if group[i] == group[j] and preference[i] > preference[j]]
    w, l = (torch.tensor([p[side] for p in pairs]) for side in (0, 1))  # noqa: E741
    c = own - reference
    if kind == "sigmoid":
        margins = c[w] - c[l]
    elif kind == "aot":
        margins = (own[w] - own[l]).sort().values - (reference[w] - reference[l]).sort().values
    else:
        margins = c[w].sort().values - c[l].sort().values
    return float(-logsigmoid(beta * margins).mean())


def rankings(model: Path, folder: Path, **overrides: Any) -> Preferences:
    return Preferences(
        batch_size=4, tokenizer=str(model), held_out_percent=0, val_size=0,
        dataset=str(write(folder / "rankings.jsonl", ranking)), **overrides,
    )  # fmt: skip


def recorded(model: Path, folder: Path, examples: Any = None, steps: int = 2, **overrides: Any) -> Any:
    folder.mkdir(parents=True, exist_ok=True)
    run = module("dpo", model, **{"lr": 0.3, "max_grad_norm": None, **overrides})
    run.recorder = Recorder(run)
    torch.manual_seed(0)  # adapters begin at random
    return fit(run, examples or data("dpo", model, folder), folder, max_steps=steps)


def losses(run: Any) -> list[float]:
    return [r.metrics["loss"] for r in run.recorder.results]


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("other") / "model", seed=9)


@pytest.mark.parametrize("budget", [1, 40, 4096])
@pytest.mark.parametrize("kind", ["sigmoid", "aot", "aot_unpaired"])
def test_loss_of_rankings_is_that_of_all_pairs_at_once(
    kind: Any, budget: int, tiny_model: Path, other_model: Path, tmp_path: Path
) -> None:
    examples = rankings(tiny_model, tmp_path / "run")
    run = recorded(
        tiny_model, tmp_path / "run", examples, 1, loss_type=kind, token_budget=budget,
        reference=ReferenceConfig(model=str(other_model)),
    )  # fmt: skip
    batch = examples.batch(0)
    own, reference = (sums(load_network(str(m)).eval(), batch) for m in (tiny_model, other_model))
    assert losses(run)[0] == pytest.approx(naive(kind, batch, own, reference), rel=1e-5)
    micro = [b for b, _ in run.recorder.updates[0]]
    assert (len(micro) > 1) == (budget < 4096)
    # Every completion goes through the network once, however many pairs it is in.
    rows = torch.cat([b.rows for b in micro]).tolist()
    assert sorted(rows) == list(range(len(batch.sequences.ids)))
    totals = run.recorder.updates[0][0][1]
    assert totals.sequences > len(examples.examples("train")[0].completions)


@pytest.mark.parametrize("kind", ["aot", "aot_unpaired"])
def test_ranking_losses_have_the_gradient_of_the_whole_step(
    kind: Any, tiny_model: Path, other_model: Path, tmp_path: Path
) -> None:
    """By transformers and autograd, on one batch with one SGD step."""
    examples = rankings(tiny_model, tmp_path / "run")
    run = recorded(
        tiny_model, tmp_path / "run", examples, 1, loss_type=kind, token_budget=1, lr=1.0,
        reference=ReferenceConfig(model=str(other_model)),
    )  # fmt: skip
    network, batch = load_network(str(tiny_model)).eval(), examples.batch(0)
    reference = sums(load_network(str(other_model)).eval(), batch).float()
    own = []
    for ids, prompt, length in zip(*batch.sequences, strict=True):
        scores = network(input_ids=ids[None, :length]).logits[0, :-1].log_softmax(-1)
        own.append(scores.gather(-1, ids[1:length, None])[int(prompt) - 1 :, 0].sum())
    rows, better, group = torch.stack(own), batch.columns["preference"], batch.columns["group"]
    w, l = ((better[:, None] > better) & (group[:, None] == group)).nonzero(as_tuple=True)  # noqa: E741
    if kind == "aot":
        margins = (rows[w] - rows[l]).sort().values - (reference[w] - reference[l]).sort().values
    else:
        c = rows - reference
        margins = c[w].sort().values - c[l].sort().values
    (-logsigmoid(BETA * margins).mean()).backward()
    trained_weights = weights(run)
    for name, p in network.named_parameters():
        assert p.grad is not None
        torch.testing.assert_close(trained_weights[name], p.detach() - p.grad, rtol=1e-4, atol=2e-5)


def test_tied_completions_make_no_pair(tiny_model: Path, tmp_path: Path) -> None:
    def row(i: int) -> dict[str, Any]:
        return {"prompt": f"{i}?", "completions": ["a", "bb", "ccc", "d"], "scores": [1, 0, 1, 2]}

    examples = Preferences(
        batch_size=2, tokenizer=str(tiny_model), held_out_percent=0, dataset=str(write(tmp_path / "t.jsonl", row))
    )
    run = recorded(tiny_model, tmp_path, examples, 1)
    totals = run.recorder.updates[0][0][1]
    assert totals.sequences == 2 * (4 * 3 // 2 - 1)
    assert losses(run) == [pytest.approx(torch.log(torch.tensor(2.0)).item())]  # the policy is its reference


# --- the reference --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def computed(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    os.environ["PL_GLOBAL_SEED"] = "1"
    return recorded(tiny_model, tmp_path_factory.mktemp("computed"), steps=4)


@pytest.mark.trap(28)
def test_a_cached_reference_gives_the_same_run(computed: Any, tiny_model: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    for folder in ("first", "again"):
        before = {f: f.stat().st_mtime_ns for f in cache.glob("*")} if cache.exists() else {}
        run = recorded(tiny_model, tmp_path / folder, steps=4, reference_cache=str(cache))
        assert losses(run) == pytest.approx(losses(computed), rel=1e-6)
        assert gap(weights(run), weights(computed)) < 1e-6
        assert run.reference.released
        files = {f: f.stat().st_mtime_ns for f in cache.glob("*")}
        assert len(files) == 1
        assert files == before or folder == "first"


@pytest.mark.trap(28)
def test_the_reference_stays_as_the_policy_began(computed: Any, tiny_model: Path) -> None:
    assert losses(computed)[0] == pytest.approx(0.6931472, rel=1e-6)
    assert len(set(losses(computed))) == 4
    network = load_network(str(tiny_model))
    began = {n: p.detach() for n, p in network.named_parameters()}
    reference = {n: p.detach() for n, p in computed.reference.network.model.named_parameters()}
    assert gap(began, reference) == 0.0
    assert gap(began, weights(computed)) > 1e-3


def test_with_adapters_the_reference_is_their_base(tiny_model: Path, tmp_path: Path) -> None:
    lora = {"lora": LoraConfig(r=2)}
    own = recorded(tiny_model, tmp_path / "own", policy=lora, lr=3.0, steps=3)
    assert own.reference.network is None
    other = recorded(
        tiny_model, tmp_path / "loaded", policy=lora, lr=3.0, steps=3, reference=ReferenceConfig(model=str(tiny_model))
    )
    assert other.reference.network is not None
    assert losses(own)[0] == pytest.approx(0.6931472, rel=1e-6)
    assert losses(own) == pytest.approx(losses(other), rel=1e-5)
    assert losses(own)[2] != pytest.approx(0.6931472, rel=1e-3)
    batch = own.trainer.datamodule.batch(0)
    expected = sums(load_network(str(tiny_model)).eval(), batch)
    torch.testing.assert_close(own._sums_of(batch).double(), expected, rtol=1e-5, atol=1e-4)
    cached = recorded(tiny_model, tmp_path / "c", policy=lora, lr=3.0, steps=3, reference_cache=str(tmp_path / "k"))
    assert losses(cached) == pytest.approx(losses(own), rel=1e-5)


def test_log_probs_in_the_data_are_the_reference(tiny_model: Path, tmp_path: Path) -> None:
    def row(i: int) -> dict[str, Any]:
        return {**KINDS["dpo"][2](i), "ref_chosen_logps": -20.0 - i, "ref_rejected_logps": -3.0 * i}

    examples = data("dpo", tiny_model, tmp_path, dataset=str(write(tmp_path / "r.jsonl", row)))
    run = recorded(tiny_model, tmp_path, examples, 1)
    assert run.reference is None
    batch = examples.batch(0)
    own = sums(load_network(str(tiny_model)).eval(), batch)
    i = (batch.columns["row"] // 2).double()
    reference = torch.where(batch.columns["row"] % 2 == 0, -20.0 - i, -3.0 * i)
    assert losses(run)[0] == pytest.approx(naive("sigmoid", batch, own, reference), rel=1e-5)


def test_without_a_reference_its_log_ratio_is_zero(tiny_model: Path, tmp_path: Path) -> None:
    run = recorded(tiny_model, tmp_path, steps=1, options=PairLossOptions(reference_free=True))
    assert run.reference is None
    batch = run.trainer.datamodule.batch(0)
    own = sums(load_network(str(tiny_model)).eval(), batch)
    assert losses(run)[0] == pytest.approx(naive("sigmoid", batch, own, torch.zeros_like(own)), rel=1e-5)
    with pytest.raises(ValueError, match=r"reference_cache: this loss reads no reference"):
        module("dpo", tiny_model, loss_type="simpo", reference_cache="x")


def test_losses_add_up_by_their_weights(tiny_model: Path, tmp_path: Path) -> None:
    parts = [losses(recorded(tiny_model, tmp_path / k, steps=1, loss_type=k))[0] for k in ("sigmoid", "sft", "hinge")]
    run = recorded(tiny_model, tmp_path / "all", steps=1, loss_type=["sigmoid", "sft", "hinge"],
                   loss_weights=[1.0, 0.5, 2.0])  # fmt: skip
    assert losses(run)[0] == pytest.approx(parts[0] + 0.5 * parts[1] + 2 * parts[2], rel=1e-5)
    batch = run.trainer.datamodule.batch(0)
    own = sums(load_network(str(tiny_model)).eval(), batch)
    best = batch.columns["preference"] > 0
    assert parts[1] == pytest.approx(float(-own[best].sum() / batch.mask[best].sum()), rel=1e-5)


def test_what_cannot_be_is_refused(tiny_model: Path) -> None:
    with pytest.raises(ValueError, match=r"model.init_args.loss_weights: 2 weights for 1 losses"):
        module("dpo", tiny_model, loss_weights=[1.0, 2.0])
    for weights_of_losses in ([0.0, 0.0], [1.0, float("nan")]):
        with pytest.raises(ValueError, match=r"^model.init_args.loss_weights: must be finite and not all 0"):
            module("dpo", tiny_model, loss_type=["sigmoid", "sft"], loss_weights=weights_of_losses)
    with pytest.raises(ValueError, match=r"^model.init_args.options.label_smoothing: hinge would not read it"):
        module("dpo", tiny_model, loss_type="hinge", options=PairLossOptions(label_smoothing=0.1))
    for value in (0.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"^model.init_args.beta: must be above 0 and finite"):
            module("kto", tiny_model, beta=value)
    with pytest.raises(ValueError, match=r"refresh_every: the reference of fixed data is fixed"):
        module("dpo", tiny_model, reference=ReferenceConfig(refresh_every=2))


def test_evaluation_estimates_kl_on_the_policys_own_answers(tiny_model: Path, tmp_path: Path) -> None:
    """0 before training, above it after a large step."""
    seen: list[float] = []
    for lr in (1e-12, 3.0):
        folder = tmp_path / str(lr)
        run = module("dpo", tiny_model, lr=lr)
        log_scores = run.log_scores
        run.log_scores = lambda p, v, s, f=log_scores: (seen.append(v["objective/kl"]), f(p, v, s))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("lit_posttrain.gates.require_change", lambda *_: None)
            fit(run, data("dpo", tiny_model, folder, val_size=4, held_out_percent=30), folder, max_steps=3,
                limit_val_batches=1.0, val_check_interval=3)  # fmt: skip
    assert seen[0] == pytest.approx(0.0, abs=1e-4)
    assert abs(seen[-1]) > 1e-3


def test_that_kl_is_the_mean_log_ratio_of_answers(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the answers that were sampled, by transformers: a sum over tokens, a mean over answers."""
    asked: list[tuple[list[int], list[int]]] = []

    def recording(engine: Any, examples: Any, *rest: Any) -> Any:
        completions = answer(engine, examples, *rest)
        asked.extend((e.prompt, c.token_ids) for e, c in zip(examples, completions, strict=True))
        return completions

    monkeypatch.setattr("lit_posttrain.algorithms.preference.answer", recording)
    run = module("dpo", tiny_model, lr=3.0)
    fit(run, data("dpo", tiny_model, tmp_path, val_size=4, held_out_percent=30), tmp_path, max_steps=3,
        limit_val_batches=1.0, val_check_interval=3)  # fmt: skip
    assert sum(len(ids) for _, ids in asked) > len(asked) == 2
    answers = SimpleNamespace(sequences=pad_sequences(*zip(*asked, strict=True)))
    own, reference = (sums(n.eval(), answers) for n in (run.built_policy().model, load_network(str(tiny_model))))
    expected = float((own - reference).mean())
    assert abs(expected) > 1e-2
    assert curve(tmp_path, "eval/objective/kl") == [pytest.approx(expected, rel=1e-4)]


def test_an_evaluation_after_training_stands_where_training_ended(tiny_model: Path, tmp_path: Path) -> None:
    run, examples = module("dpo", tiny_model), data("dpo", tiny_model, tmp_path, val_size=4, held_out_percent=40)
    fit(run, examples, tmp_path, max_steps=3)
    run.trainer.limit_val_batches = 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run.trainer.validate(run, examples, verbose=False)
    assert [step for step, _ in scalars(tmp_path)["eval/loss"]] == [3]


def test_rewards_that_tie_are_not_right(computed: Any) -> None:
    """The policy begins as its reference, so both rewards are 0."""
    assert computed.recorder.results[0].metrics["rewards/accuracies"] == 0.0
    assert computed.recorder.results[-1].metrics["rewards/accuracies"] > 0.0


@pytest.mark.parametrize("kind", ["aot", "aot_unpaired"])
def test_a_loss_that_sorts_is_evaluated_without_training(
    kind: Any, tiny_model: Path, other_model: Path, tmp_path: Path
) -> None:
    """Lightning's inference mode knows no gradients."""
    run = module("dpo", tiny_model, loss_type=kind, reference=ReferenceConfig(model=str(other_model)))
    examples = data("dpo", tiny_model, tmp_path, val_size=4, held_out_percent=40, val_batch_size=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (got,) = trainer(tmp_path, limit_val_batches=1.0).validate(run, examples, verbose=False)
    batch = examples.evaluation_batch("val", 0)
    own, reference = (sums(load_network(str(m)).eval(), batch) for m in (tiny_model, other_model))
    assert got["eval/loss"] == pytest.approx(naive(kind, batch, own, reference), rel=1e-5)
