"""Writing, verifying, falling back and pruning, under a nemesis that fails the disk and flips bits."""

import ast
import builtins
import errno
import hashlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_posttrain import checkpoint, durable
from lit_posttrain.checkpoint import (
    CheckpointError,
    load_artefact,
    newest_checkpoint,
    newest_run,
    prune,
    resolve_checkpoint_file,
    save_artefact,
    set_aside_damaged,
    tensor_hash,
    verify,
    write_checkpoint,
)
from lit_posttrain.durable import save_state


def state(seed: int) -> dict[str, Any]:
    noise = torch.Generator().manual_seed(seed)
    return {"weights": torch.randn(2000, generator=noise), "half": torch.ones(3).bfloat16(), "step": seed}


def writer(seed: int) -> Callable[[Path], dict[str, str]]:
    return lambda folder: save_state(state(seed), folder / "state.ckpt")


def loads(path: Path) -> dict[str, Any]:
    return torch.load(resolve_checkpoint_file(path), weights_only=True)


def names(run: Path) -> set[str]:
    return {p.name for p in (run / "checkpoints").iterdir()}


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    written = write_checkpoint(tmp_path, writer(4), 4)
    assert written == (tmp_path / "checkpoints" / "step-4", 4)
    assert newest_checkpoint(tmp_path) == written
    torch.testing.assert_close(loads(written.path), state(4), rtol=0, atol=0)
    # the state is found by its folder and by itself, and needs no pickled code
    assert resolve_checkpoint_file(written.path / "state.ckpt") == written.state
    assert names(tmp_path) == {"step-4"}


def test_the_manifest_holds_sizes_and_hashes(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, writer(1), 1).path
    raw = (folder / "state.ckpt").read_bytes()
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["files"] == {"state.ckpt": {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}}
    assert (manifest["step"], manifest["format"]) == (1, 1)


def test_a_sharded_state_is_a_folder(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        (folder / "state" / "inner").mkdir(parents=True)
        for name in ("state/__0_0.distcp", "state/.metadata", "state/inner/x"):
            (folder / name).write_bytes(name.encode())

    folder = write_checkpoint(tmp_path, write, 3).path
    assert resolve_checkpoint_file(folder) == str(folder / "state")
    (folder / "state" / "__0_0.distcp").unlink()
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp: missing"):
        resolve_checkpoint_file(folder)


def test_a_good_checkpoint_is_never_written_over(tmp_path: Path) -> None:
    first = write_checkpoint(tmp_path, writer(1), 5)
    before = (first.path / "state.ckpt").stat()
    assert write_checkpoint(tmp_path, lambda _: pytest.fail("written again"), 5) == first
    assert (first.path / "state.ckpt").stat() == before


def test_a_damaged_checkpoint_is_replaced(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, writer(1), 5).path
    (folder / "state.ckpt").write_bytes(b"")
    write_checkpoint(tmp_path, writer(2), 5)
    assert loads(folder)["step"] == 2
    assert names(tmp_path) == {"step-5"}


def test_strays_are_never_read_and_are_removed(tmp_path: Path) -> None:
    good = write_checkpoint(tmp_path, writer(1), 1)
    shutil.copytree(good.path, good.path.with_name(".tmp-step-9"))
    assert newest_checkpoint(tmp_path) == good
    write_checkpoint(tmp_path, writer(2), 2)
    assert names(tmp_path) == {"step-1", "step-2"}


class NotPlain:
    pass


@pytest.mark.parametrize("content", [NotPlain(), Path("x"), torch.Generator(), lambda: 0])
def test_state_that_would_need_code_to_load_is_refused(tmp_path: Path, content: object) -> None:
    good = write_checkpoint(tmp_path, writer(1), 1)
    with pytest.raises(CheckpointError, match=r"state\.ckpt"):
        write_checkpoint(tmp_path, lambda f: save_state({"x": content}, f / "state.ckpt"), 2)
    assert newest_checkpoint(tmp_path) == good
    assert names(tmp_path) == {"step-1"}


# --- the nemesis: every I/O call of a save fails once ---------------------------------------------------------------


class Nemesis:
    """Counts the I/O calls of the code under test and makes the n-th one fail."""

    def __init__(self, n: int, how: int | str):
        self.n, self.how, self.calls, self.hit = n, how, 0, ""

    def due(self, call: str) -> bool:
        self.calls += 1
        if self.calls != self.n:
            return False
        self.hit = call
        if isinstance(self.how, int):
            raise OSError(self.how, os.strerror(self.how), f"at {call}")
        return True

    def opened(self, path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        self.due("open")
        file = builtins.open(path, mode, *args, **kwargs)  # noqa: SIM115
        return Faulty(file, self) if "w" in mode else file

    def install(self, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(durable, "open", self.opened, raising=False)
        for module, attribute in [(os, n) for n in ("mkdir", "rename", "fsync", "open")] + [(shutil, "disk_usage")]:
            patch.setattr(module, attribute, self.around(attribute, getattr(module, attribute)))

    def around(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.due(name)
            return real(*args, **kwargs)

        return call


class Faulty:
    """A file whose write may store half of what it is given and say that it stored all."""

    def __init__(self, file: Any, nemesis: Nemesis):
        self.file, self.nemesis = file, nemesis

    def __enter__(self) -> "Faulty":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def fileno(self) -> int:
        return self.file.fileno()

    def write(self, data: Any) -> int:
        if self.nemesis.due("write"):
            self.file.write(bytes(data)[: len(data) // 2])
            if self.nemesis.how == "nothing stored":
                return 0
            return len(data)
        return self.file.write(data)


@pytest.mark.parametrize("how", [errno.ENOSPC, errno.EIO, errno.EACCES, "lying short write", "nothing stored"])
def test_every_io_call_failing_once_leaves_the_previous_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: int | str
) -> None:
    previous = write_checkpoint(tmp_path, writer(1), 1)
    n, hits = 0, set()
    while True:
        n += 1
        nemesis = Nemesis(n, how)
        with monkeypatch.context() as patch:
            nemesis.install(patch)
            try:
                write_checkpoint(tmp_path, writer(2), 2)
                failed = None
            except CheckpointError as e:
                failed = str(e)
        if not nemesis.hit:
            break  # the save has fewer calls than n
        hits.add(nemesis.hit)
        if isinstance(how, str) and nemesis.hit != "write":  # only a write can be short
            shutil.rmtree(previous.path.with_name("step-2"))
            continue
        assert failed, f"call {n} ({nemesis.hit}) failed and was reported as success"
        assert str(tmp_path) in failed
        if isinstance(how, int):
            assert os.strerror(how) in failed
        assert loads(previous.path)["step"] == 1
        # whatever stands under a good name is whole; no junk is left to fill the disk
        newest = newest_checkpoint(tmp_path, report=pytest.fail)
        assert newest is not None
        assert names(tmp_path) <= {"step-1", "step-2"}
        shutil.rmtree(previous.path.with_name("step-2"), ignore_errors=True)
    assert failed is None
    assert loads(previous.path.with_name("step-2"))["step"] == 2
    assert {"open", "write", "fsync", "rename", "mkdir", "disk_usage"} <= hits
    assert n > 15


def child(act: Callable[[], None]) -> int:
    process = multiprocessing.get_context("fork").Process(target=act)
    process.start()
    process.join(60)
    return process.exitcode if process.exitcode is not None else -1


def test_a_file_size_limit_of_the_kernel_is_survived(tmp_path: Path) -> None:
    """Real partial writes and errors, not injected ones: the kernel stores what fits and refuses the rest."""
    previous = write_checkpoint(tmp_path, writer(1), 1)
    size = (previous.path / "state.ckpt").stat().st_size

    def limited() -> None:
        torch.set_num_threads(1)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        for limit in (0, 1, 100, size // 2, size - 1):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            with pytest.raises(CheckpointError, match=r"step-2.*File too large"):
                write_checkpoint(tmp_path, writer(2), 2)
            assert names(tmp_path) == {"step-1"}

    assert child(limited) == 0
    assert newest_checkpoint(tmp_path) == previous


def test_a_full_disk_is_noticed_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    previous = write_checkpoint(tmp_path, writer(1), 1)
    usage = shutil._ntuple_diskusage(10**12, 10**12 - 5 * 2**20, 5 * 2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    write_checkpoint(tmp_path, writer(2), 2)
    with pytest.raises(CheckpointError, match=r"5 MiB free.*needs 6 MiB"):
        write_checkpoint(tmp_path, lambda _: pytest.fail("written"), 3, expected_bytes=5 * 2**20)
    assert newest_checkpoint(tmp_path) == (previous.path.with_name("step-2"), 2)


def test_files_and_folders_are_flushed_before_and_after_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[str] = []
    fsync, rename = os.fsync, os.rename

    def logged_fsync(fd: int) -> None:
        log.append(os.path.relpath(os.readlink(f"/proc/self/fd/{fd}"), tmp_path))
        fsync(fd)

    def logged_rename(a: Path, b: Path) -> None:
        log.append(f"rename {Path(a).name} {Path(b).name}")
        rename(a, b)

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(os, "rename", logged_rename)
    write_checkpoint(tmp_path, writer(7), 7)
    staged = "checkpoints/.tmp-step-7"
    order = [f"{staged}/state.ckpt", f"{staged}/manifest.json", staged, "rename .tmp-step-7 step-7", "checkpoints"]
    assert log == [".", *order]


@pytest.mark.parametrize("n", range(1, 30, 2))
def test_a_kill_at_any_io_call_leaves_a_checkpoint_that_loads(tmp_path: Path, n: int) -> None:
    write_checkpoint(tmp_path, writer(1), 1)

    def killed() -> None:
        torch.set_num_threads(1)
        nemesis = Nemesis(n, "kill")
        nemesis.due = lambda call: killing(nemesis)  # type: ignore[method-assign]
        patch = pytest.MonkeyPatch()
        nemesis.install(patch)
        write_checkpoint(tmp_path, writer(2), 2)
        prune(tmp_path, 1)

    def killing(nemesis: Nemesis) -> bool:
        nemesis.calls += 1
        if nemesis.calls == n:
            os.kill(os.getpid(), signal.SIGKILL)
        return False

    code = child(killed)
    assert code in (0, -signal.SIGKILL)
    newest = newest_checkpoint(tmp_path, report=pytest.fail)
    assert newest is not None
    assert loads(newest.path)["step"] == newest.step
    write_checkpoint(tmp_path, writer(3), 3)
    assert not {name for name in names(tmp_path) if name.startswith(".tmp")}


# --- damage -------------------------------------------------------------------------------------------------------


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    """Two checkpoints; the newer one names an artefact."""
    older = write_checkpoint(tmp_path, writer(1), 1).path
    artefact = save_artefact(tmp_path, {"w": torch.arange(50.0)})
    return older, write_checkpoint(tmp_path, writer(2), 2, artefacts=[artefact]).path


def damaged_is_noticed(older: Path, newer: Path) -> None:
    with pytest.raises(CheckpointError):
        verify(newer)
    told: list[str] = []
    assert newest_checkpoint(newer.parent.parent, told.append) == (older, 1)
    assert len(told) == 1
    assert str(newer.parent) in told[0]


@pytest.mark.parametrize("part", range(20))
def test_truncation_is_detected(two: tuple[Path, Path], part: int) -> None:
    older, newer = two
    file = newer / ("manifest.json" if part % 4 == 0 else "state.ckpt")
    size = file.stat().st_size
    os.truncate(file, size * part // 20 if part < 19 else size - 1)
    damaged_is_noticed(older, newer)


def test_two_hundred_bit_flips_are_detected(two: tuple[Path, Path]) -> None:
    older, newer = two
    artefact = next(newer.parent.glob("reference-*"))
    files = [newer / "state.ckpt", newer / "manifest.json", *sorted(artefact.iterdir())]
    rng = random.Random(0)
    for i in range(200):
        file = files[i % len(files)]
        good = file.read_bytes()
        place, bit = rng.randrange(len(good)), rng.randrange(8)
        file.write_bytes(good[:place] + bytes([good[place] ^ 1 << bit]) + good[place + 1 :])
        damaged_is_noticed(older, newer)
        file.write_bytes(good)
    verify(newer)


@pytest.mark.parametrize("lost", ["manifest.json", "state.ckpt", "artefact", "everything"])
def test_missing_parts_are_detected(two: tuple[Path, Path], lost: str) -> None:
    older, newer = two
    if lost == "artefact":
        shutil.rmtree(next(newer.parent.glob("reference-*")))
    elif lost == "everything":
        shutil.rmtree(newer)
        newer.mkdir()
    else:
        (newer / lost).unlink()
    damaged_is_noticed(older, newer)


def test_another_checkpoints_manifest_is_detected(two: tuple[Path, Path]) -> None:
    older, newer = two
    shutil.copy(older / "manifest.json", newer / "manifest.json")
    damaged_is_noticed(older, newer)


def test_nothing_that_verifies_is_none(two: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    for folder in two:
        (folder / "state.ckpt").unlink()
    assert newest_checkpoint(two[0].parent.parent) is None
    assert capsys.readouterr().err.count("damaged checkpoint passed over") == 2


def test_a_path_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing", tmp_path / "state.ckpt"):
        with pytest.raises(CheckpointError):
            resolve_checkpoint_file(path)


# --- runs and pruning ---------------------------------------------------------------------------------------------


def test_the_newest_run_is_the_highest_version_with_a_good_checkpoint(tmp_path: Path) -> None:
    assert newest_run(tmp_path) is None
    for version in (2, 9, 10, 11):
        write_checkpoint(tmp_path / f"version_{version}", writer(1), 1)
    (tmp_path / "version_12").mkdir()
    (tmp_path / "version_11" / "checkpoints" / "step-1" / "state.ckpt").write_bytes(b"")
    os.utime(tmp_path / "version_9")
    assert newest_run(tmp_path, report=lambda _: None) == tmp_path / "version_10"


def test_prune_keeps_the_newest(tmp_path: Path) -> None:
    for step in (2, 9, 10, 100):
        write_checkpoint(tmp_path, writer(step), step)
    prune(tmp_path, 2)
    assert names(tmp_path) == {"step-10", "step-100"}
    with pytest.raises(ValueError, match="keep_last"):
        prune(tmp_path, 0)


@pytest.mark.trap(28)
def test_prune_never_deletes_an_artefact_that_is_named(tmp_path: Path) -> None:
    named, in_use, forgotten, old = (save_artefact(tmp_path, {"w": torch.full((3,), float(i))}) for i in range(4))
    write_checkpoint(tmp_path, writer(1), 1, artefacts=[old])
    write_checkpoint(tmp_path, writer(2), 2, artefacts=[named])
    write_checkpoint(tmp_path, writer(3), 3)
    prune(tmp_path, 3, {in_use})
    assert names(tmp_path) == {"step-1", "step-2", "step-3", named, in_use, old}
    prune(tmp_path, 2, {in_use})
    assert names(tmp_path) == {"step-2", "step-3", named, in_use}
    # what a damaged manifest names is unknown: no artefact may go
    (tmp_path / "checkpoints" / "step-3" / "manifest.json").write_text("{}")
    prune(tmp_path, 1)
    assert {named, in_use} < names(tmp_path)
    assert forgotten not in names(tmp_path)


def test_a_checkpoint_cannot_name_an_artefact_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="missing"):
        write_checkpoint(tmp_path, writer(1), 1, artefacts=["reference-" + "0" * 16])
    with pytest.raises(CheckpointError, match="not an artefact"):
        load_artefact(tmp_path, "../secrets")


def test_damaged_checkpoints_ahead_are_set_aside_and_good_ones_reported(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write_checkpoint(tmp_path, writer(step), step)
    assert set_aside_damaged(tmp_path, 1) == (tmp_path / "checkpoints" / "step-3", 3)
    assert set_aside_damaged(tmp_path, 3) is None
    for step in (2, 3):
        (tmp_path / "checkpoints" / f"step-{step}" / "state.ckpt").write_bytes(b"x")
    assert set_aside_damaged(tmp_path, 1) is None
    assert names(tmp_path) == {"step-1", "damaged-step-2", "damaged-step-3"}


# --- artefacts ----------------------------------------------------------------------------------------------------


@pytest.mark.trap(28)
def test_an_artefact_holds_the_values_of_its_moment(tmp_path: Path) -> None:
    weights = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
    name = save_artefact(tmp_path, {"w": weights, "tied": weights, "half": torch.ones(()).bfloat16()})
    with torch.no_grad():
        weights.add_(1)
    loaded = load_artefact(tmp_path, name)
    expected = {"w": torch.arange(6.0).reshape(2, 3), "tied": torch.arange(6.0).reshape(2, 3)}
    torch.testing.assert_close(loaded, {**expected, "half": torch.ones(()).bfloat16()}, rtol=0, atol=0)
    assert save_artefact(tmp_path, {"w": weights}) != name


def test_an_artefact_is_written_once(tmp_path: Path) -> None:
    name = save_artefact(tmp_path, {"w": torch.ones(3)})
    file = tmp_path / "checkpoints" / name / "tensors.safetensors"
    before = file.stat()
    assert save_artefact(tmp_path, {"w": torch.ones(3)}) == name
    assert file.stat() == before
    file.write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match=r"tensors\.safetensors"):
        load_artefact(tmp_path, name)
    assert save_artefact(tmp_path, {"w": torch.ones(3)}) == name
    assert torch.equal(load_artefact(tmp_path, name)["w"], torch.ones(3))


def test_an_artefact_under_another_ones_name_is_refused(tmp_path: Path) -> None:
    a, b = (save_artefact(tmp_path, {"w": torch.full((2,), x)}) for x in (1.0, 2.0))
    folder = tmp_path / "checkpoints"
    shutil.rmtree(folder / a)
    (folder / b).rename(folder / a)
    with pytest.raises(CheckpointError, match="another artefact"):
        load_artefact(tmp_path, a)


def test_tensor_hash_sees_names_dtypes_shapes_and_bytes_alone() -> None:
    base = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(1.5).bfloat16()}
    others = [
        {"a": base["a"], "c": base["b"]},
        {"a": base["a"]},
        {"a": base["a"].reshape(3, 2), "b": base["b"]},
        {"a": base["a"].view(torch.int32), "b": base["b"]},
        {"a": base["a"], "b": base["b"].view(torch.float16)},
        {"a": base["a"], "b": base["b"][None]},
        {"a": -base["a"], "b": base["b"]},  # 0.0 and -0.0 differ in bytes
        {"a": base["a"], "b": torch.tensor(1.5078125).bfloat16()},
    ]
    hashes = [tensor_hash(tensors) for tensors in (base, *others)]
    assert len(set(hashes)) == len(hashes)
    transposed = {"b": base["b"], "a": base["a"].t().contiguous().t()}
    assert tensor_hash(transposed) == hashes[0]
    # independent of this code: the documented bytes, by hand
    head = json.dumps(["x", "torch.uint8", [3]]).encode()
    by_hand = hashlib.sha256(len(head).to_bytes(8, "little") + head + bytes([1, 2, 3])).hexdigest()
    assert tensor_hash({"x": torch.tensor([1, 2, 3], dtype=torch.uint8)}) == by_hand
    assert tensor_hash({"x": torch.empty(0)}) != tensor_hash({})


def test_checkpoint_module_needs_no_lightning() -> None:
    """Export and status read checkpoints in a fraction of the time that importing the Trainer takes."""
    for module in (checkpoint, durable):
        tree = ast.parse(Path(str(module.__file__)).read_text())
        sources = [n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
        sources += [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
        ours = {s for s in sources if s.startswith("lit_posttrain")}
        assert not [s for s in sources if "lightning" in s]
        assert ours <= {"lit_posttrain.durable"}
