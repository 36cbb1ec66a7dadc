"""A run that is killed or stopped anywhere continues bit for bit: the nemesis, the history and its checker.

Every run is a forked child: a new interpreter would spend ten seconds importing. A child sets its threads to one
before anything else, because a fork hangs in OpenMP once the parent has used it.
"""

import hashlib
import json
import multiprocessing
import os
import random
import signal
import socket
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from events import await_later_name, logger_from
from lightning.pytorch.callbacks import Callback
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler

from lit_posttrain import callbacks
from lit_posttrain.callbacks import CheckpointEvery, GracefulStop
from lit_posttrain.checkpoint import Checkpoint, load_artefact, newest_checkpoint, save_artefact, tensor_hash
from lit_posttrain.position import position
from lit_posttrain.progress import PhaseProgressBar
from lit_posttrain.randomness import permutation, seed_step
from lit_posttrain.sharding import ShardedStrategy, prime, shard

EXAMPLES, BATCH, UPDATES, EVERY = 13, 3, 3, 2
BATCHES_PER_EPOCH = EXAMPLES // BATCH
Tick = Callable[[str, int], None]


class Batches(Sampler[list[int]]):
    """Whole batches of a permutation of (seed, epoch), from a given position on."""

    def __init__(self, epoch: int, start: int):
        self.epoch, self.start, self.sampler = epoch, start, self

    def set_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            self.epoch, self.start = epoch, 0

    def __len__(self) -> int:
        return BATCHES_PER_EPOCH

    def __iter__(self) -> Iterator[list[int]]:
        order = permutation(EXAMPLES, 5, "order", self.epoch).tolist()
        start, self.start = self.start, 0
        yield from (order[i * BATCH : (i + 1) * BATCH] for i in range(start, len(self)))


class Data(pl.LightningDataModule):
    def __init__(self) -> None:
        super().__init__()
        self.cursor = (0, 0)

    def state_dict(self) -> dict[str, Any]:
        assert self.trainer is not None
        return {"cursor": position(self.trainer)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.cursor = tuple(state_dict["cursor"])

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(range(EXAMPLES), batch_sampler=Batches(*self.cursor))  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(range(4), batch_size=2)  # type: ignore[arg-type]


class Tiny(pl.LightningModule):
    """Three updates an iteration, dropout, an averaged copy, a controlled coefficient and a refreshed reference."""

    def __init__(self, folder: Path, tick: Tick):
        super().__init__()
        self.automatic_optimization = False
        self.folder, self.tick = folder, tick
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Tanh(), nn.Linear(8, 1))
        self.register_buffer("average", torch.zeros(8, 4))
        self.register_buffer("coefficient", torch.tensor(0.1))
        self.reference = torch.zeros(8, 4)
        self.reference_name = ""
        self.stop: Any = None

    def record(self, **entry: Any) -> None:
        with (self.folder / "history.jsonl").open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def checkpoint_artefacts(self) -> list[str]:
        return [self.reference_name] if self.reference_name else []

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["reference"] = self.reference_name

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.reference_name = checkpoint["reference"]
        if self.reference_name:
            self.reference = load_artefact(self.folder / "version_0", self.reference_name)["w"]

    def loss(self, ids: Tensor) -> Tensor:
        x = torch.sin(ids[:, None] * torch.arange(1.0, 5.0))
        first = self.network[0].weight
        penalty = (first - self.reference.to(first.device)).square().sum()
        return (self.network(x).squeeze(-1) - ids.float().cos()).square().mean() + self.coefficient * penalty

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        step = self.trainer.global_step
        seed_step(5, step, 0)
        for completion in range(2):
            self.tick(f"rollout {completion}", step)
            self.stop.check()
        noise = torch.rand(len(batch))
        if step % 3 == 0 and step:
            self.reference = self.network[0].weight.detach().clone()
            if self.global_rank == 0:
                self.reference_name = save_artefact(self.folder / "version_0", {"w": self.reference})
            self.reference_name = self.trainer.strategy.broadcast(self.reference_name)
            self.tick("reference", step)
        optimizer = self.optimizers()
        losses = []
        for update in range(UPDATES):
            loss = self.loss(batch + noise)
            optimizer.zero_grad()
            self.manual_backward(loss)
            (optimizer if update == UPDATES - 1 else optimizer.optimizer).step()
            losses.append(loss.item().hex())
            self.stop.check()  # here it must do nothing: half an iteration cannot be saved
            self.tick(f"update {update}", step)
        with torch.no_grad():
            self.average.lerp_(self.network[0].weight, 0.1)
            self.coefficient.mul_(1.01 if loss > 1 else 0.99)
        counted = self.trainer.fit_loop.epoch_loop._batches_that_stepped  # decides when Lightning logs
        self.record(kind="train", step=step + 1, ids=[*batch.tolist(), counted], losses=losses)
        self.log_dict({"step": float(step + 1), "loss": loss.detach(), "reward": 1.0}, prog_bar=True)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.tick(f"validation {batch_idx}", self.trainer.global_step)
        self.stop.check()
        loss = self.loss(batch)
        self.record(kind="validation", step=self.trainer.global_step, batch=batch_idx, losses=[loss.item().hex()])
        self.log_dict({"step": float(self.trainer.global_step), "val_loss": loss}, on_epoch=True, on_step=False)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.network.parameters(), lr=0.01, weight_decay=0.1)


HOOKS = [
    *("on_train_start", "on_train_epoch_start", "on_train_batch_start", "on_train_batch_end", "on_train_epoch_end"),
    *("on_validation_start", "on_validation_batch_end", "on_validation_end", "on_before_optimizer_step"),
    *("on_save_checkpoint", "on_train_end"),
]


class Ticking(Callback):
    """Calls the nemesis in every hook."""

    def __init__(self, tick: Tick):
        for name in HOOKS:
            setattr(self, name, lambda trainer, *_, name=name, **__: tick(name, trainer.global_step))


def build(folder: Path, tick: Tick, loader: Checkpoint | None, **options: Any) -> tuple[pl.Trainer, Tiny]:
    every = options.pop("every", EVERY)
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=logger_from(folder, loader),
        callbacks=[Ticking(tick), CheckpointEvery(every, keep_last=2), PhaseProgressBar()],
        enable_model_summary=False,
        log_every_n_steps=1,
        **options,
    )
    return trainer, Tiny(folder, tick)


# Validation every two iterations over epochs of four batches, or at the end of each epoch, or inside epochs.
SCHEDULES: dict[str, dict[str, Any]] = {
    "steps": {"max_steps": 7, "val_check_interval": 2, "check_val_every_n_epoch": None, "num_sanity_val_steps": 0},
    "epochs": {"max_epochs": 2, "num_sanity_val_steps": 0, "every": 3},
}


def fit(folder: Path, tick: Tick, **options: Any) -> None:
    """One attempt, from the newest checkpoint if there is one; with it alone, like a user's second command."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for method in ("save_state", "prune"):
        real = getattr(callbacks, method)

        def ticking(*args: Any, real: Any = real, method: str = method, **kwargs: Any) -> Any:
            tick(f"before {method}", -1)
            out = real(*args, **kwargs)
            tick(f"after {method}", -1)
            return out

        setattr(callbacks, method, ticking)
    found = newest_checkpoint(folder / "version_0", report=lambda m: pytest.fail(m))
    trainer, module = build(folder, tick, found, **options)
    trainer.fit(module, Data(), ckpt_path=found and found.state)


def child(act: Callable[[], None]) -> int:
    process = multiprocessing.get_context("fork").Process(target=act)
    process.start()
    process.join(60)
    assert process.exitcode is not None, "hangs"
    return process.exitcode


def ignore(name: str, step: int) -> None:
    """No nemesis."""


class Nemesis:
    """Does something to its own process at one tick; ticks are counted from the start of the process."""

    def __init__(self, at: int, act: Callable[[], None]):
        self.at, self.act, self.count = at, act, 0

    def __call__(self, name: str, step: int) -> None:
        self.count += 1
        if self.count == self.at:
            self.act()


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def history(folder: Path) -> dict[Any, Any]:
    """By step and batch, whatever any attempt recorded; the checker fails if two attempts disagree."""
    entries: dict[Any, Any] = {}
    for line in (folder / "history.jsonl").read_text().splitlines():
        entry = json.loads(line)
        key = (entry["kind"], entry["step"], entry.get("batch"))
        value = (entry.get("ids"), entry["losses"])
        assert entries.setdefault(key, value) == value, f"{key} was computed again and came out differently"
    return entries


def curves(folder: Path) -> dict[str, list[tuple[int, str]]]:
    events = EventAccumulator(str(folder / "version_0"), size_guidance={"scalars": 0})
    events.Reload()
    return {t: [(e.step, e.value.hex()) for e in events.Scalars(t)] for t in ("loss", "val_loss")}


def tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from tensors(part, f"{name}/{key}")
    elif isinstance(value, (list, tuple)):
        for key, part in enumerate(value):
            yield from tensors(part, f"{name}/{key}")


def end_state(folder: Path) -> tuple[int, str, str]:
    newest = newest_checkpoint(folder / "version_0", report=lambda m: pytest.fail(m))
    assert newest is not None
    saved = torch.load(newest.state, weights_only=True)
    parts = {k: saved[k] for k in ("state_dict", "optimizer_states")}
    return newest.step, tensor_hash(dict(tensors(parts))), hashlib.sha256(repr(saved["reference"]).encode()).hexdigest()


def outcome(folder: Path) -> tuple[Any, ...]:
    return history(folder), curves(folder), end_state(folder)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, ...]]:
    outcomes = {}
    for name, schedule in SCHEDULES.items():
        folder = tmp_path_factory.mktemp(name)
        assert child(lambda folder=folder, schedule=schedule: fit(folder, ignore, **schedule)) == 0
        outcomes[name] = outcome(folder)
    return outcomes


def test_the_undisturbed_run_is_what_it_should_be(undisturbed: dict[str, tuple[Any, ...]]) -> None:
    entries, lines, (last, *_) = undisturbed["steps"]
    assert [k[1] for k in entries if k[0] == "train"] == [1, 2, 3, 4, 5, 6, 7]
    assert sorted({k[1] for k in entries if k[0] == "validation"}) == [2, 4, 6]
    assert [s for s, _ in lines["loss"]] == [1, 2, 3, 4, 5, 6, 7]
    assert [s for s, _ in lines["val_loss"]] == [2, 4, 6]
    assert last == 7
    ids = [entries["train", n + 1, None][0][:-1] for n in range(7)]
    for epoch in (ids[:4], ids[4:]):
        flat = [i for batch in epoch for i in batch]
        assert len(flat) == len(set(flat)), "an example was repeated within an epoch"
    entries, lines, (last, *_) = undisturbed["epochs"]
    assert [s for s, _ in lines["val_loss"]] == [4, 8]
    assert last == 8


@pytest.mark.trap(43)
@pytest.mark.parametrize(("schedule", "begin", "end"), [("steps", -1, 4), ("epochs", 3, 6)])
def test_killed_at_every_hook(
    tmp_path: Path, undisturbed: dict[str, tuple[Any, ...]], schedule: str, begin: int, end: int
) -> None:
    """Attempt k dies at its k-th tick, from wherever attempt k-1 left the disk, until a checkpoint is at ``end``.

    Counting starts again with every new checkpoint, as the ticks before it are not repeated. What the sampler, the
    noise, the averages, the coefficient and the reference would be without their state is seen by the checker.
    """
    if begin > 0:
        after = At("on_train_batch_start", begin + 1, kill)
        assert child(lambda: fit(tmp_path, after, **SCHEDULES[schedule])) == -signal.SIGKILL
    attempts, at, step = 0, 0, begin
    while step < end:
        at, attempts = at + 1, attempts + 1
        code = child(lambda at=at: fit(tmp_path, Nemesis(at, kill), **SCHEDULES[schedule]))
        assert code == -signal.SIGKILL
        found = newest_checkpoint(tmp_path / "version_0", report=lambda m: pytest.fail(m))
        if found is not None and found.step != step:
            step, at = found.step, 0
    assert attempts > 40
    assert child(lambda: fit(tmp_path, ignore, **SCHEDULES[schedule])) == 0
    assert outcome(tmp_path) == undisturbed[schedule]


def test_attempts_within_a_second_are_read_in_the_order_of_time(tmp_path: Path) -> None:
    host = socket.gethostname()
    (tmp_path / f"events.out.tfevents.{int(time.time()):010d}.{host}.99999999.0").touch()
    await_later_name(tmp_path)
    newest = max(path.name for path in tmp_path.iterdir())
    assert f"events.out.tfevents.{int(time.time()):010d}.{host}.{os.getpid()}.0" > newest


@pytest.mark.parametrize("seed", range(3))
def test_killed_at_random_moments_in_a_row(tmp_path: Path, undisturbed: dict[str, tuple[Any, ...]], seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(3):
        at = rng.randrange(10, 90)
        assert child(lambda at=at: fit(tmp_path, Nemesis(at, kill), **SCHEDULES["steps"])) in (0, -signal.SIGKILL)
    assert child(lambda: fit(tmp_path, ignore, **SCHEDULES["steps"])) == 0
    assert outcome(tmp_path) == undisturbed["steps"]


class At:
    """Acts at the first tick of this name and step."""

    def __init__(self, name: str, step: int, act: Callable[[], None]):
        self.name, self.step, self.act = name, step, act

    def __call__(self, name: str, step: int) -> None:
        if (name, step) == (self.name, self.step):
            self.step = -2
            self.act()


def send(*numbers: int) -> Callable[[], None]:
    def act() -> None:
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(0.1)

    return act


STOPS = [
    *(("on_train_start", 0, 0), ("on_train_batch_start", 0, 0), ("rollout 1", 2, 2), ("update 0", 2, 3)),
    *(("update 2", 3, 4), ("on_train_batch_end", 4, 4), ("validation 1", 4, 4), ("on_validation_start", 2, 2)),
    *(("on_train_epoch_end", 4, 4), ("rollout 0", 5, 5), ("on_before_optimizer_step", 4, 5), ("reference", 3, 4)),
]


@pytest.mark.parametrize(("hook", "step", "saved"), STOPS)
def test_a_signal_stops_at_the_next_safe_point(
    tmp_path: Path, undisturbed: dict[str, tuple[Any, ...]], hook: str, step: int, saved: int
) -> None:
    number = signal.SIGINT if step == 2 else signal.SIGTERM
    assert child(lambda: fit(tmp_path, At(hook, step, send(number)), **SCHEDULES["steps"])) == 75
    newest = newest_checkpoint(tmp_path / "version_0")
    assert newest is not None
    assert newest.step == saved
    assert child(lambda: fit(tmp_path, ignore, **SCHEDULES["steps"])) == 0
    assert outcome(tmp_path) == undisturbed["steps"]


@pytest.mark.parametrize(("hook", "step"), [("validation 0", 4), ("on_train_epoch_end", 4), ("update 1", 6)])
def test_a_signal_at_the_end_of_an_epoch(
    tmp_path: Path, undisturbed: dict[str, tuple[Any, ...]], hook: str, step: int
) -> None:
    assert child(lambda: fit(tmp_path, At(hook, step, send(signal.SIGTERM)), **SCHEDULES["epochs"])) == 75
    assert child(lambda: fit(tmp_path, ignore, **SCHEDULES["epochs"])) == 0
    assert outcome(tmp_path) == undisturbed["epochs"]


def test_a_signal_after_the_last_update_lets_the_run_finish(
    tmp_path: Path, undisturbed: dict[str, tuple[Any, ...]]
) -> None:
    assert child(lambda: fit(tmp_path, At("update 2", 7, send(signal.SIGTERM)), **SCHEDULES["steps"])) == 0
    assert child(lambda: fit(tmp_path, At("on_train_batch_end", 7, send(signal.SIGTERM)), **SCHEDULES["steps"])) == 0
    assert outcome(tmp_path) == undisturbed["steps"]


def test_a_signal_during_start_up_is_not_forgotten(tmp_path: Path) -> None:
    """Between Lightning's start and ours its own handler takes it, which would end the run with exit 0, unsaved."""

    def start() -> None:
        Ticking.on_sanity_check_start = lambda *_: send(signal.SIGTERM)()
        Tiny.validation_step = lambda self, batch, batch_idx: None
        fit(tmp_path, ignore, **{**SCHEDULES["steps"], "num_sanity_val_steps": 1})

    assert child(start) == 75


@pytest.mark.parametrize(
    ("hook", "step", "numbers"),
    [
        ("rollout 0", 3, (signal.SIGTERM, signal.SIGTERM)),
        ("before save_state", -1, (signal.SIGTERM, signal.SIGTERM)),
        ("update 1", 5, (signal.SIGTERM, signal.SIGINT)),
        ("validation 0", 2, (signal.SIGINT, signal.SIGINT)),
    ],
)
def test_a_second_signal_exits_at_once(
    tmp_path: Path, undisturbed: dict[str, tuple[Any, ...]], hook: str, step: int, numbers: tuple[int, int]
) -> None:
    assert child(lambda: fit(tmp_path, At(hook, step, send(*numbers)), **SCHEDULES["steps"])) == 128 + numbers[1]
    assert child(lambda: fit(tmp_path, ignore, **SCHEDULES["steps"])) == 0
    assert outcome(tmp_path) == undisturbed["steps"]


def test_the_same_signal_twice_in_a_blink_is_one(tmp_path: Path) -> None:
    """What coreutils' timeout sends: once to the process, once to its group."""

    def twice() -> None:
        moments = iter((100.0, 100.04))  # a crowded machine would blink slowly
        callbacks.time = SimpleNamespace(monotonic=lambda: next(moments))  # type: ignore[assignment]
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.001)

    assert child(lambda: fit(tmp_path, At("rollout 0", 3, twice), **SCHEDULES["steps"])) == 75


def test_longer_training_continues_exactly(tmp_path: Path, undisturbed: dict[str, tuple[Any, ...]]) -> None:
    for steps in (3, 5, 7):
        options = {**SCHEDULES["steps"], "max_steps": steps}
        assert child(lambda options=options: fit(tmp_path, ignore, **options)) == 0
    assert outcome(tmp_path) == undisturbed["steps"]


def test_a_run_never_starts_behind_checkpoints_of_its_own_folder(tmp_path: Path) -> None:
    assert child(lambda: fit(tmp_path, ignore, **SCHEDULES["steps"])) == 0

    def again() -> None:
        torch.set_num_threads(1)
        trainer, module = build(tmp_path, ignore, None, **SCHEDULES["steps"])
        with pytest.raises(ValueError, match=r"step-7 is already further than step 0.*--ckpt_path last"):
            trainer.fit(module, Data())

    assert child(again) == 0


@pytest.mark.parametrize("failures", [1, 2])
def test_a_failed_save_is_tried_once_more_and_then_ends_the_run(
    tmp_path: Path, undisturbed: dict[str, tuple[Any, ...]], failures: int
) -> None:
    left = [failures]

    def full(name: str, step: int) -> None:
        if name == "before save_state" and left[0] and (tmp_path / "version_0" / "checkpoints" / "step-2").exists():
            left[0] -= 1
            raise OSError(28, "No space left on device")

    code = child(lambda: fit(tmp_path, full, **SCHEDULES["steps"]))
    if failures == 2:
        assert code == 1
        newest = newest_checkpoint(tmp_path / "version_0", report=lambda m: pytest.fail(m))
        assert newest is not None
        assert newest.step == 2
        code = child(lambda: fit(tmp_path, ignore, **SCHEDULES["steps"]))
    assert code == 0
    assert outcome(tmp_path) == undisturbed["steps"]


@pytest.mark.parametrize("wrong", [{"iterations": 0}, {"iterations": 1, "keep_last": 0}])
def test_arguments_are_checked(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        CheckpointEvery(**wrong)


def test_check_raises_only_when_asked_and_never_within_an_iteration() -> None:
    callback = CheckpointEvery(1)
    callback.check()
    callback._received = (signal.SIGTERM, 0.0)
    with pytest.raises(GracefulStop) as stopped:
        callback.check()
    assert stopped.value.code == 75
    callback._after_update()
    callback.check()


# --- several ranks --------------------------------------------------------------------------------------------------


def ranks(act: Callable[[int], None]) -> list[int]:
    """Exit codes of two ranks on gloo."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def start(rank: int) -> None:
        torch.set_num_threads(1)
        os.environ.update(
            LOCAL_RANK=str(rank), NODE_RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
        )
        act(rank)

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=start, args=(rank,)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
        process.kill()
    return [p.exitcode if p.exitcode is not None else -1 for p in processes]


def test_a_signal_to_one_rank_stops_all(tmp_path: Path) -> None:
    options = {**SCHEDULES["steps"], "devices": 2, "strategy": "ddp", "use_distributed_sampler": False}

    def run(tick: Tick, rank: int) -> None:
        fit(tmp_path, tick if rank == 1 else ignore, **options)

    assert ranks(lambda rank: run(At("rollout 0", 3, send(signal.SIGTERM)), rank)) == [75, 75]
    newest = newest_checkpoint(tmp_path / "version_0")
    assert newest is not None
    assert newest.step == 4  # the rollout of iteration 4 went on: the other rank could not know
    assert ranks(lambda rank: run(ignore, rank)) == [0, 0]
    assert newest_checkpoint(tmp_path / "version_0") == (tmp_path / "version_0" / "checkpoints" / "step-7", 7)


class Sharded(pl.LightningModule):
    """One matrix sharded over two ranks, each with data of its own."""

    def __init__(self, folder: Path, tick: Tick):
        super().__init__()
        self.automatic_optimization = False
        self.folder, self.tick = folder, tick
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
        self.stop: Any = None

    def configure_model(self) -> None:
        shard(self.network, self.device_mesh, torch.float32)  # type: ignore[arg-type]

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        step = self.trainer.global_step
        self.tick("rollout 0", step)
        self.stop.check()
        x = torch.sin((batch + self.global_rank)[:, None] * torch.arange(1.0, 5.0))
        loss = self.network(x).square().mean()
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        with (self.folder / f"rank-{self.global_rank}").open("a") as file:
            file.write(f"{step} {loss.item().hex()}\n")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = torch.optim.AdamW(self.network.parameters(), lr=0.01)
        prime(optimizer)
        return optimizer


def test_a_sharded_run_is_saved_by_all_and_continues_exactly(tmp_path: Path) -> None:
    def run(folder: Path, tick: Tick) -> None:
        warnings.simplefilter("ignore")
        found = newest_checkpoint(folder / "version_0")
        options = {"devices": 2, "strategy": ShardedStrategy(), "max_steps": 5, "use_distributed_sampler": False}
        trainer, _ = build(folder, ignore, found, **options)
        trainer.fit(Sharded(folder, tick), Data(), ckpt_path=found and found.state)

    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    whole.mkdir()
    stopped.mkdir()
    assert ranks(lambda rank: run(whole, ignore)) == [0, 0]
    stop = At("rollout 0", 2, send(signal.SIGTERM))
    assert ranks(lambda rank: run(stopped, stop if rank == 1 else ignore)) == [75, 75]
    newest = newest_checkpoint(stopped / "version_0")
    assert newest is not None
    assert newest.step == 3
    assert newest.state.endswith("step-3/state")
    assert ranks(lambda rank: run(stopped, ignore)) == [0, 0]
    for rank in ("rank-0", "rank-1"):
        assert (stopped / rank).read_text() == (whole / rank).read_text()
        assert len((whole / rank).read_text().splitlines()) == 5
