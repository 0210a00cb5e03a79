from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torchrl.modules import RandomPolicy

from qsm_rl import DiffusionActor, NoiseSchedule, ScoreMLP
from qsm_rl.training import (
    UserError,
    evaluate_policy,
    make_environment,
)
from tests.training.small_trainer import env_id


def test_evaluation_leaves_every_generator_as_it_was_and_repeats_itself():
    environment = make_environment(env_id("Slide"), num_envs=3)
    policy = DiffusionActor(
        ScoreMLP(2, 2, (8,)), action_spec=environment.action_spec_unbatched, noise_schedule=NoiseSchedule.vp(3)
    )
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    first = evaluate_policy(environment, policy, seed=1)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()
    assert random.getstate() == states[2]
    torch.manual_seed(99)
    assert evaluate_policy(environment, policy, seed=1) == first
    assert evaluate_policy(environment, policy, seed=2) != first


def test_each_environment_gives_its_first_episode_however_long():
    environment = make_environment(env_id("Countdown"), num_envs=6)
    policy = RandomPolicy(environment.full_action_spec)
    result = evaluate_policy(environment, policy, seed=3)
    environment.set_seed(3)
    environment.reset()
    counts = tuple(inner.unwrapped.left for inner in environment.base_env._env.envs)
    assert len(set(counts)) > 2
    assert result.lengths == counts
    assert result.returns == pytest.approx(counts)
    metrics = result.metrics()
    assert metrics["eval/return_mean"] == pytest.approx(np.mean(counts))
    assert metrics["eval/return_std"] == pytest.approx(np.std(counts))


def test_an_environment_without_end_is_named(monkeypatch):
    monkeypatch.setattr("qsm_rl.training.evaluation.LONGEST_EPISODE", 3)  # it takes longer to slide off
    environment = make_environment(env_id("Slide"))
    with pytest.raises(UserError, match="max_episode_steps"):
        evaluate_policy(environment, RandomPolicy(environment.full_action_spec), seed=0)
