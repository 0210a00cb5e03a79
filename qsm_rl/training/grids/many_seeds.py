"""Many seeds at once: independent runs of one recipe, each in its own process."""

from __future__ import annotations

import json
import shlex
import sys
import time
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from qsm_rl.atomic_files import write_atomically
from qsm_rl.training.configuration.command_line import NOT_SAVED
from qsm_rl.training.configuration.hardware import available_cores, choose_device
from qsm_rl.training.configuration.training_configuration import TrainingConfiguration
from qsm_rl.training.errors import UserError
from qsm_rl.training.folders import exclusive, make_folder
from qsm_rl.training.grids.grid import Cell, CellTable, run_cells
from qsm_rl.training.grids.statistics import mean_interval
from qsm_rl.training.runs.training_run import checked_environment

__all__ = ["run_seeds"]


def run_seeds(config: TrainingConfiguration, script: Path) -> int:
    """Runs a recipe with ``config.seeds`` seeds, as many at a time as there are cores, and prints a summary.

    An interrupted run continues from its last checkpoint, and a finished one is kept, so after a stop the same command
    with the same ``run_dir`` continues. ``run_dir/cells.csv`` holds every evaluation.

    Args:
        config: the settings; ``seed`` is the first seed.
        script: the recipe's file.

    Returns:
        The exit code: 1 if a run failed, else 0.

    Raises:
        UserError: if ``run_dir`` holds something else or runs with other settings, if ``resume`` names a single run, or
            if there is no such device, logger or environment.
    """
    if config.resume is not None:
        raise UserError(
            f"{config.resume} is a single run, but its config.yaml has seeds: {config.seeds}; set it back to 1. To "
            "continue several seeds, repeat the command that started them, with their folder as --run_dir."
        )
    default = Path("runs") / script.stem / config.env / f"{time.strftime('%Y%m%d-%H%M%S')}-{config.seeds}-seeds"
    folder = default if config.run_dir is None else Path(config.run_dir)
    left_out = {*NOT_SAVED, "env", "seed", "seeds"}
    settings = {name: value for name, value in asdict(config).items() if name not in left_out}
    text = json.dumps(settings, sort_keys=True)
    # Errors that every run would report, raised once and before there is a folder.
    choose_device(config.device)
    checked_environment(config, num_envs=1)[1].close()
    _claim(folder, {"recipe": script.stem, "env": config.env, **json.loads(text)})
    cells = [
        Cell(script.stem, config.preset, text, config.env, seed, folder / f"seed_{seed}")
        for seed in range(config.seed, config.seed + config.seeds)
    ]
    workers = min(available_cores(), len(cells))
    print(f"{len(cells)} seeds, {workers} at a time; runs in {folder}, their output in seed_N.log", flush=True)
    with exclusive(folder):
        table = CellTable(folder / "cells.csv")
        try:
            failures = run_cells(cells, table, script.parent, workers=workers)
        except KeyboardInterrupt:
            print(f"to continue: the same command with --run_dir {shlex.quote(str(folder))}", file=sys.stderr)
            raise
    for failure in failures:
        print(f"failed: {failure}", file=sys.stderr)
    finished = [float(rows[-1]["return_mean"]) for cell in cells if (rows := table.rows_of(cell))]
    if finished:
        returns = ", ".join(f"{value:.1f}" for value in finished)
        try:
            _, low, high = mean_interval([[value] for value in finished])
            interval = f"95 % interval {low:.1f} to {high:.1f}" if len(finished) > 1 else "one seed"
        except UserError as error:  # rliable is an extra; the returns can be shown without it
            interval = f"no interval: {error}"
        print(f"last evaluation of {len(finished)} seeds: mean {fmean(finished):.1f}, {interval} ({returns})")
        plot, runs = shlex.quote(str(_near(script.with_name("plot.py")))), shlex.quote(str(folder))
        print(f"curves: python {plot} {runs}/seed_*[0-9] --output {shlex.quote(f'{folder}-curves')}")
    return 1 if failures else 0


def _near(path: Path) -> Path:
    """A path relative to the working directory, if it lies below it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _claim(folder: Path, settings: dict[str, Any]) -> None:
    """Records the settings of the runs in the folder, or checks that they are the recorded ones."""
    path = folder / "settings.json"
    if not path.exists():
        if any(make_folder(folder).iterdir()):
            raise UserError(
                f"{folder} contains something other than runs of several seeds; choose a new folder as --run_dir."
            )
        text = json.dumps(settings, indent=2)
        write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
        return
    saved = json.loads(path.read_text(encoding="utf-8"))
    differences = [
        f"{name} {saved.get(name)!r}, now {settings.get(name)!r}"
        for name in sorted({*saved, *settings})
        if saved.get(name) != settings.get(name)
    ]
    if differences:
        raise UserError(
            f"{folder} contains runs with other settings ({'; '.join(differences)}); use the same settings to "
            "continue, or a new folder as --run_dir."
        )
