"""Checkpoints that survive a kill, a full disk and a flipped bit: staged, hashed, renamed into place, verified on use.

    <run>/checkpoints/step-8/state.ckpt, or state/   what the trainer saved (one file, or one shard a rank)
                             manifest.json           size and sha256 of every file, the step, the artefacts it names
    <run>/checkpoints/reference-<hash>/              tensors that several checkpoints share, with a manifest too
    <run>/checkpoints/.tmp-*                         being written or deleted: never read, removed by the next write

A folder under its final name is complete: the manifest is written last and the rename is the commit. One process
writes to a run at a time.
"""

import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from lit_posttrain.durable import (
    CheckpointError,
    Write,
    commit,
    delete,
    disk,
    read_manifest,
    remove_strays,
    tensor_hash,
    verify_files,
)

STATE_FILE = "state.ckpt"
STATE_FOLDER = "state"
_STEP = re.compile(r"step-(\d+)")
_VERSION = re.compile(r"version_(\d+)")
_ARTEFACT = re.compile(r"reference-[0-9a-f]{16}")
_TENSORS = "tensors.safetensors"


class Checkpoint(NamedTuple):
    """A verified checkpoint.

    Attributes:
        path: Its folder, ``<run>/checkpoints/step-<step>``.
        step: Finished iterations it holds.
    """

    path: Path
    step: int

    @property
    def state(self) -> str:
        """What ``Trainer.fit(ckpt_path=...)`` takes: the file, or the folder of a sharded run."""
        file = self.path / STATE_FILE
        return str(file if file.exists() else self.path / STATE_FOLDER)

    @property
    def run_dir(self) -> Path:
        """The run it belongs to."""
        return self.path.parent.parent


def checkpoints_folder(run_dir: Path) -> Path:
    """Where a run keeps its checkpoints and artefacts."""
    return Path(run_dir) / "checkpoints"


def write_checkpoint(
    run_dir: Path, write: Write, step: int, *, artefacts: Iterable[str] = (), expected_bytes: int = 0
) -> Checkpoint:
    """Save ``<run>/checkpoints/step-<step>`` or leave everything as it was.

    A good checkpoint of this step is kept and nothing is written; a damaged one is replaced once the new one is
    whole. Older checkpoints are not touched: prune them when this returns.

    Args:
        run_dir: The run's folder.
        write: Fills the empty folder it is given; may return the sha256 of what it meant each file to hold, which
            the bytes on disk are then held against.
        step: Finished iterations.
        artefacts: Names of the artefacts that resuming from this checkpoint needs.
        expected_bytes: Size to expect; with the size of the newest checkpoint it decides whether the disk has room.

    Raises:
        CheckpointError: Anything went wrong; nothing under a final name has changed, unless the message says that
            the last folder could not be flushed.
    """
    final = checkpoints_folder(run_dir) / f"step-{step}"
    if final.exists():
        try:
            verify(final)
            return Checkpoint(final, step)
        except CheckpointError:
            pass
    names = sorted(set(artefacts))
    with disk(f"cannot save {final}"):
        for name in names:
            _verify_artefact(final.parent / name)
        newest = next(iter(_steps(final.parent)), None)
        if newest is not None:  # the last one tells what a state really takes
            expected_bytes = max(expected_bytes, sum(f.stat().st_size for f in newest.path.rglob("*") if f.is_file()))
    commit(final, write, {"step": step, "artefacts": names}, expected_bytes)
    return Checkpoint(final, step)


def prune(run_dir: Path, keep_last: int, named: Iterable[str] = ()) -> None:
    """Delete all but the newest ``keep_last`` checkpoints, and the artefacts that nothing names any more.

    Args:
        run_dir: The run's folder.
        keep_last: Checkpoints to keep, at least 1.
        named: Artefacts in use now; kept like those that a kept checkpoint names.

    Raises:
        ValueError: ``keep_last`` is below 1.
        CheckpointError: The disk refused.
    """
    if keep_last < 1:
        raise ValueError(f"keep_last: {keep_last}, at least 1 is needed to resume")
    folder = checkpoints_folder(run_dir)
    found, keep, unread = _steps(folder), set(named), False
    with disk(f"cannot prune {folder}"):
        for checkpoint in found[keep_last:]:
            delete(checkpoint.path)
        for checkpoint in found[:keep_last]:
            try:
                keep.update(read_manifest(checkpoint.path).get("artefacts", ()))
            except CheckpointError:
                unread = True
        if unread:
            return  # what that checkpoint names is unknown, so no artefact may go
        for path in sorted(folder.glob("reference-*")):
            if path.name not in keep and _ARTEFACT.fullmatch(path.name):
                delete(path)


def set_aside_damaged(run_dir: Path, after: int) -> Checkpoint | None:
    """Before a run goes on from step ``after``: rename damaged checkpoints from beyond it to ``damaged-step-<N>``.

    Left as they are they would count among the ones to keep.

    Returns:
        A good checkpoint from beyond ``after``, if there is one; then nothing is renamed.

    Raises:
        CheckpointError: The disk refused.
    """
    if (ahead := newest_checkpoint(run_dir, report=lambda _: None, after=after)) is not None:
        return ahead
    with disk(f"cannot tidy {run_dir}"):
        for checkpoint in _steps(checkpoints_folder(run_dir)):
            if checkpoint.step > after:
                aside = checkpoint.path.with_name(f"damaged-{checkpoint.path.name}")
                if aside.exists():
                    delete(aside)
                os.rename(checkpoint.path, aside)
        remove_strays(checkpoints_folder(run_dir))
    return None


def verify(path: Path) -> None:
    """Hold every file of a checkpoint, and of the artefacts it names, against the manifests.

    Args:
        path: A checkpoint's folder; its artefacts are looked for beside it.

    Raises:
        CheckpointError: With the reason: no manifest, a missing file, another size or other bytes.
    """
    path = Path(path)
    with disk(f"cannot read {path}"):
        manifest = read_manifest(path)
        if not isinstance(manifest.get("step"), int):
            raise CheckpointError(f"{path}: the manifest names no step, so this is not a checkpoint")
        if not {STATE_FILE, STATE_FOLDER} & {name.split("/")[0] for name in manifest["files"]}:
            raise CheckpointError(f"{path}: neither {STATE_FILE} nor {STATE_FOLDER}/ in the manifest")
        verify_files(path, manifest)
        for name in manifest["artefacts"]:
            _verify_artefact(path.parent / name)


def manifest(path: Path) -> dict[str, Any]:
    """What a checkpoint's manifest says (step, artefacts, files), its files unread.

    Raises:
        CheckpointError: There is none, or it is damaged.
    """
    with disk(f"cannot read {path}"):
        return read_manifest(Path(path))


def newest_checkpoint(
    run_dir: Path, report: Callable[[str], None] | None = None, *, after: int = -1
) -> Checkpoint | None:
    """The newest checkpoint of a run that verifies, or None.

    Args:
        run_dir: The run's folder.
        report: Told about each damaged checkpoint that was passed over; prints to stderr by default.
        after: Look only at later steps than this.
    """
    report = report or _to_stderr
    for checkpoint in _steps(checkpoints_folder(run_dir)):
        if checkpoint.step <= after:
            break
        try:
            verify(checkpoint.path)
            return checkpoint
        except CheckpointError as e:
            report(f"damaged checkpoint passed over: {e}")
    return None


def last_checkpoint(log_dir: Path, report: Callable[[str], None] | None = None) -> Checkpoint | None:
    """The newest verified checkpoint of the newest run (highest ``version_<n>``) under ``log_dir`` that has one."""
    folder = Path(log_dir)
    versions = [(int(m[1]), p) for p in folder.glob("version_*") if (m := _VERSION.fullmatch(p.name))]
    for _, run in sorted(versions, reverse=True):
        if (checkpoint := newest_checkpoint(run, report)) is not None:
            return checkpoint
    return None


def newest_run(log_dir: Path, report: Callable[[str], None] | None = None) -> Path | None:
    """The run folder ``version_<n>`` of the highest number under ``log_dir`` that has a verified checkpoint.

    By number and not by date: copying or reading a run changes dates, and a resumed run gets a higher number.
    """
    checkpoint = last_checkpoint(log_dir, report)
    return checkpoint and checkpoint.run_dir


def resolve_checkpoint_file(path: Path) -> str:
    """Verify a checkpoint given by its folder, or the state in it, and say what ``Trainer.fit(ckpt_path=...)`` takes.

    Raises:
        CheckpointError: There is no such checkpoint, or it is damaged.
    """
    path = Path(path)
    if path.name in (STATE_FILE, STATE_FOLDER):
        path = path.parent
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint; give a folder <run>/checkpoints/step-<N>")
    verify(path)
    return Checkpoint(path, manifest(path)["step"]).state


def _steps(folder: Path) -> list[Checkpoint]:
    """Checkpoints by name alone, newest first."""
    found = [Checkpoint(p, int(m[1])) for p in Path(folder).glob("step-*") if (m := _STEP.fullmatch(p.name))]
    return sorted(found, key=lambda c: c.step, reverse=True)


def save_artefact(run_dir: Path, tensors: Mapping[str, Tensor]) -> str:
    """Save tensors that checkpoints refer to by name (a reference policy, say), once for each content.

    Not a collective: with several ranks one of them calls it, with whole tensors.

    Returns:
        The artefact's name, ``reference-<first 16 digits of tensor_hash>``.

    Raises:
        CheckpointError: It could not be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    digest = tensor_hash(tensors)
    final = checkpoints_folder(run_dir) / f"reference-{digest[:16]}"
    if final.exists():
        try:
            _verify_artefact(final)
            return final.name
        except CheckpointError:
            pass
    seen: set[int] = set()
    unshared = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        unshared[name] = tensor.clone() if storage in seen else tensor  # safetensors refuses tied weights
        seen.add(storage)

    def write(folder: Path) -> None:
        try:
            save_file(unshared, folder / _TENSORS)
        except SafetensorError as e:
            raise CheckpointError(f"cannot save {final}: {e}") from e
        if _load(folder / _TENSORS, digest) is None:
            raise CheckpointError(f"cannot save {final}: what was written reads back differently")

    size = sum(t.numel() * t.element_size() for t in unshared.values())
    commit(final, write, {"tensor_hash": digest}, size)
    return final.name


def load_artefact(run_dir: Path, name: str) -> dict[str, Tensor]:
    """The tensors of an artefact, after checking that they are the ones its name was made from.

    Raises:
        CheckpointError: It is missing or damaged, or ``name`` is no artefact's name.
    """
    path = checkpoints_folder(run_dir) / name
    with disk(f"cannot read {path}"):
        _verify_artefact(path)
        tensors = _load(path / _TENSORS, read_manifest(path)["tensor_hash"])
    if tensors is None:
        raise CheckpointError(f"{path}: holds other tensors than its name says")
    return tensors


def _load(file: Path, digest: str) -> dict[str, Tensor] | None:
    from safetensors.torch import load_file

    tensors = load_file(file)
    return tensors if tensor_hash(tensors) == digest else None


def _verify_artefact(path: Path) -> None:
    if not _ARTEFACT.fullmatch(path.name):
        raise CheckpointError(f"{path.name}: not an artefact's name (reference-<16 hex digits>)")
    if not path.is_dir():
        raise CheckpointError(f"{path}: the artefact is missing")
    content = read_manifest(path)
    if str(content.get("tensor_hash"))[:16] != path.name.removeprefix("reference-"):
        raise CheckpointError(f"{path}: holds another artefact than its name says")
    verify_files(path, content)


def _to_stderr(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
