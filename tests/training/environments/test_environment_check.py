from __future__ import annotations

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box
from gymnasium.wrappers import OrderEnforcing, TimeLimit

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


class NoReset(Sound):
    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)  # and no return


class NoStep(Sound):
    def step(self, action):
        super().step(action)


class NanInALaterEpisode(Sound):
    observations = 0

    def observe(self):
        self.observations += 1
        return np.full(2, np.nan if self.observations == 30 else 0, np.float32)


class NanLater(Sound):
    def observe(self):
        return np.full(2, np.nan if getattr(self, "time", 0) == 4 else 0, np.float32)


@pytest.mark.parametrize(
    ("spoiled", "words"),
    [
        (NoInfo, r"reset\(\) returns ndarray, expected \(observation, info\)"),
        (NoSeed, r"reset\(seed=0\) returns a different observation each time"),
        (OldSignature, r"reset\(\) fails with TypeError"),
        (FourResults, r"step\(\) returns \(ndarray, float, bool, bool\), expected"),
        (Breaking, r"step\(\) fails with IndexError: table of size 3"),
        (NoReset, r"reset\(\) returns NoneType, expected"),
        (NoStep, r"step\(\) returns NoneType, expected"),
        (NanInALaterEpisode, "returns an observation with nan at index 0"),
        (NanLater, r"step\(\) returns an observation with nan at index 0"),
        (observing(np.zeros(2)), r"dtype float64, expected float32; return observation.astype"),
        (observing(np.zeros(3, np.float32)), r"shape \(3,\), expected \(2,\)"),
        (observing("text"), r"shape \(\), expected"),
        (
            observing(np.array([0, 1.5], np.float32)),
            r"1\.5 at index 1, outside its bounds",
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


@pytest.mark.parametrize(("length", "truncates"), [(5, False), (5, True), (500, False)])
def test_it_takes_the_same_fifty_steps_each_time_or_more_to_an_end_and_none_behind_one(length, truncates):
    class Ending(Sound):
        def step(self, action):
            assert self.time < length, "behind the end"
            taken.append(float(action[0]))
            observation, reward, *_, info = super().step(action)
            over = self.time == length
            return observation, reward, over and not truncates, over and truncates, info

    taken: list[float] = []
    check_environment(Ending(), "Mine-v0")
    first, taken = taken, []
    check_environment(Ending(), "Mine-v0")
    assert first == taken and first[:2] == [-1, 1] and max(50, length) <= len(first) <= max(51, length)


def test_a_time_limit_beyond_the_longest_look_is_believed():
    endless = returning(terminated=False)
    check_environment(TimeLimit(OrderEnforcing(endless()), 10**6), "Mine-v0")
    check_environment(OrderEnforcing(TimeLimit(endless(), 10**6)), "Mine-v0")


def test_sound_environments_pass():
    check_environment(Sound(), "Mine-v0")
    check_environment(TimeLimit(returning(terminated=False)(), 1_000), "Mine-v0")
    flags = {"observation_space": Box(0, 1, (2,), np.bool_), "observe": lambda self: self.np_random.random(2) > 0.5}
    check_environment(type("Flags", (Sound,), flags)(), "Mine-v0")
    for name in ("HalfCheetah-v5", "InvertedPendulum-v5", "Hopper-v5"):
        check_registered(name)
    pytest.importorskip("dm_control")
    check_registered("dm_control/walker-walk")
