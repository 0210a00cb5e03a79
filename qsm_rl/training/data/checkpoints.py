"""Checkpoint files: written completely or not at all, the last two kept, read without running code."""

from __future__ import annotations

import contextlib
import io
import re
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch

from qsm_rl.atomic_files import TEMPORARY, read_bounded, write_atomically
from qsm_rl.training.errors import UserError
from qsm_rl.version import __version__

__all__ = ["CheckpointFolder"]

KEPT = 2
FORMAT = 1
REPLAY = re.compile(r"replay(-rank-\d{1,4})?")
LARGEST = 16 << 30  # bytes of a file that is opened at all


class CheckpointFolder:
    """The checkpoints of one run, ``frames-<frames>.pt``.

    Args:
        path: the folder. Unfinished files in it, of killed or running processes, are ignored.

    Raises:
        UserError: if it holds anything other than checkpoints and the replay buffer's folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.exists():
            for found in sorted(path.iterdir()):
                of_a_run = _frames_of(found) is not None or (REPLAY.fullmatch(found.name) and found.is_dir())
                if not (of_a_run or found.suffix == TEMPORARY):
                    raise UserError(f"{found} does not belong to a run and is not read; move it elsewhere.")

    def save(self, frames: int, state: dict[str, Any]) -> None:
        """Writes a checkpoint and removes all but the newest two.

        Args:
            frames: frames collected so far, which name the checkpoint.
            state: tensors, numbers, strings, and dictionaries and lists of them.

        Raises:
            OSError: if the disk is full or not writable; earlier checkpoints are untouched.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        torch.save({"format": FORMAT, "qsm_rl": __version__, "frames": frames, **state}, buffer)
        write_atomically(self._file(frames), lambda temporary: temporary.write_bytes(buffer.getbuffer()))
        for old in [known for known in self.frames() if known < frames][: -(KEPT - 1)]:
            self._file(old).unlink()

    def frames(self) -> list[int]:
        """Frame counts of the existing checkpoints, in ascending order."""
        return sorted(frames for path in self.path.glob("*") if (frames := _frames_of(path)) is not None)

    def newest(self) -> dict[str, Any]:
        """The newest checkpoint that can be read; a line on stderr names each one that cannot.

        Raises:
            UserError: if there is none.
        """
        for frames in reversed(self.frames()):
            try:
                return self.load(frames)
            except UserError as error:
                print(f"warning: {error} Trying the previous checkpoint.", file=sys.stderr)
        raise UserError(f"{self.path} contains no readable checkpoint; start a new run.")

    def load(self, frames: int) -> dict[str, Any]:
        """The checkpoint at a frame count, on the CPU.

        Raises:
            UserError: if it is broken, holds anything but plain data, or was written in another format.
        """
        path = self._file(frames)
        try:
            content = read_bounded(path, LARGEST)
            _check_archive(content)
            state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except Exception as error:  # readers can raise anything for a broken file
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UserError(f"{path} cannot be read: {reason.rstrip('.')}.") from error
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            known = state if isinstance(state, dict) else {}
            raise UserError(
                f"qsm_rl {__version__} cannot read the checkpoint {path}: it has format "
                f"{str(known.get('format'))[:20]}, expected {FORMAT}, and was written by qsm_rl "
                f"{str(known.get('qsm_rl', 'of an unknown version'))[:20]}."
            )
        if state.get("frames") != frames:
            raise UserError(f"{path} does not contain the checkpoint at frame {frames}: the file was renamed.")
        if (strange := _not_plain(state)) is not None:
            raise UserError(f"{path} contains a {strange}, expected tensors, numbers and strings only.")
        return state

    def readable(self) -> list[dict[str, Any]]:
        """The checkpoints that can be read, in ascending order of frames."""
        states = []
        for frames in self.frames():
            with contextlib.suppress(UserError):
                states.append(self.load(frames))
        return states

    def remove_after(self, frames: int) -> None:
        """Removes checkpoints beyond a frame count; a run that continues from there writes them again."""
        for newer in [known for known in self.frames() if known > frames]:
            self._file(newer).unlink()

    def _file(self, frames: int) -> Path:
        return self.path / f"frames-{frames:012d}.pt"


def _frames_of(path: Path) -> int | None:
    name = re.fullmatch(r"frames-(\d{12,18})\.pt", path.name)
    return int(name.group(1)) if name else None


def _check_archive(content: bytes) -> None:
    """Refuses anything but a zip file of intact, uncompressed parts, which is what PyTorch writes.

    Raises:
        ValueError: if it would unpack to more than its own size, or a part is damaged.
        zipfile.BadZipFile: if it is not a zip file, for example a bare pickle.
    """
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        parts = archive.infolist()
        if any(part.compress_type != zipfile.ZIP_STORED for part in parts):
            raise ValueError("its parts are compressed, unlike those of a checkpoint")
        if len({part.filename for part in parts}) < len(parts) or sum(part.file_size for part in parts) > len(content):
            raise ValueError("its parts overlap")
        if damaged := archive.testzip():
            raise ValueError(f"its part {damaged} is damaged")


def _not_plain(data: Any) -> str | None:
    """Name of the first type in nested dictionaries and lists that a checkpoint does not need."""
    if isinstance(data, torch.Tensor):
        plain = data.layout == torch.strided and data.device.type == "cpu" and not data.is_quantized
        huge = data.numel() * data.element_size() > LARGEST  # a view that repeats one number
        return None if plain and not huge else f"{data.layout} tensor of shape {tuple(data.shape)}"
    if isinstance(data, dict):
        data = [*data.keys(), *data.values()]
    if isinstance(data, (list, tuple)):
        return next((strange for item in data if (strange := _not_plain(item)) is not None), None)
    return None if data is None or isinstance(data, (bool, int, float, str)) else type(data).__name__
