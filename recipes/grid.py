"""Runs a grid of settings, tasks and seeds, and keeps what is finished.

python recipes/grid.py recipes/grids/default_setting.yaml --output docs/results/default_setting

Finished cells stand in OUTPUT/cells.csv and are not run again; begun ones go on from their last checkpoint. Stop it
with Ctrl-C and give the same command to go on. OUTPUT/table.md holds the last evaluation of each setting.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from qsm_rl import training as rl


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
    rl.check_cells(cells)
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
    (options.output / "table.md").write_text(rl.markdown_table(cells, table), encoding="utf-8")
    print(f"wrote {options.output / 'table.md'}")
    for failure in failures:
        print(f"failed: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    main(sys.argv[1:])
