"""Measures the training time to a given return as the chain grows, for Q-score matching and Diffusion-QL.

python recipes/time_to_return.py --output results/time_to_return

Both train the same networks on the same task with the same settings, each in one process with one thread and eager
float32, and stop at the return; only the actor's loss differs. Finished cells are recorded in OUTPUT/cells.csv and are
not run again. Stop with Ctrl-C, and repeat the command to continue. Writes OUTPUT/table.md and
OUTPUT/time_to_return.png.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, StrMethodFormatter

from qsm_rl import training as rl

SETTINGS = {
    "batch_size": 128,
    "warmup_frames": 1000,
    "frames_per_batch": 10,
    "n_step": 1,
    "tau": 0.005,
    "actor_learning_rate": 3e-4,
    "critic_learning_rate": 3e-4,
    "actor_hidden_dims": [64, 64],
    "critic_hidden_dims": [64, 64],
    "critic": "mlp",
    "critic_adam_beta1": 0.9,
    "target_aggregation": "min",
    "eval_every": 500,
    "eval_episodes": 10,
    "compile": False,
    "precision": "float32",
}
ALGORITHMS = {
    "Q-score matching": (
        "mujoco_qsm",
        {"score_critics": "target", "score_target": "normalized"},
    ),
    "Diffusion-QL": ("mujoco_diffusion_ql", {}),
}


def make_grid(options: argparse.Namespace) -> list[rl.Cell]:
    """The cells, those with short chains first."""
    cells = []
    for steps in options.steps:
        for name, (recipe, flags) in ALGORITHMS.items():
            settings = SETTINGS | flags
            settings |= {"total_frames": options.total_frames, "stop_at_return": options.value, "num_steps": steps}
            seeds = range(options.seeds)
            cells += rl.make_cells(recipe, f"{name}, T = {steps}", settings, options.env, seeds, options.runs)
    return cells


def seconds_to(value: float, rows: Sequence[dict[str, str]]) -> float | None:
    """Seconds up to the first evaluation with at least this return; None if there is none."""
    return next((float(row["elapsed_seconds"]) for row in rows if float(row["return_mean"]) >= value), None)


def write_results(cells: Sequence[rl.Cell], table: rl.CellTable, options: argparse.Namespace) -> list[str]:
    """Writes the table and the figure of the finished cells; returns the names of the files."""
    header = ["| T | algorithm | seconds, a seed each | frames | updates/s |", "|---|---|---|---|---|"]
    lines: list[tuple[int, str]] = []
    ever = False  # whether any run reached the return
    figure = Figure(figsize=(5.4, 3.8), dpi=130, layout="constrained")
    axes = figure.subplots()
    for color, name in enumerate(ALGORITHMS):
        points = []
        for steps in options.steps:
            runs = [table.rows_of(cell) for cell in cells if cell.variant == f"{name}, T = {steps}"]
            runs = [rows for rows in runs if rows]
            if not runs:
                continue
            times = [seconds_to(options.value, rows) for rows in runs]
            reached = [time for time in times if time is not None]
            frames = ", ".join(f"{int(rows[-1]['frames']):,}" for rows in runs)
            rates = [float(rows[0]["updates_per_second"]) for rows in runs if rows[0]["updates_per_second"]]
            rate = f"{statistics.mean(rates):.0f}" if rates else "none"  # solved by the end of the warm-up
            texts = ", ".join("not reached" if time is None else f"{time:.0f}" for time in times)
            lines.append((steps, f"| {steps} | {name} | {texts} | {frames} | {rate} |"))
            ever |= bool(reached)
            axes.plot([steps] * len(reached), reached, "o", color=f"C{color}", alpha=0.5)
            if len(reached) == len(runs):
                points.append((steps, statistics.median(reached)))
        axes.plot([x for x, _ in points], [y for _, y in points], color=f"C{color}", label=name)
    by_steps = [line for _, line in sorted(lines, key=lambda line: line[0])]
    (options.output / "table.md").write_text("\n".join([*header, *by_steps, ""]), encoding="utf-8")
    if not ever:
        return ["table.md"]
    axes.set(xlabel="denoising steps T", ylabel=f"seconds to a return of {options.value:g}", xscale="log", yscale="log")
    axes.set_xticks(options.steps, [str(steps) for steps in options.steps])
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.minorticks_off()
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(options.output / "time_to_return.png")
    return ["table.md", "time_to_return.png"]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parses and checks the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="Pendulum-v1", help="environment id; default Pendulum-v1")
    parser.add_argument("--value", type=float, default=-200.0, help="return at which a run ends; default -200")
    parser.add_argument(
        "--steps", nargs="+", type=int, default=[2, 5, 10, 20, 50], help="chain lengths T; default 2 5 10 20 50"
    )
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (0, 1, ...) for each cell; default 3")
    parser.add_argument(
        "--total_frames",
        type=int,
        default=15_000,
        help="frames of a run that does not reach the return; default %(default)s",
    )
    rl.add_grid_arguments(parser, runs="runs/time_to_return")
    options = parser.parse_args(arguments)
    if wrong := [steps for steps in options.steps if steps < 1]:
        raise rl.UserError(f"--steps must be at least 1 each, got {wrong[0]}.")
    for name in ("seeds", "total_frames"):
        if getattr(options, name) < 1:
            raise rl.UserError(f"--{name} must be at least 1, got {getattr(options, name)}.")
    return options


@rl.exit_on_error
def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    cells = make_grid(options)
    return rl.run_grid(cells, options, Path(__file__).parent, lambda table: write_results(cells, table, options))


if __name__ == "__main__":
    main(sys.argv[1:])
