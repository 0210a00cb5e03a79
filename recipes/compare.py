"""Compares algorithms over several seeds, with the same environments, collectors, replay buffers and evaluations.

python recipes/compare.py --algos qsm,sac,td3 --envs HalfCheetah-v5,dm_control/walker-walk --seeds 5 \\
    --total_frames 200000 --output results/comparison

Each cell, one algorithm on one environment with one seed, is a separate process with one thread. Finished cells are
recorded in OUTPUT/cells.csv and are not run again; unfinished ones continue from their last checkpoint. Stop with
Ctrl-C, and repeat the command to continue. Writes table.md, intervals.csv, curves.png and profiles.png into OUTPUT.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from qsm_rl import training as rl
from qsm_rl.atomic_files import write_csv_atomically

PUBLISHED = Path(__file__).with_name("published_returns.csv")
THRESHOLDS = [step / 50 for step in range(51)]
Scores = dict[str, list[list[float]]]


def make_grid(options: argparse.Namespace) -> list[rl.Cell]:
    """The cells, ordered by seed, so that every algorithm has its first result early."""
    sixth = max(1, options.total_frames // 6)
    settings: dict[str, Any] = {
        "total_frames": options.total_frames,
        "eval_every": sixth if options.eval_every is None else options.eval_every,
        "eval_episodes": options.eval_episodes,
    }
    if options.hidden_dims:
        settings |= {name: options.hidden_dims for name in ("actor_hidden_dims", "critic_hidden_dims")}
    cells = []
    for env in options.envs:
        for name in options.algos:
            algorithm = rl.ALGORITHMS[name]
            flags = {**settings, **algorithm.flags}
            cells += rl.make_cells(algorithm.recipe, name, flags, env, range(options.seeds), options.runs)
    return sorted(cells, key=lambda cell: cell.seed)


def normalized_scores(cells: Sequence[rl.Cell], table: rl.CellTable) -> tuple[Scores, list[str]]:
    """Last evaluations as scores, ``(seeds, environments)`` for each algorithm, on environments that all have finished.

    A dm_control return is divided by 1,000, its maximum; any other return by the highest mean over seeds that an
    algorithm reaches on that environment. If that mean is not above 0, for example because returns are costs, there is
    no scale and no score.
    """
    finals = rl.final_rows(cells, table)
    algorithms = list(dict.fromkeys(cell.variant for cell in cells))
    seeds = sorted({cell.seed for cell in cells})
    columns: dict[str, list[list[float]]] = {name: [] for name in algorithms}
    envs = []
    for env, variants in finals.items():
        returns = {name: [float(row["return_mean"]) for row in rows] for name, rows in variants.items()}
        if any(len(returns.get(name, [])) < len(seeds) for name in algorithms):
            continue
        best = max(sum(values) / len(values) for values in returns.values())
        scale = 1000.0 if env.startswith("dm_control/") else best
        if scale <= 0:
            continue
        envs.append(env)
        for name in algorithms:
            columns[name].append([value / scale for value in returns[name]])
    return {name: [list(row) for row in zip(*values, strict=True)] for name, values in columns.items() if values}, envs


def write_intervals(scores: Scores, path: Path) -> None:
    """Writes rliable's aggregates over environments with their intervals, one row each."""
    columns = ("algorithm", "aggregate", "value", "low", "high")
    rows = [
        dict(zip(columns, (name, aggregate, *(f"{value:.4f}" for value in values)), strict=True))
        for name, aggregates in rl.interval_estimates(scores).items()
        for aggregate, values in aggregates.items()
    ]
    write_csv_atomically(path, columns, rows)


def draw_profiles(scores: Scores, picture: Path) -> None:
    """Draws the share of runs above each score."""
    figure = Figure(figsize=(6.4, 4.2), dpi=130, layout="constrained")
    axes = figure.subplots()
    for color, (name, (share, low, high)) in enumerate(rl.performance_profiles(scores, THRESHOLDS).items()):
        axes.fill_between(THRESHOLDS, low, high, color=f"C{color}", alpha=0.2)
        axes.plot(THRESHOLDS, share, color=f"C{color}", label=name)
    axes.set(xlabel="normalised score", ylabel="share of runs above it", ylim=(-0.02, 1.02))
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture)


def published(envs: Sequence[str], total_frames: int) -> list[dict[str, Any]]:
    """Published numbers at no more than twice the frames of the comparison, each with its source and protocol."""
    rows = [row for row in rl.read_reference(PUBLISHED) if row["env"] in envs and row["frames"] <= 2 * total_frames]
    return [{**row, "curve": f"{row['curve']}: {row['source']}, {row['protocol']}"} for row in rows]


def write_results(cells: Sequence[rl.Cell], table: rl.CellTable, output: Path, total_frames: int) -> list[str]:
    """Writes all results that follow from the table; returns the names of the files."""
    text = rl.markdown_table(cells, table)
    envs = list(dict.fromkeys(cell.env for cell in cells))
    references = published(envs, total_frames)
    if references:
        lines = ["| published | frames | return | source | protocol |", "|---|---|---|---|---|"]
        farthest_first = sorted(references, key=lambda row: -abs(row["frames"] - total_frames))
        for row in {(row["env"], row["curve"]): row for row in farthest_first}.values():  # the nearest of each curve
            name, _, _ = row["curve"].partition(": ")
            lines.append(
                f"| {row['env']}, {name} | {row['frames']:,} | {row['return_mean']:g} | {row['source']} "
                f"| {row['protocol']} |"
            )
        text += "\n".join(["", *lines, ""])
    (output / "table.md").write_text(text, encoding="utf-8")
    written = ["table.md", "curves.png"]
    rows = [row for cell in cells for row in table.rows_of(cell)]
    curves = [
        {**row, "curve": row["variant"], "frames": int(row["frames"]), "return_mean": float(row["return_mean"])}
        for row in rows
    ]
    rl.plot_curves(rl.curves_of(curves), references, output / "curves.png")
    scores, complete = normalized_scores(cells, table)
    if complete:
        write_intervals(scores, output / "intervals.csv")
        draw_profiles(scores, output / "profiles.png")
        written += ["intervals.csv", "profiles.png"]
        print(f"intervals and profiles over {', '.join(complete)}")
    return written


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parses and checks the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algos", required=True, help=f"comma-separated names from {', '.join(rl.ALGORITHMS)}")
    parser.add_argument("--envs", required=True, help="comma-separated environment ids")
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds (0, 1, ...) for each cell; default 5")
    parser.add_argument("--total_frames", type=int, required=True, help="frames of each run")
    parser.add_argument("--eval_every", type=int, help="frames between evaluations; default a sixth of the run")
    parser.add_argument("--eval_episodes", type=int, default=5, help="episodes per evaluation; default 5")
    parser.add_argument(
        "--hidden_dims",
        type=int,
        nargs="+",
        help="widths of the hidden layers of all networks; default each algorithm's own",
    )
    rl.add_grid_arguments(parser, runs="runs/compare")
    options = parser.parse_args(arguments)
    for name in ("algos", "envs"):
        names = [part.strip() for part in getattr(options, name).split(",") if part.strip()]
        if not names:
            raise rl.UserError(f"--{name} is empty; give one or more names, separated by commas.")
        setattr(options, name, list(dict.fromkeys(names)))
    if unknown := [name for name in options.algos if name not in rl.ALGORITHMS]:
        raise rl.UserError(f"--algos: unknown {', '.join(unknown)}, expected names from {', '.join(rl.ALGORITHMS)}.")
    if options.seeds < 1:
        raise rl.UserError(f"--seeds must be at least 1, got {options.seeds}.")
    return options


@rl.exit_on_error
def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    rl.require_rliable()
    cells = make_grid(options)
    return rl.run_grid(
        cells,
        options,
        Path(__file__).parent,
        lambda table: write_results(cells, table, options.output, options.total_frames),
    )


if __name__ == "__main__":
    main(sys.argv[1:])
