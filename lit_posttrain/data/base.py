"""DataModules whose order is a function of (seed, iteration), whatever the world size and however often resumed."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, Literal, cast

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader, IterableDataset

from lit_posttrain import randomness

Split = Literal["train", "val"]


class PostTrainDataModule(LightningDataModule, ABC):
    """Batches by iteration number.

    One batch is one optimizer step's or one rollout's worth of data over all ranks, and :meth:`batch` is a pure
    function of the iteration: epoch *e* is permutation(n, seed, "order", *e*), cut into batches, the last partial one
    dropped. Every rank takes a contiguous slice of each batch. So a resume needs one number, and nothing is repeated
    or skipped.

    Subclasses load in :meth:`setup` and say in :meth:`size`, :meth:`collate` and :meth:`fingerprint` what there is.

    Args:
        batch_size: Examples per iteration over all ranks; a multiple of the number of ranks.
        val_batch_size: Examples per evaluation batch over all ranks; ``batch_size`` if not given.
    """

    def __init__(self, batch_size: int, val_batch_size: int | None = None):
        super().__init__()
        for name, value in (("batch_size", batch_size), ("val_batch_size", val_batch_size)):
            if value is not None and value < 1:
                raise ValueError(f"data.init_args.{name}: must be at least 1, got {value}")
        self.batch_size = batch_size
        self.val_batch_size = val_batch_size or batch_size
        self._sought: int | None = None
        self._next = 0
        self._order: tuple[tuple[int, int, int], list[int]] | None = None

    @abstractmethod
    def size(self, split: Split) -> int:
        """Number of examples, after :meth:`setup`."""

    @abstractmethod
    def collate(self, split: Split, indices: list[int], positions: list[int]) -> Any:
        """A batch of examples.

        Args:
            split: ``train`` or ``val``.
            indices: Which examples, each below ``size(split)``; none at all on a rank that gets no share of the last
                evaluation batch.
            positions: Position of each in the batch over all ranks.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """A hash of the training examples in their order; a resume on others is refused."""

    @property
    def iterations_per_epoch(self) -> int:
        """Full batches in one pass over the training set."""
        return self.size("train") // self.batch_size

    def batch(self, iteration: int) -> Any:
        """This rank's share of the batch of ``iteration``, counted from 0 over the whole run."""
        rank, world = self._ranks()
        share = self.batch_size // world
        positions = list(range(rank * share, (rank + 1) * share))
        return self.share("train", self.whole(iteration), positions)

    def whole(self, iteration: int) -> list[int]:
        """Which examples the batch of ``iteration`` holds over all ranks."""
        epoch, number = divmod(iteration, self.iterations_per_epoch)
        return self._permutation(epoch)[number * self.batch_size : (number + 1) * self.batch_size]

    def evaluation_batches(self, split: Split) -> int:
        """Evaluation batches of a split, the last of them perhaps partial; the same number on every rank."""
        return -(-self.size(split) // self.val_batch_size)

    def evaluation_batch(self, split: Split, number: int) -> Any:
        """This rank's share of evaluation batch ``number``: contiguous, in source order, nothing padded or dropped.

        Shares of a batch that the ranks do not divide differ by one example; of a last batch smaller than the number
        of ranks some are empty. All ranks still see every batch, so collectives inside an evaluation step match.
        """
        whole = self.whole_of_evaluation(split, number)
        rank, world = self._ranks()
        positions = list(range(len(whole) * rank // world, len(whole) * (rank + 1) // world))
        return self.share(split, whole, positions)

    def whole_of_evaluation(self, split: Split, number: int) -> list[int]:
        """Which examples evaluation batch ``number`` holds over all ranks."""
        start = number * self.val_batch_size
        return list(range(start, min(start + self.val_batch_size, self.size(split))))

    def share(self, split: Split, whole: list[int], positions: list[int]) -> Any:
        """A rank's share of a batch, for those who have to see the rest of it; by default only :meth:`collate`.

        Args:
            split: ``train`` or ``val``.
            whole: The batch's examples over all ranks.
            positions: Which of them are this rank's.
        """
        return self.collate(split, [whole[p] for p in positions], positions)

    def seek(self, iteration: int) -> None:
        """Let the next training iterator begin at ``iteration``, once."""
        self._sought = iteration

    def train_dataloader(self) -> DataLoader:
        """Training batches. An iterator yields one epoch's number of them, beginning with the first not yet trained."""
        self._check_training_size()
        return _loader(self, None)

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        """The held-out set, or nothing where there is none."""
        return _loader(self, "val") if self.size("val") else []

    def test_dataloader(self) -> DataLoader | list[DataLoader]:
        """The held-out set."""
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader:
        """The whole training set in source order, once: rejection sampling answers these prompts."""
        return _loader(self, "train")

    def state_dict(self) -> dict[str, Any]:
        """The first iteration not yet trained, and what the order depends on."""
        return {"iteration": self._trained(), **self._order_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where a checkpoint stopped.

        Raises:
            ValueError: The data or its order is not the checkpoint's.
        """
        if self.trainer is not None and self.trainer.state.fn != TrainerFn.FITTING:
            return
        for name, now in self._order_state().items():
            if state_dict[name] != now:
                what = "data: the training examples are" if name == "examples" else f"{_KEYS[name]}: {now!r} is"
                raise ValueError(
                    f"{what} not what the checkpoint was trained with ({state_dict[name]!r}), so it cannot be resumed "
                    "exactly; restore the setting, or start a new run from exported weights"
                )
        self._next = state_dict["iteration"]

    def take(self) -> Iterator[Any]:
        """One epoch's number of training batches from the current iteration on."""
        for iteration in self._iterations():
            self._next = iteration + 1
            yield self.batch(iteration)

    def _iterations(self) -> range:
        start = self._trained() if self._sought is None else self._sought
        self._sought = None
        return range(start, start + self.iterations_per_epoch)

    def _trained(self) -> int:
        # The Trainer's count is right at every hook and after a restore; what was handed out may not be trained yet.
        if self.trainer is not None:
            return cast(Any, self.trainer.fit_loop.epoch_loop.batch_progress.total).processed
        return self._next

    def _order_state(self) -> dict[str, Any]:
        return {"seed": randomness.run_seed(), "batch_size": self.batch_size, "examples": self.fingerprint()}

    def _permutation(self, epoch: int) -> list[int]:
        key = (self.size("train"), randomness.run_seed(), epoch)
        if self._order is None or self._order[0] != key:
            n, seed, _ = key
            self._order = key, randomness.permutation(n, seed, "order", epoch).tolist()
        return self._order[1]

    def _ranks(self) -> tuple[int, int]:
        if self.trainer is None:
            return 0, 1
        # Not trainer.global_rank: tensor-parallel ranks of one replica must read the same data.
        replicas = self.trainer.distributed_sampler_kwargs or {"rank": 0, "num_replicas": 1}
        return replicas["rank"], replicas["num_replicas"]

    def _check_training_size(self) -> None:
        _, world = self._ranks()
        if self.batch_size % world:
            raise ValueError(
                f"data.init_args.batch_size: {self.batch_size} is over all ranks, and {world} ranks do not divide it; "
                f"set it to {-(-self.batch_size // world) * world}"
            )
        if self.size("train") < self.batch_size:
            raise ValueError(
                f"data.init_args.batch_size: {self.batch_size} is more than the {self.size('train')} training examples "
                "there are; lower it or bring more data"
            )


# What Lightning warns of and cannot know: no workers, so the length is exact; no held-out set was asked for; and the
# position in the epoch is the DataModule's, which does resume.
_ANSWERED_WARNINGS = (
    "Your `IterableDataset` has `__len__` defined",
    "Total length of `list` across ranks is zero",
    "You're resuming from a checkpoint that ended before the epoch ended and your dataloader is not resumable",
)
_KEYS = {"seed": "seed_everything", "batch_size": "data.init_args.batch_size"}


class _Batches(IterableDataset):
    """A DataModule's batches as a sized dataset: training batches, or those of one split in source order."""

    def __init__(self, datamodule: PostTrainDataModule, split: Split | None):
        self.datamodule = datamodule
        self.split: Split | None = split

    def __len__(self) -> int:
        if self.split is None:
            return self.datamodule.iterations_per_epoch
        return self.datamodule.evaluation_batches(self.split)

    def __iter__(self) -> Iterator[Any]:
        if self.split is None:
            yield from self.datamodule.take()
        else:
            for number in range(len(self)):
                yield self.datamodule.evaluation_batch(self.split, number)


def _loader(datamodule: PostTrainDataModule, split: Split | None) -> DataLoader:
    for message in _ANSWERED_WARNINGS:
        warnings.filterwarnings("ignore", message)
    # Without a generator of its own every new iterator would draw from torch's global one.
    return DataLoader(
        _Batches(datamodule, split),
        batch_size=None,
        num_workers=0,
        collate_fn=_unchanged,
        generator=torch.Generator(),
    )


def _unchanged(batch: Any) -> Any:
    return batch
