"""Worker: lit_posttrain's own GRPO under a Lightning Trainer, held between iterations until the parent asks for one.

A request names the prompts, the group size and the limit of that iteration, or its completions: then nothing is
sampled, and forward and backward are timed on the same sequences every time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader, IterableDataset

from lit_posttrain.algorithms import GRPO
from lit_posttrain.batching import pad_sequences
from lit_posttrain.objective import AdvantageConfig, KLConfig, Objective, RatioConfig
from lit_posttrain.policy import Policy, PolicyConfig
from lit_posttrain.rewards import PerSampleReward
from lit_posttrain.rollout import RolloutEngine, SamplingParams
from lit_posttrain.types import Completion, Prompt, PromptBatch, Sample, SamplingKey, Sequences

from .ours_rollout import make_engine
from .protocol import Channel, Clock, begin, optimizer_bytes, reward, tensor_bytes

RATE = 1e-6


class Checksum(PerSampleReward):
    """The reward of both sides; also counts tokens."""

    def __init__(self, weight: float = 1.0):
        super().__init__(weight)
        self.tokens = 0

    def score(self, sample: Sample) -> float:
        """See ``protocol.reward``."""
        self.tokens += len(sample.token_ids)
        return reward(sample.token_ids)


class FixedEngine(RolloutEngine):
    """Returns given completions with the policy's log-probs, which hold because the learning rate is 0."""

    def __init__(self):
        self.completions: list[list[int]] = []
        self.policy: Policy | None = None
        self._known: dict[str, list[Completion]] = {}

    def sync(self, policy: Policy) -> None:
        """Keep the policy."""
        self.policy = policy

    def bind(self, tokenizer: Any) -> None:
        """No tokenizer is needed."""

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        keys: Sequence[SamplingKey],
        tick: Callable[[int], None] | None = None,
    ) -> list[Completion]:
        """The given completions, scored the first time."""
        name = repr(self.completions)
        if name not in self._known:
            self._known[name] = [self._scored(list(p), c) for p, c in zip(prompts, self.completions, strict=True)]
        return self._known[name]

    def _scored(self, prompt: list[int], completion: list[int]) -> Completion:
        assert self.policy is not None
        sequences = Sequences(*(x.to(self.policy.device) for x in pad_sequences([prompt], [completion])))
        mask = sequences.completion_mask()
        log_probs = self.policy(sequences, mask, 1.0).log_probs[mask]
        return Completion(completion, log_probs.tolist(), "length", 1)


class Waiting(IterableDataset):
    """Batches without content: the request that an iteration waits for brings it."""

    def __iter__(self) -> Iterator[PromptBatch]:
        """For ever."""
        while True:
            yield PromptBatch([], [])


class Driver(Callback):
    """Blocks before each iteration until there is a request, and answers after it."""

    def __init__(self, channel: Channel, clock: Clock, rank: int, world: int):
        self.channel, self.clock, self.rank, self.world = channel, clock, rank, world
        self.passes = 0.0
        self.stops: list[int] | None = None  # the model's own

    def prompt(self, number: int, ids: list[int]) -> Prompt:
        """Its text is of no account to a checksum."""
        return Prompt(number, str(number), str(number), ids, "", None, {})

    def static_bytes(self, module: Any) -> dict[str, int]:
        """See below."""
        return static_bytes(module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Everything is loaded."""
        for name in ("loss", "manual_backward"):
            setattr(pl_module, name, self.clock.timed(getattr(pl_module, name), self._passed))
        self.channel.reply()

    def _passed(self, seconds: float) -> None:
        self.passes += seconds

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: PromptBatch, batch_idx: int) -> None:
        """Fill the batch with what the request names, this rank's part of it."""
        request = self.channel.receive()
        pl_module.group_size = request["samples"]
        stops = [] if request["kind"] == "fixed" else self.stops
        pl_module.sampling = SamplingParams(max_new_tokens=request["new_tokens"], stop_token_ids=stops)
        positions = list(range(len(request["prompts"])))[self.rank :: self.world]
        batch.prompts[:] = [self.prompt(i, request["prompts"][i]) for i in positions]
        batch.positions[:] = positions
        if isinstance(pl_module.engine, FixedEngine):
            pl_module.engine.completions = request["completions"]
        pl_module.rewards[0].tokens, self.passes = 0, 0.0
        self.clock.start()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Answer."""
        measured = self.clock.stop()
        self.channel.reply(
            **measured,
            tokens=pl_module.rewards[0].tokens,
            phases={**pl_module.seconds, "forward_backward": self.passes},
            static_bytes=self.static_bytes(pl_module),
        )


def static_bytes(module: GRPO) -> dict[str, int]:
    """What is there whatever the batch: fp32 masters, the compute view where it is another copy, gradients, Adam."""
    policy = module.built_policy()
    return {
        "parameters": tensor_bytes(policy.model.parameters()) + view_bytes(policy),
        "gradients": tensor_bytes(p for _, p in policy.trainable()),  # fp32, as the masters
        "optimizer": sum(optimizer_bytes(optimizer) for optimizer in module.trainer.optimizers),
    }


def view_bytes(network: Policy) -> int:
    """The compute view, where it is another copy."""
    pairs = [] if network.view is None else network.view.pairs
    return tensor_bytes(low for master, low in pairs if low.data_ptr() != master.data_ptr())


def bare_trainer(setup: dict[str, Any], driver: Callback, **more: Any) -> pl.Trainer:
    """Trains until the process ends, and does nothing besides."""
    arguments: dict[str, Any] = {
        "accelerator": "gpu" if setup["device"] == "cuda" else "cpu",
        "devices": 1,
        "max_steps": -1,
        "max_epochs": -1,
        "limit_val_batches": 0,
        "num_sanity_val_steps": 0,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "default_root_dir": setup["folder"],
        "callbacks": [driver],
    }
    return pl.Trainer(**{**arguments, **more})


def main() -> None:
    """Build module and Trainer; the Driver does the rest."""
    channel = Channel()
    setup = channel.receive()
    begin(setup)
    clock = Clock(setup["device"])
    rank, world = setup.get("rank", 0), setup.get("world", 1)
    pl.seed_everything(setup["seed"])
    cuda = setup["device"] == "cuda"
    rate = 0.0 if setup["engine"] == "given" else RATE
    module = GRPO(
        policy=PolicyConfig(model=setup["model"], compute_dtype=setup["dtype"]),
        objective=Objective(
            advantage=AdvantageConfig(baseline="group_mean", scale="group_std"),
            ratio=RatioConfig(level="token", clip_low=0.2, clip_high=0.2),
            kl=KLConfig(estimator="k3", placement="loss", coef=0.0),
            aggregation="token_mean",
        ),
        rewards=[Checksum()],
        sampling=SamplingParams(max_new_tokens=setup["new_tokens"]),
        group_size=setup["samples"],
        engine=FixedEngine() if setup["engine"] == "given" else make_engine(setup["engine"]),
        token_budget=setup["token_budget"],
        optimizer=lambda params: torch.optim.AdamW(params, lr=rate, weight_decay=0.0, fused=True),
    )
    strategy = "auto" if world == 1 else DDPStrategy(process_group_backend=None if cuda else "gloo")
    trainer = bare_trainer(setup, Driver(channel, clock, rank, world), devices=world, strategy=strategy)
    trainer.fit(module, DataLoader(Waiting(), batch_size=None))


if __name__ == "__main__":
    main()
