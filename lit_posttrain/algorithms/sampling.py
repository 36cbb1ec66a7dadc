"""Sampling prompts and judging the samples: what training, evaluation and prediction share."""

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable

from lit_posttrain import randomness
from lit_posttrain.algorithms.base import PostTrainModule
from lit_posttrain.algorithms.evaluation import Evaluation, EvaluationConfig
from lit_posttrain.policy import Policy, PolicyConfig
from lit_posttrain.rewards.base import RewardFunction, require_names
from lit_posttrain.rollout.engine import RolloutEngine, SamplingParams
from lit_posttrain.rollout.native import NativeEngine
from lit_posttrain.sharding import world_size
from lit_posttrain.types import PromptBatch

_PROMPTS_SHOWN = 256


class SamplingModule(PostTrainModule):
    """A policy whose completions are judged: evaluation for every algorithm that can be sampled.

    Args:
        policy: The network that is trained.
        rewards: Judge the samples; their weighted scores add up to the reward.
        sampling: How completions are drawn.
        engine: Generates the completions; the native engine by default.
        evaluation: How held-out prompts are sampled and scored.
        optimizer: Gets the trainable parameters.
        scheduler: Learning-rate schedule, stepped once an iteration.
        max_grad_norm: Gradients are clipped to this global norm; null leaves them.
        token_budget: Most tokens, padding included, in one forward pass; null is 768 in fp32 and 1,152 in
            bf16. Sets memory, never the objective.
    """

    def __init__(
        self,
        policy: PolicyConfig,
        rewards: list[RewardFunction],
        sampling: SamplingParams,
        engine: RolloutEngine | None,
        evaluation: EvaluationConfig,
        optimizer: OptimizerCallable,
        scheduler: LRSchedulerCallable | None,
        max_grad_norm: float | None,
        token_budget: int | None,
    ):
        super().__init__(policy, optimizer, scheduler, max_grad_norm, token_budget)
        require_names(rewards, "model.init_args.rewards")
        if len(rewards) > 1:
            for i, function in enumerate(rewards):
                function.key = f"model.init_args.rewards[{i}].init_args"
        self.rewards = rewards
        self.sampling = sampling
        self.engine = engine or NativeEngine()
        self.evaluation = Evaluation(evaluation, sampling, rewards)

    def setup(self, stage: str) -> None:
        """Hold every gold answer against the rewards before any model is loaded."""
        data = getattr(self.trainer, "datamodule", None)
        for function in self.rewards:
            if data is not None and hasattr(data, "check_answers"):
                data.check_answers(function.check_answer)

    def prepare_policy(self, policy: Policy) -> None:
        """See that prompts and completions fit into the model."""
        data = getattr(self.trainer, "datamodule", None)
        if data is not None and policy.context_length and hasattr(data, "check_fits"):
            data.check_fits(policy.context_length, self.sampling.max_new_tokens)
        self.engine.bind(self.tokenizer)

    def place_rewards(self) -> None:
        """Load the networks among the rewards and show them some prompts, before anything is computed."""
        data = getattr(self.trainer, "datamodule", None)
        split = "train" if self.trainer.state.fn in ("fit", "predict") else "val"
        prompts = data.prompts(split)[:_PROMPTS_SHOWN] if data is not None and hasattr(data, "prompts") else []
        for function in self.rewards:
            function.place(self.device)
            for prompt in prompts:
                function.check_prompt(prompt.prompt)

    def restore_rewards(self) -> None:
        """Judge as the run did whose weights these are. An evaluation without a checkpoint says what it cannot know."""
        if self.loaded_counters is not None:
            for function in self.rewards:
                function.restore(self.loaded_counters.get("rewards", {}).get(function.name, {}))
        elif self.trainer.state.fn != "fit":
            for function in self.rewards:
                function.warn_uncalibrated()

    def on_fit_start(self) -> None:
        """Also the rewards' networks."""
        super().on_fit_start()
        self.place_rewards()

    def on_validation_start(self) -> None:
        """Likewise, and outside of training what a checkpoint holds of them."""
        super().on_validation_start()
        if self.trainer.state.fn != "fit":
            self.place_rewards()
            self.restore_rewards()

    def on_test_start(self) -> None:
        """Likewise."""
        super().on_test_start()
        self.place_rewards()
        self.restore_rewards()

    def on_predict_start(self) -> None:
        """Likewise."""
        super().on_predict_start()
        self.place_rewards()
        self.restore_rewards()

    def teardown(self, stage: str) -> None:
        """End what rewards and engine started."""
        for function in self.rewards:
            function.close()
        self.engine.close()

    # --- evaluation -------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Begin an evaluation with the present weights."""
        self.engine.sync(self.built_policy())
        self.evaluation.begin(self.tokenizer, self._stop_ids(), self.device)

    def validation_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """Sample and judge held-out prompts."""
        self.evaluation.add(self.engine, batch, randomness.run_seed(), self._tick_evaluation)
        bar = self.trainer.progress_bar_callback
        if bar is not None and hasattr(bar, "show"):
            bar.show(**self.evaluation.so_far())  # pyright: ignore[reportAttributeAccessIssue]

    def on_validation_epoch_end(self) -> None:
        """Log pass@k and the rest, and write every sample and verdict."""
        self._finish_evaluation("eval")

    def on_test_epoch_start(self) -> None:
        """Like validation."""
        self.on_validation_epoch_start()

    def test_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """Like validation."""
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        """Like validation."""
        self._finish_evaluation("test")

    def on_predict_epoch_start(self) -> None:
        """Like validation; the samples are the product."""
        self.on_validation_epoch_start()

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """Sample and judge training prompts."""
        self.validation_step(batch, batch_idx)

    def on_predict_epoch_end(self) -> None:
        """Write the samples, one JSON line each."""
        self.evaluation.finish(self.run_dir() / "predictions", self.step_of_weights(), self.global_rank)

    def _tick_evaluation(self, finished: int) -> None:
        if world_size() == 1:  # one rank that stopped alone would leave the others waiting
            self.poll()

    def _finish_evaluation(self, prefix: str) -> None:
        self.engine.rest()
        if self.trainer.sanity_checking:
            return
        step = self.step_of_weights()
        values, text = self.evaluation.finish(self.run_dir() / "evaluation", step, self.global_rank)
        self.log_scores(prefix, values, step)
        self.log_text(f"{prefix}/samples", text, step)

    # --- helpers ----------------------------------------------------------------------------------------------

    def _tick(self, finished: int) -> None:
        if finished:
            self.advance(finished)
        self._tick_evaluation(finished)

    def _stop_ids(self) -> list[int]:
        return self.sampling.stop_ids(self.built_policy().stop_token_ids)
