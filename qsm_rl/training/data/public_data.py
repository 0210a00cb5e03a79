"""Public data sets of transitions by name, from Minari and D4RL, with the entries that TorchRL uses."""

from __future__ import annotations

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase

from qsm_rl.training.errors import UserError

__all__ = ["read_d4rl", "read_minari"]


def read_minari(identity: str) -> TensorDict:
    """The transitions of a Minari data set, which is downloaded if it is not in Minari's folder yet.

    Minari itself reads the data: TorchRL 0.14's ``MinariExperienceReplay`` allocates its memory map after reading and
    returns zeros.

    Args:
        identity: Minari's id, as in ``mujoco/halfcheetah/medium-v0``.

    Returns:
        Transitions ``(N,)``, one episode after another.

    Raises:
        UserError: if the observations or actions are not vectors.
    """
    import minari

    episodes = []
    for episode in minari.load_dataset(identity, download=True).iterate_episodes():
        for name in ("observations", "actions"):
            if not isinstance(getattr(episode, name), np.ndarray):
                kind = type(getattr(episode, name)).__name__
                raise UserError(f"--dataset minari:{identity} has {name} of type {kind}, expected vectors.")
        observation = torch.as_tensor(episode.observations)  # one more than actions
        terminated = torch.as_tensor(episode.terminations).bool()
        following = {
            "observation": observation[1:],
            "reward": torch.as_tensor(episode.rewards),
            "terminated": terminated,
            "done": terminated | torch.as_tensor(episode.truncations).bool(),
        }
        entries = {"observation": observation[:-1], "action": torch.as_tensor(episode.actions), "next": following}
        episodes.append(TensorDict(entries, [len(terminated)]))
    return torch.cat(episodes)


def read_d4rl(identity: str) -> TensorDictBase:
    """The transitions of a D4RL data set, which TorchRL downloads.

    Args:
        identity: D4RL's id, as in ``hopper-medium-v2``.

    Returns:
        Transitions ``(N,)``. The files do not hold the observation that follows the last frame of an episode. After a
        termination it is not needed. If the time limit ended the episode, that last frame is left out, as in D4RL's own
        ``qlearning_dataset``, since its value would be learned from an observation that never occurred.
    """
    from torchrl.data.datasets import D4RLExperienceReplay

    data = D4RLExperienceReplay(identity, batch_size=1, direct_download=True)[:]
    following = data["next"]
    return data[(following["terminated"] | ~following["done"]).squeeze(-1)]
