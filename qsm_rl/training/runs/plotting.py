"""The learning curve of one run."""

from __future__ import annotations

import math
import re
from pathlib import Path

from qsm_rl.atomic_files import write_atomically
from qsm_rl.training.runs.loggers import read_metrics

__all__ = ["plot_learning_curve"]


def plot_learning_curve(metrics: Path, picture: Path, *, title: str) -> None:
    """Draws the returns of a run over frames: evaluations with their spread, and training episodes.

    Args:
        metrics: the run's metrics.csv.
        picture: PNG file to write.
        title: title of the picture.
    """
    # The figure's own canvas draws without a display and leaves pyplot's global state unchanged.
    from matplotlib.figure import Figure

    columns = read_metrics(metrics)
    figure = Figure(figsize=(7, 4.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    frames, returns = _points(columns, "train/return_mean")
    if frames:
        axes.plot(frames, returns, color="0.65", linewidth=1, label="training episodes (with exploration noise)")
    frames, means, spreads = _points(columns, "eval/return_mean", "eval/return_std")
    if frames:
        low, high = ([m + sign * s for m, s in zip(means, spreads, strict=True)] for sign in (-1, 1))
        axes.fill_between(frames, low, high, color="tab:blue", alpha=0.2, linewidth=0, label="± 1 std over episodes")
        axes.plot(frames, means, color="tab:blue", marker="o", markersize=3, label="evaluation, mean")
    ways = [match.group(1) for name in columns if (match := re.fullmatch(r"eval/(\w+)/return_mean", name))]
    for color, way in zip(("tab:orange", "tab:green"), ways, strict=False):
        axes.plot(*_points(columns, f"eval/{way}/return_mean"), color=color, marker="o", markersize=3, label=way)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=9)
    axes.set(title=title, xlabel="frames", ylabel="return of an episode")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1e6:g}M" if value >= 1e6 else f"{value:,.0f}")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    write_atomically(picture, lambda temporary: figure.savefig(temporary, format="png"))


def _points(columns: dict[str, list[float]], *names: str) -> list[list[float]]:
    """Frames and the named columns, without the rows that lack one of them."""
    if any(name not in columns for name in names):
        return [[] for _ in ("frames", *names)]
    rows = zip(columns["frames"], *(columns[name] for name in names), strict=True)
    kept = [row for row in rows if not any(math.isnan(value) for value in row)]
    return [list(values) for values in zip(*kept, strict=True)] or [[] for _ in ("frames", *names)]
