"""Environments of the recipes: Gymnasium and dm_control tasks as batched TorchRL environments.

Both kinds take the same route, ``gymnasium.Env`` -> ``SyncVectorEnv`` -> ``VectorEnvironment``, so a training loop sees
no difference between them. They live on the CPU, where MuJoCo runs; a collector moves the policy's inputs and outputs
(``Collector(..., env_device="cpu", policy_device="cuda")``).
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib.util
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import gymnasium
import mujoco
import numpy as np
import torch
from gymnasium.spaces import Box
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import TransformAction, TransformObservation
from torchrl.envs import EnvBase, TransformedEnv

from qsm_rl.action_box import ActionBox
from qsm_rl.training.environments.environment_check import check_environment
from qsm_rl.training.environments.observation_statistics import RunningObservationNorm
from qsm_rl.training.environments.vector_environment import VectorEnvironment

__all__ = ["check_registered", "make_environment", "sub_environment_seeds"]

PICTURE = 480  # height and width, as in Gymnasium's MuJoCo environments
_DM_CONTROL_PREFIX = "dm_control/"


def make_environment(
    env: str,
    *,
    num_envs: int = 1,
    seed: int | None = None,
    action_repeat: int = 1,
    normalize_observation: bool = False,
    filmed: bool = False,
) -> EnvBase:
    """Builds the TorchRL environment of a Gymnasium or dm_control task.

    The batch size is always ``(num_envs,)``. ``step`` reads ``action`` and writes, under ``next``:

    - ``observation`` ``(num_envs, O)`` float32; for dm_control the task's entries, flattened and concatenated in its
      own order
    - ``reward`` ``(num_envs, 1)`` float32, summed over the repeated steps of the action
    - ``terminated`` ``(num_envs, 1)`` bool: the task ended by its own rule; no value follows
    - ``truncated`` ``(num_envs, 1)`` bool: the time limit cut the episode; its value continues unless it also
      terminated
    - ``done`` ``(num_envs, 1)`` bool: at least one of the two
    - ``episode_reward`` ``(num_envs, 1)`` float32: sum of the rewards since the episode's start
    - ``step_count`` ``(num_envs, 1)`` int64: frames since the episode's start

    Where ``done`` is set, ``("next", "observation")`` is the true last observation of the episode, and only those
    environments are reset. Actions are float32 in the environment's own bounds; ``environment.action_spec_unbatched``
    is the spec of one environment, shape ``(A,)``.

    Reseeding reproduces everything that follows: after ``environment.set_seed(s)`` and ``environment.reset()`` an
    environment behaves bit for bit like a new one built with ``seed=s`` after its ``reset()``.

    Args:
        env: A Gymnasium id with a continuous action space (``"HalfCheetah-v5"``, or ``"module:Name-v0"`` to import the
            module that registers it first), or ``"dm_control/<domain>-<task>"`` (``"dm_control/walker-walk"``).
        num_envs: Number of copies, stepped one after the other in this process. More copies give more frames per call
            of the policy and less overhead per frame, but older weights. Usually 1 to 16.
        seed: Seed of the whole batch, see ``sub_environment_seeds``; ``None`` takes fresh entropy.
        action_repeat: Number of simulator steps for which an action is held, fewer at the end of the episode. One frame
            is one decision of the agent, so with 2 an episode of 1000 simulator steps is 500 frames long. Higher values
            bring distant rewards nearer and make control coarser. Usually 1 or 2, at most 8.
        normalize_observation: Whether to shift and scale observations by their running mean and standard deviation,
            see ``RunningObservationNorm``. Helps where features differ in size by orders of magnitude (Humanoid-v5);
            the authors do not use it.
        filmed: Whether frames may be rendered, see [`Film`][qsm_rl.training.Film]. The cost of stepping does not
            change.

    Returns:
        The environment, already seeded; call ``reset()`` before stepping.

    Raises:
        ValueError: If the environment is unknown, its actions are not a bounded 1-D ``Box``, its observations are not
            a 1-D ``Box``, a number is outside its range, or ``filmed`` is set and the environment takes no
            ``render_mode``.
        ImportError: If the environment needs a package that is not installed.

    Examples:
        >>> environment = make_environment("InvertedPendulum-v5", num_envs=2, seed=0)
        >>> rollout = environment.rollout(5, break_when_any_done=False)
        >>> rollout["next", "observation"].shape
        torch.Size([2, 5, 4])
        >>> environment.action_spec_unbatched.space.high
        tensor([3.])
    """
    for name, number in (("num_envs", num_envs), ("action_repeat", action_repeat)):
        if not isinstance(number, int) or number < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {number}.")
    make_one = functools.partial(_make_gymnasium_env, env, action_repeat, "rgb_array" if filmed else None)
    # DISABLED leaves resets to TorchRL, which requests them by mask. TorchRL's own GymEnv(num_envs=...) corrupts the
    # last observations; SerialEnv over single environments is correct but takes 1.5 to 2.4 times as long.
    vector_env = _SeededVectorEnv([make_one] * num_envs, autoreset_mode=AutoresetMode.DISABLED)
    environment: EnvBase = VectorEnvironment(vector_env)
    if normalize_observation:
        norm = RunningObservationNorm(environment.observation_spec["observation"].shape[-1])
        environment = TransformedEnv(environment, norm)
    if seed is not None:
        environment.set_seed(seed)
    return environment


def sub_environment_seeds(seed: int, num_envs: int) -> list[int]:
    """Derives the seed of each environment in a batch.

    Different batches share no seeds. With ``seed + i``, environment 1 of a run with seed 0 would repeat environment 0
    of a run with seed 1. A larger batch begins with the seeds of a smaller one.

    Args:
        seed: Seed of the batch, at least 0.
        num_envs: Number of environments.

    Returns:
        ``num_envs`` seeds in 0..2^32-1.

    Raises:
        ValueError: If ``seed`` is negative.

    Examples:
        >>> sub_environment_seeds(0, 3)[:2] == sub_environment_seeds(0, 2)
        True
    """
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}.")
    return np.random.SeedSequence(int(seed)).generate_state(num_envs).tolist()


class _SeededVectorEnv(SyncVectorEnv):
    """Gymnasium's vector environment with independent seeds for its environments."""

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        if seed is not None and not isinstance(seed, list):
            seed = [*sub_environment_seeds(seed, self.num_envs)]
        return super().reset(seed=seed, options=options)


class _ActionRepeat(gymnasium.Wrapper):
    """Holds each action for several steps, sums their rewards, and stops at the end of the episode."""

    def __init__(self, env: gymnasium.Env, repeat: int) -> None:
        super().__init__(env)
        self._repeat = repeat
        if "render_fps" in env.metadata:  # one picture per action
            self.metadata = {**env.metadata, "render_fps": env.metadata["render_fps"] / repeat}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        total_reward = 0.0
        for _ in range(self._repeat):
            observation, reward, terminated, truncated, info = self.env.step(action)
            total_reward += float(reward)
            if terminated or truncated:
                break
        return observation, total_reward, terminated, truncated, info


class _DmControlEnv(gymnasium.Env):
    """A task of the dm_control suite; the last step of an episode is a termination only if its discount is 0."""

    has_time_limit = True  # every task of the suite has one

    def __init__(self, name: str, render_mode: str | None) -> None:
        suite = _import_dm_control_suite(name)
        domain, _, task = name.removeprefix(_DM_CONTROL_PREFIX).partition("-")
        if (domain, task) not in suite.ALL_TASKS:
            raise ValueError(_unknown_environment(name))
        # flat_observation joins the entries in the order of the task's observation spec.
        self._env = suite.load(domain, task, environment_kwargs={"flat_observation": True})
        (spec,) = self._env.observation_spec().values()
        self.observation_space = Box(-np.inf, np.inf, spec.shape, np.float32)
        bounds = self._env.action_spec()
        # dm_control writes MuJoCo's largest number where an actuator has no limit.
        low = np.where(bounds.minimum <= -mujoco.mjMAXVAL, -np.inf, bounds.minimum).astype(np.float32)
        high = np.where(bounds.maximum >= mujoco.mjMAXVAL, np.inf, bounds.maximum).astype(np.float32)
        self.action_space = Box(low, high, bounds.shape, np.float32)
        self.metadata = {"render_modes": ["rgb_array"], "render_fps": 1 / self._env.control_timestep()}
        self.render_mode = render_mode

    def render(self) -> np.ndarray:
        picture: np.ndarray = self._env.physics.render(height=PICTURE, width=PICTURE, camera_id=0)
        return picture

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is not None:
            self._env.task.random.seed(seed)
        return self._flat(self._env.reset()), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        timestep = self._env.step(action)
        terminated = timestep.last() and timestep.discount == 0.0
        return self._flat(timestep), timestep.reward, terminated, timestep.last() and not terminated, {}

    @staticmethod
    def _flat(timestep: Any) -> np.ndarray:
        (observation,) = timestep.observation.values()
        return observation.astype(np.float32)


def check_registered(name: str) -> None:
    """Makes an environment, steps it briefly, and refuses it if it has a fault: see ``check_environment``.

    Args:
        name: environment id, as for ``make_environment``.

    Raises:
        ValueError: naming the fault, or as ``make_environment`` raises it.
        ImportError: as ``make_environment`` raises it.

    Examples:
        >>> check_registered("InvertedPendulum-v5")
    """
    env = _make_gymnasium_env(name, 1, None, converted=False)
    try:
        check_environment(env, name)
    finally:
        env.close()


def _make_gymnasium_env(
    name: str, action_repeat: int, render_mode: str | None, *, converted: bool = True
) -> gymnasium.Env:
    if name.startswith(_DM_CONTROL_PREFIX):
        env: gymnasium.Env = _DmControlEnv(name, render_mode)
    else:
        env = _make_registered(name, {} if render_mode is None else {"render_mode": render_mode})
    actions, observations = env.action_space, env.observation_space
    if not (isinstance(actions, Box) and len(actions.shape) == 1 and np.issubdtype(actions.dtype, np.floating)):
        raise ValueError(
            f"{name} has the action space {actions}, expected a 1-D Box of real numbers; choose another environment."
        )
    try:
        with np.errstate(over="ignore"):
            bounds = [torch.from_numpy(bound.astype(np.float32)) for bound in (actions.low, actions.high)]
        fit = ActionBox(*bounds).action_dim > 0
    except ValueError:
        fit = False
    if not fit:
        raise ValueError(
            f"{name} has the unbounded or empty action space {actions}, expected finite bounds low < high, also in "
            "float32; choose another environment, or bound it with gymnasium.wrappers.TransformAction before "
            "registering it."
        )
    if not (isinstance(observations, Box) and len(observations.shape) == 1 and observations.shape[0] > 0):
        raise ValueError(
            f"{name} has the observation space {observations}, expected a 1-D Box with at least one number; "
            "choose another environment, or apply gymnasium.wrappers.FlattenObservation before registering it."
        )
    # Changes that an environment makes to its action array must not reach its space, a repeated step or the replay
    # buffer.
    env = TransformAction(env, np.copy, actions)
    if not converted:
        return env
    if action_repeat > 1:
        env = _ActionRepeat(env, action_repeat)
    if actions.dtype != np.float32:
        # Rounding to float32 can push an action past a float64 bound.
        low, high = actions.low, actions.high
        float_actions = Box(low.astype(np.float32), high.astype(np.float32), dtype=np.float32)
        env = TransformAction(env, lambda action: np.clip(action.astype(low.dtype), low, high), float_actions)
    float_observations = Box(-np.inf, np.inf, observations.shape, np.float32)
    return TransformObservation(env, lambda observation: np.asarray(observation, np.float32), float_observations)


def _make_registered(name: str, options: dict[str, Any]) -> gymnasium.Env:
    try:
        with _no_model_deprecations():
            return gymnasium.make(name, **options)
    except gymnasium.error.UnregisteredEnv:
        raise ValueError(_unknown_environment(name)) from None
    except gymnasium.error.DependencyNotInstalled as error:
        raise ImportError(f"Environment {name!r} needs a package that is not installed: {error}") from error
    except ImportError as error:  # such as Hopper-v3, which Gymnasium has removed
        top = name.partition(":")[0].partition(".")[0]
        if ":" in name and importlib.util.find_spec(top) is None:
            raise ImportError(f"Environment {name!r}: module {top} not found; add its folder to PYTHONPATH.") from error
        raise ImportError(f"Environment {name!r} cannot be imported; {_did_you_mean(name)} {error}") from error
    except gymnasium.error.Error as error:
        raise ValueError(f"Environment {name!r} cannot be created: {error}") from error
    except TypeError as error:
        # The second is what Python says of a class without an __init__.
        refusals = ("unexpected keyword argument 'render_mode'", "() takes no arguments")
        if "render_mode" not in options or not any(refusal in str(error) for refusal in refusals):
            raise
        raise ValueError(
            f"cannot record a video of {name}: it does not accept a render_mode; give its __init__ the argument "
            "render_mode=None."
        ) from error


def _import_dm_control_suite(name: str) -> Any:
    try:
        with warnings.catch_warnings():
            # Without a display dm_control tries its renderers and falls back; nothing is rendered here.
            warnings.filterwarnings("ignore", message=".*DISPLAY environment variable is missing")
            from dm_control import suite
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "dm_control":
            raise
        raise ImportError(f'{name} needs dm_control, which is not installed: pip install "qsm_rl[dmc]"') from None
    return suite


def _unknown_environment(name: str) -> str:
    return f"Unknown environment {name!r}; {_did_you_mean(name)} Give a Gymnasium id or dm_control/<domain>-<task>."


def _did_you_mean(name: str) -> str:
    latest: dict[tuple[str | None, str], gymnasium.envs.registration.EnvSpec] = {}
    for spec in sorted(gymnasium.registry.values(), key=lambda spec: spec.version or 0):
        latest[spec.namespace, spec.name] = spec
    known = [spec.id for spec in latest.values()]
    if importlib.util.find_spec("dm_control"):
        tasks = _import_dm_control_suite(name).ALL_TASKS
        known += [f"{_DM_CONTROL_PREFIX}{domain}-{task}" for domain, task in tasks]
    by_lower = {candidate.lower(): candidate for candidate in known}
    matches = [by_lower[match] for match in difflib.get_close_matches(name.lower(), by_lower, n=3)]
    return f"did you mean {' or '.join(matches)}?" if matches else "no known name is close."


@contextlib.contextmanager
def _no_model_deprecations() -> Iterator[None]:
    """Drops MuJoCo's warnings of old attributes in Gymnasium's models, which users cannot fix.

    MuJoCo would print them for every environment and write MUJOCO_LOG.TXT into the working directory.
    """

    def forward(message: str) -> None:
        if "deprecated" not in message:
            logging.getLogger("mujoco").warning(message)

    handler = mujoco.get_mju_user_warning()
    mujoco.set_mju_user_warning(forward)
    try:
        yield
    finally:
        mujoco.set_mju_user_warning(handler)
