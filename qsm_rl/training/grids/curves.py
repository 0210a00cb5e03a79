"""Learning curves over seeds, of the kit's runs and of other sources, in one picture."""

from __future__ import annotations

import csv
import math
import textwrap
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qsm_rl.training.errors import UserError
from qsm_rl.training.grids.statistics import curve_intervals

__all__ = ["common_frames", "curves_of", "plot_curves", "read_reference"]

Curve = dict[Any, dict[int, float]]  # seed -> frames -> return
Curves = dict[tuple[str, str], Curve]  # environment and name of the curve


def curves_of(rows: Sequence[Mapping[str, Any]]) -> Curves:
    """The returns by environment and name of the curve, then by seed, then by frame count.

    Args:
        rows: evaluations with ``env``, ``curve``, ``seed``, ``frames`` and ``return_mean``.

    Raises:
        UserError: if two runs of a curve have the same seed, or its seeds have no evaluation frame in common.

    Examples:
        >>> curves_of([{"env": "Hopper-v5", "curve": "qsm", "seed": 0, "frames": 1000, "return_mean": 7.0}])
        {('Hopper-v5', 'qsm'): {0: {1000: 7.0}}}
    """
    curves: Curves = {}
    for row in rows:
        seed = curves.setdefault((row["env"], row["curve"]), {}).setdefault(row["seed"], {})
        if row["frames"] in seed:
            raise UserError(
                f"two runs of {row['env']}, {row['curve']} have seed {row['seed']}, but a curve has one run per seed; "
                "plot runs with different settings separately, each with its own --curve."
            )
        seed[row["frames"]] = row["return_mean"]
    for (env, name), curve in curves.items():
        if not common_frames(curve):
            raise UserError(
                f"the seeds of {env}, {name} were never evaluated at the same frame; plot them separately, each with "
                "its own --curve."
            )
    return dict(sorted(curves.items()))


def common_frames(curve: Curve) -> list[int]:
    """Frame counts at which every seed was evaluated.

    Examples:
        >>> common_frames({0: {1000: 7.0, 2000: 9.0}, 1: {1000: 5.0}})
        [1000]
    """
    return sorted(set.intersection(*(set(seed) for seed in curve.values())))


def read_reference(path: Path) -> list[dict[str, Any]]:
    """Reads curves from other sources.

    Args:
        path: CSV with ``env``, ``curve``, ``frames`` and ``return_mean``; other columns are kept.

    Raises:
        UserError: if the file or a column is missing, or a value is not a number.
    """
    if not path.is_file():
        raise UserError(f"--reference {path} does not exist.")
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows or not {"env", "curve", "frames", "return_mean"} <= rows[0].keys():
        raise UserError(f"--reference {path} needs the columns env, curve, frames, return_mean.")
    try:
        return [{**row, "frames": int(float(row["frames"])), "return_mean": float(row["return_mean"])} for row in rows]
    except (TypeError, ValueError) as error:
        raise UserError(
            f"--reference {path} must contain numbers in the columns frames and return_mean: {error}."
        ) from error


def plot_curves(curves: Curves, reference: Sequence[Mapping[str, Any]], picture: Path) -> None:
    """Draws one panel per environment: the mean of each curve with its 95 % interval, and dashed references.

    A reference with a single point, such as a published result, is drawn as a horizontal line.

    Args:
        curves: from [`curves_of`][qsm_rl.training.curves_of].
        reference: from [`read_reference`][qsm_rl.training.read_reference].
        picture: PNG file to write.

    Raises:
        UserError: if rliable is not installed.
    """
    from matplotlib.figure import Figure

    envs = sorted({env for env, _ in curves})
    colors = {name: f"C{number}" for number, name in enumerate(dict.fromkeys(name for _, name in curves))}
    columns = min(2, len(envs))
    rows = math.ceil(len(envs) / columns)
    figure = Figure(figsize=(5.6 * columns, 4.2 * rows), dpi=130, layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for panel in panels[len(envs) :]:
        panel.remove()
    for axes, env in zip(panels, envs, strict=False):
        for name in (name for other, name in curves if other == env):
            curve, color = curves[env, name], colors[name]
            frames = common_frames(curve)
            means, lows, highs = curve_intervals([[seed[frame] for frame in frames] for seed in curve.values()])
            axes.fill_between(frames, lows, highs, color=color, alpha=0.2, linewidth=0)
            label = f"{name}, {len(curve)} seed{'s' if len(curve) > 1 else ''}"
            axes.plot(frames, means, color=color, marker="o", markersize=3, label=label)
        published: dict[str, list[tuple[int, float]]] = defaultdict(list)
        for row in reference:
            if row["env"] == env:
                published[str(row["curve"])].append((row["frames"], row["return_mean"]))
        for style, (name, points) in enumerate(sorted(published.items())):
            look = {"color": f"{0.2 + 0.15 * (style % 4):.2f}", "linestyle": "--", "label": textwrap.fill(name, 68)}
            if len(points) == 1:
                axes.axhline(points[0][1], linewidth=1, **look)
            else:
                axes.plot(*zip(*sorted(points), strict=True), marker="s", markersize=3, **look)
        axes.set(title=env, xlabel="frames", ylabel="return, mean and 95 % interval")
        if published:  # their long names would hide curves
            axes.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(-0.05, -0.13))
        else:
            axes.legend(frameon=False, fontsize=9)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture)
