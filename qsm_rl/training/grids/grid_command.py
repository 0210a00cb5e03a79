"""The command line shared by programs that run grids: their options, and the steps from cells to results."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from qsm_rl.training.configuration.hardware import available_cores
from qsm_rl.training.errors import UserError
from qsm_rl.training.folders import exclusive
from qsm_rl.training.grids.algorithms import check_cells
from qsm_rl.training.grids.grid import Cell, CellTable, run_cells

__all__ = ["add_grid_arguments", "run_grid"]


def add_grid_arguments(parser: argparse.ArgumentParser, runs: str) -> None:
    """Adds ``--output``, ``--runs``, ``--workers`` and ``--dry_run``.

    Args:
        parser: parser that receives the options.
        runs: default parent folder of the run folders.
    """
    parser.add_argument("--output", type=Path, required=True, help="folder for cells.csv and the results")
    parser.add_argument(
        "--runs", type=Path, default=Path(runs), help=f"parent folder of the run folders; default {runs}"
    )
    parser.add_argument(
        "--workers", type=int, default=available_cores(), help="runs at a time, one thread each; default one per core"
    )
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="check the grid, list missing cells and write results, without running anything",
    )


def run_grid(
    cells: Sequence[Cell],
    options: argparse.Namespace,
    recipes: Path,
    write_results: Callable[[CellTable], Sequence[str]],
) -> int:
    """Runs the cells missing from ``cells.csv`` in the output folder, and writes the results of all cells.

    Args:
        cells: the grid.
        options: the values of [`add_grid_arguments`][qsm_rl.training.add_grid_arguments].
        recipes: folder of the recipes.
        write_results: takes the table, writes files into the output folder, and returns their names.

    Returns:
        The exit status: 0, or 1 if a cell failed; failed cells are named on stderr.

    Raises:
        UserError: naming the wrong option, setting or environment, before anything runs or is written.
    """
    if options.workers < 1:
        raise UserError(f"--workers must be at least 1, got {options.workers}.")
    check_cells(cells)
    with exclusive(options.output):
        return _run(cells, options, recipes, write_results)


def _run(
    cells: Sequence[Cell],
    options: argparse.Namespace,
    recipes: Path,
    write_results: Callable[[CellTable], Sequence[str]],
) -> int:
    table = CellTable(options.output / "cells.csv")
    missing = [cell for cell in cells if not table.rows_of(cell)]
    print(f"{len(cells)} cells, {len(cells) - len(missing)} finished; runs in {options.runs}", flush=True)
    failures: list[str] = []
    if options.dry_run:
        for cell in missing:
            print(f"missing: {cell.env}, {cell.variant}, seed {cell.seed}")
    else:
        failures = run_cells(cells, table, recipes, workers=options.workers)
    if any(table.rows_of(cell) for cell in cells):
        print(f"wrote {', '.join(write_results(table))} to {options.output}")
    else:
        print(f"wrote nothing: {table.path} has no results for these settings")
    for failure in failures:
        print(f"failed: {failure}", file=sys.stderr)
    return 1 if failures else 0
