"""``lit-posttrain COMMAND [options]``: looks at the words first, and imports what a command needs only when it runs.

Exit status: 0 done, 2 something in the command or its files to mend, 3 a reward or a gate stopped the run, or
``inspect`` found something wrong,
4 nothing to resume from, 75 stopped by a signal after saving (run again with ``--ckpt_path last``).
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from lit_posttrain import cli_config
from lit_posttrain.cli_config import UserError

LIGHTNING_COMMANDS = {
    "fit": "train, and resume with --ckpt_path last",
    "validate": "evaluate on the validation split",
    "test": "evaluate on the test split",
    "predict": "generate from the prompts of the data",
}
COMMANDS = {
    **LIGHTNING_COMMANDS,
    "inspect": "show what the model will see, before any training",
    "export": "write a run's policy as a Hugging Face folder",
}

HELP = f"""usage: lit-posttrain COMMAND [options]

Post-training of language models on PyTorch Lightning, from one YAML file.

commands:
{chr(10).join(f"  {name:<10}{text}" for name, text in COMMANDS.items())}

  lit-posttrain fit --config EXPERIMENT.yaml [--config configs/hardware/MACHINE.yaml] [--KEY.KEY=VALUE ...]
  lit-posttrain fit --config EXPERIMENT.yaml --print_config      the whole configuration, defaults included
  lit-posttrain fit --model.help=CLASS, --data.help=CLASS        what a class takes
  lit-posttrain COMMAND --help                                   the options of a command
"""

Bases = Callable[[], tuple[type, type]]


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one command.

    Args:
        argv: The words after the program's name; those of this process if None.

    Raises:
        SystemExit: With the status named above, unless the command is done.
    """
    dispatch(list(sys.argv[1:] if argv is None else argv), _bases)


def dispatch(argv: list[str], bases: Bases) -> None:
    """Runs one command over given base classes.

    Args:
        argv: The words after the program's name.
        bases: Imports and returns the base class of models and that of data.

    Raises:
        SystemExit: As :func:`main`.
    """
    try:
        _dispatch(argv, bases)
    except UserError as error:
        print(f"lit-posttrain: {error}", file=sys.stderr)
        raise SystemExit(error.code) from None


def _dispatch(argv: list[str], bases: Bases) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print(HELP)
        return
    command, words = argv[0], argv[1:]
    if command not in COMMANDS:
        first = "the command comes first, not" if command.startswith("-") else "unknown command"
        raise UserError(f"{first} {command!r}{cli_config.near(command, COMMANDS)}")
    # A console script, unlike `python -m`, does not find modules in the current folder.
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    if command == "export":
        _export(words)
        return
    if command == "inspect":
        _inspect(words, bases)
        return
    tree = cli_config.read(words)
    cli_config.check(tree)
    from lit_posttrain import cli_lightning

    cli_lightning.run(argv, *bases(), tree=tree)


def _bases() -> tuple[type, type]:
    from lit_posttrain.algorithms.base import PostTrainModule
    from lit_posttrain.data.base import PostTrainDataModule

    return PostTrainModule, PostTrainDataModule


class _Arguments(argparse.ArgumentParser):
    """Reports in one line, takes no abbreviations, and names a misspelt option before it misses the right one."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)

    def parse(self, words: list[str], required: Sequence[str]) -> argparse.Namespace:
        """Reads the words; an unknown option is named with the nearest valid one."""
        given, unknown = self.parse_known_args(words)
        if unknown:
            known = [option for action in self._actions for option in action.option_strings if option.startswith("--")]
            raise UserError(f"unknown option {unknown[0]}{cli_config.near(unknown[0].partition('=')[0], known)}")
        if missing := [f"--{name}" for name in required if getattr(given, name) is None]:
            raise UserError(f"missing {' and '.join(missing)}; see {self.prog} --help")
        return given


def _inspect(words: list[str], bases: Bases) -> None:
    about = (
        f"{COMMANDS['inspect'].capitalize()}: rendered examples with what counts in the loss marked, lengths, what is "
        "dropped and why, duplicates, end tokens. Exit status 3 if something is wrong."
    )
    parser = argparse.ArgumentParser(prog="lit-posttrain inspect", description=about, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE", action="append", help="as for fit; further keys may follow")
    parser.add_argument("--shown", metavar="N", type=int, default=3, help="training examples to print (default 3)")
    parser.add_argument("--json", metavar="FILE", help="also write the findings there")
    given, keys = parser.parse_known_args(words)
    if not given.config:
        raise UserError("missing --config; see lit-posttrain inspect --help")
    words = [word for file in given.config for word in ("--config", file)] + keys
    tree = cli_config.read(words)
    cli_config.check(tree)
    from lit_posttrain import cli_inspect

    cli_inspect.inspect(words, bases(), tree, given.shown, given.json)


def _export(words: list[str]) -> None:
    about = f"{COMMANDS['export'].capitalize()}. Needs --checkpoint and --out."
    parser = _Arguments(prog="lit-posttrain export", description=about, allow_abbrev=False)
    parser.add_argument(
        "--checkpoint",
        metavar="PATH",
        help="a run's folder (its newest checkpoint that verifies), one checkpoint's folder, or 'last' with --config",
    )
    parser.add_argument("--out", metavar="DIR", help="the folder to write; must be absent or empty")
    parser.add_argument("--config", metavar="FILE", help="the experiment whose newest run 'last' means")
    about = "the weights as they were trained last, where the run kept a moving average (ema_decay)"
    parser.add_argument("--last_weights", action="store_true", help=about)
    given = parser.parse(words, required=("checkpoint", "out"))
    checkpoint = given.checkpoint
    if checkpoint == "last":
        if given.config is None:
            raise UserError("--checkpoint last needs --config EXPERIMENT.yaml, to know which run is meant")
        from lit_posttrain.cli_resume import last

        checkpoint = str(last(cli_config.read(["--config", given.config]).data.get("trainer") or {}).path)
    elif given.config is not None:
        raise UserError("--config is only for --checkpoint last: a run's folder holds its own config.yaml")
    from lit_posttrain.export import export

    try:
        export(checkpoint, given.out, given.last_weights)
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from None
