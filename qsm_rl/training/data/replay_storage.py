"""Storage of the replay buffer's rows: in memory, or in memory-mapped files whose space is reserved in advance."""

from __future__ import annotations

import os
import shutil
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import torch
from tensordict import TensorDictBase
from torchrl.data import LazyMemmapStorage, LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs import EnvBase

from qsm_rl.training.configuration.training_configuration import TrainingConfiguration
from qsm_rl.training.errors import TrainingError, UserError
from qsm_rl.training.ranks import rank

__all__ = ["AgentsReplayBuffer", "ReservedMemmapStorage", "check_replay_space", "make_storage", "replay_bytes"]


CHUNK = 1 << 24  # bytes written at a time


class AgentsReplayBuffer(TensorDictReplayBuffer):
    """A replay buffer whose rows hold one transition of each of N agents; each agent samples its own rows.

    Args:
        num_agents: N.
        **options: options of TorchRL's ``TensorDictReplayBuffer``.
    """

    def __init__(self, num_agents: int, **options: Any) -> None:
        super().__init__(**options)
        self.num_agents = num_agents

    def sample(self, batch_size: int | None = None, **options: Any) -> TensorDictBase:
        """Transitions ``(B, N)``, with those of agent n in column n."""
        size = (batch_size or self.batch_size, self.num_agents)
        device = self.storage.device
        rows, agents = torch.randint(len(self), size, device=device), torch.arange(self.num_agents, device=device)
        stored = self.storage.get(slice(0, len(self))).exclude("index")  # views
        return stored.apply(lambda entry: entry[rows, agents], batch_size=size)


class ReservedMemmapStorage(LazyMemmapStorage):
    """TorchRL's memory-mapped storage, with all its disk space reserved before the first row is written.

    TorchRL's own files are sparse: if the disk fills up later, writing to one ends the process by SIGBUS, without an
    error.

    Args:
        max_size: number of rows.
        folder: folder of the files; anything that an earlier process has left in it is removed.
    """

    def __init__(self, max_size: int, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        super().__init__(max_size, scratch_dir=folder)
        self.folder = folder

    def _init(self, data: Any) -> None:
        super()._init(data)
        for path in self.folder.rglob("*.memmap"):
            with path.open("r+b") as file:
                try:
                    _reserve(file, path.stat().st_size)
                except OSError as error:
                    raise TrainingError(
                        f"the replay buffer of {self.max_size:,} rows does not fit into {self.folder}: "
                        f"{error.strerror}; free some space, or lower --replay_size."
                    ) from error

    def remove(self) -> None:
        """Removes the files; the storage cannot be used afterwards."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _reserve(file: BinaryIO, size: int) -> None:
    """Reserves the space of a new file on disk."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)
        return
    for start in range(0, size, CHUNK):  # macOS has no such call
        file.write(bytes(min(CHUNK, size - start)))
    file.flush()


def make_storage(config: TrainingConfiguration, run_folder: Path, device: torch.device) -> LazyTensorStorage:
    """The storage that the settings choose, with this rank's share of ``replay_size``.

    Args:
        config: the settings; ``replay_storage`` chooses the storage.
        run_folder: the run's folder.
        device: device of a storage in memory.
    """
    rows = -(-config.replay_size // config.devices)
    if config.replay_storage == "memory":
        return LazyTensorStorage(rows, device=device)
    name = f"replay-memmap-{rank()}"
    if config.replay_storage == "disk":
        return ReservedMemmapStorage(rows, run_folder / name)
    # A name by which the same run finds its own leftovers and no other run does.
    own = f"{run_folder.name}-{zlib.crc32(str(run_folder.resolve()).encode()):08x}"
    return ReservedMemmapStorage(rows, Path(config.replay_storage) / own / name)


def replay_bytes(environment: EnvBase, rows: int) -> int:
    """Bytes of a replay buffer: two observations, action and reward in float32, two flags, two integers from TorchRL.

    Args:
        environment: with ``observation`` ``(num_envs, O)`` and actions ``(num_envs, A)``.
        rows: number of rows.
    """
    numbers = 2 * environment.observation_spec["observation"].shape[-1] + environment.action_spec.shape[-1] + 1
    return rows * (4 * numbers + 2 + 16)


def check_replay_space(config: TrainingConfiguration, environment: EnvBase) -> None:
    """Refuses a replay buffer on a disk that has no room for it, before anything is written.

    Raises:
        UserError: naming the folder, the space needed and the space that is free.
    """
    if config.replay_storage == "memory":
        return
    folder = Path(config.resume or config.run_dir or "runs")
    if config.replay_storage != "disk":
        folder = Path(config.replay_storage)
        if not folder.is_dir():
            raise UserError(f"--replay_storage {folder} is not an existing folder; create it, or use memory or disk.")
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    needed, free = replay_bytes(environment, config.replay_size), shutil.disk_usage(existing).free
    if needed > free:
        raise UserError(
            f"--replay_storage {config.replay_storage}: {config.replay_size:,} rows take {needed / 1e9:.1f} GB, but "
            f"{existing} has only {free / 1e9:.1f} GB free; free some space, choose another folder, or lower "
            "--replay_size."
        )
