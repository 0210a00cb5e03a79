"""Errors that users can fix: reported in a line or two, without a traceback."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import NoReturn, ParamSpec

__all__ = ["TrainingError", "UserError", "exit_on_error", "full_disk_errors", "user_errors"]

P = ParamSpec("P")

DENIED = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT)


class UserError(Exception):
    """An input of the user is not valid. The message names the value, what was expected, and the fix."""


class TrainingError(Exception):
    """Training cannot continue. The message names the cause and the frame; the last checkpoint is intact."""


@contextmanager
def user_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Turns the given kinds of exception, raised in the block, into a ``UserError`` with the same message.

    Use it only around calls whose arguments come directly from the user: a bug must keep its traceback.

    Args:
        *kinds: exception classes that the called code raises for bad input.

    Raises:
        UserError: in place of an exception of the given kinds.
    """
    try:
        yield
    except kinds as error:
        raise UserError(str(error)) from error


@contextmanager
def full_disk_errors(run_folder: Path) -> Iterator[None]:
    """Explains how to continue a run that a full disk has ended, whichever file could not be written.

    Args:
        run_folder: the run's folder.

    Raises:
        TrainingError: in place of an ``OSError`` from a full disk or an exhausted quota.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise TrainingError(
            f"{error.filename or run_folder} could not be written: {error.strerror}; free some space.\n"
            f"Then --resume {run_folder} continues from the last checkpoint."
        ) from error


def exit_on_error(main: Callable[P, int]) -> Callable[P, NoReturn]:
    """Turns a recipe's ``main`` into a command that exits with the code that ``main`` returns.

    A [`UserError`][qsm_rl.training.UserError] is printed on stderr without a traceback, with exit code 2. A
    [`TrainingError`][qsm_rl.training.TrainingError] and anything that the file system denies are printed in the same
    way, with code 1. Ctrl-C before training has begun gives 130.

    Args:
        main: the recipe's entry point.
    """

    @wraps(main)
    def command(*args: P.args, **kwargs: P.kwargs) -> NoReturn:
        try:
            code = main(*args, **kwargs)
        except (UserError, TrainingError) as error:
            print(f"error: {error}", file=sys.stderr)
            code = 2 if isinstance(error, UserError) else 1
        except OSError as error:
            if error.errno not in DENIED or error.filename is None:
                raise
            print(f"error: {os.fsdecode(error.filename)}: {error.strerror}.", file=sys.stderr)
            code = 1
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            code = 130
        sys.exit(code)

    return command
