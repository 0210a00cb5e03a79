"""Draws the learning curves of runs over seeds.

python recipes/plot.py RUN_DIR... --output docs/results/NAME

Runs with the same environment, recipe and preset form one curve: the mean over seeds with its 95 % bootstrap interval,
computed by rliable. Writes NAME.png and NAME.csv (every evaluation of every run), and prints a table of the last
evaluation that all seeds of a curve have in common.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Mapping
from pathlib import Path

import yaml

from qsm_rl import training as rl
from qsm_rl.atomic_files import write_csv_atomically
from qsm_rl.training.grids.curves import Curves

COLUMNS = ("env", "curve", "seed", "frames", "return_mean", "return_std")
SAMPLING = "sampling"
# Settings in which the seeds of one curve may differ, and prefixes of others.
UNEQUAL = (
    *("seed", "seeds", "total_frames", "stop_at_return", "checkpoint_every"),
    *("device", "compile", "precision", "replay_storage"),
)
UNEQUAL_PREFIXES = ("eval_", "log")


def evaluations(run_dir: Path, curve: str | None, ways: list[str]) -> list[dict[str, object]]:
    """The evaluations of one run, one row per evaluation and way of acting."""
    if not (run_dir / "config.yaml").is_file() or not (run_dir / "metrics.csv").is_file():
        raise rl.UserError(f"{run_dir} is not the folder of a run: it lacks config.yaml or metrics.csv.")
    text = (run_dir / "config.yaml").read_text(encoding="utf-8")
    config = yaml.safe_load(text)
    recipe = re.match(r"# python recipes/(?:mujoco_)?(\w+)\.py", text)
    columns = rl.read_metrics(run_dir / "metrics.csv")

    def evaluated(column: str) -> bool:
        return not all(map(math.isnan, columns.get(column, [])))

    rows = []
    for way in ways:
        prefix = "eval/" if way == SAMPLING else f"eval/{way}/"
        if not evaluated(f"{prefix}return_mean"):
            there = [name.split("/")[1] for name in columns if re.fullmatch(r"eval/\w+/return_mean", name)]
            raise rl.UserError(
                f"{run_dir} has no {prefix}return_mean: "
                + (
                    "it has no evaluation yet; wait for one, or set a smaller --eval_every."
                    if not evaluated("eval/return_mean")
                    else f"choose --ways from {', '.join([SAMPLING, *there])}."
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


def warn_of_differences(curves: Mapping[Path, str]) -> None:
    """Warns of settings that differ between the runs of one curve, which are drawn as seeds of one setting."""
    first: dict[str, dict[str, object]] = {}
    for run_dir, curve in curves.items():
        config = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
        settings = {
            name: value for name, value in config.items() if not (name in UNEQUAL or name.startswith(UNEQUAL_PREFIXES))
        }
        known = first.setdefault(curve, settings)
        if different := sorted(name for name in {*known, *settings} if known.get(name) != settings.get(name)):
            print(
                f"warning: {run_dir} is plotted as a seed of the curve {curve!r}, but differs from another of its runs "
                f"in {', '.join(different)}; plot different settings separately, each with its own --curve",
                file=sys.stderr,
            )


def table(curves: Curves) -> str:
    """The last evaluation that all seeds of a curve have in common, as Markdown."""
    lines = ["| environment | curve | frames | seeds | mean | 95 % interval | returns |", "|" + "---|" * 7]
    for (env, name), curve in curves.items():
        frame = rl.common_frames(curve)[-1]
        returns = [seed[frame] for _, seed in sorted(curve.items())]
        mean, low, high = rl.mean_interval([[value] for value in returns])
        each = ", ".join(f"{value:.1f}" for value in returns)
        interval = f"{low:.1f} to {high:.1f}" if len(returns) > 1 else "one seed"
        lines.append(f"| {env} | {name} | {frame:,} | {len(returns)} | {mean:.1f} | {interval} | {each} |")
    return "\n".join(lines) + "\n"


@rl.exit_on_error
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dirs", nargs="+", type=Path, help="run folders")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("curves"),
        help="picture and CSV to write, without extension; default %(default)s",
    )
    parser.add_argument(
        "--reference", type=Path, help="CSV of other curves (env, curve, frames, return_mean), drawn dashed"
    )
    parser.add_argument("--curve", help="name of the curve, for custom settings; default is recipe and preset")
    parser.add_argument(
        "--ways",
        nargs="+",
        default=[SAMPLING],
        help="ways of acting, one curve each: sampling, deterministic, best_of_N; default sampling",
    )
    parser.add_argument("--last_frame", type=int, help="leave out evaluations after this frame count")
    given = parser.parse_args(arguments)
    output, last_frame = given.output, given.last_frame
    if output.suffix in (".png", ".csv"):
        output = output.with_suffix("")
    runs = [evaluations(run_dir, given.curve, given.ways) for run_dir in given.run_dirs]
    firsts = zip(given.run_dirs, (rows[0] for rows in runs), strict=True)
    warn_of_differences({run_dir: f"{row['env']}, {row['curve']}" for run_dir, row in firsts})
    rows = [row for run in runs for row in run]
    rows = [row for row in rows if last_frame is None or row["frames"] <= last_frame]
    if not rows:
        raise rl.UserError(f"no evaluation up to frame {last_frame:,}; raise --last_frame.")
    curves = rl.curves_of(rows)
    text = table(curves)
    reference = rl.read_reference(given.reference) if given.reference else []
    rl.make_folder(output.parent)
    rl.plot_curves(curves, reference, Path(f"{output}.png"))
    write_csv_atomically(Path(f"{output}.csv"), COLUMNS, rows)
    print(f"{text}\nwrote {output}.png and {output}.csv")
    return 0


if __name__ == "__main__":
    main()
