"""Grids of runs: every variant of the settings on every task with every seed, each cell in its own process.

Results go to one table as cells finish, and cells in the table are not run again.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from qsm_rl.atomic_files import write_csv_atomically
from qsm_rl.training.configuration.command_line import CONFIGURATION_FILE
from qsm_rl.training.errors import UserError
from qsm_rl.training.folders import in_use
from qsm_rl.training.runs.loggers import read_metrics

__all__ = ["Cell", "CellTable", "make_cells", "read_grid", "run_cells"]

KEY = ("env", "variant", "seed")
NUMBERS = ("frames", "return_mean", "return_std", "updates_per_second", "elapsed_seconds")
COLUMNS = (*KEY, *NUMBERS, "settings", "way", "recipe")
LATER_COLUMNS = {"elapsed_seconds", "way", "recipe"}  # missing in older tables
POLL_SECONDS = 1.0
SECONDS_TO_STOP = 60.0
OWN = ("env", "seed", "run_dir", "resume")  # flags that the grid sets for each cell
OF_TASKS = ("seeds", "variants")  # entries that only a task may choose


@dataclass(frozen=True)
class Cell:
    """One run of a grid.

    Attributes:
        recipe: name of the recipe's file, without its extension.
        variant: name of the settings.
        settings: flags of the recipe as sorted JSON, without environment and seed; they identify the settings.
        env: environment id.
        seed: seed of the run.
        folder: folder of the run.
    """

    recipe: str
    variant: str
    settings: str
    env: str
    seed: int
    folder: Path

    @property
    def flags(self) -> list[str]:
        """The recipe's command line."""
        values = {"env": self.env, "seed": self.seed, **json.loads(self.settings)}
        texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}
        return [part for name, text in texts.items() for part in (f"--{name}", text)]

    @property
    def total_frames(self) -> int:
        """Frames of the run."""
        return int(json.loads(self.settings)["total_frames"])


def make_cells(
    recipe: str, variant: str, settings: dict[str, Any], env: str, seeds: Iterable[int], runs: Path
) -> list[Cell]:
    """The cells of one variant on one task, one per seed.

    Args:
        recipe: name of the recipe's file, without ending.
        variant: name of the settings.
        settings: flags of the recipe, including at least ``total_frames``.
        env: environment id.
        seeds: seeds of the cells.
        runs: folder for the runs' folders; cells with other settings get another one.
    """
    text = json.dumps(settings, sort_keys=True)
    digest = hashlib.sha256(f"{recipe} {text}".encode()).hexdigest()[:8]
    folder = runs / env.replace("/", "-") / f"{_file_name(variant)}-{digest}"
    return [Cell(recipe, variant, text, env, seed, folder / f"seed_{seed}") for seed in seeds]


def read_grid(path: Path, runs: Path) -> list[Cell]:
    """The cells of a grid file, ordered by seed, so that every variant has its first result early.

    Args:
        path: YAML file with ``recipe``, ``seeds`` (a list), ``settings`` (flags of every cell), ``tasks`` (a mapping
            from environment to its flags, with at least ``total_frames``) and ``variants`` (a mapping from name to
            flags). A variant's flags override a task's, which override the settings. A task may list the ``variants``
            that run on it, and its ``seeds``.
        runs: folder for the runs' folders; cells with other settings get another one.

    Raises:
        UserError: naming the entries that the file lacks or that do not belong there.
    """
    try:
        grid = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"the grid file {path} cannot be read: {error}") from error
    expected = {"recipe", "seeds", "settings", "tasks", "variants"}
    found = set(grid) if isinstance(grid, dict) else set()
    if found != expected:
        raise UserError(
            f"the grid file {path} needs exactly the entries {sorted(expected)}; "
            f"missing {sorted(expected - found)}, unknown {sorted(found - expected)}."
        )
    if not isinstance(grid["recipe"], str):
        raise UserError(f"{path}: recipe must be the name of a recipe, such as mujoco_qsm, got {grid['recipe']!r}.")
    cells = []
    _check_flags(path, "tasks", grid["tasks"], OWN)
    _check_flags(path, "variants", grid["variants"], (*OWN, *OF_TASKS))
    _check_flags(path, "settings", {"settings": grid["settings"]}, (*OWN, *OF_TASKS))
    for env, task in grid["tasks"].items():
        task = dict(task or {})
        variants, seeds = task.pop("variants", list(grid["variants"])), task.pop("seeds", grid["seeds"])
        if not isinstance(variants, list):
            raise UserError(f"{path}: variants of the task {env} must be a list, got {variants!r}.")
        whole = isinstance(seeds, list) and all(type(seed) is int and seed >= 0 for seed in seeds)
        if not whole or len(set(seeds)) < len(seeds):
            raise UserError(
                f"{path}: seeds must be a list of distinct integers of at least 0, such as [0, 1, 2], got {seeds!r}."
            )
        if unknown := sorted(set(variants) - set(grid["variants"])):
            raise UserError(f"{path}: the task {env} names unknown variants {unknown}.")
        for variant in variants:
            settings = {**(grid["settings"] or {}), **task, **(grid["variants"][variant] or {})}
            if "total_frames" not in settings:
                raise UserError(f"{path}: the task {env} needs total_frames.")
            cells += make_cells(grid["recipe"], variant, settings, env, seeds, runs)
    return sorted(cells, key=lambda cell: cell.seed)


def _check_flags(path: Path, name: str, entries: Any, refused: Sequence[str]) -> None:
    if not isinstance(entries, dict) or not all(isinstance(flags or {}, dict) for flags in entries.values()):
        raise UserError(f"{path}: {name} must contain flags with their values, such as {{tau: 0.1}}.")
    for entry, flags in entries.items():
        if not isinstance(entry, str):  # a number, or one of YAML's words for true and false
            raise UserError(f"{path}: YAML does not read the name {entry!r} in {name} as text; put it in quotes.")
        if found := sorted({*(flags or {})} & {*refused}):
            raise UserError(f"{path}: {entry} sets {', '.join(found)}, which the grid sets for each cell; remove it.")
        if "config" in (flags or {}):  # flags identify a cell: finished ones would miss changes of the file
            raise UserError(f"{path}: {entry} takes settings from a file (config); write them into the grid instead.")


class CellTable:
    """The evaluations of finished cells as a CSV file, one row each; written completely and atomically.

    The column ``way`` is empty for the sampling policy. Otherwise it names an additional way of acting, such as
    ``best_of_16``.

    Args:
        path: the file; created when the first cell finishes.

    Raises:
        UserError: if the file is not such a table.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, str]] = []
        if path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                reader = csv.DictReader(file)
                found = set(reader.fieldnames or ())
                if not set(COLUMNS) - LATER_COLUMNS <= found <= set(COLUMNS):
                    raise UserError(f"{path} is not a table of cells, expected the columns {', '.join(COLUMNS)}.")
                self.rows = [{name: row.get(name, "") for name in COLUMNS} for row in reader]

    def rows_of(self, cell: Cell, way: str = "") -> list[dict[str, str]]:
        """The rows of a cell and a way of acting; empty if the cell has not finished with these settings."""
        key = (cell.env, cell.variant, str(cell.seed), cell.settings, way)
        names, recipes = (*KEY, "settings", "way"), ("", cell.recipe)
        return [row for row in self.rows if row["recipe"] in recipes and tuple(row[name] for name in names) == key]

    def add(self, cell: Cell) -> None:
        """Adds the results of a finished run, replacing those of the same cell with other settings."""
        columns = read_metrics(cell.folder / "metrics.csv")
        rates = [rate for rate in columns["time/updates_per_second"] if rate > 0]
        rate = f"{statistics.median_high(rates):.1f}" if rates else ""
        key = (cell.env, cell.variant, str(cell.seed))
        self.rows = [row for row in self.rows if tuple(row[name] for name in KEY) != key]
        clock = _total_elapsed(columns.get("time/elapsed_seconds", []), len(columns["frames"]))
        prefixes = [found[1] for name in columns if (found := re.fullmatch(r"eval/((?:\w+/)?)return_mean", name))]
        for prefix in prefixes:
            means, stds = (columns[f"eval/{prefix}return_{name}"] for name in ("mean", "std"))
            for frames, mean, std, elapsed in zip(columns["frames"], means, stds, clock, strict=True):
                if mean == mean:  # rows without an evaluation hold NaN
                    numbers = (str(int(frames)), f"{mean:.2f}", f"{std:.2f}", rate, elapsed)
                    values = (*key, *numbers, cell.settings, prefix.removesuffix("/"), cell.recipe)
                    self.rows.append(dict(zip(COLUMNS, values, strict=True)))
        self.rows.sort(key=lambda row: (row["env"], row["variant"], int(row["seed"]), row["way"], int(row["frames"])))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_csv_atomically(self.path, COLUMNS, self.rows)


def run_cells(cells: Sequence[Cell], table: CellTable, recipes: Path, *, workers: int) -> list[str]:
    """Runs the cells that the table lacks, ``workers`` at a time, each with one thread.

    An interrupted cell continues from its last checkpoint. Ctrl-C, SIGTERM and SIGHUP stop every cell after its current
    step.

    Args:
        cells: the cells to run, in order.
        table: receives the results.
        recipes: folder of the recipes.
        workers: processes at a time.

    Returns:
        One line for each cell that failed, with the end of its log.

    Raises:
        KeyboardInterrupt: after a requested stop.
    """
    waiting = [cell for cell in cells if not table.rows_of(cell)]
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    running: dict[int, tuple[Cell, subprocess.Popen[bytes]]] = {}
    failures: list[str] = []
    done = sum(cell.total_frames for cell in cells) - sum(cell.total_frames for cell in waiting)
    # Closing the terminal (SIGHUP) would also end this process, while the cells, in separate sessions, would live on.
    numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]
    previous = {number: signal.signal(number, signal.default_int_handler) for number in numbers}
    bar = tqdm(total=sum(cell.total_frames for cell in cells), initial=done, unit=" frames", dynamic_ncols=True)
    try:
        while waiting or running:
            for worker in range(workers):
                if worker not in running and waiting:
                    cell = waiting.pop(0)
                    if _finished(cell):  # by a grid that was killed before it added the results
                        table.add(cell)
                        done += cell.total_frames
                        continue
                    if in_use(cell.folder / CONFIGURATION_FILE):  # cells outlive a killed grid
                        failures.append(
                            f"{_name(cell)}: another process is running it in {cell.folder}; wait for that process, or "
                            "stop it"
                        )
                        done += cell.total_frames
                        continue
                    process = _start(cell, recipes)
                    # One core per cell if this grid uses all cores: migrating between them costs a tenth. With fewer
                    # workers, another grid may run at the same time and would take the same cores.
                    if workers == len(cores):
                        os.sched_setaffinity(process.pid, {cores[worker]})
                    running[worker] = cell, process
            time.sleep(POLL_SECONDS)
            for worker, (cell, process) in list(running.items()):
                if process.poll() is not None:
                    del running[worker]
                    if process.returncode == 0:
                        table.add(cell)
                    else:
                        failures.append(f"{_name(cell)}: {_last_line(cell)}")
                    done += cell.total_frames
            bar.n = done + sum(_frames(cell.folder) for cell, _ in running.values())
            bar.set_description(f"{len(waiting) + len(running)} of {len(cells)} cells left", refresh=True)
    except BaseException:
        _stop(process for _, process in running.values())
        raise
    finally:
        bar.close()
        for number, handler in previous.items():
            signal.signal(number, handler)
    return failures


def _start(cell: Cell, recipes: Path) -> subprocess.Popen[bytes]:
    folder = cell.folder
    script = recipes / f"{cell.recipe}.py"
    if any((folder / "checkpoints").glob("*.pt")):
        arguments = ["--resume", str(folder)]
    else:
        shutil.rmtree(folder, ignore_errors=True)  # it holds nothing to continue from
        arguments = [*cell.flags, "--run_dir", str(folder)]
    folder.parent.mkdir(parents=True, exist_ok=True)
    # One thread each: PyTorch's threads spin while they wait and take cores from the other cells.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with _log(folder).open("ab") as log:
        return subprocess.Popen(
            [sys.executable, str(script), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches only the grid, which then stops its cells
        )


def _stop(processes: Iterable[subprocess.Popen[bytes]]) -> None:
    processes = list(processes)
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(SECONDS_TO_STOP)
        except subprocess.TimeoutExpired:
            process.kill()


def _frames(folder: Path) -> int:
    """Frames that a run has logged so far."""
    try:
        columns = read_metrics(folder / "metrics.csv")
    except (OSError, ValueError):
        return 0  # not begun yet, or being written
    return int(max(columns.get("frames", [0]), default=0))


def _finished(cell: Cell) -> bool:
    """Whether the run ended with an evaluation, at its last frame or at the return that stops it."""
    metrics = cell.folder / "metrics.csv"
    if not (cell.folder / "actor" / "config.json").exists() or not metrics.exists():
        return False
    columns, target = read_metrics(metrics), json.loads(cell.settings).get("stop_at_return")
    target = math.inf if target is None else target
    evaluations = zip(columns["frames"], columns.get("eval/return_mean", []), strict=False)
    return any(value >= target or (frame >= cell.total_frames and value == value) for frame, value in evaluations)


def _total_elapsed(clock: Sequence[float], count: int) -> list[str]:
    """Seconds of training up to each row of the log; an early version restarted the clock when a run was resumed."""
    before, last, total = 0.0, 0.0, []
    for now in clock:
        before += last if now < last else 0.0
        last = now
        total.append(f"{before + now:.0f}")
    return total or [""] * count


def _name(cell: Cell) -> str:
    return f"{cell.env}, {cell.variant}, seed {cell.seed}"


def _log(folder: Path) -> Path:
    return folder.with_name(folder.name + ".log")


def _last_line(cell: Cell) -> str:
    path = _log(cell.folder)
    lines = path.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").strip().splitlines()
    return f"{lines[-1] if lines else 'no output'} (see {path})"


def _file_name(text: str) -> str:
    return "".join(character if character.isalnum() or character in "._-" else "_" for character in text)
