"""Curves of a run as a picture, read from the event files that TensorBoard shows."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Curve = tuple[list[int], list[float]]


def read_scalars(run_dir: Path) -> dict[str, Curve]:
    """Steps and values of every scalar tag of a run, all its event files together."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0})
    events.Reload()
    curves = {}
    for tag in events.Tags()["scalars"]:
        points = {e.step: e.value for e in events.Scalars(tag)}
        steps = sorted(points)
        curves[tag] = (steps, [points[s] for s in steps])
    return curves


def plot_curves(curves: Mapping[str, Curve], panels: Mapping[str, list[str]], out: Path, title: str) -> None:
    """A row of panels, each with some tags over iterations, and the moving mean of noisy ones.

    Args:
        curves: As ``read_scalars`` gives them.
        panels: Title of each panel and the tags it shows; tags that the run lacks are left out.
        out: The PNG.
        title: Above all panels.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.6), squeeze=False)
    for axis, (name, tags) in zip(axes[0], panels.items(), strict=True):
        for tag in (t for t in tags if t in curves):
            steps, values = curves[tag]
            label = tag.removeprefix("train/")
            if tag.startswith("eval/"):
                axis.plot(steps, values, marker="o", label=label)
                continue
            line = axis.plot(steps, values, alpha=0.3)[0]
            axis.plot(steps, _smooth(values), color=line.get_color(), label=label)
        axis.set_title(name)
        axis.set_xlabel("iteration")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.suptitle(title)
    figure.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)
    pyplot.close(figure)


def overoptimisation_figure(points: Sequence[Mapping[str, float]]) -> Any:
    """Proxy and gold reward against sqrt(KL), in the order of training.

    Args:
        points: Each with ``step`` and ``sqrt_kl``; ``proxy`` and ``gold`` where they are known.

    Returns:
        A matplotlib figure that no window manager knows of.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.8), layout="constrained")
    axis = figure.subplots()
    for name, style in (("proxy", "--"), ("gold", "-")):
        known = [p for p in points if name in p]
        if known:
            axis.plot([p["sqrt_kl"] for p in known], [p[name] for p in known], style, marker="o", label=name)
    for p in points:
        if "proxy" in p:
            axis.annotate(
                f"{p['step']:.0f}", (p["sqrt_kl"], p["proxy"]), fontsize=7, xytext=(3, 4), textcoords="offset points"
            )
    axis.set_xlabel("sqrt(KL to the initial policy) [nat^1/2]")
    axis.set_ylabel("mean reward on held-out prompts")
    axis.set_title("reward against distance (numbers: iterations)", fontsize=10)
    axis.grid(alpha=0.3)
    if points:
        axis.legend()
    return figure


def _smooth(values: list[float], width: int = 5) -> list[float]:
    """Mean of the last ``width`` values up to each."""
    return [sum(values[max(0, i + 1 - width) : i + 1]) / min(i + 1, width) for i in range(len(values))]
