"""The time to a given return: what follows from finished cells, and two real runs."""

from __future__ import annotations

import csv

import pytest

from qsm_rl import training as rl
from qsm_rl.training.grids.grid import COLUMNS
from recipes import time_to_return


def run(*arguments) -> int:
    with pytest.raises(SystemExit) as ended:
        time_to_return.main([str(argument) for argument in arguments])
    return ended.value.code


def test_seconds_are_those_of_the_first_evaluation_that_is_good_enough():
    rows = [
        {"elapsed_seconds": seconds, "return_mean": value}
        for seconds, value in (("10", "-900"), ("20", "-150"), ("30", "-1"))
    ]
    assert time_to_return.seconds_to(-200.0, rows) == 20
    assert time_to_return.seconds_to(0.0, rows) is None


def test_table_names_each_run_and_those_that_did_not_get_there(tmp_path):
    arguments = ["--steps", "2", "5", "--seeds", "2", "--output", str(tmp_path), "--runs", str(tmp_path / "runs")]
    options = time_to_return.parse(arguments)
    cells = time_to_return.make_grid(options)
    rl.check_cells(cells)
    assert len(cells) == 8
    with (tmp_path / "cells.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for cell in cells:
            if cell.variant.startswith("Q-score"):
                value = -100.0 if cell.seed == 0 else -300.0
                values = (cell.env, cell.variant, cell.seed, 1500, value, 1.0, 80.0, 33, cell.settings, "", cell.recipe)
                writer.writerow(dict(zip(COLUMNS, values, strict=True)))
    time_to_return.write_results(cells, rl.CellTable(tmp_path / "cells.csv"), options)
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert lines[2:] == [
        "| 2 | Q-score matching | 33, not reached | 1,500, 1,500 | 80 |",
        "| 5 | Q-score matching | 33, not reached | 1,500, 1,500 | 80 |",
    ]
    assert (tmp_path / "time_to_return.png").stat().st_size > 5_000
    options.value = 0.0  # which none reached
    assert time_to_return.write_results(cells, rl.CellTable(tmp_path / "cells.csv"), options) == ["table.md"]
    assert "not reached, not reached" in (tmp_path / "table.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--steps", "0"], "--steps must be at least 1 each, got 0"),
        (["--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["--env", "Nowhere-v0"], "Nowhere"),
    ],
)
def test_bad_values_are_named_before_anything_runs(tmp_path, capsys, arguments, words):
    assert run(*arguments, "--output", tmp_path / "out", "--runs", tmp_path / "runs") == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_both_algorithms_run_to_their_end_and_are_kept(tmp_path):
    arguments = ["--steps", "2", "--seeds", "1", "--total_frames", "600", "--value", "-5000"]
    arguments += ["--output", tmp_path / "out", "--runs", tmp_path / "runs", "--workers", "2"]
    assert run(*arguments) == 0
    table = rl.CellTable(tmp_path / "out" / "cells.csv")
    assert [int(row["frames"]) for row in table.rows] == [500, 500]  # stopped by the first evaluation
    assert run(*arguments) == 0
    assert "not reached" not in (tmp_path / "out" / "table.md").read_text()
