"""Gymnasium's vector environments as a TorchRL environment, with little overhead per step."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from tensordict import TensorDict, TensorDictBase
from torchrl.data import Bounded, Categorical, Composite, Unbounded
from torchrl.envs import EnvBase

__all__ = ["VectorEnvironment"]


class VectorEnvironment(EnvBase):
    """A vector environment of boxes, stepped as one; also sums the rewards and counts the frames of each episode.

    ``make_environment`` describes the entries. TorchRL's ``GymWrapper`` with ``RewardSum`` and ``StepCounter`` gives
    the same values but takes twice as long per step, because it reads every entry through its spec and traverses the
    tensordict once per transform.

    Args:
        vector_env: a vector environment whose observations and actions are 1-D float32 boxes, with automatic resets
            disabled: TorchRL requests them by mask, so the last observation of an episode is the true one.

    Raises:
        ValueError: If the vector environment resets by itself.
    """

    def __init__(self, vector_env: VectorEnv) -> None:
        mode = vector_env.metadata.get("autoreset_mode")
        if mode != AutoresetMode.DISABLED:
            raise ValueError(f"vector_env must be made with autoreset_mode=AutoresetMode.DISABLED, got {mode}.")
        count = vector_env.num_envs
        super().__init__(device="cpu", batch_size=[count])
        self.vector_env = vector_env
        self.is_closed = False  # TorchRL's base class starts as closed, so `close` would do nothing
        low, high = (torch.as_tensor(bound).expand(count, -1) for bound in _bounds(vector_env))
        size = vector_env.single_observation_space.shape[0]  # type: ignore[index]
        self.action_spec = Bounded(low, high, shape=low.shape)
        self.observation_spec = Composite(
            observation=Unbounded((count, size)),
            episode_reward=Unbounded((count, 1)),
            step_count=Unbounded((count, 1), dtype=torch.int64),
            shape=(count,),
        )
        self.reward_spec = Unbounded((count, 1))
        flags = {
            name: Categorical(2, shape=(count, 1), dtype=torch.bool) for name in ("done", "terminated", "truncated")
        }
        self.done_spec = Composite(flags, shape=(count,))

    def _set_seed(self, seed: int | None) -> None:
        self.vector_env.reset(seed=seed)

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: Any) -> TensorDict:
        mask = None if tensordict is None else tensordict.get("_reset", None)
        options = None if mask is None else {"reset_mask": mask.reshape(-1).numpy()}
        observation, _ = self.vector_env.reset(options=options)
        # After a partial reset TorchRL uses only the rows of the mask.
        shape = (*self.batch_size, 1)
        entries = {name: torch.zeros(shape, dtype=torch.bool) for name in ("done", "terminated", "truncated")}
        entries["observation"] = torch.from_numpy(observation)
        entries["episode_reward"] = torch.zeros(shape)
        entries["step_count"] = torch.zeros(shape, dtype=torch.int64)
        return TensorDict(entries, self.batch_size, device=self.device)

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        observation, rewards, terminations, truncations, _ = self.vector_env.step(tensordict.get("action").numpy())
        reward = torch.from_numpy(rewards.astype(np.float32)).unsqueeze(-1)
        terminated = torch.from_numpy(terminations).unsqueeze(-1)
        truncated = torch.from_numpy(truncations).unsqueeze(-1)
        entries = {
            "observation": torch.from_numpy(observation),
            "reward": reward,
            "episode_reward": tensordict.get("episode_reward") + reward,
            "step_count": tensordict.get("step_count") + 1,
            "done": terminated | truncated,
            "terminated": terminated,
            "truncated": truncated,
        }
        return TensorDict(entries, self.batch_size, device=self.device)

    def close(self, *, raise_if_closed: bool = True) -> None:
        """Closes the environments."""
        if not self.is_closed:
            self.vector_env.close()
        super().close(raise_if_closed=raise_if_closed)


def _bounds(vector_env: VectorEnv) -> tuple[np.ndarray, np.ndarray]:
    space = vector_env.single_action_space
    return space.low, space.high  # type: ignore[attr-defined]
