from __future__ import annotations

import json
from dataclasses import replace

import pytest

from qsm_rl.training import QSMConfiguration, RunFolder, UserError, make_environment
from qsm_rl.training.runs.resuming import check_identity, check_never_stored, check_unfinished, run_identity
from tests.training.small_trainer import env_id

CONFIG = QSMConfiguration(total_frames=200, eval_every=100)


@pytest.fixture
def folder(tmp_path):
    return RunFolder.open(replace(CONFIG, run_dir=tmp_path / "run"), "some_recipe")


def publish(folder: RunFolder, name: str = "") -> None:
    path = folder.path / name / "actor"
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")


@pytest.fixture(scope="module")
def slide():
    return make_environment(env_id("Slide"), num_envs=2)


@pytest.mark.parametrize(
    "change",
    [
        *({"stop_at_return": 5.0}, {"device": "cpu"}, {"precision": "float32"}, {"compile": False}, {"log_every": 7}),
        *({"logger": {"class_path": "a.B"}}, {"replay_storage": "disk"}),
        *({"eval_every": 7}, {"eval_best_of": 4}, {"eval_video": True}, {"run_dir": "a"}, {"resume": "a"}),
        {"total_frames": 2_000, "warmup_frames": 40},  # as config.yaml has the warm-up of 200 frames
    ],
    ids=str,
)
def test_what_may_be_edited_does_not_enter_a_run_s_identity(slide, change):
    config = replace(CONFIG, num_envs=2)
    assert run_identity(replace(config, **change), slide) == run_identity(config, slide)
    workers = replace(config, num_workers=2)
    assert run_identity(replace(workers, worker_backend="ray"), slide) == run_identity(workers, slide)


@pytest.mark.parametrize("change", [{"seed": 1}, {"tau": 0.1}, {"checkpoint_every": 7}, {"num_envs": 2}], ids=str)
def test_another_setting_is_named_with_the_file_to_mend(slide, change):
    state = {"frames": 1000, "run": json.loads(json.dumps(run_identity(CONFIG, slide)))}
    check_identity(state, run_identity(CONFIG, slide), "runs/a")
    check_identity({"frames": 1000}, run_identity(CONFIG, slide), "runs/a")  # of a version that kept none
    ((name, value),) = change.items()
    cause = "frame 1,000 does not match this run: runs/a/config.yaml was changed. Compared with the checkpoint"
    with pytest.raises(UserError, match=f"{cause}, {name} is {value}, expected "):
        check_identity(state, run_identity(replace(CONFIG, **change), slide), "runs/a")


@pytest.mark.parametrize(
    ("name", "words"), [("Countdown", "observation_size is 1"), ("WideSlide", r"action_(low|high).* is -?3")]
)
def test_another_environment_is_named(slide, name, words):
    state = {"frames": 1000, "run": run_identity(CONFIG, slide)}
    other = run_identity(CONFIG, make_environment(env_id(name)))
    with pytest.raises(UserError, match=f"the environment has changed. Compared with the checkpoint, {words}"):
        check_identity(state, other, "runs/a")
    assert state["run"]["environment"] == {"observation_size": 2, "action_low": [-1, -1], "action_high": [1, 1]}


@pytest.mark.parametrize(
    ("rows", "published", "refused"),
    [
        ("200,1.0", True, True),
        ("200,1.0", False, False),  # killed before its actor
        ("200,", True, False),  # stopped in its last evaluation
        ("100,1.0\n200,", True, False),
        ("199,1.0", True, False),
    ],
)
def test_a_run_that_ended_before_its_first_checkpoint_s_frame_has_lost_one(folder, rows, published, refused):
    folder.metrics.write_text(f"frames,eval/return_mean\n{rows}\n")
    if published:
        publish(folder)
    if refused:
        with pytest.raises(UserError, match="has a log up to frame 200 but no checkpoint"):
            check_never_stored(CONFIG, folder)
    else:
        check_never_stored(CONFIG, folder)


def test_the_first_checkpoint_of_several_processes_comes_with_a_batch_of_all(folder):
    config = replace(CONFIG, total_frames=10_000, devices=2, frames_per_batch=16, checkpoint_every=100)
    folder.metrics.write_text("frames\n128\n")
    check_never_stored(config, folder)
    with pytest.raises(UserError, match="up to frame 128"):
        check_never_stored(replace(config, devices=1), folder)


def test_a_run_is_finished_with_all_its_frames_and_an_actor(folder):
    check_unfinished(CONFIG, folder, 200)  # killed before it published one
    publish(folder, "seed_3")  # of one of several agents
    check_unfinished(CONFIG, folder, 199)
    with pytest.raises(UserError, match="finished at frame 200"):
        check_unfinished(CONFIG, folder, 200)


@pytest.mark.parametrize(
    ("target", "first_frame", "finished"), [(5.0, 100, True), (5.1, 100, False), (5.0, 99, False), (None, 150, False)]
)
def test_a_return_that_was_reached_up_to_the_checkpoint_finishes_a_run(folder, target, first_frame, finished):
    folder.metrics.write_text("frames,eval/return_mean\n50,\n100,5.0\n200,9.0\n")
    config = replace(CONFIG, stop_at_return=target)
    if finished:
        with pytest.raises(
            UserError, match=r"its evaluation at frame 100 gave a return of 5.0, at least --stop_at_return 5;"
        ):
            check_unfinished(config, folder, first_frame)
    else:
        check_unfinished(config, folder, first_frame)
