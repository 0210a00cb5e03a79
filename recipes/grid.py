"""Runs a grid of settings, tasks and seeds, and keeps finished cells.

python recipes/grid.py recipes/grids/default_setting.yaml --output docs/results/default_setting

Finished cells are recorded in OUTPUT/cells.csv and are not run again; unfinished ones continue from their last
checkpoint. Stop with Ctrl-C, and repeat the command to continue. OUTPUT/table.md holds the last evaluation of each
setting.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from qsm_rl import training as rl


def write_results(cells: Sequence[rl.Cell], table: rl.CellTable, output: Path) -> list[str]:
    """Writes the table of the finished cells; returns the names of the files."""
    (output / "table.md").write_text(rl.markdown_table(cells, table), encoding="utf-8")
    return ["table.md"]


@rl.exit_on_error
def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", type=Path, help="YAML file of the grid, see recipes/grids")
    rl.add_grid_arguments(parser, runs="runs/grid")
    options = parser.parse_args(arguments)
    rl.require_rliable()  # for the table's intervals; checked before hours of training
    cells = rl.read_grid(options.grid, options.runs)
    return rl.run_grid(cells, options, Path(__file__).parent, lambda table: write_results(cells, table, options.output))


if __name__ == "__main__":
    main(sys.argv[1:])
