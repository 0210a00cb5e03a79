from __future__ import annotations

import dataclasses
import errno
import fcntl
import os

import pytest

from qsm_rl.training import (
    QSMConfiguration,
    RunFolder,
    UserError,
    parse_configuration,
)
from qsm_rl.training.folders import in_use
from qsm_rl.training.runs.resuming import check_never_stored


def parse(*arguments: str) -> QSMConfiguration:
    return parse_configuration(QSMConfiguration, arguments)


def test_run_folder_is_made_once_and_used_by_one_process(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = parse("--env", "Hopper-v5", "--seed", "7")
    folder = RunFolder.open(config, "some_recipe")
    assert folder.path.parent.as_posix() == "runs/some_recipe/Hopper-v5"
    assert folder.path.name.endswith("-s7")
    again = dataclasses.replace(config, run_dir=folder.path)
    with pytest.raises(UserError, match=r"already holds a run.*--resume"):
        RunFolder.open(again, "some_recipe")
    (folder.checkpoints / "replay").mkdir(parents=True)
    (folder.checkpoints / "replay" / "rows.incomplete").touch()
    with pytest.raises(UserError, match="in use by another process"):
        RunFolder.open(dataclasses.replace(config, resume=folder.path), "some_recipe")
    assert list(folder.checkpoints.rglob("*.incomplete")), "the other process is writing it"
    folder.close()  # as if it had been killed
    RunFolder.open(dataclasses.replace(config, resume=folder.path), "some_recipe").close()
    assert not list(folder.checkpoints.rglob("*.incomplete"))
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="not empty"):
        RunFolder.open(dataclasses.replace(config, run_dir=other), "some_recipe")
    with pytest.raises(UserError, match="cannot be created"):
        RunFolder.open(dataclasses.replace(config, run_dir=other / "thesis.tex" / "run"), "some_recipe")


def test_a_file_system_without_locks_is_named_and_used(tmp_path, monkeypatch, capsys):
    def refused(file, operation):
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    monkeypatch.setattr(fcntl, "flock", refused)
    folder = RunFolder.open(parse("--run_dir", str(tmp_path / "run")), "some_recipe")
    assert "config.yaml cannot be locked (Bad file descriptor)" in capsys.readouterr().err
    assert not in_use(folder.path / "config.yaml")


def test_locks_are_asked_for_where_nfs_gives_them(tmp_path, monkeypatch):
    """An exclusive lock of a file that is open for reading alone is EBADF there."""

    def flock(file, operation):
        if fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        given(file, operation)

    given = fcntl.flock
    monkeypatch.setattr(fcntl, "flock", flock)
    folder = RunFolder.open(parse("--run_dir", str(tmp_path / "run")), "some_recipe")
    assert in_use(folder.path / "config.yaml")
    folder.close()
    assert not in_use(folder.path / "config.yaml")


@pytest.mark.parametrize(
    "name",
    [
        *("config.yaml", "metrics.csv", "learning_curve.png", "logger_id.txt"),
        *("tensorboard", "videos", "faults", "checkpoints", "actor", "seed_0"),
        *("checkpoints/replay/rows.safetensors", "actor/config.json", "seed_0/config.yaml", "seed_0/actor/config.json"),
    ],
)
def test_links_in_a_resumed_run_are_refused(tmp_path, name):
    RunFolder.open(parse("--run_dir", str(tmp_path / "run")), "some_recipe").close()
    link = tmp_path / "run" / name
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(tmp_path)
    with pytest.raises(UserError, match=f"{name} is a symbolic link"):
        RunFolder.open(dataclasses.replace(parse(), resume=tmp_path / "run"), "some_recipe")


@pytest.mark.parametrize(("frame", "refused"), [(100, False), (112, False), (128, True)])
def test_rows_up_to_the_first_checkpoint_s_batch_are_no_lost_checkpoints(tmp_path, frame, refused):
    """With batches of 16 the checkpoint of every 100 frames comes at 112, and a row of that frame before it."""
    config = parse("--num_envs", "16", "--checkpoint_every", "100", "--run_dir", str(tmp_path / "run"))
    folder = RunFolder.open(config, "some_recipe")
    folder.metrics.write_text(f"frames,eval/return_mean\n{frame},1.0\n")
    if refused:
        with pytest.raises(UserError, match="has a log up to frame 128 but no checkpoint"):
            check_never_stored(config, folder)
    else:
        check_never_stored(config, folder)


@pytest.mark.parametrize("total_frames", ["60", "120"])
def test_a_run_that_ended_before_its_first_period_has_lost_a_checkpoint(tmp_path, total_frames):
    """The last frame brings one; more frames to go on for do not change that."""
    given = ("--checkpoint_every", "100", "--run_dir", str(tmp_path / "run"))
    folder = RunFolder.open(parse("--total_frames", "60", *given), "some_recipe")
    folder.metrics.write_text("frames,eval/return_mean\n60,1.0\n")
    folder.actor.mkdir()
    (folder.actor / "config.json").write_text("{}")
    with pytest.raises(UserError, match="has a log up to frame 60 but no checkpoint"):
        check_never_stored(parse("--total_frames", total_frames, *given), folder)


def test_a_log_without_a_row_is_no_lost_checkpoint(tmp_path):
    config = parse("--run_dir", str(tmp_path / "run"))
    folder = RunFolder.open(config, "some_recipe")
    folder.metrics.write_text("frames,eval/return_mean\n")  # killed again before its first row
    check_never_stored(config, folder)


def test_a_process_of_a_higher_rank_that_no_run_has_started_is_refused(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.delenv("QSM_RL_RUN_FOLDER", raising=False)
    with pytest.raises(UserError, match=r"LOCAL_RANK is 1, .* start the run once, without torchrun"):
        RunFolder.open(parse(), "mujoco_qsm")


@pytest.mark.parametrize("resumed", [False, True])
def test_a_process_of_a_higher_rank_joins_the_folder_of_rank_0_and_holds_no_lock(tmp_path, monkeypatch, resumed):
    first = RunFolder.open(parse("--run_dir", str(tmp_path / "run")), "some_recipe")
    config = dataclasses.replace(parse(), resume=first.path if resumed else None)
    monkeypatch.setenv("LOCAL_RANK", "1")
    joined = RunFolder.open(config, "some_recipe")
    assert (joined.path, joined.resumed) == (first.path, resumed)
    joined.close()
    assert in_use(first.path / "config.yaml")
    monkeypatch.setenv("LOCAL_RANK", "0")
    first.close()


def test_a_run_that_could_not_begin_leaves_nothing_but_what_others_have_put_there(tmp_path):
    folder = RunFolder.open(parse("--run_dir", str(tmp_path / "run")), "some_recipe")
    folder.discard()
    assert not folder.path.exists()
    folder = RunFolder.open(parse("--run_dir", str(tmp_path / "run")), "some_recipe")
    (folder.path / "notes.txt").touch()
    folder.discard()
    assert [path.name for path in folder.path.iterdir()] == ["notes.txt"]


def test_actors_are_published_once_they_are_whole(tmp_path):
    folder = RunFolder.open(parse("--run_dir", str(tmp_path / "run")), "some_recipe")
    for name in ("actor", "seed_1/actor", "seed_0/actor"):
        (folder.path / name).mkdir(parents=True)
    assert folder.published == []
    for name in ("actor", "seed_1/actor", "seed_0/actor"):
        (folder.path / name / "config.json").touch()
    assert folder.published == [folder.path / name for name in ("actor", "seed_0/actor", "seed_1/actor")]


def test_a_run_whose_settings_cannot_be_written_is_not_gone_on_with(tmp_path, monkeypatch):
    config = parse("--run_dir", str(tmp_path / "run"))
    RunFolder.open(config, "some_recipe").close()

    def refused(*arguments, **options):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("pathlib.Path.open", refused)
    with pytest.raises(UserError, match=r"config\.yaml cannot be written: Permission denied"):
        RunFolder.open(dataclasses.replace(config, resume=tmp_path / "run"), "some_recipe")
