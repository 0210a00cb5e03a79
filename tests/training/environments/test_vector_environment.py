from __future__ import annotations

from functools import partial

import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from torchrl.envs import GymWrapper, RewardSum, StepCounter, TransformedEnv
from torchrl.envs.transforms import Compose

from qsm_rl.training import make_environment
from qsm_rl.training.environments.vector_environment import VectorEnvironment
from tests.training.small_trainer import Countdown, env_id


def batch_of_three(mode=AutoresetMode.DISABLED):
    return SyncVectorEnv([Countdown] * 3, autoreset_mode=mode)


def test_it_steps_sums_and_counts_as_torchrls_wrapper_and_transforms_do():
    ours = VectorEnvironment(batch_of_three())
    theirs = TransformedEnv(GymWrapper(batch_of_three(), device="cpu"), Compose(RewardSum(), StepCounter()))
    rollouts = []
    for environment in (ours, theirs):
        environment.set_seed(1)
        torch.manual_seed(0)
        rollouts.append(environment.rollout(60, break_when_any_done=False))
        environment.close()
    ended = rollouts[0]["next", "done"].squeeze(-1)
    assert (ended.any(0) & ~ended.all(0)).any()  # some resets are partial
    types = [{key: value.dtype for key, value in one.items(True, True)} for one in rollouts]
    assert types[0] == types[1]
    assert (rollouts[0] == rollouts[1]).all()


def test_a_vector_environment_that_resets_by_itself_is_refused():
    with pytest.raises(ValueError, match=r"AutoresetMode.DISABLED, got .*SAME_STEP"):
        VectorEnvironment(batch_of_three(AutoresetMode.SAME_STEP))


@pytest.mark.parametrize("normalize_observation", [False, True])
def test_closing_closes_every_environment_once(normalize_observation):
    environment, closed = make_environment(env_id("Slide"), num_envs=2, normalize_observation=normalize_observation), []
    for number, env in enumerate(environment.vector_env.envs):
        env.unwrapped.close = partial(closed.append, number)
    environment.reset()
    assert not environment.is_closed
    environment.close()
    environment.close()
    assert environment.is_closed and closed == [0, 1]
