"""Learning from fixed examples: it learns, whatever the token budget and layout, and only from what counts."""

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from offline_runs import KINDS, data, fit, module, trained, write
from tiny import write_tiny_model
from tiny_runs import Recorder, curve, gap, scalars, weights
from torch import Tensor
from torch.nn.functional import cross_entropy

from lit_posttrain.batching import split
from lit_posttrain.functional.masked import Totals
from lit_posttrain.policy import Policy, PolicyConfig, load_network
from lit_posttrain.reference import ReferenceConfig
from lit_posttrain.scalar_heads import ScoreNetwork, last_tokens
from lit_posttrain.types import ExampleBatch, Sequences

LEARNING = {"sft": ("loss", 60), "rm": ("accuracy", 40), "dpo": ("rewards/accuracies", 40), "safety": ("accuracy", 40)}


def state(run: Any) -> dict[str, Tensor]:
    return {**weights(run), **{name: b.clone() for name, b in run.built_policy().named_buffers(recurse=False)}}


@pytest.mark.parametrize("kind", sorted(LEARNING))
def test_one_batch_is_learnt_by_heart(kind: str, tiny_model: Path, tmp_path: Path) -> None:
    metric, steps = LEARNING[kind]
    run = module(kind, tiny_model, optimizer=lambda params: torch.optim.Adam(params, lr=1e-2))
    recorder = Recorder(run)
    fit(
        run, data(kind, tiny_model, tmp_path, dataset=str(write(tmp_path / "d.jsonl", KINDS[kind][2], 4))), tmp_path,
        max_steps=steps, logger=False,
    )  # fmt: skip
    values = [r.metrics[metric] for r in recorder.results]
    losses = [r.metrics["loss"] for r in recorder.results]
    assert len(values) == steps
    assert losses[-1] < 0.1 * losses[0]
    if metric != "loss":
        assert values[-1] == 1.0


@pytest.fixture(scope="module")
def two_steps(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor]]:
    os.environ["PL_GLOBAL_SEED"] = "1"
    folder = tmp_path_factory.mktemp("whole")
    return {kind: state(trained(kind, tiny_model, folder / kind, lr=0.1, token_budget=4096)) for kind in KINDS}


@pytest.mark.parametrize(
    ("kind", "dtype", "budget"),
    [("sft", "float32", 768), ("sft", "bfloat16", 1152), ("kto", "float32", 768)]
    + [(kind, dtype, 1152) for kind in ("rm", "dpo") for dtype in ("float32", "bfloat16")],
)
def test_the_default_budget_suits_precision_and_what_stays_together(
    kind: str, dtype: Any, budget: int, tiny_model: Path
) -> None:
    run = module(kind, tiny_model)
    run.policy = Policy(PolicyConfig(model=str(tiny_model), compute_dtype=dtype))
    assert run.token_budget == budget
    assert module(kind, tiny_model, token_budget=7).token_budget == 7


@pytest.mark.trap(15)
@pytest.mark.parametrize("layout", ["1", "40", "padded", "padded 40"])
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_token_budget_and_layout_change_nothing(
    kind: str,
    layout: str,
    two_steps: dict[str, dict[str, Tensor]],
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if "padded" in layout:
        monkeypatch.setattr("lit_posttrain.policy.scoring.share_prompts", lambda network: False)
    budget = int(layout.split()[-1]) if layout[-1].isdigit() else 4096
    run = trained(kind, tiny_model, tmp_path / "run", lr=0.1, token_budget=budget)
    assert run.built_policy().shares_prompts == ("padded" not in layout)
    before = {n: p.detach() for n, p in run.network_class(run.policy_config).model.named_parameters()}
    expected = two_steps[kind]
    moved = gap(weights(run), before)
    assert moved > 1e-3
    assert gap(state(run), expected) < 2e-6 * max(1.0, max(float(x.abs().max()) for x in expected.values()))


def negative_log_likelihoods(network: Any, batch: ExampleBatch) -> Tensor:
    """Of each completion a sum over its tokens, by transformers and a row at a time."""
    values = []
    for ids, prompt, length in zip(*batch.sequences, strict=True):
        with torch.no_grad():
            logits = network(input_ids=ids[None, :length]).logits[0].double()
        values.append(cross_entropy(logits[prompt - 1 : length - 1], ids[prompt:length], reduction="sum"))
    return torch.stack(values)


@pytest.mark.trap(15)
@pytest.mark.parametrize("normalisation", ["token_mean", "sequence_sum"])
def test_sft_divides_by_tokens_or_sequences_of_the_step(normalisation: str, tiny_model: Path, tmp_path: Path) -> None:
    run = module("sft", tiny_model, normalisation=normalisation, token_budget=40)
    recorder, examples = Recorder(run), data("sft", tiny_model, tmp_path, val_size=5, held_out_percent=40)
    fit(run, examples, tmp_path, max_steps=1, limit_val_batches=1.0, val_check_interval=1)
    assert len(recorder.updates[0]) > 1
    held_out = examples.collate("val", list(range(examples.size("val"))), list(range(examples.size("val"))))
    totals = []
    for network, batch in ((load_network(str(tiny_model)), examples.batch(0)), (run.built_policy().model, held_out)):
        tokens = int((batch.sequences.lengths - batch.sequences.prompt_lengths).sum())
        totals.append((float(negative_log_likelihoods(network, batch).sum()), tokens, len(batch.sequences.ids)))
    expected = [nll / (tokens if normalisation == "token_mean" else rows) for nll, tokens, rows in totals]
    assert recorder.results[0].metrics["loss"] == pytest.approx(expected[0], rel=1e-5)
    assert curve(tmp_path, "eval/loss") == [pytest.approx(expected[1], rel=1e-5)]
    assert curve(tmp_path, "eval/perplexity") == [pytest.approx(math.exp(totals[1][0] / totals[1][1]), rel=1e-4)]


@pytest.mark.parametrize("budget", [40, 4096])
@pytest.mark.parametrize("below", [False, True])
def test_kto_holds_the_step_against_one_reference_point(
    below: bool, budget: int, tiny_model: Path, tmp_path: Path
) -> None:
    """2402.01306 Eq. 8: z is the mean log-ratio of the step's mismatched completions, and never below 0.

    With policy and reference exchanged every log-ratio changes its sign, so z is 0 in one of the cases.
    """
    models = [write_tiny_model(tmp_path / "other", seed=9), tiny_model]
    policy, reference = models[::-1] if below else models
    constants = {"beta": 0.1, "desirable_weight": 1.3, "undesirable_weight": 0.7}
    run = module("kto", policy, reference=ReferenceConfig(model=str(reference)), token_budget=budget, **constants)
    recorder, examples = Recorder(run), data("kto", policy, tmp_path)
    fit(run, examples, tmp_path, max_steps=1)
    batch = examples.batch(0)
    own, other = (-negative_log_likelihoods(load_network(str(m)).eval(), batch) for m in (policy, reference))
    matched, mean = batch.columns["role"] == 0, float((own - other)[batch.columns["role"] == 1].mean())
    assert (mean < -0.1) if below else (mean > 0.1)
    gain, good = 0.1 * (own - other - max(0.0, mean))[matched], batch.columns["label"][matched] > 0
    assert good.any()
    assert not good.all()
    expected = torch.where(good, 1.3 * (1 - gain.sigmoid()), 0.7 * (1 - (-gain).sigmoid())).mean()
    assert recorder.results[0].metrics["loss"] == pytest.approx(float(expected), rel=1e-5)
    assert recorder.results[0].metrics["kl"] == pytest.approx(max(0.0, mean), rel=1e-4)
    assert (len(recorder.updates[0]) > 1) == (budget == 40)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_an_evaluation_is_the_same_however_it_is_cut_into_batches(kind: str, tiny_model: Path, tmp_path: Path) -> None:
    other = {"reference": ReferenceConfig(model=str(write_tiny_model(tmp_path / "other", seed=9)))}
    curves = []
    for size in (1, 2, 6):
        folder = tmp_path / str(size)
        rows = write(folder / "rows.jsonl", KINDS[kind][2], 40)
        examples = data(
            kind, tiny_model, folder, dataset=str(rows), val_size=6, held_out_percent=50, val_batch_size=size
        )
        run = module(kind, tiny_model, lr=1e-6, **(other if kind in ("dpo", "kto") else {}))
        fit(run, examples, folder, max_steps=1, limit_val_batches=1.0, val_check_interval=1)
        assert examples.size("val") == 6
        # KTO's z is that of an evaluation batch.
        of_batch = ("eval/loss", "eval/kl") if kind == "kto" else ()
        found = {tag: points[-1][1] for tag, points in scalars(folder).items() if tag.startswith("eval/")}
        curves.append({tag: value for tag, value in found.items() if tag not in of_batch})
    assert len(curves[0]) > 2
    for got in curves[:2]:
        assert got == pytest.approx(curves[2], rel=1e-4, abs=1e-6)


# --- where gradients go ---------------------------------------------------------------------------------------------


def whole_batch(kind: str, tiny_model: Path, folder: Path) -> tuple[Any, ExampleBatch]:
    run = trained(kind, tiny_model, folder / "run", steps=1, lr=0.0001)
    batch = run.trainer.datamodule.batch(1)
    return run, batch._replace(columns={**batch.columns, **run.columns(batch, "train")})


def loss_of(run: Any, batch: ExampleBatch, packed: bool = False) -> Tensor:
    totals = Totals(*run.counts(batch))
    run.policy.shares_prompts = packed
    (micro,) = split(batch.sequences, batch.mask, batch.columns, 10**6, run.rows(batch), packed=packed,
                     together=batch.columns["group"] if run.together else None)  # fmt: skip
    return run.loss(micro, totals).loss


@pytest.mark.trap(1)
@pytest.mark.trap(8)
@pytest.mark.parametrize("kind", ["sft", "dpo", "kto"])
def test_only_completions_are_targets_and_their_end_token_is_one(kind: str, tiny_model: Path, tmp_path: Path) -> None:
    """The loss's gradient by every log-prob of the batch, with the log-probs of all positions put in its place."""
    run, batch = whole_batch(kind, tiny_model, tmp_path)
    seen: list[tuple[Sequences, Tensor]] = []
    policy = run.built_policy()
    policy.shares_prompts = False

    def everywhere(sequences: Sequences, mask: Tensor, temperature: float, **_: Any) -> Any:
        scored = Policy.forward(policy, sequences, sequences.attention_mask()[:, 1:], temperature)
        values = scored.log_probs.detach().requires_grad_()
        seen.append((sequences, values))
        # As the chunked head does: 0 where the mask is False.
        return scored._replace(log_probs=values.where(mask, 0.0))

    policy.forward = everywhere
    loss_of(run, batch).backward()
    policy.__dict__.pop("forward")
    ((sequences, values),) = seen
    slope = values.grad
    assert slope is not None
    completion = sequences.completion_mask()
    assert not slope[~completion].any()
    assert slope[completion].all()
    ends = slope.gather(1, sequences.lengths[:, None] - 2)
    assert ends.all()
    assert sequences.ids.gather(1, sequences.lengths[:, None] - 1).eq(run.tokenizer.eos_token_id).all()


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_what_stands_in_the_padding_is_irrelevant(kind: str, tiny_model: Path, tmp_path: Path) -> None:
    run, batch = whole_batch(kind, tiny_model, tmp_path)
    padding = ~batch.sequences.attention_mask()
    assert padding.any()
    other = batch._replace(sequences=batch.sequences._replace(ids=batch.sequences.ids.masked_fill(padding, 77)))
    for packed in (False, True):
        a, b = loss_of(run, batch, packed), loss_of(run, other, packed)
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.trap(31)
def test_scores_are_those_of_transformers_however_it_pads(tiny_model: Path) -> None:
    network = ScoreNetwork(PolicyConfig(model=str(tiny_model), compute_dtype="float32")).eval()
    with torch.no_grad():
        network.model.score.bias.fill_(0.3)  # type: ignore[union-attr]
    rows = [[10, 20, 30, 40, 50], [11, 21, 31], [12, 22, 32, 42]]
    width, pad = 5, 257
    network.model.config.pad_token_id = pad  # type: ignore[union-attr]
    lengths = torch.tensor([len(r) for r in rows])
    right = torch.tensor([r + [pad] * (width - len(r)) for r in rows])
    left = torch.tensor([[pad] * (width - len(r)) + r for r in rows])
    network.shares_prompts = False
    sequences = Sequences(right, torch.ones_like(lengths), lengths)
    with torch.no_grad():
        ours = network(sequences, last_tokens(sequences))
        alone = torch.cat([_alone(network, r) for r in rows])
        positions = (left != pad).long().cumsum(-1).sub(1).clamp(min=0)
        by_right = network.model(input_ids=right, attention_mask=(right != pad).long()).logits[:, 0]
        by_left = network.model(input_ids=left, attention_mask=(left != pad).long(), position_ids=positions).logits[
            :, 0
        ]
    for theirs in (by_right, by_left, alone):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert ours.unique().numel() == 3


def _alone(network: ScoreNetwork, row: list[int]) -> Tensor:
    return network.model(input_ids=torch.tensor([row])).logits[:, 0]


def test_one_token_decides_where_a_reward_is_read() -> None:
    at = last_tokens(Sequences(torch.zeros(2, 4, dtype=torch.long), torch.tensor([1, 1]), torch.tensor([4, 2])))
    assert at.tolist() == [[False, False, False, True], [False, True, False, False]]
