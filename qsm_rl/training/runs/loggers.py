"""Loggers of a run's metrics: metrics.csv, the log as one table, and a logger of the user's choice."""

from __future__ import annotations

import csv
import importlib
import importlib.util
import inspect
import os
from argparse import Namespace
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from qsm_rl.atomic_files import write_atomically, write_csv_atomically
from qsm_rl.training.errors import UserError

__all__ = ["MetricsTable", "check_logger", "chosen_logger", "read_metrics"]

STEP = "frames"


class Service(NamedTuple):
    """Facts about a Lightning logger beyond its class: its package, and how it names runs."""

    package: str
    to_install: str
    name_argument: str
    id_argument: str


SERVICES = {
    "lightning.pytorch.loggers.WandbLogger": Service("wandb", "qsm_rl[wandb]", "name", "id"),
    "lightning.pytorch.loggers.MLFlowLogger": Service("mlflow", "mlflow", "run_name", "run_id"),
    "lightning.pytorch.loggers.CometLogger": Service("comet_ml", "comet_ml", "name", "experiment_key"),
}
RUN_ID = "logger_id.txt"


class MetricsTable(Logger):
    """A Lightning logger that keeps one CSV table, one row per frame count, in a file of the caller's choice.

    Rows are appended as they arrive. A new metric adds a column, and the file is rewritten. Lightning's CSVLogger
    numbers its folders and deletes what an earlier process has logged, so it cannot continue a run.

    Args:
        path: the CSV file.
        last_frame: rows of an earlier process beyond this frame count are removed, since the run continues there.
    """

    def __init__(self, path: Path, *, last_frame: int = 0) -> None:
        super().__init__()
        self.path = path
        self._columns: list[str] = [STEP]
        self._rows: list[dict[str, str]] = []
        if path.exists():
            self._columns, rows = _read(path)
            self._rows = [row for row in rows if int(row[STEP]) <= last_frame]
            if not self._rows:  # empty columns would look as if, say, an evaluation had taken place
                self._columns = [STEP]
            self._rewrite()

    @property
    def name(self) -> str:
        """Name of the table."""
        return self.path.stem

    @property
    def version(self) -> str:
        """Empty: a run folder holds a single table."""
        return ""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Appends a row.

        Args:
            metrics: values of the row by name.
            step: frames collected so far.
        """
        row = {STEP: str(step), **{name: repr(float(value)) for name, value in metrics.items()}}
        self._rows.append(row)
        if new := [name for name in row if name not in self._columns]:
            self._columns += new
        if new or not self.path.exists():
            self._rewrite()
        else:
            with self.path.open("a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, self._columns, restval="", lineterminator="\n").writerow(row)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Does nothing: config.yaml holds the settings."""

    def _rewrite(self) -> None:
        write_csv_atomically(self.path, self._columns, self._rows)


def check_logger(choice: dict[str, Any] | None) -> None:
    """Checks that the package of a chosen logger is installed, before anything is created.

    Args:
        choice: the setting ``logger``: None, or the logger's ``class_path`` and its ``init_args``.

    Raises:
        UserError: naming the pip command, if it is not installed.
    """
    if choice is None:
        return
    service = SERVICES.get(choice["class_path"])
    if service is not None and importlib.util.find_spec(service.package) is None:
        name = choice["class_path"].rpartition(".")[2]
        raise UserError(f'--logger {name} needs {service.package}: pip install "{service.to_install}".')


def chosen_logger(choice: dict[str, Any], folder: Path, settings: dict[str, Any]) -> Logger:
    """Makes and starts the logger that the setting ``logger`` chooses.

    Its local files go to the run's folder, which also gives the run its name. A resumed run continues its record in the
    service; the id of that record is kept in ``logger_id.txt``.

    Args:
        choice: the logger's ``class_path``, and its ``init_args``.
        folder: the run's folder.
        settings: the run's settings, which the logger records.

    Raises:
        UserError: if the logger cannot be made or started, with the logger's own message.
    """
    module, _, name = choice["class_path"].rpartition(".")
    logger_class = getattr(importlib.import_module(module), name)
    service, id_file = SERVICES.get(choice["class_path"]), folder / RUN_ID
    has_files = "save_dir" in inspect.signature(logger_class).parameters
    arguments: dict[str, Any] = {"save_dir": folder} if has_files else {}
    if service is not None:
        arguments[service.name_argument] = folder.name
        if id_file.exists():
            arguments[service.id_argument] = id_file.read_text(encoding="utf-8").strip()
    os.environ.setdefault("WANDB_PROJECT", "qsm_rl")  # in place of Lightning's "lightning_logs"
    try:
        logger: Logger = logger_class(**{**arguments, **choice.get("init_args", {})})
        logger.log_hyperparams(settings)  # starts the logger
        version = logger.version
    except Exception as error:  # services can raise anything: no key, no network, a wrong address
        raise UserError(f"--logger {name} could not be started: {' '.join(str(error).split())[:500]}") from error
    if service is not None:
        write_atomically(id_file, lambda temporary: temporary.write_text(f"{version}\n", encoding="utf-8"))
    return logger


def read_metrics(path: Path) -> dict[str, list[float]]:
    """Reads a metrics.csv.

    Args:
        path: the file.

    Returns:
        The columns, ``frames`` first; empty cells are NaN.
    """
    columns, rows = _read(path)
    return {name: [float(row[name]) if row.get(name) else float("nan") for row in rows] for name in columns}


def _read(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        # A process killed while appending may leave an incomplete last row; the run continues before it.
        rows = [row for row in reader if None not in row.values() and (row.get(STEP) or "").isdigit()]
        return list(reader.fieldnames or [STEP]), rows
