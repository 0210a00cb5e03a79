"""Folders for results, and locks on them, which end with the process that holds them, however that ends."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qsm_rl.training.errors import UserError

__all__ = ["exclusive", "in_use", "make_folder"]


def make_folder(folder: Path) -> Path:
    """Makes a folder and those above it, where they are missing; returns it.

    Raises:
        UserError: if it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be made: {error.strerror}; choose another folder.") from error
    return folder


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """A block in which no other process enters such a block on the folder.

    Args:
        folder: made when missing.

    Raises:
        UserError: if another process is in one, or the folder cannot be made.
    """
    descriptor = os.open(make_folder(folder), os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise UserError(f"{folder} is in use by another process; wait for it, or choose another folder.") from error
    try:
        yield
    finally:
        os.close(descriptor)


def in_use(path: Path) -> bool:
    """Whether another process holds the lock of a file."""
    try:
        with path.open(encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False
