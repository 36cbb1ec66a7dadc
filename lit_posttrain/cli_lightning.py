"""LightningCLI with this project's rules: subclasses by name, no abbreviations, every user error one line."""

import logging
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import Namespace
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lit_posttrain import cli_resume
from lit_posttrain.allocator import keep_freed_memory
from lit_posttrain.checkpoint import CheckpointError
from lit_posttrain.cli_config import LINK_SOURCE, LINK_TARGET, ConfigTree, UserError, read
from lit_posttrain.cli_errors import explain, ignored
from lit_posttrain.gates import GateError
from lit_posttrain.rewards.base import RewardError

STOPPED_BY_RUN = 3
_USER_ERRORS = (ValueError, OSError, MisconfigurationException)
# Functions under which a ValueError is about what the user gave; once a step runs, it is a bug.
_PREPARING = {
    "before_instantiate_classes",
    "instantiate_classes",
    "setup",
    "setup_data",
    "prepare_data",
    "configure_model",
    "configure_optimizers",
}
_PREPARING |= {"on_load_checkpoint", "load_state_dict", "load_checkpoint", "on_fit_start", "on_train_start"}
_PREPARING |= {f"{split}_dataloader" for split in ("train", "val", "test", "predict")}
_RUNNING = {"training_step", "validation_step", "test_step", "predict_step"}


class _Rejected(Exception):
    """The parser's message, on its way to be explained."""

    def __init__(self, message: str, parser: LightningArgumentParser):
        super().__init__(message)
        self.parser = parser


class Parser(LightningArgumentParser):
    """Takes no abbreviations at any depth, and hands its errors on instead of printing its usage."""

    def __init__(self, *args: Any, **kwargs: Any):
        # Given to the CLI instead, this would not reach the parsers that are made for each class.
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Hands on the message; an inner parser raises for the outer one."""
        if not self.exit_on_error:
            super().error(message, ex)
        raise _Rejected(message, self)


class SaveConfig(SaveConfigCallback):
    """``config.yaml`` of a ``fit`` in the run's folder, and ``validate.yaml`` and so on of the others.

    Args:
        record: What to write instead of the configuration as run: a run that goes on writes what it would have
            written without the interruption, so that its file always reproduces the whole run.
    """

    def __init__(
        self, parser: LightningArgumentParser, config: Namespace, record: Namespace | None = None, **kwargs: Any
    ):
        super().__init__(parser, record if record is not None else config, **kwargs)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Writes the file, unless there is no logger: then it would land in the current folder."""
        if trainer.loggers:
            self.config_filename = "config.yaml" if stage == "fit" else f"{TrainerFn(stage).value}.yaml"
            super().setup(trainer, pl_module, stage)

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """The same as text beside the curves, on rank zero."""
        text = self.parser.dump(self.config, skip_none=False)
        block = "\n".join("    " + line for line in text.splitlines())  # indented: markdown that nothing can end
        for logger in trainer.loggers:
            writer = getattr(logger, "experiment", None)
            if writer is not None and hasattr(writer, "add_text"):
                writer.add_text("config", block, 0)  # pyright: ignore[reportAttributeAccessIssue]


class PostTrainCLI(LightningCLI):
    """The four commands of Lightning.

    Args:
        argv: The words after the program's name; the first one names the command.
        tree: The same words, merged, as read before Lightning was imported.
        kwargs: Of LightningCLI.
    """

    def __init__(self, argv: Sequence[str], tree: ConfigTree, **kwargs: Any):
        self.argv, self.tree = list(argv), tree
        super().__init__(**kwargs)

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        # A parser takes 0.1 s, and only one of the four is used.
        chosen = {name: skip for name, skip in LightningCLI.subcommands().items() if name == self.argv[0]}
        self.subcommands = lambda: chosen
        super()._add_subcommands(parser, **kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The one link: data is tokenized by the policy's tokenizer."""
        parser.link_arguments(LINK_SOURCE, LINK_TARGET, compute_fn=_tokenizer_of)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses ``argv``; an error becomes one line."""
        try:
            self.config = parser.parse_args(self.argv)
        except _Rejected as error:
            chosen = self._subcommand_parsers[self.argv[0]]
            raise UserError(explain(str(error), self.tree, chosen)) from None
        if sentence := ignored(self.tree, self._subcommand_parsers[self.argv[0]]):
            raise UserError(sentence)

    def _parse_ckpt_path(self) -> None:
        """Does nothing: a checkpoint never overrides the configuration."""

    def before_instantiate_classes(self) -> None:
        """Finds the checkpoint to go on from, and says what goes on and what differs."""
        config = self.config[self.argv[0]]
        trainer = config["trainer"].as_dict()
        if self.argv[0] == "fit":
            _refuse_stepping_keys(trainer)
        resume = cli_resume.resolve(config.get("ckpt_path"), trainer)
        if resume is None:
            if self.argv[0] == "fit":
                cli_resume.require_new_folder(trainer)
            return
        checkpoint = resume.checkpoint
        now = yaml.safe_load(self._parser(self.argv[0]).dump(config, skip_none=False))
        lines = [f"going on from {checkpoint.path} (step {checkpoint.step})"]
        lines += cli_resume.differences(checkpoint.run_dir, now)
        if resume.continues and self.argv[0] == "fit":
            record = config.clone()
            record["ckpt_path"] = None
            self.save_config_kwargs = {**self.save_config_kwargs, "record": record}
            config["trainer"]["logger"] = _namespaces(cli_resume.continued_logger(trainer, resume))
        config["ckpt_path"] = checkpoint.state
        _say(lines)


@rank_zero_only
def _say(lines: list[str]) -> None:
    print("\n".join(f"lit-posttrain: {line}" for line in lines), flush=True)


def _refuse_stepping_keys(trainer: dict[str, Any]) -> None:
    """Algorithms take their steps themselves, and clip and accumulate by keys of their own."""
    for name, idle, instead in (
        ("gradient_clip_val", None, "model.init_args.max_grad_norm"),
        ("accumulate_grad_batches", 1, "model.init_args.token_budget, which splits a step into micro-batches"),
    ):
        if trainer.get(name) not in (None, idle):
            raise UserError(f"trainer.{name}: is {trainer[name]}, but has no effect here; set {instead}")


def _tokenizer_of(policy: Any) -> str | None:
    return policy.get("tokenizer") or policy.get("model")


def _namespaces(node: Any) -> Any:
    """Plain mappings with a ``class_path`` as the parser holds them."""
    if isinstance(node, list):
        return [_namespaces(item) for item in node]
    return Namespace(class_path=node["class_path"], init_args=Namespace(**node["init_args"]))


def run(
    argv: Sequence[str],
    model_base: type,
    data_base: type,
    tree: ConfigTree | None = None,
    cli_class: type[PostTrainCLI] = PostTrainCLI,
) -> PostTrainCLI:
    """Runs ``fit``, ``validate``, ``test`` or ``predict``.

    Args:
        argv: The words after the program's name.
        model_base: ``model.class_path`` names a subclass of it.
        data_base: ``data.class_path`` names a subclass of it.
        tree: The words as read already.
        cli_class: What does it.

    Raises:
        UserError: Something to mend in what was given, or a reward's or a gate's refusal (exit status 3).
    """
    _hush()
    keep_freed_memory()
    try:
        return cli_class(
            argv,
            tree or read(argv[1:]),
            model_class=model_base,
            datamodule_class=data_base,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            save_config_callback=SaveConfig,
            save_config_kwargs={"overwrite": True},
            parser_class=Parser,
            parser_kwargs={"prog": "lit-posttrain"},
        )
    except Exception as error:
        raise_readable(error)


def _hush() -> None:
    """Leave out what Lightning and transformers print that says nothing about the run."""
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)")
    # Iterations are minutes, not milliseconds: every one of them is logged whatever log_every_n_steps says.
    warnings.filterwarnings("ignore", message=r"The number of training batches .* is smaller than the logging interval")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: "Tip:" not in record.getMessage()
    )
    standard = warnings.formatwarning
    package = str(Path(__file__).parent)

    def one_line(message: Any, category: Any, filename: str, lineno: int, line: str | None = None) -> str:
        ours = filename.startswith(package)
        return f"lit-posttrain: warning: {message}\n" if ours else standard(message, category, filename, lineno, line)

    warnings.formatwarning = one_line
    if not sys.stderr.isatty():
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()


def raise_readable(error: Exception) -> NoReturn:
    """Raises a user's error as one line, and any other as it is, with its traceback.

    Args:
        error: What a command raised.
    """
    causes = [error]
    while isinstance(cause := causes[-1].__cause__, Exception) and cause not in causes:
        causes.append(cause)
    for cause in causes:
        if isinstance(cause, GateError | RewardError | FloatingPointError):
            raise UserError(str(cause), STOPPED_BY_RUN) from None
        if isinstance(cause, CheckpointError):
            raise UserError(str(cause)) from None
    # The parser wraps what a class raised on its instantiation: the first one that is not the parser's own.
    said = next((cause for cause in causes if not _raised_by_parser(cause)), error)
    frames = {frame.name for cause in causes for frame in traceback.extract_tb(cause.__traceback__)}
    if isinstance(said, _USER_ERRORS) and frames & _PREPARING and not frames & _RUNNING:
        raise UserError(str(said)) from None
    raise said.with_traceback(said.__traceback__) from said.__cause__


def _raised_by_parser(error: Exception) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and "jsonargparse" in Path(frames[-1].filename).parts
