from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from tensordict.nn import TensorDictModule
from torchrl.envs.utils import ExplorationType, exploration_type, set_exploration_type

from qsm_rl import DiffusionActor, NoiseSchedule, ScoreMLP
from qsm_rl.training import UserError, evaluate_agents, evaluate_policy, make_environment
from tests.training.small_trainer import env_id


def make_evaluator(name, episodes):
    environment = make_environment(env_id(name))
    observation_dim = environment.observation_spec["observation"].shape[-1]
    action_spec = environment.action_spec_unbatched
    actor = DiffusionActor(
        ScoreMLP(observation_dim, action_spec.shape[-1], (8,)),
        action_spec=action_spec,
        noise_schedule=NoiseSchedule.vp(3),
    )

    def evaluate(seed, **options):
        return evaluate_policy(make_environment(env_id(name)), actor, episodes=episodes, seed=seed, **options)

    return evaluate, actor


def test_evaluation_leaves_every_generator_as_it_was_and_repeats_itself():
    evaluate, _ = make_evaluator("Slide", 3)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    first = evaluate(1)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()
    assert random.getstate() == states[2]
    torch.manual_seed(99)
    assert evaluate(2) != first
    assert evaluate(1) == first


def test_evaluation_uses_the_weights_as_they_are():
    evaluate, actor = make_evaluator("Slide", 3)
    before = evaluate(1)
    with torch.no_grad():
        for parameter in actor.parameters():
            parameter.add_(1.0)
    assert evaluate(1) != before
    assert all(parameter.requires_grad for parameter in actor.parameters())


def test_the_deterministic_policy_runs_through_the_same_states():
    """Against the steps written out; the collector resets once before it begins."""
    evaluate, actor = make_evaluator("Slide", 1)
    environment = make_environment(env_id("Slide"))
    environment.set_seed(5)
    environment.reset()
    with set_exploration_type(ExplorationType.DETERMINISTIC), torch.no_grad():
        rollout = environment.rollout(100, actor)
    result = evaluate(5, deterministic=True)
    assert result.returns == pytest.approx([rollout["next", "reward"].sum().item()])
    assert result.lengths == (rollout.numel(),)
    assert evaluate(5).returns != pytest.approx(result.returns)
    assert result.metrics("deterministic")["eval/deterministic/return_mean"] == pytest.approx(result.returns[0])


def test_every_episode_counts_however_long():
    evaluate, _ = make_evaluator("Countdown", 6)
    result = evaluate(3)
    # The reward is 1 a step, and the lengths are those that the environment draws, one after the other; the collector
    # resets once before it begins.
    environment = make_environment(env_id("Countdown"))
    environment.set_seed(3)
    counts = []
    for _ in range(7):
        environment.reset()
        counts.append(environment.vector_env.envs[0].unwrapped.left)
    assert len(set(counts)) > 2
    assert result.lengths == tuple(counts[1:])
    assert result.returns == pytest.approx(counts[1:])
    metrics = result.metrics()
    assert metrics["eval/return_mean"] == pytest.approx(np.mean(counts[1:]))
    assert metrics["eval/return_std"] == pytest.approx(np.std(counts[1:]))
    assert (metrics["eval/return_min"], metrics["eval/return_max"]) == (min(counts[1:]), max(counts[1:]))
    assert metrics["eval/episode_length"] == pytest.approx(np.mean(counts[1:]))


def test_episodes_that_a_time_limit_ends_count_too():
    policy = TensorDictModule(lambda observation: (-observation).clamp(-1, 1), ["observation"], ["action"])  # stays
    environment = make_environment(env_id("Slide"))
    assert evaluate_policy(environment, policy, episodes=2, seed=0).lengths == (40, 40)
    assert environment.vector_env.closed


def test_an_environment_without_end_is_named(monkeypatch):
    monkeypatch.setattr("qsm_rl.training.evaluation.evaluate.LONGEST_EPISODE", 3)  # it takes longer to slide off
    evaluate, _ = make_evaluator("Slide", 1)
    with pytest.raises(UserError, match="max_episode_steps"):
        evaluate(0)
    with pytest.raises(UserError, match="max_episode_steps"):
        evaluate_two_agents(0)


def evaluate_two_agents(seed, seen=None):
    """Agents that act at random, in two environments each."""

    def policy(tensordict):
        if seen is not None:
            seen.append(exploration_type())
        return tensordict.set("action", torch.rand(2, 2, 2) * 2 - 1)

    environment = make_environment(env_id("Slide"), num_envs=4)
    try:
        return evaluate_agents(environment, policy, agents=2, seed=seed, device=torch.device("cpu"))
    finally:
        assert environment.vector_env.closed


def test_agents_sample_with_random_numbers_of_the_evaluation_s_own():
    state, seen = torch.get_rng_state(), []
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        first = evaluate_two_agents(1, seen)
    assert set(seen) == {ExplorationType.RANDOM} and torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert evaluate_two_agents(1) == first != evaluate_two_agents(2)
