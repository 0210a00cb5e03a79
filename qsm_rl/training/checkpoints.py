"""Checkpoint files: written whole or not at all, the last two kept, read without running code."""

from __future__ import annotations

import io
import re
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch

from qsm_rl.atomic_files import sweep_temporaries, write_atomically
from qsm_rl.training.errors import UserError

__all__ = ["CheckpointFolder"]

KEPT = 2
FORMAT = 1


class CheckpointFolder:
    """The checkpoints of one run, ``frames-<frames>.pt``.

    Args:
        path: the folder; half-written files of killed processes in it are removed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.exists():
            sweep_temporaries(path)

    def save(self, frames: int, state: dict[str, Any]) -> None:
        """Writes a checkpoint and removes all but the newest two.

        Args:
            frames: frames collected so far, the checkpoint's name.
            state: tensors, numbers, strings, and dictionaries and lists of them.

        Raises:
            OSError: if the disk is full or not writable; earlier checkpoints are untouched.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        torch.save({"format": FORMAT, "frames": frames, **state}, buffer)
        write_atomically(self._file(frames), lambda temporary: temporary.write_bytes(buffer.getbuffer()))
        for old in [known for known in self.frames() if known < frames][: -(KEPT - 1)]:
            self._file(old).unlink()

    def frames(self) -> list[int]:
        """Frame counts of the checkpoints there are, in ascending order."""
        names = (re.fullmatch(r"frames-(\d+)\.pt", path.name) for path in self.path.glob("frames-*.pt"))
        return sorted(int(name.group(1)) for name in names if name)

    def newest(self) -> dict[str, Any]:
        """The newest checkpoint that can be read; a line on stderr tells of each that cannot.

        Raises:
            UserError: if there is none.
        """
        for frames in reversed(self.frames()):
            try:
                return self.load(frames)
            except UserError as error:
                print(f"warning: {error} Trying the one before.", file=sys.stderr)
        raise UserError(f"{self.path} holds no checkpoint that can be read; start a new run.")

    def load(self, frames: int) -> dict[str, Any]:
        """The checkpoint at a frame count, on the CPU.

        Raises:
            UserError: if it is broken, holds anything but plain data, or was written in another format.
        """
        path = self._file(frames)
        try:
            with zipfile.ZipFile(path) as archive:  # torch's older format, a bare pickle, is none
                if damaged := archive.testzip():
                    raise ValueError(f"its part {damaged} is damaged")
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a broken file can make its readers raise anything
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UserError(f"{path} cannot be read: {reason}.") from error
        if not isinstance(state, dict) or state.get("format") != FORMAT or state.get("frames") != frames:
            raise UserError(f"{path} is not a checkpoint of format {FORMAT} at frame {frames}.")
        return state

    def _file(self, frames: int) -> Path:
        return self.path / f"frames-{frames:012d}.pt"
