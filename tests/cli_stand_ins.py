"""Small stand-ins by which the command line is tested without models and data sets."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.cli import OptimizerCallable
from torch.utils.data import DataLoader

from lit_posttrain.checkpoint import CheckpointError, write_checkpoint
from lit_posttrain.gates import GateError
from lit_posttrain.rewards.base import RewardError


@dataclass(frozen=True, kw_only=True)
class Adapters:
    r: int = 4


BASE = """\
trainer:
  accelerator: cpu
  max_steps: 2
  limit_val_batches: 0
  enable_progress_bar: false
  enable_model_summary: false
  enable_checkpointing: false
  logger: {class_path: TensorBoardLogger, init_args: {save_dir: logs, name: tiny}}
  callbacks:
    - class_path: cli_stand_ins.SaveAtEnd
    - class_path: cli_stand_ins.Spy
model:
  class_path: cli_stand_ins.Tiny
  init_args:
    policy:
      model: some/model
    scores:
      - class_path: cli_stand_ins.Exact
        init_args:
          weight: 0.5
    optimizer:
      class_path: torch.optim.AdamW
      init_args: {lr: 1.0e-6}
data:
  class_path: cli_stand_ins.Numbers
"""


@dataclass(frozen=True, kw_only=True)
class Net:
    model: str
    tokenizer: str | None = None
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    lora: Adapters | None = None


@dataclass(frozen=True, kw_only=True)
class Sampling:
    temperature: float = 1.0
    max_new_tokens: int = 16


class Score(ABC):
    def __init__(self, weight: float = 1.0):
        if weight < 0:
            raise ValueError(f"weight: {weight} is negative; give a positive one")
        self.weight = weight

    @abstractmethod
    def score(self) -> float: ...


class Exact(Score):
    def __init__(self, strict: bool = True, **kwargs):
        super().__init__(**kwargs)
        self.strict = strict

    def score(self) -> float:
        return 1.0


class ModelBase(LightningModule, ABC):
    def __init__(self, policy: Net, optimizer: OptimizerCallable = lambda params: torch.optim.SGD(params, lr=0.1)):
        super().__init__()
        self.policy = policy
        self.optimizer = optimizer

    @abstractmethod
    def loss(self) -> float: ...

    def configure_model(self):
        if not hasattr(self, "layer"):
            self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch, i):
        return self.layer(batch).square().mean()

    def validation_step(self, batch, i):
        self.log("seen", float(self.global_step))

    def on_save_checkpoint(self, checkpoint):
        # What save_hyperparameters would leave; Lightning's own command line would let it override the YAML.
        checkpoint["hyper_parameters"] = {"group_size": 9}

    def configure_optimizers(self):
        return self.optimizer(self.parameters())


class Tiny(ModelBase):
    def __init__(
        self,
        scores: list[Score] | None = None,
        sampling: Sampling = Sampling(),
        group_size: int = 2,
        clip: tuple[float, float] = (0.2, 0.2),
        by_source: dict[str, Score] | None = None,
        fault: str | None = None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        if group_size < 1:
            raise ValueError(f"model.init_args.group_size:\n  {group_size} is too small")
        self.scores, self.sampling, self.group_size, self.fault = scores, sampling, group_size, fault
        _raise(self, "init")

    def loss(self) -> float:
        return 0.0

    def configure_model(self):
        _raise(self, "configure_model")
        super().configure_model()

    def training_step(self, batch, i):
        def setup():  # of an engine, say: by its name it is no preparation of the run
            _raise(self, "setup_in_step")

        setup()
        _raise(self, "training_step")
        return super().training_step(batch, i)


class DataBase(LightningDataModule, ABC):
    def __init__(self, tokenizer: str, batch_size: int = 1, fault: str | None = None):
        super().__init__()
        self.tokenizer, self.batch_size, self.fault = tokenizer, batch_size, fault

    @abstractmethod
    def load(self) -> Any: ...


class Numbers(DataBase):
    def load(self) -> Any:
        return torch.ones(4, 1)

    def setup(self, stage):
        _raise(self, "setup")

    def train_dataloader(self):
        _raise(self, "train_dataloader")
        return DataLoader(self.load(), batch_size=self.batch_size)

    def val_dataloader(self):
        return DataLoader(self.load(), batch_size=self.batch_size)


class Spy(Callback):
    seen: list[tuple[Any, Any]] = []  # noqa: RUF012 - what runs leave for the tests

    def on_fit_start(self, trainer, pl_module):
        Spy.seen.append((trainer, pl_module))


class SaveAtEnd(Callback):
    def on_train_end(self, trainer, pl_module):
        write_checkpoint(
            Path(trainer.log_dir), lambda folder: trainer.save_checkpoint(folder / "state.ckpt"), trainer.global_step
        )


class NoTokenizer(DataBase):
    """Data that tokenizes nothing."""

    def __init__(self):
        super().__init__(tokenizer="none")

    def load(self) -> Any:
        return torch.ones(4, 1)

    def train_dataloader(self):
        return DataLoader(self.load())


FAULTS: dict[str, Callable[[], BaseException]] = {
    "value": lambda: ValueError("group_size:\n  mend it"),
    "missing": lambda: FileNotFoundError(2, "No such file or directory", "rows.jsonl"),
    "bug": lambda: RuntimeError("a bug"),
    "stop": lambda: SystemExit(75),
    "gate": lambda: GateError("no parameter is trainable"),
    "disk": lambda: CheckpointError("cannot save step-2: no space left"),
    "reward": lambda: RewardError("scores[0] gave only invalid verdicts"),
}


def _raise(owner: Any, where: str) -> None:
    """Raises what ``fault: kind@where`` asks for."""
    kind, _, place = (owner.fault or "").partition("@")
    if place == where:
        raise FAULTS[kind]()
