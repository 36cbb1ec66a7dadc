"""Over-optimisation as it happens: the reward that is learned from, and a better one, against sqrt(KL)."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lit_posttrain import randomness
from lit_posttrain.algorithms.measures import reported
from lit_posttrain.algorithms.online import OnlineModule
from lit_posttrain.batching import pad_sequences, split, to_device
from lit_posttrain.functional.kl import kl_estimate
from lit_posttrain.reference import Reference, ReferenceConfig
from lit_posttrain.report.plots import overoptimisation_figure
from lit_posttrain.rewards.base import RewardFunction, judge
from lit_posttrain.rewards.learned import LearnedReward
from lit_posttrain.rollout.collect import generate, to_samples
from lit_posttrain.types import Completion, Prompt

FILE = "overoptimisation"


@final
class OverOptimisation(Callback):
    """Before training and after each validation: reward on held-out prompts against the square root of the KL.

    Gao et al. (2210.10760) found that the reward which is optimised (the proxy) goes on rising with d = sqrt(KL(pi ||
    pi_init)) while what it stands for (the gold reward) turns and falls. ``overoptimisation.json`` and
    ``overoptimisation.png`` of the run, and in TensorBoard ``eval/overoptimisation/*`` and a figure, show both.

    The proxy is what the rewards say, without a KL in it or a missing end's penalty. The KL is that of whole answers to
    the policy as its folder holds it: the sum over an answer's tokens of k3, which is unbiased and never negative.
    Sampling draws from numbers of its own, so training is the same with and without.

    Args:
        gold: Judges the same answers and is never learned from; null shows the proxy alone.
        prompts: How many held-out prompts, the first ones; one answer each.
    """

    def __init__(self, gold: RewardFunction | None = None, prompts: int = 128):
        if prompts < 1:
            raise ValueError(f"OverOptimisation.prompts: must be at least 1, is {prompts}")
        if gold is not None:
            gold.key = "OverOptimisation.gold.init_args"
            if isinstance(gold, LearnedReward) and gold.calibration:
                raise ValueError(
                    f"{gold.key}.calibration: gold is not calibrated, since a constant changes no curve; set it to 0"
                )
        self.gold, self.prompts = gold, prompts
        self.points: list[dict[str, float]] = []
        self._initial: Reference | None = None

    def state_dict(self) -> dict[str, Any]:
        """The points so far."""
        return {"points": self.points}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on after them."""
        self.points = list(state_dict["points"])

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        """Refuse what samples nothing, and hold the gold answers against the gold reward."""
        if stage != "fit":
            return
        if not isinstance(pl_module, OnlineModule):
            raise ValueError(
                f"trainer.callbacks: OverOptimisation watches PPO and GRPO; {type(pl_module).__name__} samples nothing"
            )
        if self.gold is not None:
            trainer.datamodule.check_answers(self.gold.check_answer)  # pyright: ignore[reportAttributeAccessIssue]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Find or load the initial policy, and load the gold reward's network."""
        data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        if not data.size("val"):
            raise ValueError("trainer.callbacks: OverOptimisation needs held-out prompts; see data.init_args.val_size")
        if data.size("val") < self.prompts:
            rank_zero_warn(f"OverOptimisation.prompts: {self.prompts}, but only {data.size('val')} are held out")
        own: Reference | None = pl_module.reference
        if own is not None and own.equals_initial_policy and own.config.refresh_every is None:
            self._initial = own  # which the module places
        else:
            self._initial = Reference(pl_module.built_policy(), ReferenceConfig())
            self._initial.place(pl_module.device, pl_module.device_mesh)
        if self.gold is not None:
            self.gold.place(pl_module.device)
            for prompt in data.prompts("val")[: self.prompts]:
                self.gold.check_prompt(prompt.prompt)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """The first point, when the rewards are calibrated and nothing is trained."""
        if trainer.global_step == 0 and not self.points:
            self._measure(trainer, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """A further point."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._measure(trainer, pl_module)

    def teardown(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        """End what the gold reward started."""
        self._initial = None
        if self.gold is not None:
            self.gold.close()

    # --- a point ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _measure(self, trainer: pl.Trainer, module: OnlineModule) -> None:
        """Sample, judge and record. Every rank does the same."""
        data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        prompts = data.prompts("val")[: self.prompts]
        module.phase("over-optimisation", len(prompts))
        module.engine.sync(module.built_policy())
        completions = generate(
            module.engine, prompts, 1, module.sampling, randomness.run_seed(), "over-optimisation", 0, module.advance
        )
        module.engine.rest()
        stops = module.sampling.stop_ids(module.built_policy().stop_token_ids)
        samples = to_samples(module.tokenizer, prompts, completions, stops)
        kl = self._kl(module, prompts, completions)
        point = {"step": float(trainer.global_step), "kl": kl, "sqrt_kl": kl**0.5}
        rewards: dict[str, list[RewardFunction]] = {"proxy": module.rewards}
        if self.gold is not None:
            rewards["gold"] = [self.gold]
        for name, functions in rewards.items():
            judgement = judge(functions, samples)
            if judgement.valid.any():
                point[name] = float(judgement.rewards[judgement.valid].mean())
            else:
                rank_zero_warn(f"OverOptimisation: no answer has a valid {name} reward ({judgement.reasons})")
            reported(functions)  # what they logged is no part of the next iteration
        self.points = [p for p in self.points if p["step"] < point["step"]] + [point]
        self._show(trainer, module, point)

    def _kl(self, module: OnlineModule, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> float:
        """Mean over answers."""
        assert self._initial is not None
        policy, temperature = module.built_policy(), module.sampling.temperature
        sequences = pad_sequences([p.token_ids for p in prompts], [c.token_ids for c in completions])
        packed, total = policy.packs(sequences.ids.shape[1]), 0.0
        for batch in split(sequences, sequences.completion_mask(), {}, module.token_budget, packed=packed):
            b = to_device(batch, module.device)
            ours = policy(b.sequences, b.mask, temperature).log_probs
            theirs = self._initial.log_probs(b.sequences, b.mask, temperature)
            total += float(kl_estimate(ours, theirs, "k3").where(b.mask, 0.0).sum())
        return total / len(prompts)

    def _show(self, trainer: pl.Trainer, module: OnlineModule, point: dict[str, float]) -> None:
        step = int(point["step"])
        tagged = {f"eval/overoptimisation/{name}": value for name, value in point.items() if name != "step"}
        if module.logger is not None:
            module.logger.log_metrics(tagged, step=step)
        folder: Path = module.run_dir()
        if not trainer.is_global_zero:
            return
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{FILE}.json").write_text(json.dumps(self.points, indent=1) + "\n", encoding="utf-8")
        figure = overoptimisation_figure(self.points)
        figure.savefig(folder / f"{FILE}.png", dpi=120)
        module.log_figure("eval/overoptimisation", figure, step)
