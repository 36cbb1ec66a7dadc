"""Folders that are whole or absent: staged, hashed, flushed and renamed into place; what checkpoints are made of.

A folder under its final name is complete: its manifest (size and sha256 of every file) is written last, and the
rename is the commit. Staged and half-deleted folders are called ``.tmp-*``; nothing reads them and the next write
removes them. One process writes to a parent folder at a time.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor

FORMAT = 1
MANIFEST = "manifest.json"
_CHUNK = 1 << 22

# Fills the folder it is given; may return the sha256 of what each file was meant to hold, by relative name.
Write = Callable[[Path], Mapping[str, str] | None]


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, or must not be loaded; the message names the path and the cause."""


def commit(final: Path, write: Write, facts: dict[str, Any], expected_bytes: int) -> None:
    """Make the folder ``final``, replacing a damaged one of that name, or change nothing.

    Args:
        final: Where the folder belongs.
        write: Fills it.
        facts: What the manifest says besides the files.
        expected_bytes: Room that the disk must have.

    Raises:
        CheckpointError: It could not be made; the message names the path and the cause.
    """
    folder = final.parent
    staged = folder / f".tmp-{final.name}"
    with disk(f"cannot save {final}"):
        if not folder.is_dir():
            os.makedirs(folder, exist_ok=True)
            _fsync_folder(folder.parent)
        remove_strays(folder)
        _check_room(folder, expected_bytes)
        try:
            os.mkdir(staged)
            meant = write(staged) or {}
            _write_manifest(staged, facts, meant)
            verify_files(staged, read_manifest(staged))
            if final.exists():
                os.rename(final, folder / f".tmp-damaged-{final.name}")
            os.rename(staged, final)
        except BaseException:
            shutil.rmtree(staged, ignore_errors=True)
            raise
        _fsync_folder(folder)
    shutil.rmtree(folder / f".tmp-damaged-{final.name}", ignore_errors=True)


def _write_manifest(staged: Path, facts: dict[str, Any], meant: Mapping[str, str]) -> None:
    files, folders = {}, [staged]
    for path in sorted(staged.rglob("*")):
        if path.is_dir():
            folders.append(path)
            continue
        name = path.relative_to(staged).as_posix()
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        files[name] = {"bytes": path.stat().st_size, "sha256": meant.get(name) or _hash_file(path)}
    if not files:
        raise CheckpointError(f"{staged}: nothing was written")
    with open(staged / MANIFEST, "wb", buffering=0) as file:
        text = _seal({"format": FORMAT, **facts, "files": files})
        if file.write(text) != len(text):
            raise OSError(errno.EIO, "the disk stored less than was written", str(staged / MANIFEST))
        os.fsync(file.fileno())
    for path in folders:
        _fsync_folder(path)


def _check_room(folder: Path, expected_bytes: int) -> None:
    needed = expected_bytes + expected_bytes // 20 + (1 << 20)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(
            f"{folder}: {free / 2**20:.0f} MiB free, the next checkpoint needs {needed / 2**20:.0f} MiB; "
            "free some space or lower keep_last"
        )


def remove_strays(folder: Path) -> None:
    """Delete what an interrupted write or deletion left in a checkpoints folder."""
    for path in sorted(Path(folder).glob(".tmp-*")):
        shutil.rmtree(path)


def delete(path: Path) -> None:
    """Take a folder away; a kill half-way leaves a stray, never half a folder under a good name."""
    away = path.parent / f".tmp-deleted-{path.name}"
    os.rename(path, away)
    shutil.rmtree(away, ignore_errors=True)


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the folder ``path``; ``CheckpointError`` if it is missing, damaged or of another format."""
    file = path / MANIFEST
    if not file.is_file():
        raise CheckpointError(f"{path}: no {MANIFEST}, so the save never finished or the file was lost")
    raw, content = file.read_bytes(), {}
    try:
        content = json.loads(raw)
        content.pop("seal")
        intact = _seal(content) == raw
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        intact = False
    if not intact:
        raise CheckpointError(f"{file}: damaged, its own hash does not fit")
    if content["format"] != FORMAT:
        raise CheckpointError(f"{file}: format {content['format']}, this version reads {FORMAT}")
    return content


def _seal(content: dict[str, Any]) -> bytes:
    """The manifest's exact bytes: canonical JSON with a hash over the rest, so that every flipped bit shows."""
    seal = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return (json.dumps({**content, "seal": seal}, sort_keys=True, indent=1) + "\n").encode()


def verify_files(path: Path, content: dict[str, Any]) -> None:
    """Hold the folder's files against its manifest ``content``; ``CheckpointError`` names the first that differs."""
    for name, facts in content["files"].items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{file}: missing")
        size = file.stat().st_size
        if size != facts["bytes"]:
            raise CheckpointError(f"{file}: {size} bytes, the manifest says {facts['bytes']}")
        if _hash_file(file) != facts["sha256"]:
            raise CheckpointError(f"{file}: its bytes differ from what the manifest says")


def save_state(state: Mapping[str, Any], path: Path) -> dict[str, str]:
    """Write ``state`` with ``torch.save`` and prove that it loads again without unpickling code.

    Returns:
        The sha256 of what was meant to be written, by file name, as ``write_checkpoint`` takes it.

    Raises:
        OSError: The disk failed, a write that stored less than it was given included.
        CheckpointError: ``state`` holds something that ``torch.load(weights_only=True)`` refuses.
    """
    with open(path, "wb", buffering=0) as file:
        writer = _Writer(file)
        try:
            torch.save(state, cast(IO[bytes], writer))
        except Exception as e:
            raise CheckpointError(f"{path}: cannot be written: {e}") from e
        writer.close()
    try:
        torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except OSError:
        raise
    except Exception as e:
        reason = str(e).strip().splitlines()
        hint = next((line for line in reason if "Unsupported" in line or "GLOBAL" in line), reason[0] if reason else e)
        raise CheckpointError(
            f"{path}: does not load with weights_only=True ({hint}); "
            "a checkpoint may hold only tensors, numbers, strings, lists, tuples, dicts and sets of these"
        ) from e
    return {path.name: writer.hash.hexdigest()}


class _Writer:
    """An unbuffered file for ``torch.save`` that hashes what it is given and remembers the first error.

    Errors are kept until ``close``: raised from inside the zip writer they come out as another error or end the
    process, because the archive is finalised on the way out.
    """

    def __init__(self, file: Any):
        self.file, self.hash, self.error = file, hashlib.sha256(), None

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        if self.error is None:
            self.hash.update(view)
            done = 0
            try:
                while done < len(view):
                    # The kernel may store less than asked, at most 2 GiB at once; storing nothing is a failure.
                    n = self.file.write(view[done:])
                    if not n:
                        raise OSError(errno.EIO, "the disk stored less than was written")
                    done += n
            except OSError as e:
                self.error = e
        return len(view)

    def flush(self) -> None:
        """Nothing is buffered; ``torch.save`` asks for it."""

    def close(self) -> None:
        """Raise what went wrong."""
        if self.error is not None:
            raise self.error


def tensor_hash(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, dtypes, shapes and bytes, in the order of the names; device and strides play no part."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        head = json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode()
        digest.update(len(head).to_bytes(8, "little") + head)
        # Bytes, because numpy knows no bfloat16; flattened first, because a scalar cannot be viewed as another dtype.
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextmanager
def disk(doing: str) -> Iterator[None]:
    """Turn what the disk says into an error that names the path and the cause."""
    try:
        yield
    except OSError as e:
        where = f" ({e.filename})" if e.filename else ""
        raise CheckpointError(f"{doing}{where}: {e.strerror or e}") from e


def _hash_file(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _fsync_folder(path: Path) -> None:
    """Without this a rename may be forgotten by a power cut."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
