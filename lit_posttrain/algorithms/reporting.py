"""What every run tells: its phases and their seconds, curves, texts, and how far it is."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch import nn

from lit_posttrain import gates
from lit_posttrain.policy import Policy
from lit_posttrain.precision import describe_hardware
from lit_posttrain.types import StepResult


class Reporting(pl.LightningModule):
    """Progress, logs and the gates of the first iterations; below every algorithm."""

    def __init__(self):
        super().__init__()
        self.stop: Any = None
        self.seconds: dict[str, float] = defaultdict(float)
        self._before: tuple[list[int], float] = ([], 0.0)

    def announce(self, policy: Policy) -> None:
        """One line: hardware, precision, number of trained parameters."""
        size = sum(p.numel() for _, p in policy.trainable())
        self.print(
            f"{describe_hardware(self.device)}; computing in {policy.compute_dtype}; {size:,} trained parameters"
        )

    def learning_rate(self) -> float:
        """The first parameter group's present rate."""
        return self.learning_rates()[0]

    def learning_rates(self) -> list[float]:
        """Every parameter group's present rate."""
        wrapper = self.optimizers()
        assert not isinstance(wrapper, list)
        return [float(group["lr"]) for group in wrapper.optimizer.param_groups]

    def _owned(self) -> list[nn.Parameter]:
        wrapper = self.optimizers()
        assert not isinstance(wrapper, list)
        return [p for group in wrapper.optimizer.param_groups for p in group["params"]]

    # --- progress ---------------------------------------------------------------------------------------------

    def phase(self, name: str, total: int) -> None:
        """Tell the progress bar what happens now."""
        bar = self.trainer.progress_bar_callback
        if bar is not None and hasattr(bar, "phase"):
            bar.phase(name, total)  # pyright: ignore[reportAttributeAccessIssue]

    def advance(self, n: int = 1) -> None:
        """Tell the progress bar that ``n`` more units of the phase are done."""
        bar = self.trainer.progress_bar_callback
        if bar is not None and hasattr(bar, "advance"):
            bar.advance(n)  # pyright: ignore[reportAttributeAccessIssue]

    def poll(self) -> None:
        """Let a requested stop happen here."""
        if self.stop is not None:
            self.stop.check()

    @contextmanager
    def timed_phase(self, name: str, total: int) -> Iterator[None]:
        """A phase whose seconds are added up in ``seconds``."""
        self.phase(name, total)
        start = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - start

    # --- logs -------------------------------------------------------------------------------------------------

    def run_dir(self) -> Path:
        """The run's folder. Collective: every rank asks, or none."""
        return Path(self.trainer.log_dir or self.trainer.default_root_dir)

    def epochs_done(self) -> float:
        """Epochs, the present one's share included."""
        batches = self.trainer.num_training_batches
        done = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready
        return self.trainer.current_epoch + (done / batches if batches and batches != float("inf") else 0.0)

    def log_text(self, tag: str, text: str, step: int) -> None:
        """Markdown in TensorBoard."""
        writer = self._writer("add_text")
        if writer is not None:
            writer.add_text(tag, text, step)

    def log_histogram(self, tag: str, values: Any, step: int) -> None:
        """A histogram in TensorBoard."""
        writer = self._writer("add_histogram")
        if writer is not None and len(values):
            writer.add_histogram(tag, values, step)

    def log_figure(self, tag: str, figure: Any, step: int) -> None:
        """A matplotlib figure in TensorBoard."""
        writer = self._writer("add_figure")
        if writer is not None:
            writer.add_figure(tag, figure, step)

    def log_scores(self, prefix: str, values: dict[str, float], step: int) -> None:
        """An evaluation's numbers, through Lightning.

        Schedulers and early stopping see them, and the commands print and return them. It takes "step" as the x axis,
        and would count something else without. They are equal on every rank already; without ``sync_dist`` Lightning
        would warn of each.
        """
        tagged = {f"{prefix}/{name}": float(value) for name, value in values.items()}
        self.log_dict({"step": float(step), **tagged}, sync_dist=True)

    def _writer(self, method: str) -> Any:
        writer = getattr(self.logger, "experiment", None)
        return writer if self.trainer.is_global_zero and hasattr(writer, method) else None

    # --- gates ------------------------------------------------------------------------------------------------

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Remember the parameters' checksums where a gate will compare them."""
        if self.trainer.global_step < gates.GATED_ITERATIONS:
            self._before = gates.fingerprint(self._owned()), self.learning_rate()

    def require_change(self, results: list[StepResult]) -> None:
        """Stop a run whose updates moved nothing."""
        after, norm = gates.fingerprint(self._owned()), max((r.grad_norm for r in results if r.applied), default=0.0)
        gates.require_change(self._before[0], after, self._before[1], norm)
