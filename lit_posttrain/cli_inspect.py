"""``lit-posttrain inspect``: the data of a configuration, as its run would see it, without any network or Trainer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lit_posttrain.cli_config import ConfigTree, UserError
from lit_posttrain.cli_lightning import PostTrainCLI, run

WRONG = 3


class _DataOnly(PostTrainCLI):
    """Parses and instantiates as ``fit`` does, and stops there."""

    def before_instantiate_classes(self) -> None:
        """Nothing will be written, so no folder is in the way."""

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """None: the machine that this runs on need not be the one that trains."""
        return None

    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing runs."""


def inspect(
    words: Sequence[str], bases: tuple[type, type], tree: ConfigTree, shown: int, json_file: str | None
) -> None:
    """Print what the model will see.

    Args:
        words: Configuration files and keys, as for ``fit``.
        bases: Base classes of models and data.
        tree: The words, merged.
        shown: Training examples to print.
        json_file: Where the findings are also written.

    Raises:
        UserError: The configuration or the data cannot be read (exit status 2), or something is wrong (3).
    """
    from rich.console import Console

    from lit_posttrain.report import inspect as report

    cli = run(["fit", *words], *bases, tree=tree, cli_class=_DataOnly)
    model, data = cli.model, cli.datamodule
    try:
        data.setup("fit")
        for function in getattr(model, "rewards", []):
            if hasattr(data, "check_answers"):
                data.check_answers(function.check_answer)
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from None
    tokenizer = data.load_tokenizer()
    stops, context = _of_model(model.policy_config, tokenizer)
    sampling = getattr(model, "sampling", None)
    found = report.inspect(data, tokenizer, stops, context, sampling.max_new_tokens if sampling else 0)
    report.show(found, data, tokenizer, Console(highlight=False), shown)
    if json_file is not None:
        report.write_json(found, Path(json_file))
    if found.problems:
        raise UserError("; ".join(found.problems), WRONG)


def _of_model(config: Any, tokenizer: Any) -> tuple[list[int], int | None]:
    """Stop tokens and positions, from the model's configuration files alone."""
    from transformers import AutoConfig, GenerationConfig

    from lit_posttrain.model_files import model_folder

    folder = model_folder(config.model, "model.init_args.policy.model", revision=config.revision, weights=False)
    try:
        described: Any = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"model.init_args.policy.model: {folder} has no readable config.json ({error})") from None
    ids: Any = None
    if (folder / "generation_config.json").is_file():
        ids = GenerationConfig.from_pretrained(folder).eos_token_id
    ids = described.eos_token_id if ids is None else ids
    stops = [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
    if tokenizer.eos_token_id is not None:
        stops = [*stops, tokenizer.eos_token_id]
    return stops, getattr(described, "max_position_embeddings", None)
