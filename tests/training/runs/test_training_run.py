from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from qsm_rl.training import QSMConfiguration, UserError, make_environment
from qsm_rl.training.runs import training_run
from qsm_rl.training.runs.training_run import TrainingRun, checked_environment
from tests.training.small_trainer import build, env_id


def asked_for(monkeypatch, folder, written, stored, device="cpu", **settings):
    """What room a run with a replay buffer of 1,000 rows on each rank asks for."""
    asked, config = {}, QSMConfiguration(env=env_id("Slide"), checkpoint_every=70, **settings)
    monkeypatch.setattr(training_run, "check_space", lambda path, **needs: asked.update(needs, path=path))
    _, module = build("Slide")
    run = SimpleNamespace(
        config=config, device=torch.device(device), folder=folder, environment=make_environment(env_id("Slide"))
    )
    TrainingRun._check_space(run, module, written, stored)
    return asked


def test_room_is_asked_for_what_the_run_will_write_and_has_not_yet(monkeypatch):
    folder = SimpleNamespace(path="here")
    asked = asked_for(monkeypatch, folder, 600, 200)
    assert (asked["rows"], asked["stored"], asked["capacity"]) == (600, 200, 1000)
    assert (asked["checkpoint_every"], asked["path"], asked["device"]) == (70, "here", torch.device("cpu"))
    assert asked["row"] == 4 * (2 + 2 + 2 + 1) + 2 and all(isinstance(v, torch.Tensor) for v in asked["state"].values())
    asked = asked_for(monkeypatch, folder, 1600, 1200, replay_storage="disk")
    assert (asked["rows"], asked["stored"], asked["device"]) == (1000, 1000, None)
    assert asked_for(monkeypatch, folder, 600, 200, device="cuda:0")["rows"] == 600


def test_the_buffers_of_all_processes_are_asked_for(monkeypatch):
    asked = asked_for(monkeypatch, SimpleNamespace(path="here"), 5000, 2500, devices=3)
    assert (asked["rows"], asked["stored"], asked["capacity"]) == (3000, 2500, 1000)


@pytest.mark.parametrize("resumed", [False, True])
def test_a_new_run_without_room_leaves_no_folder(monkeypatch, resumed):
    discarded = []
    folder = SimpleNamespace(path="here", resumed=resumed, discard=lambda: discarded.append(True))

    def refused(*arguments, **needs):
        raise UserError("no room")

    _, module = build("Slide")
    config = QSMConfiguration(env=env_id("Slide"))
    environment = make_environment(env_id("Slide"))
    run = SimpleNamespace(config=config, device=torch.device("cpu"), folder=folder, environment=environment)
    monkeypatch.setattr(training_run, "check_space", refused)
    with pytest.raises(UserError, match="no room"):
        TrainingRun._check_space(run, module, 10, 0)
    assert bool(discarded) != resumed


def test_environments_are_made_as_the_settings_say_once_what_they_need_is_there(monkeypatch):
    seen = []
    for name in ("check_logger", "check_workers", "check_registered"):
        monkeypatch.setattr(training_run, name, lambda value, name=name: seen.append((name, value)))
    monkeypatch.setattr(training_run, "check_filming", lambda env, make: seen.append(("check_filming", env)))
    config = QSMConfiguration(env=env_id("Slide"), seed=7, action_repeat=2, normalize_observation=True)
    make, environment = checked_environment(config, 3)
    assert seen == [("check_logger", None), ("check_workers", config), ("check_registered", config.env)]
    expected = make_environment(config.env, num_envs=3, seed=7, action_repeat=2, normalize_observation=True)
    for one in (environment, make(num_envs=3, seed=7)):
        expected.set_seed(7)
        wanted, found = expected.rollout(4), (one.set_seed(7), one.rollout(4))[1]
        assert found.batch_size == wanted.batch_size
        torch.testing.assert_close(found["next", "step_count"], wanted["next", "step_count"])
    checked_environment(QSMConfiguration(env=config.env, eval_video=True), 1)
    assert ("check_filming", config.env) in seen
