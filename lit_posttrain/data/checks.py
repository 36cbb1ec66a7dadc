"""What the arguments of data sets of fixed examples must be."""

from collections.abc import Sequence
from typing import Any

from lit_posttrain.data.columns import check_mapping
from lit_posttrain.data.mixture import Source, check_sources


def check_arguments(data: Any, dataset: str | None, datasets: Sequence[Source] | None, own: bool) -> None:
    """See that the arguments make sense together.

    Args:
        data: The DataModule.
        dataset: As given.
        datasets: As given.
        own: Whether its class reads rows of its own.

    Raises:
        ValueError: They do not; names the key.
    """
    if not (own and dataset is None and not datasets) and (dataset is None) == (not datasets):
        raise ValueError("data.init_args.dataset, data.init_args.datasets: set exactly one of them")
    check_sources(data.sources)
    check_mapping(data.column_map, data.known)
    if data.train_size is not None and len(data.sources) > 1 and not data.streaming:
        raise ValueError(
            "data.init_args.train_size: the first examples would all come from the first dataset; set "
            "data.init_args.datasets[...].fraction"
        )
    for name, least in (("train_size", 1), ("val_size", 0), ("max_length", 2), ("shuffle_buffer", 1)):
        value = getattr(data, name)
        if value is not None and value < least:
            raise ValueError(f"data.init_args.{name}: must be at least {least}, got {value}")
    if not 0 <= data.held_out_percent <= 99:
        raise ValueError(f"data.init_args.held_out_percent: must be 0 to 99, got {data.held_out_percent}")
    if data.streaming:
        _check_streaming(data, own)


def check_stage(data: Any, stage: str | None) -> None:
    """See that a stream has an end, and evaluations, where it needs them.

    Args:
        data: The DataModule, set up.
        stage: What for.

    Raises:
        ValueError: It lacks them; names the key.
    """
    if not data.streaming:
        return
    if stage == "predict":
        raise ValueError("data.init_args.streaming: a pass over all examples never ends; set streaming: false")
    if stage != "fit" or data.trainer is None:
        return
    if data.trainer.max_steps < 1:
        raise ValueError("trainer.max_steps: data.init_args.streaming has no end, so say after how many steps to stop")
    share = isinstance(data.trainer.val_check_interval, float)
    if share and data.train_size is None and data.trainer.limit_val_batches and data.size("val"):
        raise ValueError(
            f"trainer.val_check_interval: {data.trainer.val_check_interval} is a share of an epoch, and that of a "
            "stream has no end, so nothing would be evaluated; set it to a number of steps, or "
            "data.init_args.train_size to the examples of an epoch"
        )


def _check_streaming(data: Any, own: bool) -> None:
    if own:
        raise ValueError("data.init_args.streaming: load_examples is overridden and returns all rows; unset streaming")
    for i, source in enumerate(data.sources):
        if source.fraction != 1.0:
            raise ValueError(
                f"data.init_args.datasets[{i}].fraction: is {source.fraction}, but nobody knows how many rows a stream "
                "has; leave it out, or set data.init_args.streaming: false"
            )
    if data.val_split is None and data.held_out_percent and data.val_size is None:
        raise ValueError(
            "data.init_args.val_size: with streaming say how many held-out rows to look for at the beginning of the "
            "data; 0 for none"
        )
