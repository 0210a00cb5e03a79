"""Checks whether a run will fit: memory for the replay buffer, disk space for its files and the checkpoints."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import Tensor

from qsm_rl.training.errors import UserError

__all__ = ["available_memory", "check_space"]

KEPT_CHECKPOINTS = 3  # two, plus the one that is being written
CGROUP = Path("/sys/fs/cgroup")
SMALL_FILES = 64 << 20  # bytes of logs, pictures and the actor


def available_memory(device: torch.device) -> int | None:
    """Bytes that are still available on a device; None if the system does not report them."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
    try:  # in a container, recently read files count as used memory, but are dropped when memory is needed
        limit, used = (int((CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        counts = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        return min(free, max(0, limit - used + int(counts["inactive_file"])))
    except (OSError, ValueError, KeyError):
        return free


def check_space(
    folder: Path,
    *,
    rows: int,
    capacity: int,
    row: int,
    checkpoint_every: int,
    state: dict[str, Tensor],
    device: torch.device | None,
    stored: int = 0,
) -> None:
    """Refuses a run that would fail midway for lack of memory or disk space.

    Args:
        folder: the run's folder.
        rows: transitions that the replay buffers of all processes will hold.
        capacity: transitions that one of these buffers could hold. Its memory is allocated with the first one; on a GPU
            all of it is used from then on, elsewhere as rows are written.
        row: bytes of one transition, see ``row_bytes``.
        checkpoint_every: frames between checkpoints, whose rows are on disk in addition to the buffer's.
        state: the update's tensors; Adam keeps two more of each.
        device: device whose memory holds the replay buffer; None for one in memory-mapped files.
        stored: rows that are on disk already.

    Raises:
        UserError: naming the space needed, the space available, and the setting to lower.
    """
    free = None if device is None else available_memory(device)
    held = capacity if device is not None and device.type == "cuda" else rows
    if free is not None and held * row > free:
        raise UserError(
            f"the replay buffer needs {_size(held * row)} of memory for {held:,} transitions of {row} bytes, but only "
            f"{_size(free)} is free on {device}; lower --replay_size to {free * 3 // 4 // row:,}."
        )
    if device is not None and device.type == "cpu":
        try:
            torch.empty(capacity * row, dtype=torch.uint8)
        except (RuntimeError, TypeError) as error:  # the latter if the number itself is too large
            raise UserError(
                f"a replay buffer of {capacity:,} transitions of {row} bytes needs more memory than this machine can "
                f"provide; lower --replay_size (this run needs {rows:,})."
            ) from error
    checkpoint = 3 * sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    replay, checkpoints = (max(0, rows - stored) + 2 * checkpoint_every) * row, KEPT_CHECKPOINTS * checkpoint
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if replay + checkpoints + SMALL_FILES > free:
        raise UserError(
            f"the run needs {_size(replay + checkpoints + SMALL_FILES)} in {folder} ({_size(replay)} for the replay "
            f"buffer, {_size(checkpoints)} for checkpoints), but only {_size(free)} is free; free some space, lower "
            "--replay_size, or choose another --run_dir."
        )


def _size(count: int) -> str:
    """Bytes in a readable form, by powers of 1,000."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"
