"""Files that exist either in full or not at all, even if the process is killed, and safe reading of files."""

from __future__ import annotations

import csv
import os
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["TEMPORARY", "read_bounded", "sweep_temporaries", "write_atomically", "write_csv_atomically"]

TEMPORARY = ".incomplete"


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a temporary file next to the target, flushes it to the disk, and renames it into place.

    Args:
        path: the target; an existing file is replaced only when the new one is complete.
        write: a function that writes a file to the path it is given.

    Raises:
        OSError: if the disk is full or not writable; the target is unchanged, and nothing is left behind.
    """
    temporary = path.with_name(path.name + TEMPORARY)
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
    """Writes a CSV file with a header as ``write_atomically`` does; columns that a row lacks stay empty."""

    def write(temporary: Path) -> None:
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)

    write_atomically(path, write)


def sweep_temporaries(folder: Path) -> None:
    """Removes the half-written files that killed processes left in a folder and below it."""
    for temporary in folder.rglob(f"*{TEMPORARY}"):
        temporary.unlink(missing_ok=True)


def read_bounded(path: Path, largest: int, *, follow_links: bool = False) -> bytes:
    """The content of a file whose source is not trusted.

    Args:
        path: the file.
        largest: largest accepted size in bytes.
        follow_links: whether to follow a symbolic link, which may lead anywhere.

    Raises:
        ValueError: if it is a link that is not followed, a device or a pipe, or too large.
        OSError: if it is missing or cannot be read.
    """
    about = path.stat(follow_symlinks=follow_links)
    if stat.S_ISLNK(about.st_mode):
        raise ValueError("it is a symbolic link; replace it with the file itself")
    if not stat.S_ISREG(about.st_mode):
        raise ValueError("it is not a regular file")
    if about.st_size > largest:
        raise ValueError(f"it has {about.st_size:,} bytes, expected at most {largest:,}")
    return path.read_bytes()
