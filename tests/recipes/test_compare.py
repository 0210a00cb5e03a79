"""The comparison: its cells, what follows from finished ones, and what is refused before anything runs."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from qsm_rl.training.grids.grid import COLUMNS
from recipes import compare

ENVS = "InvertedPendulum-v5,HalfCheetah-v5"


def run(*arguments) -> int:
    with pytest.raises(SystemExit) as ended:
        compare.main([str(argument) for argument in arguments])
    return ended.value.code


def finish(output: Path, returns: dict[tuple[str, str], list[float]], *arguments: str) -> None:
    """Writes cells.csv as if the cells had run."""
    options = compare.parse([*arguments, "--output", str(output)])
    rows = []
    for cell in compare.make_grid(options):
        if (cell.env, cell.variant) in returns:
            value = returns[cell.env, cell.variant][cell.seed]
            for frames, share in ((500, 0.5), (1000, 1.0)):
                key = (cell.env, cell.variant, cell.seed, frames)
                values = (*key, share * value, 1.0, 40.0, 60 * share, cell.settings, "", cell.recipe)
                rows.append(dict(zip(COLUMNS, values, strict=True)))
    output.mkdir()
    with (output / "cells.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


GRID = ("--algos", "sac,td3,qsm-paper", "--envs", ENVS, "--seeds", "2", "--total_frames", "1000")
RETURNS = {
    ("InvertedPendulum-v5", "sac"): [100.0, 300.0],
    ("InvertedPendulum-v5", "td3"): [50.0, 50.0],
    ("InvertedPendulum-v5", "qsm-paper"): [0.0, 100.0],
    ("HalfCheetah-v5", "sac"): [10.0, 20.0],
}


def test_results_of_finished_cells_and_what_is_missing(tmp_path, capsys):
    output = tmp_path / "out"
    finish(output, RETURNS, *GRID)
    assert run(*GRID, "--output", output, "--runs", tmp_path / "runs", "--dry_run") == 0
    out = capsys.readouterr().out
    assert "12 cells, 8 finished" in out
    assert out.count("missing: HalfCheetah-v5") == 4 and "missing: InvertedPendulum" not in out
    assert not (tmp_path / "runs").exists()

    table = (output / "table.md").read_text()
    assert "| sac | 200 | 100 to 300 | 100, 300 | 40 | 1 |" in table
    assert table.index("| sac | 200") < table.index("| td3 | 50") and "HalfCheetah-v5, 1,000 frames" in table
    assert (output / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (output / "profiles.png").read_bytes().startswith(b"\x89PNG")
    with (output / "intervals.csv").open() as file:
        values = {(row["algorithm"], row["aggregate"]): float(row["value"]) for row in csv.DictReader(file)}
    # Only InvertedPendulum is complete; its returns are divided by 200, the mean of the best.
    assert values["sac", "mean"] == pytest.approx(1.0) and values["td3", "mean"] == pytest.approx(0.25)
    assert values["qsm-paper", "optimality gap"] == pytest.approx(0.75)


def test_returns_that_are_costs_give_no_score(tmp_path, capsys):
    """They would enter the aggregates beside scores of about 1 as hundreds below 0."""
    costs = {(env, variant): [-300.0, -200.0] for env, variant in RETURNS if env == "InvertedPendulum-v5"}
    gains = {("HalfCheetah-v5", variant): [0.5, 0.5] for _, variant in costs}
    finish(tmp_path / "out", costs | gains, *GRID)
    assert run(*GRID, "--output", tmp_path / "out", "--runs", tmp_path / "runs", "--dry_run") == 0
    assert "intervals and profiles over HalfCheetah-v5\n" in capsys.readouterr().out
    with (tmp_path / "out" / "intervals.csv").open() as file:
        assert {float(row["value"]) for row in csv.DictReader(file) if row["aggregate"] == "mean"} == {1.0}


def test_one_seed_of_one_algorithm_stands_beside_the_published_numbers_nearest_in_frames(tmp_path):
    env, output = "dm_control/walker-walk", tmp_path / "out"
    given = ("--algos", "sac,td3", "--envs", env, "--seeds", "1", "--total_frames", "22000")
    finish(output, {(env, "sac"): [20.0]}, *given)
    assert run(*given, "--output", output, "--runs", tmp_path / "runs", "--dry_run") == 0
    text = (output / "table.md").read_text()
    assert text.count(f"| {env}, QSM |") == 1 and f"| {env}, QSM | 20,000 | 138 | authors' JAX code" in text
    assert "\n\n| published | frames |" in text, "a table of its own"
    assert {path.suffix for path in output.iterdir()} >= {".md", ".png"}
    assert not [*output.glob("intervals*"), *output.glob("profiles*")], "there is nothing to aggregate"


def test_published_numbers_come_with_source_and_protocol_where_the_frames_compare(tmp_path):
    assert compare.published(["dm_control/walker-walk"], 4_000) == []
    (row,) = [row for row in compare.published(["dm_control/walker-walk"], 5_000) if row["curve"].startswith("QSM")]
    assert (row["frames"], row["return_mean"]) == (10_000, 36.5)
    assert "authors' JAX code" in row["curve"] and "action repeat 1" in row["curve"]
    late = {row["curve"].split(":")[0]: row["return_mean"] for row in compare.published(["HalfCheetah-v5"], 500_000)}
    assert late == {"QSM at 1M": 3888, "SAC at 1M": 10617, "QVPO at 1M": 11386, "CGPO at 1M": 14369}


def test_cells_differ_in_the_algorithm_only(tmp_path):
    options = compare.parse([*GRID, "--hidden_dims", "64", "64", "--output", str(tmp_path)])
    cells = compare.make_grid(options)
    assert [cell.seed for cell in cells] == [0] * 6 + [1] * 6
    shared = '"actor_hidden_dims": [64, 64], "critic_hidden_dims": [64, 64], "eval_episodes": 5, "eval_every": 166, '
    assert {(cell.recipe, cell.settings) for cell in cells} == {
        ("mujoco_sac", "{" + shared + '"total_frames": 1000}'),
        ("mujoco_td3", "{" + shared + '"total_frames": 1000}'),
        ("mujoco_qsm", "{" + shared + '"preset": "paper", "total_frames": 1000}'),
    }
    assert len({cell.folder for cell in cells}) == 12
    cells = compare.make_grid(compare.parse([*GRID, "--eval_every", "9", "--output", str(tmp_path)]))
    assert {json.loads(cell.settings)["eval_every"] for cell in cells} == {9}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--algos", "sac,ppo"], ["ppo", "qsm", "td3"]),
        (["--algos", ","], ["--algos is empty"]),
        (["--envs", "Hoper-v5"], ["Hoper-v5", "did you mean Hopper-v5"]),
        (["--seeds", "0"], ["--seeds must be at least 1, got 0"]),
        (["--total_frames", "-3"], ["total_frames", "-3"]),
        (["--eval_every", "0"], ["--eval_every must be at least 1, got 0"]),
    ],
)
def test_bad_input_is_named_before_anything_runs(tmp_path, capsys, arguments, words):
    assert run(*GRID, "--output", tmp_path / "out", "--runs", tmp_path / "runs", *arguments) == 2
    message = capsys.readouterr().err
    assert all(word in message for word in words), message
    assert not list(tmp_path.iterdir())


def test_a_missing_extra_is_named_before_anything_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "rliable", None)
    assert run(*GRID, "--output", tmp_path / "out") == 2
    assert "qsm_rl[results]" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_comparison_from_a_shell(tmp_path):
    script = Path(compare.__file__)
    command = [
        *(sys.executable, script, "--algos", "sac,td3", "--envs", "InvertedPendulum-v5", "--seeds", "1"),
        *("--total_frames", "120", "--eval_episodes", "1", "--hidden_dims", "8", "--output", tmp_path / "out"),
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"cells.csv", "table.md", "curves.png"}
    again = subprocess.run([*command, "--dry_run"], cwd=tmp_path, capture_output=True, text=True)
    assert "2 cells, 2 finished" in again.stdout
