"""Runs a grid of settings, tasks and seeds, and keeps what is finished.

python recipes/grid.py recipes/grids/default_setting.yaml --output docs/results/default_setting

Finished cells stand in OUTPUT/cells.csv and are not run again; begun ones go on from their last checkpoint. Stop it
with Ctrl-C and give the same command to go on. OUTPUT/table.md holds the last evaluation of each setting.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from qsm_rl import training as rl

RECIPES = {"mujoco_qsm": rl.QSMConfiguration}


def check(cells: Sequence[rl.Cell]) -> None:
    """Every setting and every environment, before anything runs."""
    for cell in cells:
        if cell.recipe not in RECIPES:
            raise rl.UserError(f"unknown recipe {cell.recipe!r}; there are {', '.join(RECIPES)}.")
        try:
            rl.parse_configuration(RECIPES[cell.recipe], cell.flags)
        except rl.UserError as error:
            raise rl.UserError(f"{cell.variant} on {cell.env}: {error}") from error
    with rl.user_errors(ValueError, ImportError):
        for env in sorted({cell.env for cell in cells}):
            rl.make_environment(env).close()


def write_table(cells: Sequence[rl.Cell], table: rl.CellTable, path: Path) -> None:
    """The last evaluation of every finished cell, a line for each variant, the best first."""
    lines = []
    for env in dict.fromkeys(cell.env for cell in cells):
        returns: dict[str, list[float]] = defaultdict(list)
        rates: dict[str, list[float]] = defaultdict(list)
        frames = set()
        for cell in cells:
            if cell.env == env and (rows := table.rows_of(cell)):
                returns[cell.variant].append(float(rows[-1]["return_mean"]))
                rates[cell.variant].append(float(rows[-1]["updates_per_second"] or "nan"))
                frames.add(int(rows[-1]["frames"]))
        if not returns:
            continue
        lines += [
            f"**{env}, {' and '.join(f'{count:,}' for count in sorted(frames))} frames**",
            "",
            "| setting | mean return | 95 % interval | seeds | updates/s |",
            "|---|---|---|---|---|",
        ]
        for variant in sorted(returns, key=lambda name: -sum(returns[name]) / len(returns[name])):
            values, rate = returns[variant], rates[variant]
            mean, low, high = rl.mean_interval([[value] for value in values])
            seeds = ", ".join(f"{value:.0f}" for value in values)
            interval = f"{low:.0f} to {high:.0f}" if len(values) > 1 else "one seed"
            lines.append(f"| {variant} | {mean:.0f} | {interval} | {seeds} | {sum(rate) / len(rate):.0f} |")
        lines.append("")
    path.write_text("\n".join(lines), encoding="utf-8")


@rl.exit_on_error
def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", type=Path, help="YAML file of the grid, see recipes/grids")
    parser.add_argument("--output", type=Path, required=True, help="folder of cells.csv and table.md")
    parser.add_argument("--runs", type=Path, default=Path("runs/grid"), help="folder of the run folders")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="runs at a time, one thread each")
    parser.add_argument("--dry_run", action="store_true", help="check the grid, say what is missing, write the table")
    options = parser.parse_args(arguments)
    if options.workers < 1:
        raise rl.UserError(f"--workers must be at least 1, got {options.workers}.")
    cells = rl.read_grid(options.grid, options.runs)
    check(cells)
    options.output.mkdir(parents=True, exist_ok=True)
    table = rl.CellTable(options.output / "cells.csv")
    missing = [cell for cell in cells if not table.rows_of(cell)]
    print(f"{len(cells)} cells, {len(cells) - len(missing)} finished; runs in {options.runs}")
    failures: list[str] = []
    if options.dry_run:
        for cell in missing:
            print(f"missing: {cell.env}, {cell.variant}, seed {cell.seed}")
    else:
        failures = rl.run_cells(cells, table, Path(__file__).parent, workers=options.workers)
    write_table(cells, table, options.output / "table.md")
    print(f"wrote {options.output / 'table.md'}")
    for failure in failures:
        print(f"failed: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    main(sys.argv[1:])
