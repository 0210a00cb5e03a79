"""What a command says and exits with when something ends it."""

from __future__ import annotations

import errno
import os

import pytest

from qsm_rl.training import TrainingError, UserError, exit_on_error


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UserError("--tau must be at most 1, got 2."), 2, "error: --tau must be at most 1, got 2.\n"),
        (TrainingError("a loss is NaN."), 1, "error: a loss is NaN.\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (OSError(errno.EROFS, os.strerror(errno.EROFS), b"runs/x"), 1, "error: runs/x: Read-only file system.\n"),
        (OSError(errno.EACCES, os.strerror(errno.EACCES), "runs/x"), 1, "error: runs/x: Permission denied.\n"),
    ],
)
def test_what_people_can_mend_is_said_without_a_traceback(error, code, said, capsys):
    @exit_on_error
    def command() -> int:
        raise error

    with pytest.raises(SystemExit) as ended:
        command()
    assert (ended.value.code, capsys.readouterr().err) == (code, said)


@pytest.mark.parametrize(
    "error", [OSError(errno.EBADF, "bad file descriptor", "x"), OSError("no number"), ValueError("a bug")]
)
def test_anything_else_keeps_its_traceback(error):
    @exit_on_error
    def command() -> int:
        raise error

    with pytest.raises(type(error)) as raised:
        command()
    assert raised.value is error
