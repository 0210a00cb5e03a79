from __future__ import annotations

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box

from qsm_rl.training.environments.environment_check import check_environment
from qsm_rl.training.environments.make_environment import check_registered


class Sound(gymnasium.Env):
    """Nothing is wrong with it; each case below spoils one thing."""

    observation_space, action_space = Box(-1, 1, (2,), np.float32), Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time = 0
        return self.observe(), {}

    def observe(self):
        return self.np_random.uniform(-1, 1, 2).astype(np.float32)

    def step(self, action):
        self.time += 1
        return self.observe(), 1.0, self.time >= 5, False, {}


def returning(**changed):
    """The environment with one of the five results of step replaced."""

    class Spoiled(Sound):
        def step(self, action):
            names = ("observation", "reward", "terminated", "truncated", "info")
            return tuple({**dict(zip(names, super().step(action), strict=True)), **changed}.values())

    return Spoiled


def observing(observation):
    return type("Spoiled", (Sound,), {"observe": lambda self: observation})


class NoInfo(Sound):
    def reset(self, *, seed=None, options=None):
        return super().reset(seed=seed)[0]


class NoSeed(Sound):
    def observe(self):
        return np.random.uniform(-1, 1, 2).astype(np.float32)


class OldSignature(Sound):
    def reset(self):
        return np.zeros(2, np.float32), {}


class FourResults(Sound):
    def step(self, action):
        return super().step(action)[:4]


class Breaking(Sound):
    def step(self, action):
        if action[0] == 1.0:
            raise IndexError("table of size 3")
        return super().step(action)


class NanLater(Sound):
    def observe(self):
        return np.full(2, np.nan if getattr(self, "time", 0) == 4 else 0, np.float32)


@pytest.mark.parametrize(
    ("spoiled", "words"),
    [
        (NoInfo, r"reset\(\) returns ndarray, expected \(observation, info\)"),
        (NoSeed, r"reset\(seed=0\) gives another observation each time"),
        (OldSignature, r"reset\(\) fails with TypeError"),
        (FourResults, r"step\(\) returns \(ndarray, float, bool, bool\), expected"),
        (Breaking, r"step\(\) fails with IndexError: table of size 3"),
        (NanLater, r"step\(\) gives nan as number 0 of the observation"),
        (observing(np.zeros(2)), r"dtype float64, expected float32; return observation.astype"),
        (observing(np.zeros(3, np.float32)), r"shape \(3,\), expected \(2,\)"),
        (observing("text"), r"shape \(\), expected"),
        (
            observing(np.array([0, 1.5], np.float32)),
            r"1\.5 as number 1 of the observation, beyond its bounds",
        ),
        (returning(reward=float("nan")), "reward nan, expected one finite number"),
        (returning(reward=np.zeros(2)), "reward array"),
        (returning(reward=None), "reward None"),
        (returning(terminated=0.0), "terminated = 0.0, expected True or False"),
        (returning(truncated=None), "truncated = None"),
        (returning(info=None), r"NoneType\), expected"),
        (returning(terminated=False), "no episode has ended within 10,000 random steps"),
    ],
)
def test_what_is_broken_is_refused_by_name(spoiled, words):
    with pytest.raises(ValueError, match=f"Mine-v0: .*{words}"):
        check_environment(spoiled(), "Mine-v0")


def test_sound_environments_pass():
    check_environment(Sound(), "Mine-v0")
    check_environment(gymnasium.wrappers.TimeLimit(returning(terminated=False)(), 1_000), "Mine-v0")
    flags = {"observation_space": Box(0, 1, (2,), np.bool_), "observe": lambda self: self.np_random.random(2) > 0.5}
    check_environment(type("Flags", (Sound,), flags)(), "Mine-v0")
    for name in ("HalfCheetah-v5", "InvertedPendulum-v5", "Hopper-v5"):
        check_registered(name)
    pytest.importorskip("dm_control")
    check_registered("dm_control/walker-walk")
