"""Checkpoints, atomic files, and the published actor."""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import Bounded

from qsm_rl import DDIMSampler, DDPMSampler, DiffusionActor, NoiseSchedule, ScoreMLP
from qsm_rl.training import CheckpointFolder, UserError, load_actor, make_environment, publish_actor
from qsm_rl.training.atomic_files import sweep_temporaries, write_atomically


class Planted:
    """Unpickling it makes a file: what must never happen."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


class Killed(BaseException):
    """Stands for the process ending at this point."""


def test_a_write_that_ends_in_the_middle_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, lambda temporary: temporary.write_text("old"))

    def half(temporary):
        temporary.write_text("ne")
        raise Killed

    with pytest.raises(Killed):
        write_atomically(path, half)
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_process_killed_around_the_rename_leaves_the_old_checkpoint_and_a_leftover_that_is_swept(
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

    folder = CheckpointFolder(tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".incomplete"]
    assert folder.newest()["value"].tolist() == [1, 1, 1]


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


def test_sweeping_goes_below_the_folder_and_keeps_the_rest(tmp_path):
    (tmp_path / "replay").mkdir()
    (tmp_path / "replay" / "rows.incomplete").write_text("x")
    (tmp_path / "rows").write_text("x")
    sweep_temporaries(tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["replay", "rows"]


def test_the_newest_two_checkpoints_are_kept(tmp_path):
    folder = CheckpointFolder(tmp_path)
    for frames in (100, 200, 1000):
        folder.save(frames, {})
    assert folder.frames() == [200, 1000]


def test_an_unreadable_checkpoint_is_passed_over_with_a_word(tmp_path, capsys):
    folder = CheckpointFolder(tmp_path)
    for frames in (100, 200):
        folder.save(frames, {"value": torch.arange(1000)})
    newest = tmp_path / "frames-000000000200.pt"
    newest.write_bytes(newest.read_bytes()[:2000])
    assert folder.newest()["frames"] == 100
    assert newest.name in capsys.readouterr().err
    (tmp_path / "frames-000000000100.pt").write_bytes(b"")
    with pytest.raises(UserError, match="no checkpoint that can be read"):
        folder.newest()


def test_a_checkpoint_that_holds_code_is_refused_and_not_run(tmp_path):
    trap = tmp_path / "executed"
    path = tmp_path / "frames-000000000100.pt"
    for write in (lambda: torch.save({"format": 1, "frames": 100, "x": Planted(trap)}, path), plain_pickle(path, trap)):
        write()
        with pytest.raises(UserError, match="cannot be read"):
            CheckpointFolder(tmp_path).load(100)
        assert not trap.exists()


def plain_pickle(path, trap):
    return lambda: path.write_bytes(pickle.dumps({"format": 1, "frames": 100, "x": Planted(trap)}))


def test_a_checkpoint_under_another_name_is_refused(tmp_path):
    folder = CheckpointFolder(tmp_path)
    folder.save(100, {})
    shutil.copy(tmp_path / "frames-000000000100.pt", tmp_path / "frames-000000000200.pt")
    with pytest.raises(UserError, match="frame 200"):
        folder.load(200)


@pytest.mark.parametrize("sampler", [DDPMSampler(clip="clean", temperature=0.5), DDIMSampler(3, eta=0.5)])
@pytest.mark.parametrize("normalize", [False, True])
def test_published_actor_comes_back_with_the_same_actions(tmp_path, sampler, normalize):
    environment = make_environment("InvertedPendulum-v5", num_envs=2, seed=0, normalize_observation=normalize)
    environment.rollout(20)
    actor = DiffusionActor(
        ScoreMLP(4, 1, (8, 4)),
        action_spec=Bounded(-3.0, 3.0, (1,)),
        noise_schedule=NoiseSchedule.cosine(5),
        sampler=sampler,
    )
    publish_actor(tmp_path, actor, hidden_dims=(8, 4), environment=environment, env="InvertedPendulum-v5")
    loaded = load_actor(tmp_path)
    raw = torch.randn(16, 4)
    norm = environment.transform[-1] if normalize else None
    seen = norm.normalize(raw) if normalize else raw
    torch.manual_seed(1)
    expected = actor(TensorDict({"observation": seen}, [16]))["action"]
    torch.manual_seed(1)
    assert torch.equal(loaded(TensorDict({"observation": raw}, [16]))["action"], expected)
    assert (expected.abs() < 3).any()
    assert json.loads((tmp_path / "config.json").read_text())["env"] == "InvertedPendulum-v5"


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: (folder / "config.json").unlink(),
        lambda folder: (folder / "config.json").write_text("{}"),
        lambda folder: (folder / "config.json").write_text("nonsense"),
        lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 100),
        lambda folder: (folder / "config.json").write_text(
            (folder / "config.json").read_text().replace('"observation_dim": 4', '"observation_dim": 5')
        ),
    ],
)
def test_a_broken_actor_folder_is_named(tmp_path, spoil):
    environment = make_environment("InvertedPendulum-v5", seed=0)
    spec = environment.action_spec_unbatched
    actor = DiffusionActor(ScoreMLP(4, 1, (8,)), action_spec=spec, noise_schedule=NoiseSchedule.cosine(5))
    publish_actor(tmp_path, actor, hidden_dims=(8,), environment=environment, env="InvertedPendulum-v5")
    load_actor(tmp_path)
    spoil(tmp_path)
    with pytest.raises(UserError, match="no actor that can be read"):
        load_actor(tmp_path)
