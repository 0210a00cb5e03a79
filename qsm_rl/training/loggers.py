"""metrics.csv: the log of a run as one table."""

from __future__ import annotations

import csv
from argparse import Namespace
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from qsm_rl.training.atomic_files import write_csv_atomically

__all__ = ["MetricsTable", "read_metrics"]

STEP = "frames"


class MetricsTable(Logger):
    """A Lightning logger that keeps one CSV table, a row for each frame count, in a file of the caller's choice.

    Rows are appended as they come. A new metric adds a column, and the file is written anew. Lightning's CSVLogger
    numbers its folders and deletes what an earlier process has logged, so it cannot go on with a run.

    Args:
        path: the CSV file.
        last_frame: rows of an earlier process beyond this frame count are removed, for the run continues there.
    """

    def __init__(self, path: Path, *, last_frame: int = 0) -> None:
        super().__init__()
        self.path = path
        self._columns: list[str] = [STEP]
        self._rows: list[dict[str, str]] = []
        if path.exists():
            self._columns, rows = _read(path)
            self._rows = [row for row in rows if int(row[STEP]) <= last_frame]
            self._rewrite()

    @property
    def name(self) -> str:
        """Name of the table."""
        return self.path.stem

    @property
    def version(self) -> str:
        """Nothing: a run folder holds one table."""
        return ""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Appends a row.

        Args:
            metrics: the row.
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
        """Nothing: config.yaml holds them."""

    def _rewrite(self) -> None:
        write_csv_atomically(self.path, self._columns, self._rows)


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
        # A process killed while appending may leave a last row without its end; the run continues before it.
        rows = [row for row in reader if None not in row.values() and (row.get(STEP) or "").isdigit()]
        return list(reader.fieldnames or [STEP]), rows
