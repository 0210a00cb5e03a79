from __future__ import annotations

import csv
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import pytest

from qsm_rl.training import Cell, CellTable, UserError, final_rows, make_cells, mean_interval, read_grid, run_cells
from qsm_rl.training.grids import grid as grid_module

GRID = """
recipe: fake
seeds: [0, 1]
settings: {total_frames: 20, tau: 0.1, widths: [4, 4]}
tasks:
  A-v0: {tau: 0.2}
  dm_control/b-c: {total_frames: 30, variants: [plain], seeds: [7]}
variants:
  plain: {}
  slow tau: {tau: 0.3}
"""

# Writes what a recipe writes; fails on the seed named in `fail`, waits for a signal on the seed named in `wait`.
FAKE = """
import csv, json, sys, time
from pathlib import Path

flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
here = Path(__file__).parent
with (here / "calls").open("a") as file:
    file.write(json.dumps(flags) + "\\n")
folder = Path(flags.get("--resume") or flags["--run_dir"])
(folder / "checkpoints").mkdir(parents=True, exist_ok=True)
if "--resume" in flags:
    flags = json.loads((folder / "flags").read_text())
(folder / "flags").write_text(json.dumps(flags))
(folder / "checkpoints" / "frames-10.pt").touch()
for kind in ("fail", "wait"):
    path = here / kind
    if path.exists() and path.read_text() == flags["--seed"]:
        print("it broke", flush=True)
        if kind == "fail":
            sys.exit(1)
        time.sleep(60)
frames = int(flags["--total_frames"])
with (folder / "metrics.csv").open("w") as file:
    file.write("frames,eval/return_mean,eval/return_std,time/updates_per_second,time/elapsed_seconds\\n")
    # Resumed in between: the clock begins anew.
    file.write(f"5,,,0,7\\n{frames // 2},1,0.5,40,3\\n{frames},{100 * float(flags['--tau'])},0.25,50,9\\n")
"""


EVALUATIONS = "frames,eval/return_mean,eval/return_std,time/updates_per_second,time/elapsed_seconds"


@pytest.fixture
def grid(tmp_path, monkeypatch):
    monkeypatch.setattr(grid_module, "POLL_SECONDS", 0.1)
    (tmp_path / "grid.yaml").write_text(GRID)
    (tmp_path / "fake.py").write_text(FAKE)
    return tmp_path


def run(folder: Path) -> list[str]:
    table = CellTable(folder / "cells.csv")
    return run_cells(read_grid(folder / "grid.yaml", folder / "runs"), table, folder, workers=2)


def publish(cell: Cell, metrics: str) -> None:
    """What a run leaves that has published its actor."""
    (cell.folder / "actor").mkdir(parents=True)
    (cell.folder / "actor" / "config.json").write_text("{}")
    (cell.folder / "metrics.csv").write_text(metrics)


def calls(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / "calls").read_text().splitlines()]


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "cells.csv").open() as file:
        return list(csv.DictReader(file))


def test_cells_come_seed_by_seed_with_the_nearest_setting_winning(grid):
    cells = read_grid(grid / "grid.yaml", grid)
    assert [(cell.env, cell.variant, cell.seed) for cell in cells] == [
        ("A-v0", "plain", 0),
        ("A-v0", "slow tau", 0),
        ("A-v0", "plain", 1),
        ("A-v0", "slow tau", 1),
        ("dm_control/b-c", "plain", 7),
    ]
    assert [json.loads(cell.settings)["tau"] for cell in cells] == [0.2, 0.3, 0.2, 0.3, 0.1]
    assert cells[0].flags == [
        *("--env", "A-v0", "--seed", "0", "--tau", "0.2", "--total_frames", "20", "--widths", "[4, 4]"),
    ]
    assert len({cell.folder for cell in cells}) == 5
    (cell,) = make_cells("fake", "../tau 1/2", {"total_frames": 20}, "dm_control/b-c", [7], grid)
    env, variant, seed = cell.folder.relative_to(grid).parts
    assert (env, variant[:-8], seed) == ("dm_control-b-c", ".._tau_1_2-", "seed_7")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("seeds: [0, 1]\n", "seed: 0\n", ["missing ['seeds']", "unknown ['seed']"]),
        ("variants: [plain]", "variants: [fast]", ["dm_control/b-c", "fast"]),
        ("variants: [plain]", "variants: plain", ["dm_control/b-c must be a list", "'plain'"]),
        ("total_frames: 20, ", "", ["A-v0", "total_frames"]),
        ("recipe: fake", "recipe: [", ["cannot be read"]),
        ("recipe: fake", "recipe: [fake]", ["recipe must be the name of a recipe", "['fake']"]),
        ("seeds: [0, 1]", "seeds: [0.5, 1]", ["seeds must be a list", "[0.5, 1]"]),
        ("seeds: [0, 1]", "seeds: [-1, 1]", ["seeds must be a list", "[-1, 1]"]),
        ("{tau: 0.3}", "{config: mine.yaml}", ["slow tau", "a file (config)", "write them into the grid"]),
        ("plain:", "off:", ["the name False in variants", "in quotes"]),
    ],
)
def test_a_wrong_grid_file_is_named(grid, old, new, words):
    path = grid / "grid.yaml"
    path.write_text(GRID.replace(old, new))
    with pytest.raises(UserError) as caught:
        read_grid(path, grid)
    assert all(word in str(caught.value) for word in words), caught.value


def test_finished_cells_are_kept_and_changed_ones_run_again(grid):
    assert run(grid) == []
    assert len(calls(grid)) == 5
    finals = {(row["env"], row["variant"], row["seed"]): row for row in rows(grid)}
    assert len(rows(grid)) == 10  # two evaluations each; the row without one is left out
    assert finals["A-v0", "slow tau", "1"] == {
        **{"env": "A-v0", "variant": "slow tau", "seed": "1", "frames": "20", "updates_per_second": "50.0"},
        **{"return_mean": "30.00", "return_std": "0.25", "elapsed_seconds": "16"},
        "settings": '{"tau": 0.3, "total_frames": 20, "widths": [4, 4]}',
        **{"way": "", "recipe": "fake"},
    }
    run(grid)
    assert len(calls(grid)) == 5

    (grid / "grid.yaml").write_text(GRID.replace("tau: 0.3", "tau: 0.4"))
    run(grid)
    assert [call["--tau"] for call in calls(grid)[5:]] == ["0.4", "0.4"]
    assert len(rows(grid)) == 10
    assert {row["return_mean"] for row in rows(grid) if row["variant"] == "slow tau"} == {"1.00", "40.00"}


def test_a_failed_cell_is_reported_and_goes_on_from_its_checkpoint(grid):
    (grid / "fail").write_text("1")
    failures = run(grid)
    assert sorted(line.split(": ")[0] for line in failures) == ["A-v0, plain, seed 1", "A-v0, slow tau, seed 1"]
    assert all("it broke" in line for line in failures)
    assert {row["seed"] for row in rows(grid)} == {"0", "7"}
    (grid / "fail").unlink()
    assert run(grid) == []
    assert sorted("--resume" in call for call in calls(grid)) == [False] * 5 + [True] * 2
    assert {row["seed"] for row in rows(grid)} == {"0", "1", "7"}


@pytest.mark.parametrize(
    ("program", "told"),
    [
        ("import os; print(os.environ['OMP_NUM_THREADS'], os.getsid(0) == os.getpid(), [*sys.stdin])", "1 True []"),
        ("print('first\\n 10 %\\r20 %', end='', file=sys.stderr)", "20 %"),
        ("pass", "no output"),
    ],
)
def test_cells_have_one_thread_a_session_and_a_log_whose_last_line_is_told(grid, program, told):
    (grid / "fake.py").write_text(f"import sys\n{program}\nsys.exit(1)\n")
    (cell,) = make_cells("fake", "v", {"total_frames": 20}, "A-v0", [0], grid / "runs")
    (failure,) = run_cells([cell], CellTable(grid / "cells.csv"), grid, workers=1)
    assert failure == f"A-v0, v, seed 0: {told} (see {cell.folder}.log)"


def test_signals_are_handled_as_before_once_the_cells_are_done_and_nohup_s_not_at_all(grid, monkeypatch):
    numbers, during = (signal.SIGTERM, signal.SIGHUP), []
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda s: sleep(s) or during.append([signal.getsignal(n) for n in numbers]))
    given = [signal.signal(number, handler) for number, handler in zip(numbers, (print, signal.SIG_IGN), strict=True)]
    try:
        run(grid)
        assert [signal.getsignal(number) for number in numbers] == [print, signal.SIG_IGN]
    finally:
        for number, handler in zip(numbers, given, strict=True):
            signal.signal(number, handler)
    assert during[0] == [signal.default_int_handler, signal.SIG_IGN]


def test_a_cell_that_does_not_stop_is_killed(monkeypatch):
    monkeypatch.setattr(grid_module, "SECONDS_TO_STOP", 0.2)
    program = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as deaf:
        assert deaf.stdout.readline()
        grid_module._stop([deaf])
        assert deaf.wait(20) == -signal.SIGKILL


def test_a_signal_stops_the_cells_and_the_next_call_goes_on(grid):
    (grid / "wait").write_text("0")
    program = textwrap.dedent(f"""
        from pathlib import Path
        from tests.training.grids.test_grid import run
        run(Path({str(grid)!r}))
    """)
    with subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while not (grid / "calls").exists() or len(calls(grid)) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        begin = time.monotonic()
        process.send_signal(signal.SIGTERM)
        process.wait(30)
    assert time.monotonic() - begin < 20, "the cells were waited for instead of stopped"
    assert process.returncode != 0
    (grid / "wait").unlink()
    assert run(grid) == []
    assert len(rows(grid)) == 10


def test_a_finished_run_that_a_killed_grid_left_behind_is_taken_over(grid):
    run(grid)
    table, before = grid / "cells.csv", rows(grid)
    table.unlink()
    for cell in read_grid(grid / "grid.yaml", grid / "runs"):
        (cell.folder / "actor").mkdir()
        (cell.folder / "actor" / "config.json").write_text("{}")
    assert run(grid) == []
    assert len(calls(grid)) == 5 and rows(grid) == before


@pytest.mark.parametrize("metrics", ["frames,train/q_value\n10,1\n20,2\n", f"{EVALUATIONS}\n10,4,0,9,1\n20,,,9,2\n"])
def test_a_run_that_was_stopped_in_its_last_evaluation_goes_on(grid, metrics):
    """It wrote its last row, without the evaluation, and published its actor."""
    (cell,) = make_cells("fake", "v", {"total_frames": 20, "tau": 0.1}, "A-v0", [0], grid / "runs")
    publish(cell, metrics)
    table = CellTable(grid / "cells.csv")
    assert run_cells([cell], table, grid, workers=1) == []
    assert [(row["frames"], row["return_mean"]) for row in table.rows] == [("10", "1.00"), ("20", "10.00")]


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="processes cannot be bound to cores here")
def test_cells_are_bound_to_cores_only_where_the_grid_has_all_of_them(grid, monkeypatch):
    bound = []
    monkeypatch.setattr(os, "sched_setaffinity", lambda process, cores: bound.append(cores))
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 5})
    cells = make_cells("fake", "v", {"total_frames": 20, "tau": 0.1}, "A-v0", [0, 1, 2], grid / "runs")
    run_cells(cells[:1], CellTable(grid / "cells.csv"), grid, workers=1)
    assert bound == []
    run_cells(cells, CellTable(grid / "cells.csv"), grid, workers=2)
    assert bound == [{3}, {5}]


def test_ways_of_acting_are_rows_of_their_own(grid):
    cell = make_cells("fake", "best", {"total_frames": 20}, "A-v0", [0], grid / "runs")[0]
    cell.folder.mkdir(parents=True)
    header = EVALUATIONS.replace("time", "eval/best_of_4/return_mean,eval/best_of_4/return_std,time", 1)
    (cell.folder / "metrics.csv").write_text(f"{header}\n10,1,0,3,0.5,40,5\n20,2,0,4,0.5,40,9\n")
    table = CellTable(grid / "cells.csv")
    table.add(cell)
    table = CellTable(grid / "cells.csv")
    assert [row["return_mean"] for row in table.rows_of(cell)] == ["1.00", "2.00"]
    assert [row["return_mean"] for row in table.rows_of(cell, "best_of_4")] == ["3.00", "4.00"]
    finals = final_rows([cell], table)["A-v0"]
    assert {name: row["return_mean"] for name, (row,) in finals.items()} == {"best": "2.00", "best, best_of_4": "4.00"}
    table.add(cell)
    assert len(table.rows) == 4


def test_cells_of_another_recipe_are_none_of_these(grid):
    run(grid)
    table = CellTable(grid / "cells.csv")
    cells = read_grid(grid / "grid.yaml", grid / "runs")
    assert all(table.rows_of(cell) for cell in cells)
    assert not any(table.rows_of(replace(cell, recipe="other")) for cell in cells)


@pytest.mark.parametrize("later", ["elapsed_seconds", "way", "recipe"])
def test_a_table_from_before_a_column_was_kept_is_read(grid, later):
    run(grid)
    lines = (grid / "cells.csv").read_text().splitlines()
    position = lines[0].split(",").index(later)
    with (grid / "cells.csv").open(newline="") as file:
        old = [row[:position] + row[position + 1 :] for row in csv.reader(file)]
    with (grid / "cells.csv").open("w", newline="") as file:
        csv.writer(file).writerows(old)
    assert {row[later] for row in CellTable(grid / "cells.csv").rows} == {""}
    run(grid)
    assert len(calls(grid)) == 5


def test_a_file_of_another_kind_is_not_written_over(tmp_path):
    path = tmp_path / "cells.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="is not a table of cells"):
        CellTable(path)
    assert path.read_text() == "a,b\n1,2\n"


def test_interval_of_the_mean_by_hand():
    """Of two seeds the bootstrap means are 0, 5 and 10 with shares 1/4, 1/2, 1/4: the interval holds both ends."""
    assert mean_interval([[0.0], [10.0]]) == (5.0, 0.0, 10.0)
    mean, low, high = mean_interval([[float(k % 2)] for k in range(100)])
    assert mean == 0.5
    # standard error sqrt(0.25 / 100) = 0.05
    assert low == pytest.approx(0.5 - 1.96 * 0.05, abs=0.02)
    assert high == pytest.approx(0.5 + 1.96 * 0.05, abs=0.02)


def test_a_finished_run_without_a_return_to_stop_at_is_taken_over(grid):
    """As --seeds writes its settings, every one of them."""
    (cell,) = make_cells(
        "fake", "v", {"total_frames": 20, "tau": 0.1, "stop_at_return": None}, "A-v0", [0], grid / "runs"
    )
    publish(cell, f"{EVALUATIONS}\n10,4,0,9,1\n20,6,0,9,2\n")
    table = CellTable(grid / "cells.csv")
    assert run_cells([cell], table, grid, workers=1) == []
    assert table.rows[-1]["return_mean"] == "6.00" and not (grid / "calls").exists()


def test_a_cell_that_another_process_runs_is_left_alone(grid):
    """One of a grid that was killed, say, whose cells live on."""
    (cell,) = make_cells("fake", "v", {"total_frames": 20, "tau": 0.1}, "A-v0", [0], grid / "runs")
    cell.folder.mkdir(parents=True)
    (cell.folder / "config.yaml").write_text("")
    with (cell.folder / "config.yaml").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        (failure,) = run_cells([cell], CellTable(grid / "cells.csv"), grid, workers=1)
    assert "another process is running it" in failure and (cell.folder / "config.yaml").exists()
    assert run_cells([cell], CellTable(grid / "cells.csv"), grid, workers=1) == []


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("A-v0: {tau: 0.2}", "A-v0: {seed: 3}", "A-v0 sets seed, which the grid sets"),
        ("settings: {", "settings: {seed: 3, ", "settings sets seed, which the grid sets"),
        ("slow tau: {tau: 0.3}", "slow tau: {env: B-v0, seeds: 2}", "slow tau sets env, seeds"),
        ("slow tau: {tau: 0.3}", "slow tau: [tau]", "variants must contain flags"),
        ("A-v0: {tau: 0.2}", "A-v0: 7", "tasks must contain flags"),
        ("seeds: [0, 1]", "seeds: [0, 0]", "distinct integers"),
    ],
)
def test_what_would_mislabel_cells_is_refused(grid, old, new, words):
    path = grid / "grid.yaml"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(UserError, match=words):
        read_grid(path, grid / "runs")


def test_a_run_that_stopped_at_its_return_counts_as_finished(tmp_path):
    cell = make_cells("fake", "v", {"total_frames": 600, "stop_at_return": 5}, "A-v0", [0], tmp_path)[0]
    publish(cell, f"{EVALUATIONS}\n100,4,0,9,1\n200,6,0,9,2\n")
    table = CellTable(tmp_path / "cells.csv")
    assert run_cells([cell], table, tmp_path, workers=1) == []
    assert [row["return_mean"] for row in table.rows] == ["4.00", "6.00"]


def test_the_frames_so_far_are_none_of_a_cell_that_has_only_begun(tmp_path):
    path = tmp_path / "metrics.csv"
    assert grid_module._frames(tmp_path) == 0
    for row, frames in (("", 0), ("10,4,0,9,1\n", 10)):
        path.write_text(f"{EVALUATIONS}\n{row}")
        assert grid_module._frames(tmp_path) == frames


def test_a_grid_whose_seeds_are_a_number_is_refused(grid):
    path = grid / "grid.yaml"
    path.write_text(re.sub("^seeds: .*$", "seeds: 3", path.read_text(), flags=re.MULTILINE))
    with pytest.raises(UserError, match="seeds must be a list"):
        read_grid(path, grid / "runs")
