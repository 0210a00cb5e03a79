from __future__ import annotations

import errno
import os
import shutil
from collections import namedtuple

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer

from qsm_rl.training import (
    ReplayArchive,
    TrainingConfiguration,
    TrainingError,
    TransitionWriter,
    UserError,
    make_environment,
)
from qsm_rl.training.data.replay_storage import ReservedMemmapStorage, check_replay_space, make_storage, replay_bytes

ROWS = 50


def batch(first: int, count: int, n_step: bool = False) -> TensorDict:
    t = torch.arange(first, first + count, dtype=torch.float32).reshape(1, count, 1)
    flag = torch.zeros(1, count, 1, dtype=torch.bool)
    observation = t.expand(1, count, 4)
    following = {"observation": observation + 1, "reward": t, "done": flag, "terminated": flag, "truncated": flag}
    return TensorDict({"observation": observation, "action": t, "next": following}, [1, count])


def test_a_buffer_on_the_disk_holds_samples_and_restores_the_same_rows_as_one_in_memory(tmp_path):
    storages = [LazyTensorStorage(ROWS), ReservedMemmapStorage(ROWS, tmp_path / "map")]
    samples, archives = [], []
    for number, storage in enumerate(storages):
        replay = TensorDictReplayBuffer(storage=storage, batch_size=8)
        archive = ReplayArchive(tmp_path / f"archive-{number}")
        for first in range(0, 70, 10):  # 20 rows beyond its end: the oldest are overwritten
            TransitionWriter(replay).write(batch(first, 10))
            manifest = archive.save(replay)
        torch.manual_seed(0)
        samples.append(replay.sample())
        archives.append((replay, manifest))
    for key in samples[0].keys(True, True):
        assert torch.equal(samples[0][key], samples[1][key])

    replay, manifest = archives[1]
    again = TensorDictReplayBuffer(storage=ReservedMemmapStorage(ROWS, tmp_path / "again"), batch_size=8)
    ReplayArchive(tmp_path / "archive-1").restore(again, manifest)
    assert torch.equal(again[:]["observation"], replay[:]["observation"]) and len(again) == ROWS
    assert again.write_count == replay.write_count == 70


@pytest.mark.parametrize("with_fallocate", [True, False])
def test_all_space_is_taken_before_the_first_row_and_given_back_at_the_end(tmp_path, monkeypatch, with_fallocate):
    if not with_fallocate:  # as on macOS
        monkeypatch.delattr(os, "posix_fallocate")
    stale = tmp_path / "map" / "left by a process that was killed"
    stale.mkdir(parents=True)
    storage = ReservedMemmapStorage(1000, tmp_path / "map")
    assert not stale.exists()
    TransitionWriter(TensorDictReplayBuffer(storage=storage, batch_size=8)).write(batch(0, 1))
    environment = make_environment("InvertedPendulum-v5")  # 4 observations, 1 action
    taken = [path.stat() for path in (tmp_path / "map").rglob("*.memmap")]
    assert sum(status.st_blocks * 512 for status in taken) >= sum(status.st_size for status in taken)
    assert 0.7 <= sum(status.st_size for status in taken) / replay_bytes(environment, 1000) <= 1
    storage.remove()
    assert not (tmp_path / "map").exists()


def test_a_full_disk_is_an_error_and_no_sigbus(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    replay = TensorDictReplayBuffer(storage=ReservedMemmapStorage(1000, tmp_path / "map"), batch_size=8)
    with pytest.raises(TrainingError, match=r"1,000 rows does not fit into .*No space left.*--replay_size"):
        TransitionWriter(replay).write(batch(0, 1))


def test_a_disk_without_room_is_refused_before_the_run_begins(tmp_path, monkeypatch):
    environment = make_environment("InvertedPendulum-v5")
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(replay_bytes(environment, 999)))
    fits = TrainingConfiguration(replay_storage="disk", run_dir=tmp_path / "a" / "b", replay_size=999)
    check_replay_space(fits, environment)
    for storage in ("disk", str(tmp_path)):
        large = TrainingConfiguration(replay_storage=storage, run_dir=tmp_path / "a" / "b", replay_size=1000)
        with pytest.raises(UserError, match=r"1,000 rows take 0\.0 GB.*free.*--replay_size"):
            check_replay_space(large, environment)
    with pytest.raises(UserError, match="is not an existing folder"):
        check_replay_space(TrainingConfiguration(replay_storage=str(tmp_path / "missing")), environment)


def test_the_files_lie_in_the_run_folder_or_apart_for_each_run(tmp_path):
    def folder(storage: str, run: str) -> str:
        config = TrainingConfiguration(replay_storage=storage, replay_size=10)
        return str(make_storage(config, tmp_path / run, torch.device("cpu")).folder.relative_to(tmp_path))

    assert folder("disk", "run") == "run/replay-memmap-0"
    apart = {folder(str(tmp_path / "fast"), run) for run in ("a/run", "b/run")}
    assert len(apart) == 2 and all(path.startswith("fast/run-") for path in apart)
