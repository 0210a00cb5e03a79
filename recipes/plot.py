"""Draws the learning curves of runs over seeds: `python recipes/plot.py RUN_DIR... --output docs/results/NAME`.

Runs of the same environment and preset are one curve: the mean over seeds in the band from the lowest to the highest.
Writes NAME.png and NAME.csv (every evaluation of every run), and prints the last common evaluation of each curve.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections import defaultdict
from pathlib import Path

import yaml
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from qsm_rl import training as rl

COLUMNS = ("env", "curve", "seed", "frames", "return_mean", "return_std")
Curve = dict[int, dict[int, float]]  # seed -> frames -> return


def evaluations(run_dir: Path, curve: str | None) -> list[dict[str, object]]:
    """The evaluations of one run, a row each."""
    if not (run_dir / "config.yaml").is_file() or not (run_dir / "metrics.csv").is_file():
        raise rl.UserError(f"{run_dir} is not the folder of a run: it lacks config.yaml or metrics.csv.")
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    columns = rl.read_metrics(run_dir / "metrics.csv")
    if "eval/return_mean" not in columns:
        raise rl.UserError(f"{run_dir} has no evaluation yet; wait for one, or set a smaller --eval_every.")
    points = zip(columns["frames"], columns["eval/return_mean"], columns["eval/return_std"], strict=True)
    name = curve or f"qsm {config['preset']}"
    return [
        dict(zip(COLUMNS, (config["env"], name, config["seed"], int(frames), mean, std), strict=True))
        for frames, mean, std in points
        if not math.isnan(mean)
    ]


def read_reference(path: Path) -> list[dict[str, object]]:
    """Curves from elsewhere, in the columns that this script writes."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows or not {"env", "curve", "frames", "return_mean"} <= rows[0].keys():
        raise rl.UserError(f"--reference {path} needs the columns env, curve, frames, return_mean.")
    return [{**row, "frames": int(row["frames"]), "return_mean": float(row["return_mean"])} for row in rows]


def draw(rows: list[dict[str, object]], reference: list[dict[str, object]], picture: Path) -> None:
    """One panel for each environment; a band over seeds for each curve, dashes for the reference."""
    envs = sorted({str(row["env"]) for row in rows})
    figure = Figure(figsize=(5.2 * len(envs), 4.2), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, env in zip(figure.subplots(1, len(envs), squeeze=False)[0], envs, strict=True):
        for color, name in enumerate(sorted({str(row["curve"]) for row in rows if row["env"] == env})):
            curve = by_seed(rows, env, name)
            frames = common_frames(curve)
            returns = [[seed[frame] for seed in curve.values()] for frame in frames]
            axes.fill_between(
                frames, [min(r) for r in returns], [max(r) for r in returns], color=f"C{color}", alpha=0.2
            )
            label = f"{name}, {len(curve)} seed{'s' if len(curve) > 1 else ''}"
            axes.plot(
                frames, [sum(r) / len(r) for r in returns], color=f"C{color}", marker="o", markersize=3, label=label
            )
        for name in sorted({str(row["curve"]) for row in reference if row["env"] == env}):
            points = sorted(
                (row["frames"], row["return_mean"]) for row in reference if (row["env"], row["curve"]) == (env, name)
            )
            axes.plot(*zip(*points, strict=True), color="0.2", linestyle="--", marker="s", markersize=3, label=name)
        axes.set(title=env, xlabel="frames", ylabel="evaluation return, mean and range of seeds")
        axes.legend(frameon=False, fontsize=9)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture)


def by_seed(rows: list[dict[str, object]], env: str, name: str) -> Curve:
    """The curve's returns by seed and frame count."""
    curve: Curve = defaultdict(dict)
    for row in rows:
        if (row["env"], row["curve"]) == (env, name):
            curve[row["seed"]][row["frames"]] = row["return_mean"]
    return curve


def common_frames(curve: Curve) -> list[int]:
    """Frame counts at which every seed was evaluated."""
    return sorted(set.intersection(*(set(seed) for seed in curve.values())))


@rl.exit_on_error
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dirs", nargs="+", type=Path, help="folders of runs")
    parser.add_argument("--output", type=Path, default=Path("curves"), help="picture and table, without ending")
    parser.add_argument(
        "--reference", type=Path, help="CSV of curves from elsewhere (env, curve, frames, return_mean), dashed"
    )
    parser.add_argument("--curve", help="name of the curve in place of the preset, for runs with settings of their own")
    parser.add_argument("--last_frame", type=int, help="leave out what lies beyond this frame count")
    arguments = parser.parse_args()
    output, last_frame = arguments.output, arguments.last_frame
    rows = [row for run_dir in arguments.run_dirs for row in evaluations(run_dir, arguments.curve)]
    rows = [row for row in rows if last_frame is None or row["frames"] <= last_frame]
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    reference = read_reference(arguments.reference) if arguments.reference else []
    draw(rows, reference, output.with_suffix(".png"))
    for env, name in sorted({(str(row["env"]), str(row["curve"])) for row in rows}):
        curve = by_seed(rows, env, name)
        frame = common_frames(curve)[-1]
        returns = [round(seed[frame], 1) for seed in curve.values()]
        print(f"{env}, {name}, {frame:,} frames: mean {sum(returns) / len(returns):.1f}, seeds {returns}")
    print(f"wrote {output.with_suffix('.csv')} and {output.with_suffix('.png')}")
    return 0


if __name__ == "__main__":
    main()
