from collections import Counter
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from lit_posttrain import randomness
from lit_posttrain.data.base import PostTrainDataModule, Split


class Numbers(PostTrainDataModule):
    """Example *i* is the number *i*; a batch is (indices, positions)."""

    def __init__(self, train: int = 11, val: int = 7, batch_size: int = 4, val_batch_size: int | None = 3):
        super().__init__(batch_size, val_batch_size)
        self.sizes = {"train": train, "val": val}

    def size(self, split: Split) -> int:
        return self.sizes[split]

    def collate(self, split: Split, indices: list[int], positions: list[int]) -> Any:
        return indices, positions

    def fingerprint(self) -> str:
        return str(self.sizes["train"])


def on_rank(rank: int, world: int, **sizes: Any) -> Numbers:
    data = Numbers(**sizes)
    data.trainer = SimpleNamespace(  # type: ignore[assignment]
        distributed_sampler_kwargs={"rank": rank, "num_replicas": world}, state=SimpleNamespace(fn="fit")
    )
    return data


def joined(lists: Iterable[list[int]]) -> list[int]:
    return list(chain.from_iterable(lists))


def indices(batches: Any) -> list[list[int]]:
    return [batch[0] for batch in batches]


def test_an_epoch_is_the_permutation_of_its_number_without_the_partial_batch() -> None:
    data = Numbers()
    for epoch in range(3):
        order = randomness.permutation(11, 7, "order", epoch).tolist()
        assert data.batch(2 * epoch) == (order[:4], [0, 1, 2, 3])
        assert data.batch(2 * epoch + 1) == (order[4:8], [0, 1, 2, 3])
    assert len({tuple(data.batch(n)[0]) for n in range(10)}) == 10


def test_a_batch_is_a_function_of_its_number() -> None:
    forwards = [Numbers().batch(n) for n in range(9)]
    data = Numbers()
    torch.manual_seed(3)
    assert [data.batch(n) for n in reversed(range(9))] == forwards[::-1]


def test_the_order_follows_the_runs_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    before = Numbers(train=50).batch(0)
    monkeypatch.setenv("PL_GLOBAL_SEED", "8")
    assert Numbers(train=50).batch(0) != before


@pytest.mark.trap(43)
@pytest.mark.parametrize("world", [1, 2, 4])
def test_rank_slices_make_up_the_global_batch(world: int) -> None:
    ranks = [on_rank(r, world) for r in range(world)]
    for n in range(5):
        shares = [data.batch(n) for data in ranks]
        assert joined(share[0] for share in shares) == Numbers().batch(n)[0]
        assert joined(share[1] for share in shares) == [0, 1, 2, 3]
        assert {len(share[0]) for share in shares} == {4 // world}


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_evaluation_covers_everything_once_in_order_and_in_step(world: int) -> None:
    loaders = [on_rank(r, world).val_dataloader() for r in range(world)]
    assert {len(loader) for loader in loaders} == {3}
    steps = list(zip(*loaders, strict=True))
    assert [joined(share[0] for share in shares) for shares in steps] == [[0, 1, 2], [3, 4, 5], [6]]
    assert [joined(share[1] for share in shares) for shares in steps] == [[0, 1, 2], [0, 1, 2], [0]]
    for shares in steps:
        lengths = [len(share[0]) for share in shares]
        assert max(lengths) - min(lengths) <= 1


def test_prediction_visits_the_whole_training_set() -> None:
    assert indices(Numbers().predict_dataloader()) == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10]]


def test_without_a_held_out_set_there_is_no_loader() -> None:
    assert Numbers(val=0).val_dataloader() == []


def test_iterators_go_on_where_the_last_stopped() -> None:
    data = Numbers()
    loader = data.train_dataloader()
    assert len(loader) == 2
    assert indices([*loader, *loader]) == [data.batch(n)[0] for n in range(4)]


def test_seek_holds_once() -> None:
    data = Numbers(train=13)
    data.seek(4)
    loader = data.train_dataloader()
    assert indices([*loader, *loader]) == [data.batch(n)[0] for n in range(4, 10)]
    data.seek(1)
    assert next(iter(loader)) == data.batch(1)


def test_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    data = Numbers()
    for loader in (data.train_dataloader(), data.predict_dataloader()):
        assert list(loader)
    assert torch.equal(torch.get_rng_state(), state)


def test_sizes_that_cannot_work_are_named() -> None:
    with pytest.raises(ValueError, match=r"data.init_args.batch_size: 4 is over all ranks, and 3 .* set it to 6"):
        on_rank(0, 3).train_dataloader()
    with pytest.raises(ValueError, match=r"data.init_args.batch_size: 4 is more than the 3 training examples"):
        Numbers(train=3).train_dataloader()
    with pytest.raises(ValueError, match=r"data.init_args.batch_size: must be at least 1, got 0"):
        Numbers(batch_size=0)
    with pytest.raises(ValueError, match=r"data.init_args.val_batch_size: must be at least 1, got -1"):
        Numbers(val_batch_size=-1)


class Recorder(LightningModule):
    """Notes its batches; ``crash_at`` dies in that iteration, after the batch was handed out."""

    def __init__(self, crash_at: int | None = None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.crash_at = crash_at
        self.train_batches: list[list[int]] = []
        self.val_batches: list[list[int]] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.global_step == self.crash_at:
            raise KeyboardInterrupt
        self.train_batches.append(batch[0])
        return self.weight * 1.0

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.val_batches.append(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


class SaveAt(Callback):
    def __init__(self, hook: str, step: int, path: Path):
        def save(trainer: Trainer, *_: Any) -> None:
            if trainer.global_step == step and not path.exists():
                trainer.save_checkpoint(path)

        setattr(self, hook, save)


def fit(data: Numbers, model: Recorder, *callbacks: Callback, ckpt_path: Path | None = None, **flags: Any) -> Recorder:
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **({"max_epochs": 3, "num_sanity_val_steps": 0} | flags),
    )
    trainer.fit(model, datamodule=data, ckpt_path=None if ckpt_path is None else str(ckpt_path))
    return model


def test_fit_trains_and_evaluates_every_batch() -> None:
    model = fit(Numbers(), Recorder(), max_epochs=2, num_sanity_val_steps=1)
    assert model.train_batches == [Numbers().batch(n)[0] for n in range(4)]
    assert model.val_batches == [[0, 1, 2], [0, 1, 2], [3, 4, 5], [6], [0, 1, 2], [3, 4, 5], [6]]
    assert fit(Numbers(val=0), Recorder()).val_batches == []


def test_lightnings_warnings_about_loaders_are_answered(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    path = tmp_path / "saved.ckpt"
    fit(Numbers(val=0), Recorder(), SaveAt("on_train_batch_end", 1, path))
    fit(Numbers(val=0), Recorder(), ckpt_path=path)
    told = [str(w.message) for w in recwarn]
    assert not [m for m in told if "IterableDataset" in m or "resum" in m or "is zero" in m]


def test_a_second_fit_begins_at_the_beginning() -> None:
    data = Numbers()
    fit(data, Recorder(), max_epochs=1)
    assert fit(data, Recorder(), max_epochs=1).train_batches == [Numbers().batch(n)[0] for n in range(2)]


def test_a_limited_epoch_leaves_out_nothing() -> None:
    model = fit(Numbers(train=20), Recorder(), limit_train_batches=3)
    assert model.train_batches == [Numbers(train=20).batch(n)[0] for n in range(9)]


@pytest.mark.trap(43)
@pytest.mark.parametrize("limit", [1.0, 3], ids=["whole epochs", "limited epochs"])
@pytest.mark.parametrize("step", range(1, 9))
@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_train_batch_end"])
def test_a_resume_repeats_and_skips_nothing(hook: str, step: int, limit: float, tmp_path: Path) -> None:
    path = tmp_path / "saved.ckpt"
    first = fit(Numbers(train=17), Recorder(), SaveAt(hook, step, path), limit_train_batches=limit, limit_val_batches=0)
    data = Numbers(train=17)
    data.batch(5)  # whatever happened to the DataModule before plays no part
    second = fit(data, Recorder(), ckpt_path=path, limit_train_batches=limit, limit_val_batches=0)
    assert first.train_batches[:step] + second.train_batches == first.train_batches
    assert torch.load(path, weights_only=True)["Numbers"]["iteration"] == step


def test_a_resume_on_other_data_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "saved.ckpt"
    fit(Numbers(), Recorder(), SaveAt("on_train_batch_end", 1, path))
    with pytest.raises(ValueError, match=r"data: the training examples are not what the checkpoint was trained with"):
        fit(Numbers(train=12), Recorder(), ckpt_path=path)
    with pytest.raises(ValueError, match=r"data.init_args.batch_size: 2 is not what the checkpoint"):
        fit(Numbers(batch_size=2), Recorder(), ckpt_path=path)
    monkeypatch.setenv("PL_GLOBAL_SEED", "8")
    with pytest.raises(ValueError, match=r"seed_everything: 8 is not what the checkpoint"):
        fit(Numbers(), Recorder(), ckpt_path=path)
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    trainer.validate(Recorder(), datamodule=Numbers(train=12), ckpt_path=str(path), verbose=False)


def test_state_without_a_trainer() -> None:
    data = Numbers()
    loader = data.train_dataloader()
    list(loader)
    resumed = Numbers()
    resumed.load_state_dict(data.state_dict())
    assert indices(resumed.train_dataloader()) == [data.batch(n)[0] for n in (2, 3)]


def test_every_example_is_seen_equally_often() -> None:
    data = Numbers(train=12)
    seen = Counter(i for n in range(3 * 5) for i in data.batch(n)[0])
    assert seen == dict.fromkeys(range(12), 5)
