"""The command line around a grid, with a recipe that writes what a real one would."""

from __future__ import annotations

import argparse
import fcntl
import os

import pytest

from qsm_rl.training import UserError, add_grid_arguments, make_cells, run_grid
from tests.training.grids.test_grid import FAKE

SETTINGS = {"total_frames": 20, "tau": 0.2, "warmup_frames": 2}


def make_grid(folder, env: str = "Pendulum-v1"):
    return make_cells("mujoco_td3", "td3", SETTINGS, env, (0, 1), folder / "runs")


def run(folder, *arguments: str, env: str = "Pendulum-v1") -> int:
    parser = argparse.ArgumentParser()
    add_grid_arguments(parser, runs="runs/here")
    output = folder / "out"
    options = parser.parse_args(["--output", str(output), "--runs", str(folder / "runs"), *arguments])

    def write_results(table) -> list[str]:
        (output / "finals").write_text(" ".join(row["return_mean"] for row in table.rows if row["frames"] == "20"))
        return ["finals", "more"]

    (folder / "mujoco_td3.py").write_text(FAKE)
    return run_grid(make_grid(folder, env), options, folder, write_results)


def test_cells_run_once_and_their_results_are_written(tmp_path, capsys):
    assert run(tmp_path) == 0
    out = capsys.readouterr().out
    assert "2 cells, 0 finished" in out and f"wrote finals, more to {tmp_path / 'out'}" in out
    assert (tmp_path / "out" / "finals").read_text() == "20.00 20.00"  # a hundred times tau
    assert run(tmp_path) == 0
    assert "2 cells, 2 finished" in capsys.readouterr().out
    assert len((tmp_path / "calls").read_text().splitlines()) == 2


def test_a_dry_run_names_the_missing_and_writes_results_without_running(tmp_path, capsys):
    assert run(tmp_path, "--dry_run") == 0
    out = capsys.readouterr().out
    assert "missing: Pendulum-v1, td3, seed 1" in out and "wrote nothing" in out
    assert not (tmp_path / "out" / "finals").exists() and not (tmp_path / "calls").exists()
    assert run(tmp_path) == 0
    (tmp_path / "out" / "finals").unlink()
    assert run(tmp_path, "--dry_run") == 0
    assert (tmp_path / "out" / "finals").exists()
    assert len((tmp_path / "calls").read_text().splitlines()) == 2


def test_two_grids_do_not_share_a_folder(tmp_path):
    (tmp_path / "out").mkdir()
    descriptor = os.open(tmp_path / "out", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(UserError, match="out is in use by another process"):
        run(tmp_path)
    os.close(descriptor)
    assert run(tmp_path) == 0


def test_a_failed_cell_is_named_and_the_others_are_kept(tmp_path, capsys):
    (tmp_path / "fail").write_text("1")
    assert run(tmp_path) == 1
    assert "failed: Pendulum-v1, td3, seed 1: it broke" in capsys.readouterr().err
    assert (tmp_path / "out" / "finals").read_text() == "20.00"


@pytest.mark.parametrize(
    ("arguments", "env", "words"),
    [(["--workers", "0"], "Pendulum-v1", "--workers must be at least 1, got 0"), ([], "Pendulm-v1", "Pendulm-v1")],
)
def test_mistakes_are_named_before_anything_is_written(tmp_path, arguments, env, words):
    with pytest.raises(UserError, match=words):
        run(tmp_path, *arguments, env=env)
    assert {path.name for path in tmp_path.iterdir()} == {"mujoco_td3.py"}
