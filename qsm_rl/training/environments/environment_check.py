"""Checks an environment before training: its faults would otherwise show after hours, or never."""

from __future__ import annotations

import warnings
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box
from gymnasium.wrappers import TimeLimit

__all__ = ["check_environment"]

STEPS = 50
LONGEST = 10_000


def check_environment(env: gymnasium.Env, name: str) -> None:
    """Steps an environment with random and extreme actions, and refuses faults that would ruin any training.

    Gymnasium's own ``check_env`` checks more of the interface, but only warns of NaN and of values outside their space.

    Args:
        env: the environment as registered, with box spaces; it is seeded and stepped, but not closed.
        name: its name, for messages.

    Raises:
        ValueError: if it raises; if it returns anything that differs from its spaces in form, dtype or shape, lies
            outside their bounds, or is not finite; or if it has no end, that is, no time limit and no episode that ends
            within 10,000 random steps.
    """
    space, actions = env.observation_space, env.action_space
    assert isinstance(space, Box) and isinstance(actions, Box)
    actions.seed(0)
    extremes = [actions.low, actions.high]
    limited, wrapper = False, env
    while isinstance(wrapper, gymnasium.Wrapper):
        limited, wrapper = limited or isinstance(wrapper, TimeLimit), wrapper.env
    limited = limited or getattr(wrapper, "has_time_limit", False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Gymnasium's warnings of the same faults
        first = _reset(env, name, space, seed=0)
        if not np.array_equal(first, _reset(env, name, space, seed=0)):
            raise ValueError(
                f"{name}: reset(seed=0) returns a different observation each time; draw random numbers only from "
                "self.np_random, after super().reset(seed=seed)."
            )
        ended = limited
        for step in range(STEPS if limited else LONGEST):
            action = extremes[step] if step < len(extremes) else actions.sample()
            if _step(env, name, space, action):
                ended = True
                _reset(env, name, space, seed=None)
            if ended and step >= STEPS:
                break
    if not ended:
        raise ValueError(
            f"{name}: no episode has ended within {LONGEST:,} random steps, and there is no time limit; register the "
            "environment with max_episode_steps."
        )


def _reset(env: gymnasium.Env, name: str, space: Box, seed: int | None) -> np.ndarray:
    result = _called(name, "reset()", env.reset, seed=seed)
    if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], dict)):
        raise ValueError(f"{name}: reset() returns {_form(result)}, expected (observation, info) with a dictionary.")
    _check_observation(result[0], name, "reset()", space)
    return np.array(result[0])


def _step(env: gymnasium.Env, name: str, space: Box, action: np.ndarray) -> bool:
    result = _called(name, "step()", env.step, action)
    if not (isinstance(result, tuple) and len(result) == 5 and isinstance(result[4], dict)):
        raise ValueError(
            f"{name}: step() returns {_form(result)}, expected (observation, reward, terminated, truncated, info)."
        )
    observation, reward, terminated, truncated, _ = result
    _check_observation(observation, name, "step()", space)
    number = np.asarray(reward)
    if number.shape != () or not np.issubdtype(number.dtype, np.number) or not np.isfinite(number):
        raise ValueError(f"{name}: step() returns the reward {reward!r}, expected one finite number.")
    for flag, value in (("terminated", terminated), ("truncated", truncated)):
        if not isinstance(value, (bool, np.bool_)):
            raise ValueError(f"{name}: step() returns {flag} = {value!r}, expected True or False.")
    return bool(terminated or truncated)


def _called(name: str, what: str, call: Any, *arguments: Any, **options: Any) -> Any:
    try:
        return call(*arguments, **options)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{name}: {what} fails with {type(error).__name__}: {reason}") from error


def _check_observation(observation: Any, name: str, source: str, space: Box) -> None:
    found = np.asarray(observation)
    if found.shape != space.shape:
        raise ValueError(f"{name}: {source} returns an observation of shape {found.shape}, expected {space.shape}.")
    if not (found.dtype.kind in "biuf" and np.can_cast(found.dtype, space.dtype)):
        raise ValueError(
            f"{name}: {source} returns an observation of dtype {found.dtype}, expected {space.dtype}; return "
            f"observation.astype(np.{space.dtype})."
        )
    if not np.isfinite(found).all():
        index = int(np.flatnonzero(~np.isfinite(found))[0])
        raise ValueError(f"{name}: {source} returns an observation with {found[index]} at index {index}.")
    beyond = np.flatnonzero((found < space.low) | (found > space.high))
    if len(beyond):
        index = int(beyond[0])
        raise ValueError(
            f"{name}: {source} returns an observation with {found[index]} at index {index}, outside its bounds "
            f"{space.low[index]} to {space.high[index]}; widen observation_space."
        )


def _form(result: Any) -> str:
    if isinstance(result, tuple):
        return f"({', '.join(type(part).__name__ for part in result)})"
    return type(result).__name__
