"""Files that are either there in full or not at all, whatever kills the process."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["sweep_temporaries", "write_atomically", "write_csv_atomically"]

SUFFIX = ".incomplete"


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file beside its target, flushes it to the disk, and puts it in place in one step.

    Args:
        path: the target; an existing file is replaced only when the new one is complete.
        write: writes the file whose path it is given.

    Raises:
        OSError: if the disk is full or not writable; the target is as it was, and nothing is left behind.
    """
    temporary = path.with_name(path.name + SUFFIX)
    try:
        write(temporary)
        descriptor = os.open(temporary, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)  # the new name must survive a power cut as well
    finally:
        os.close(directory)


def write_csv_atomically(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes a CSV file with a header as :func:`write_atomically` does; what a row lacks stays empty."""

    def write(temporary: Path) -> None:
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)

    write_atomically(path, write)


def sweep_temporaries(folder: Path) -> None:
    """Removes what killed processes left half written in a folder and below it."""
    for temporary in folder.rglob(f"*{SUFFIX}"):
        temporary.unlink(missing_ok=True)
