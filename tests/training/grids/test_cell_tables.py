from __future__ import annotations

import pytest

from qsm_rl.training import CellTable, final_rows, make_cells, markdown_table
from qsm_rl.training.grids.grid import COLUMNS


@pytest.fixture
def grid(tmp_path):
    """Cells of two variants with two seeds each, and an empty table."""
    cells = [
        cell
        for name in ("slow", "fast")
        for cell in make_cells("fake", name, {"total_frames": 9}, "A-v0", [0, 1], tmp_path)
    ]
    return cells, CellTable(tmp_path / "cells.csv")


def add(table, cell, frames, value, rate="40.0", elapsed="90", way=""):
    key = (cell.env, cell.variant, str(cell.seed), str(frames), str(value), "0.0", rate, elapsed)
    table.rows.append(dict(zip(COLUMNS, (*key, cell.settings, way, cell.recipe), strict=True)))


def test_the_best_variant_comes_first_with_its_last_evaluations(grid):
    cells, table = grid
    add(table, cells[0], 500, 99.0)
    add(table, cells[0], 1000, 1.0)
    add(table, cells[1], 1000, 3.0, rate="", elapsed="30")
    add(table, cells[2], 500, 7.0, rate="", elapsed="")  # as an early version wrote it
    add(table, cells[2], 500, 20.0, way="best_of_4")
    assert markdown_table(cells, table).splitlines() == [
        "**A-v0, 500 and 1,000 frames**",
        "",
        "| setting | mean return | 95 % interval | seeds | updates/s | minutes |",
        "|---|---|---|---|---|---|",
        "| fast, best_of_4 | 20 | one seed | 20 | 40 | 2 |",
        "| fast | 7 | one seed | 7 |  |  |",
        "| slow | 2 | 1 to 3 | 1, 3 | 40 | 1 |",
    ]


def test_a_task_s_table_ends_before_the_next_one_s_heading(grid, tmp_path):
    """Markdown would take the heading for a row."""
    cells, table = grid
    cells += make_cells("fake", "slow", {"total_frames": 9}, "B-v0", [0], tmp_path)
    for cell in (cells[0], cells[-1]):
        add(table, cell, 9, 1.0)
    assert "\n\n**B-v0, 9 frames**\n\n| setting |" in markdown_table(cells, table)


def test_a_grid_without_a_finished_cell_has_no_table(grid):
    cells, table = grid
    assert final_rows(cells, table) == {} and markdown_table(cells, table) == ""
