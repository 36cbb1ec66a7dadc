"""What a person sees while a run goes: its phase, how far it is, how long it still takes, the latest reward."""

import sys
import time
from typing import Any, TextIO

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

_FORMAT = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"


class PhaseProgressBar(ProgressBar):
    """One bar over the iterations of the whole run and one over the current phase; plain lines without a terminal.

    Lightning's own bars restart every epoch and lose count on a resume, and during a rollout of minutes they stand
    still. A module reaches this one as ``self.trainer.progress_bar_callback``: ``phase("rollout", total=512)``, then
    ``advance(8)`` as completions finish. Metrics logged with ``prog_bar=True`` are shown, the reward first.

    Args:
        line_seconds: Without a terminal, seconds between two lines within a phase, at least 0; an iteration always
            ends with one.

    Raises:
        ValueError: ``line_seconds`` is negative.
    """

    def __init__(self, line_seconds: float = 10.0):
        super().__init__()
        if line_seconds < 0:
            raise ValueError(f"PhaseProgressBar.line_seconds: {line_seconds}, it must be at least 0")
        self.line_seconds = line_seconds
        self._enabled = True
        self._bar: Tqdm | None = None
        self._phase_bar: Tqdm | None = None
        self._stream: TextIO = sys.stdout
        self._plain = True
        self._metrics: dict[str, Any] = {}
        self._total: int | None = None
        self._phase = ("", 0, 0)
        self._evaluation = ""
        self._phase_began = self._began = self._last_line = time.monotonic()
        self._first = self._done = 0

    # --- for modules --------------------------------------------------------------------------------------------

    def phase(self, name: str, total: int) -> None:
        """Begin a phase.

        Args:
            name: What happens now: ``rollout``, ``rewards``, ``update``, ``validation``.
            total: Units of work in it (completions, micro-batches); 0 if unknown.
        """
        self._phase, self._phase_began = (name, 0, total), time.monotonic()
        if not self._enabled:
            return
        if self._plain:
            self._line_if_due()
            return
        if self._phase_bar is None:
            self._phase_bar = self._tqdm(name, total or None, position=1, leave=False)
        self._phase_bar.reset(total=total or None)
        self._phase_bar.set_description_str(f"  {name}")
        self._refresh()

    def advance(self, n: int = 1) -> None:
        """``n`` more units of the current phase are done."""
        name, done, total = self._phase
        self._phase = (name, done + n, total)
        if not self._enabled:
            return
        if self._plain:
            self._line_if_due()
        elif self._phase_bar is not None and self._phase_bar.update(n):  # tqdm draws at most ten times a second
            self._refresh()

    def show(self, **metrics: Any) -> None:
        """Show these numbers from now on, ``reward`` say, before the iteration logs them."""
        self._metrics.update(metrics)
        self._refresh()

    # --- what is shown ------------------------------------------------------------------------------------------

    def line(self) -> str:
        """The state of the run in one line: phase, iteration, elapsed, ETA, metrics."""
        name, done, total = self._phase
        parts = [f"iteration {self._done}/{'?' if self._total is None else self._total}"]
        if name:
            phase = f"{name} {done}/{total}" if total else f"{name} {done}" if done else name
            left = _remaining(self._phase_began, done, total - done) if total else None
            parts.append(phase if left is None or done >= total else f"{phase} ({_clock(left)} left)")
        left = None
        if self._total is not None:
            left = _remaining(self._began, self._done - self._first, self._total - self._done)
        parts.append(f"elapsed {_clock(time.monotonic() - self._began)}")
        parts.append(f"ETA {'?' if left is None else _clock(left)}")
        return "  ".join([*parts, *(f"{k} {v}" for k, v in self._shown().items())])

    def _shown(self) -> dict[str, str]:
        order = sorted(self._metrics, key=lambda k: ("reward" not in k, k))
        return {k: f"{self._metrics[k]:.4g}" if _is_number(self._metrics[k]) else str(self._metrics[k]) for k in order}

    def _line_if_due(self) -> None:
        if time.monotonic() - self._last_line >= self.line_seconds:
            self._write_line()

    def _write_line(self) -> None:
        self._last_line = time.monotonic()
        print(self.line(), file=self._stream, flush=True)

    def _refresh(self) -> None:
        if self._bar is not None:
            self._bar.set_postfix(self._shown(), refresh=True)

    def _tqdm(self, name: str, total: int | None, **options: Any) -> Tqdm:
        return Tqdm(
            desc=name, total=total, file=self._stream, dynamic_ncols=True, smoothing=0, bar_format=_FORMAT, **options
        )

    def _open(self, name: str, first: int, total: int | None) -> None:
        self._close()
        self._stream, self._plain = sys.stdout, not sys.stdout.isatty()
        self._first = self._done = first
        self._total, self._phase, self._metrics = total, ("", 0, 0), {}
        self._phase_began = self._began = self._last_line = time.monotonic()
        if self._enabled and not self._plain:
            self._bar = self._tqdm(name, total, initial=first, position=0, leave=True)

    def _close(self) -> None:
        for bar in (self._phase_bar, self._bar):
            if bar is not None:
                bar.close()
        self._bar = self._phase_bar = None

    # --- Lightning's hooks --------------------------------------------------------------------------------------

    def disable(self) -> None:
        """Show nothing (Lightning calls this on all ranks but the first)."""
        self._enabled = False

    def enable(self) -> None:
        """Show again."""
        self._enabled = True

    @property
    def is_enabled(self) -> bool:
        """Whether this process shows anything; ``LightningModule.print`` asks."""
        return self._enabled

    def print(self, *args: Any, sep: str = " ", **kwargs: Any) -> None:
        """Print without breaking the bars."""
        text = sep.join(map(str, args))
        if self._bar is not None:
            self._bar.write(text, **kwargs)
        elif self._enabled:
            print(text, **kwargs)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin at the iteration a resumed run begins at."""
        self._open("training", trainer.global_step, _total_iterations(trainer))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """One iteration more."""
        self._take_metrics(trainer)
        self._done = trainer.global_step
        if not self._enabled:
            return
        if self._plain:
            self._write_line()
        elif self._bar is not None:
            self._bar.n = self._done
            self._refresh()

    def _take_metrics(self, trainer: pl.Trainer) -> None:
        self._metrics.update({k: v for k, v in trainer.progress_bar_metrics.items() if k not in ("v_num", "step")})

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the finished bar on the screen."""
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave the terminal tidy."""
        self._close()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Validation is a phase of training, or the whole of ``validate``."""
        sanity = trainer.sanity_checking
        batches = trainer.num_sanity_val_batches if sanity else trainer.num_val_batches
        self._evaluate("sanity check" if sanity else "validation", batches, trainer)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Like validation."""
        self._evaluate("test", trainer.num_test_batches, trainer)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Like validation."""
        self._evaluate("predict", trainer.num_predict_batches, trainer)

    def _evaluate(self, name: str, batches: Any, trainer: pl.Trainer) -> None:
        total = sum(batches) if isinstance(batches, list) else batches
        if not trainer.training and trainer.state.fn != "fit":
            self._open(name, 0, 1)
        self._evaluation = name
        self.phase(name, int(total) if total != float("inf") else 0)

    def _batch_done(self) -> None:
        if self._phase[0] == self._evaluation:  # else the module counts a phase of its own
            self.advance()

    def on_validation_batch_end(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        """One batch more."""
        self._batch_done()

    def on_test_batch_end(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        """One batch more."""
        self._batch_done()

    def on_predict_batch_end(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        """One batch more."""
        self._batch_done()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show what validation logged."""
        self._take_metrics(trainer)
        self._end_evaluation(trainer)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Like validation."""
        self._end_evaluation(trainer)

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Like validation."""
        self._end_evaluation(trainer)

    def _end_evaluation(self, trainer: pl.Trainer) -> None:
        if self._enabled and self._plain and not trainer.sanity_checking:
            self._write_line()
        self._phase = ("", 0, 0)
        if trainer.state.fn != "fit":
            self._close()
        self._refresh()


def _total_iterations(trainer: pl.Trainer) -> int | None:
    """Iterations of the whole run, None if it is endless."""
    limits = []
    if trainer.max_steps >= 0:
        limits.append(trainer.max_steps)
    if trainer.max_epochs is not None and trainer.max_epochs >= 0 and trainer.num_training_batches != float("inf"):
        limits.append(trainer.max_epochs * int(trainer.num_training_batches))
    return min(limits, default=None)


def _remaining(began: float, done: int, left: int) -> float | None:
    """Seconds for ``left`` more at the pace so far, None before the first."""
    return (time.monotonic() - began) / done * left if done > 0 else None


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
