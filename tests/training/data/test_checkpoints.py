from __future__ import annotations

import os
import pickle
import resource
import shutil

import pytest
import torch

from qsm_rl.training import CheckpointFolder, UserError


class Planted:
    """Unpickling it makes a file: what must never happen."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def plain_pickle(path, trap):
    return lambda: path.write_bytes(pickle.dumps({"format": 1, "frames": 100, "x": Planted(trap)}))


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_process_killed_around_the_rename_leaves_the_old_checkpoint_and_a_leftover_that_is_passed_over(
    tmp_path, monkeypatch, step
):
    folder = CheckpointFolder(tmp_path)
    folder.save(100, {"value": torch.ones(3)})

    # A child process dies at once, without clean-up, where the write is about to become visible.
    child = os.fork()
    if child == 0:
        setattr(os, step, lambda *args: os._exit(9))
        folder.save(200, {"value": torch.zeros(3)})
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert [path for path in tmp_path.iterdir() if path.suffix == ".incomplete"]

    # Whoever reads the folder leaves it alone, since its process may be alive.
    assert CheckpointFolder(tmp_path).newest()["value"].tolist() == [1, 1, 1]
    assert [path for path in tmp_path.iterdir() if path.suffix == ".incomplete"]


def test_full_disk_leaves_the_last_good_checkpoint(tmp_path):
    folder = CheckpointFolder(tmp_path)
    folder.save(100, {"value": torch.ones(3)})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))  # no file may grow beyond this, as on a full disk
    try:
        with pytest.raises(OSError):
            folder.save(200, {"value": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["frames-000000000100.pt"]
    assert folder.newest()["frames"] == 100


def test_the_newest_two_checkpoints_are_kept(tmp_path):
    folder = CheckpointFolder(tmp_path)
    for frames in (100, 200, 1000):
        folder.save(frames, {})
    assert folder.frames() == [200, 1000]


def test_a_run_that_goes_on_removes_what_lies_beyond(tmp_path):
    folder = CheckpointFolder(tmp_path)
    for frames in (100, 200):
        folder.save(frames, {})
    folder.remove_after(200)
    assert folder.frames() == [100, 200]
    folder.remove_after(100)
    assert folder.frames() == [100]


def test_an_unreadable_checkpoint_is_passed_over_with_a_word(tmp_path, capsys):
    folder = CheckpointFolder(tmp_path)
    for frames in (100, 200):
        folder.save(frames, {"value": torch.arange(1000)})
    newest = tmp_path / "frames-000000000200.pt"
    newest.write_bytes(newest.read_bytes()[:2000])
    assert folder.newest()["frames"] == 100
    assert newest.name in capsys.readouterr().err
    (tmp_path / "frames-000000000100.pt").write_bytes(b"")
    with pytest.raises(UserError, match="no readable checkpoint"):
        folder.newest()


def test_a_checkpoint_that_holds_code_is_refused_and_not_run(tmp_path):
    trap = tmp_path / "executed"
    path = tmp_path / "frames-000000000100.pt"
    for write in (lambda: torch.save({"format": 1, "frames": 100, "x": Planted(trap)}, path), plain_pickle(path, trap)):
        write()
        with pytest.raises(UserError, match="cannot be read"):
            CheckpointFolder(tmp_path).load(100)
        assert not trap.exists()


@pytest.mark.parametrize("position", [0.05, 0.5, 0.9])
def test_a_changed_bit_is_noticed(tmp_path, position):
    folder = CheckpointFolder(tmp_path)
    folder.save(100, {"value": torch.randn(10_000)})
    path = tmp_path / "frames-000000000100.pt"
    content = bytearray(path.read_bytes())
    content[int(position * len(content))] ^= 16
    path.write_bytes(content)
    with pytest.raises(UserError, match="cannot be read"):
        folder.load(100)


def test_a_checkpoint_under_another_name_is_refused(tmp_path):
    folder = CheckpointFolder(tmp_path)
    folder.save(100, {})
    shutil.copy(tmp_path / "frames-000000000100.pt", tmp_path / "frames-000000000200.pt")
    with pytest.raises(UserError, match="does not contain the checkpoint at frame 200"):
        folder.load(200)
