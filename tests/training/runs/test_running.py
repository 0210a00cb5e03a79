from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.loggers.logger import DummyLogger

from qsm_rl.training import QSMConfiguration, RunFolder, make_environment
from qsm_rl.training.evaluation.evaluate import EvaluationResult
from qsm_rl.training.folders import in_use
from qsm_rl.training.runs import running
from qsm_rl.training.runs.callbacks import (
    CheckpointWriter,
    Evaluation,
    LearningCurve,
    MetricRows,
    StopAtReturn,
    StopSignals,
)
from qsm_rl.training.runs.progress import Progress
from tests.training.small_trainer import env_id

DEFAULTS = {"env": env_id("Slide"), "total_frames": 100, "warmup_frames": 20, "compile": False}


def begin(path, resumed=False, **settings):
    config = QSMConfiguration(**{**DEFAULTS, "run_dir": path / "run", **settings})
    folder = RunFolder.open(config, "mujoco_qsm")
    folder.resumed = resumed
    return config, folder


@pytest.fixture(scope="module")
def slide():
    return make_environment(env_id("Slide"))


@pytest.mark.parametrize(
    ("settings", "first_frame", "line"),
    [
        ({}, 0, "frames: 100; warm-up: 20 frames of random actions"),
        (
            {"warmup_frames": 21},
            0,
            "frames: 100; warm-up: 20 frames of random actions, a fifth of total_frames instead of",
        ),
        ({"devices": 3}, 0, "frames: 100, rounded up to 120 (batches of 30); warm-up"),
        ({"total_frames": 105, "warmup_frames": 10}, 105, "frames: 105; warm-up"),  # it published no actor
        ({"total_frames": 105, "warmup_frames": 10}, 101, "frames: 105, rounded up to 111 (batches of 10); warm-up"),
        (
            {"num_envs": 2, "checkpoint_every": 50},
            0,
            "every checkpoint truncates the episodes, here after 25 frames each",
        ),
        ({"compile": True}, 0, "compiled (the first one takes about a minute)"),
        ({"devices": 2}, 0, "device: cpu, 2 processes, "),
    ],
    ids=str,
)
def test_a_run_says_what_it_will_do(tmp_path, slide, capsys, settings, first_frame, line):
    config, folder = begin(tmp_path, **settings)
    running.print_summary(config, folder, slide, torch.device("cpu"), first_frame=first_frame)
    said = capsys.readouterr().out
    assert "observation 2, action 2; preset default, seed 0" in said and f"run folder: {folder.path}" in said
    assert any(told.startswith(line) or told.endswith(line) for told in said.splitlines()), said
    assert ("a fifth of" in said) == (config.warmup_frames > 20)
    assert ("truncates the episodes" in said) == (config.num_envs > 1)
    assert (", compiled" in said, " processes" in said) == (config.compile is True, config.devices > 1)
    assert said.endswith("stop with Ctrl-C at any time; the run can be resumed\n")


def test_a_resumed_run_says_where_it_goes_on(tmp_path, slide, capsys):
    config, folder = begin(tmp_path, resumed=True)
    for frame, end in (
        (50, "resumed from the checkpoint at frame 50"),
        (0, "no checkpoint yet, so the run starts from the beginning"),
    ):
        running.print_summary(config, folder, slide, torch.device("cpu"), first_frame=frame)
        assert capsys.readouterr().out.strip().endswith(end)


class Recorder(DummyLogger):
    """A logger as of another library."""


def test_every_logger_goes_on_behind_the_checkpoint(tmp_path):
    config, folder = begin(tmp_path, logger={"class_path": f"{__name__}.Recorder"})
    folder.metrics.write_text("frames,a\n50,1\n51,1\n")
    _, tensorboard, other = running.make_loggers(config, folder, first_frame=50)
    assert folder.metrics.read_text() == "frames,a\n50,1\n"
    assert tensorboard._kwargs["purge_step"] == 51 and type(other).__name__ == "Recorder"
    assert len(running.make_loggers(QSMConfiguration(), folder)) == 2


def test_the_callbacks_have_the_settings_they_are_named_for(tmp_path, slide, monkeypatch):
    config, folder = begin(tmp_path, log_every=7, eval_every=13, stop_at_return=5.0, eval_video=True)
    frames = SimpleNamespace(collector=SimpleNamespace(env=slide), first_frame=0, checkpoint_every=50, total_frames=100)
    monkeypatch.setattr(running, "CheckpointWriter", lambda *arguments: arguments)
    evaluation, stop_at, rows, curve, checkpoints, progress, stop = running.make_callbacks(
        config, folder, frames, None, make_environment
    )
    assert [type(one) for one in (evaluation, stop_at, rows, curve, progress, stop)] == [
        *(Evaluation, StopAtReturn, MetricRows, LearningCurve, Progress, StopSignals),
    ]
    assert (evaluation.videos, stop_at.target, checkpoints[-1]) == (folder.videos, 5.0, stop)
    assert (rows.every, rows.evaluate_every, evaluation.every, curve.every) == (7, 13, 13, 13)
    assert not evaluation.deterministic
    other = replace(config, eval_video=False, eval_deterministic=True)
    evaluation = running.make_callbacks(other, folder, frames, None, make_environment)[0]
    assert evaluation.videos is None and evaluation.deterministic
    monkeypatch.setenv("LOCAL_RANK", "1")
    writer, stop = running.make_callbacks(config, folder, frames, None, make_environment)
    assert writer[-1] is stop, "a rank above 0 stores its replay buffer and ends with the others"


def finish(folder, capsys, *, frame=100, total=100, stored=100, videos=None, **how):
    """What a run prints that has ended at a frame."""
    closed = []
    stop, evaluation = StopSignals(), Evaluation(None, 10, None, 2, None, videos=videos)
    stop.signal = how.get("signal")
    evaluation.results = {"": EvaluationResult((1.0, 3.0), (5, 5)), "best_of_2": EvaluationResult((4.0, 4.0), (5, 5))}
    at = StopAtReturn(evaluation, how.get("target"))
    at.reached = how.get("reached")
    writer = CheckpointWriter.__new__(CheckpointWriter)
    writer.last_frame = stored
    logger = SimpleNamespace(finalize=closed.append)
    trainer = SimpleNamespace(loggers=[logger], callbacks=[evaluation, at, writer, stop])
    module = SimpleNamespace(env_frames=frame, env=DEFAULTS["env"])
    frames = SimpleNamespace(total_frames=total, close=lambda: closed.append("frames"))
    code = running.finish_run(trainer, module, frames, folder, usual_frames=how.get("usual", 100))
    assert closed == ["frames", "success"] and not in_use(folder.path / "config.yaml")
    return code, capsys.readouterr().out.splitlines()


def publish(path: Path) -> None:
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")


def test_a_finished_run_says_how_it_went_and_how_to_go_on(tmp_path, capsys):
    _, folder = begin(tmp_path / "a b")
    publish(folder.actor)
    code, told = finish(folder, capsys)
    resume = f"python recipes/mujoco_qsm.py --resume '{folder.path}'"
    assert (code, told) == (
        0,
        [
            "evaluation at frame 100: return 2.0 ± 1.0 over 2 episodes",
            "evaluation at frame 100, best_of_2: return 4.0 ± 0.0 over 2 episodes",
            f"learning curve: {folder.learning_curve}",
            f"actor: {folder.actor}",
            f"to train longer: {resume} --total_frames 200",
        ],
    )


@pytest.mark.parametrize(("preset", "flag"), [("paper", " --preset paper"), ("default", "")])
def test_a_short_run_says_how_to_begin_a_full_one(tmp_path, capsys, monkeypatch, preset, flag):
    monkeypatch.setattr(running.sys, "argv", ["here/mujoco_qsm.py"])
    _, folder = begin(tmp_path, preset=preset)
    publish(folder.path / "seed_3" / "actor")
    _, told = finish(folder, capsys, usual=101)
    env = DEFAULTS["env"]
    assert told[-3:-1] == [
        f"actor: {folder.path}/seed_N/actor",
        f"the full run, 101 frames with the preset's settings: python here/mujoco_qsm.py --env {env}{flag}",
    ]


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"stored": None}, "no checkpoint had been written yet; to start again: {resume}"),
        ({"stored": 50, "frame": 60}, "to continue from the checkpoint at frame 50: {resume}"),
        ({"stored": 50, "total": 300}, "to continue from the checkpoint at frame 50: {resume} --total_frames 300"),
        ({"stored": 100}, "the run is finished; to train longer: {resume} --total_frames 200"),
        ({"stored": 50, "target": 7.5}, "to continue from the checkpoint at frame 50: {resume} --stop_at_return 7.5"),
    ],
    ids=str,
)
def test_a_stopped_run_says_how_to_go_on(tmp_path, capsys, given, line):
    _, folder = begin(tmp_path)
    publish(folder.actor)
    code, told = finish(folder, capsys, signal=signal.SIGTERM, **given)
    assert code == 143
    assert told == [
        f"stopped by SIGTERM at frame {given.get('frame', 100)}; actor: {folder.actor}",
        line.format(resume=f"python recipes/mujoco_qsm.py --resume {folder.path}"),
    ]


@pytest.mark.parametrize(
    ("stored", "total", "where"),
    [
        (None, 100, "to start again: {resume} --stop_at_return null"),
        (40, 300, "to continue from the checkpoint at frame 40: {resume} --total_frames 300 --stop_at_return null"),
    ],
)
def test_a_run_that_reached_its_return_says_how_to_go_on_without(tmp_path, capsys, stored, total, where):
    _, folder = begin(tmp_path, stop_at_return=2.0)
    publish(folder.actor)
    code, told = finish(folder, capsys, frame=50, stored=stored, total=total, target=2.0, reached=2.0)
    assert code == 0
    assert told[-2:] == [
        "stopped at frame 50: the evaluation's return of 2.0 is at least --stop_at_return 2",
        where.format(resume=f"python recipes/mujoco_qsm.py --resume {folder.path}"),
    ]


def test_a_run_with_videos_says_where_they_are(tmp_path, capsys):
    _, folder = begin(tmp_path)
    assert f"videos: {folder.videos}" in finish(folder, capsys, videos=folder.videos)[1]


def test_a_return_that_was_given_up_on_resuming_is_given_up_in_the_command_too(tmp_path, capsys):
    _, folder = begin(tmp_path, stop_at_return=2.0)
    publish(folder.actor)
    _, told = finish(folder, capsys)
    assert told[-1].endswith(f"--resume {folder.path} --stop_at_return null --total_frames 200")
