"""Draws the learning curves of runs over seeds: `python recipes/plot.py RUN_DIR... --output docs/results/NAME`.

Runs of the same environment, recipe and preset are one curve: the mean over seeds in its 95 % bootstrap interval, by
rliable. Writes NAME.png and NAME.csv (every evaluation of every run), and prints a table of the last evaluation that
all seeds of a curve have in common.
"""

from __future__ import annotations

import argparse
import csv
import math
import re
from collections import defaultdict
from pathlib import Path

import yaml
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from qsm_rl import training as rl

COLUMNS = ("env", "curve", "seed", "frames", "return_mean", "return_std")
SAMPLING = "sampling"
Curve = dict[int, dict[int, float]]  # seed -> frames -> return


def evaluations(run_dir: Path, curve: str | None, ways: list[str]) -> list[dict[str, object]]:
    """The evaluations of one run, a row for each and each way of acting."""
    if not (run_dir / "config.yaml").is_file() or not (run_dir / "metrics.csv").is_file():
        raise rl.UserError(f"{run_dir} is not the folder of a run: it lacks config.yaml or metrics.csv.")
    text = (run_dir / "config.yaml").read_text(encoding="utf-8")
    config = yaml.safe_load(text)
    recipe = re.match(r"# python recipes/(?:mujoco_)?(\w+)\.py", text)
    columns = rl.read_metrics(run_dir / "metrics.csv")
    rows = []
    for way in ways:
        prefix = "eval/" if way == SAMPLING else f"eval/{way}/"
        if f"{prefix}return_mean" not in columns:
            there = [name.split("/")[1] for name in columns if re.fullmatch(r"eval/\w+/return_mean", name)]
            raise rl.UserError(
                f"{run_dir} has no {prefix}return_mean: "
                + (
                    "it has no evaluation yet; wait for one, or set a smaller --eval_every."
                    if "eval/return_mean" not in columns
                    else f"--ways are here {', '.join([SAMPLING, *there])}."
                )
            )
        name = curve or f"{recipe.group(1) if recipe else 'qsm'} {config['preset']}"
        name += "" if way == SAMPLING else f", {way}"
        points = zip(columns["frames"], columns[f"{prefix}return_mean"], columns[f"{prefix}return_std"], strict=True)
        rows += [
            dict(zip(COLUMNS, (config["env"], name, config["seed"], int(frames), mean, std), strict=True))
            for frames, mean, std in points
            if not math.isnan(mean)
        ]
    return rows


def read_reference(path: Path) -> list[dict[str, object]]:
    """Curves from elsewhere, in the columns that this script writes."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows or not {"env", "curve", "frames", "return_mean"} <= rows[0].keys():
        raise rl.UserError(f"--reference {path} needs the columns env, curve, frames, return_mean.")
    return [{**row, "frames": int(row["frames"]), "return_mean": float(row["return_mean"])} for row in rows]


def by_curve(rows: list[dict[str, object]]) -> dict[tuple[str, str], Curve]:
    """The returns by environment and name of the curve.

    Raises:
        UserError: if two runs of a curve have the same seed, or its seeds no evaluation in common.
    """
    curves: dict[tuple[str, str], Curve] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        seed = curves[row["env"], row["curve"]][row["seed"]]
        if row["frames"] in seed:
            raise rl.UserError(
                f"two runs of {row['env']}, {row['curve']} have seed {row['seed']}: a curve needs a run for each seed. "
                "Draw runs of different settings apart, each with a name by --curve."
            )
        seed[row["frames"]] = row["return_mean"]
    for (env, name), curve in curves.items():
        if not common_frames(curve):
            raise rl.UserError(
                f"the seeds of {env}, {name} were never evaluated at the same frame: draw them apart, by --curve."
            )
    return dict(sorted(curves.items()))


def common_frames(curve: Curve) -> list[int]:
    """Frame counts at which every seed was evaluated."""
    return sorted(set.intersection(*(set(seed) for seed in curve.values())))


def draw(curves: dict[tuple[str, str], Curve], reference: list[dict[str, object]], picture: Path) -> None:
    """One panel for each environment; the interval of each curve, dashes for the reference."""
    envs = sorted({env for env, _ in curves})
    figure = Figure(figsize=(5.2 * len(envs), 4.2), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, env in zip(figure.subplots(1, len(envs), squeeze=False)[0], envs, strict=True):
        for color, name in enumerate(name for other, name in curves if other == env):
            curve = curves[env, name]
            frames = common_frames(curve)
            means, lows, highs = rl.curve_intervals([[seed[frame] for frame in frames] for seed in curve.values()])
            axes.fill_between(frames, lows, highs, color=f"C{color}", alpha=0.2, linewidth=0)
            label = f"{name}, {len(curve)} seed{'s' if len(curve) > 1 else ''}"
            axes.plot(frames, means, color=f"C{color}", marker="o", markersize=3, label=label)
        for name in sorted({str(row["curve"]) for row in reference if row["env"] == env}):
            points = sorted(
                (row["frames"], row["return_mean"]) for row in reference if (row["env"], row["curve"]) == (env, name)
            )
            axes.plot(*zip(*points, strict=True), color="0.2", linestyle="--", marker="s", markersize=3, label=name)
        axes.set(title=env, xlabel="frames", ylabel="evaluation return, mean and 95 % interval over seeds")
        axes.legend(frameon=False, fontsize=9)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture)


def table(curves: dict[tuple[str, str], Curve]) -> str:
    """The last evaluation that all seeds of a curve have in common, as Markdown."""
    lines = ["| environment | curve | frames | seeds | mean | 95 % interval | returns |", "|" + "---|" * 7]
    for (env, name), curve in curves.items():
        frame = common_frames(curve)[-1]
        returns = [seed[frame] for _, seed in sorted(curve.items())]
        mean, low, high = rl.mean_interval([[value] for value in returns])
        each = ", ".join(f"{value:.1f}" for value in returns)
        interval = f"{low:.1f} to {high:.1f}" if len(returns) > 1 else "one seed"
        lines.append(f"| {env} | {name} | {frame:,} | {len(returns)} | {mean:.1f} | {interval} | {each} |")
    return "\n".join(lines) + "\n"


@rl.exit_on_error
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dirs", nargs="+", type=Path, help="folders of runs")
    parser.add_argument("--output", type=Path, default=Path("curves"), help="picture and CSV, without ending")
    parser.add_argument(
        "--reference", type=Path, help="CSV of curves from elsewhere (env, curve, frames, return_mean), dashed"
    )
    parser.add_argument("--curve", help="name of the curve in place of recipe and preset, for settings of your own")
    parser.add_argument(
        "--ways", nargs="+", default=[SAMPLING], help="ways of acting, a curve each: sampling deterministic best_of_N"
    )
    parser.add_argument("--last_frame", type=int, help="leave out what lies beyond this frame count")
    given = parser.parse_args(arguments)
    output, last_frame = given.output, given.last_frame
    rows = [row for run_dir in given.run_dirs for row in evaluations(run_dir, given.curve, given.ways)]
    rows = [row for row in rows if last_frame is None or row["frames"] <= last_frame]
    if not rows:
        raise rl.UserError(f"no evaluation up to frame {last_frame:,}; raise --last_frame.")
    curves = by_curve(rows)
    text = table(curves)
    reference = read_reference(given.reference) if given.reference else []
    output.parent.mkdir(parents=True, exist_ok=True)
    draw(curves, reference, Path(f"{output}.png"))
    with Path(f"{output}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"{text}\nwrote {output}.png and {output}.csv")
    return 0


if __name__ == "__main__":
    main()
