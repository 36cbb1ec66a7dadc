"""``--ckpt_path``: which run and checkpoint is meant, and what differs from the configuration that it ran with."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from lit_posttrain.checkpoint import Checkpoint, checkpoints_folder, last_checkpoint, newest_checkpoint
from lit_posttrain.cli_config import UserError

NOTHING_TO_RESUME = 4
_DEFAULT_LOGGER = "lightning.pytorch.loggers.TensorBoardLogger"
# Where a run is continued and what is shown, not what it computes.
_NOT_COMPARED = (
    *("ckpt_path", "weights_only", "verbose", "config"),
    *("trainer.logger.init_args.version", "trainer.logger.init_args.purge_step"),
)


class Resume(NamedTuple):
    """Where a run goes on.

    Attributes:
        checkpoint: What is loaded; verified.
        continues: Whether that run itself goes on, in its own folder, rather than a new one from its state.
    """

    checkpoint: Checkpoint
    continues: bool


def runs_folder(trainer: Mapping[str, Any]) -> tuple[Path, str | int | None]:
    """The folder whose ``version_*`` are the runs of a configuration, and the version that it names, if any.

    Args:
        trainer: The ``trainer`` part of a configuration as plain mappings.

    Raises:
        UserError: ``trainer.logger: false``, so that runs have no folder.
    """
    logger = trainer.get("logger")
    if logger is False:
        raise UserError("'last' is looked for in the logger's folder, but trainer.logger is false", NOTHING_TO_RESUME)
    first = logger[0] if isinstance(logger, list) and logger else logger
    arguments = (first.get("init_args") or {}) if isinstance(first, Mapping) else {}
    root = arguments.get("save_dir") or trainer.get("default_root_dir") or "."
    return Path(root, arguments.get("name", "lightning_logs") or ""), arguments.get("version")


def require_new_folder(trainer: Mapping[str, Any]) -> None:
    """A run that starts anew does not write over the ``config.yaml`` of one that can be resumed.

    Args:
        trainer: As in :func:`runs_folder`.

    Raises:
        UserError: The logger's ``version`` names a run with checkpoints.
    """
    if trainer.get("logger") is False:
        return
    folder, version = runs_folder(trainer)
    run = folder / (version if isinstance(version, str) else f"version_{version}")
    if version is not None and next(checkpoints_folder(run).glob("step-*"), None) is not None:
        raise UserError(
            f"{run} holds the checkpoints of a run already: go on with it (--ckpt_path last), or leave the logger's "
            "version out to start a new one"
        )


def last(trainer: Mapping[str, Any]) -> Checkpoint:
    """The newest checkpoint that verifies, of the newest run of a configuration that has one.

    Args:
        trainer: As in :func:`runs_folder`.

    Raises:
        UserError: There is none; exit status 4.
    """
    folder, version = runs_folder(trainer)
    if version is None:
        checkpoint, where = last_checkpoint(folder), folder / "version_*"
    else:
        where = folder / (version if isinstance(version, str) else f"version_{version}")
        checkpoint = newest_checkpoint(where)
    if checkpoint is None:
        raise UserError(f"no checkpoint that verifies in {where}: there is nothing to go on from", NOTHING_TO_RESUME)
    return checkpoint


def resolve(ckpt_path: str | None, trainer: Mapping[str, Any]) -> Resume | None:
    """What ``ckpt_path`` means: ``last`` goes on with the newest run, a path starts a new run from its state.

    Args:
        ckpt_path: As given; None to start anew.
        trainer: As in :func:`runs_folder`.

    Raises:
        UserError: Nothing there, see :func:`last`.
        ValueError: No such path, or no checkpoint that verifies in it.
    """
    if ckpt_path is None:
        return None
    if ckpt_path == "last":
        return Resume(last(trainer), True)
    from lit_posttrain.export import find_checkpoint

    return Resume(find_checkpoint(ckpt_path), False)


def continued_logger(trainer: Mapping[str, Any], resume: Resume) -> Any:
    """The logger's part of the configuration, set to write on in the run's own folder.

    Points after the checkpoint are dropped (TensorBoard's ``purge_step``): the run will make them again.

    Args:
        trainer: As in :func:`runs_folder`.
        resume: What goes on.
    """
    logger = trainer.get("logger")
    if logger is None or logger is True:
        root = trainer.get("default_root_dir") or "."
        logger = {"class_path": _DEFAULT_LOGGER, "init_args": {"save_dir": root, "name": "lightning_logs"}}
    loggers = []
    for entry in logger if isinstance(logger, list) else [logger]:
        changed: dict[str, Any] = {"version": resume.checkpoint.run_dir.name}
        if str(entry["class_path"]).endswith("TensorBoardLogger"):
            changed["purge_step"] = resume.checkpoint.step + 1
        loggers.append({**entry, "init_args": {**(entry.get("init_args") or {}), **changed}})
    return loggers if isinstance(logger, list) else loggers[0]


def differences(run: Path, config: Mapping[str, Any]) -> Iterator[str]:
    """A line for each key whose value is not the one that the run was started with.

    Args:
        run: A folder that may hold ``config.yaml``.
        config: The configuration now, as plain YAML values.
    """
    saved_file = run / "config.yaml"
    if not saved_file.is_file():
        return
    before, now = _flat(yaml.safe_load(saved_file.read_text(encoding="utf-8"))), _flat(config)
    optimizer = False
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if old != new and not key.startswith(_NOT_COMPARED):
            yield f"{key}: {old!r} in {run.name}, {new!r} now"
            optimizer |= "optimizer." in key or "schedule" in key
    if optimizer:
        yield "the state of optimizer and scheduler, learning rate included, comes from the checkpoint, not these keys"


def _flat(node: Any, path: str = "") -> dict[str, Any]:
    """Leaves by dotted path."""
    children: Any = ()
    if isinstance(node, Mapping):
        children = [(f"{path}.{key}" if path else str(key), value) for key, value in node.items()]
    elif isinstance(node, list):
        children = [(f"{path}[{index}]", value) for index, value in enumerate(node)]
    if not children:
        return {path: node}
    return {key: value for name, child in children for key, value in _flat(child, name).items()}
