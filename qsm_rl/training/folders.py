"""Folders for results, and locks on them, which are released when the process that holds them ends in any way."""

from __future__ import annotations

import fcntl
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from qsm_rl.training.errors import UserError

__all__ = ["exclusive", "in_use", "make_folder", "take_lock"]


def make_folder(folder: Path) -> Path:
    """Makes a folder, along with any missing parents, and returns it.

    Raises:
        UserError: if it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be created: {error.strerror}; choose another folder.") from error
    return folder


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """A context that no other process can enter for the same folder at the same time.

    Args:
        folder: created if missing.

    Raises:
        UserError: if another process is using the folder, or it cannot be made.
    """
    descriptor = os.open(make_folder(folder), os.O_RDONLY | os.O_DIRECTORY)
    if not take_lock(descriptor, folder):
        os.close(descriptor)
        raise UserError(f"{folder} is in use by another process; wait for it, or choose another folder.")
    try:
        yield
    finally:
        os.close(descriptor)


def take_lock(file: TextIO | int, path: Path) -> bool:
    """Takes the lock of an open file or folder; False if another process holds it.

    NFS locks files only if they are open for writing, and never folders. If the file system has no locks, a line on
    stderr says so, and the lock counts as taken.

    Args:
        file: the open file, or a descriptor.
        path: its path, for that line.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        print(
            f"warning: {path} cannot be locked ({error.strerror}); make sure no other process uses it", file=sys.stderr
        )
    return True


def in_use(path: Path) -> bool:
    """Whether another process holds the lock of a file."""
    try:
        with path.open("r+", encoding="utf-8") as file:
            return not take_lock(file, path)
    except FileNotFoundError:
        return False
