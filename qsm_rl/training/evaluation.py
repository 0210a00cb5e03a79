"""Evaluation: complete episodes of the policy as it is, with random numbers of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from tensordict import TensorDictBase
from torch import nn
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType, set_exploration_type

from qsm_rl.training.errors import UserError
from qsm_rl.training.random_state import isolated_random_state

__all__ = ["EvaluationResult", "evaluate_policy"]

LONGEST_EPISODE = 100_000


@dataclass(frozen=True)
class EvaluationResult:
    """Episodes of one evaluation.

    Attributes:
        returns: sums of rewards, undiscounted, one for each episode.
        lengths: frames of each episode.
    """

    returns: tuple[float, ...]
    lengths: tuple[int, ...]

    def metrics(self) -> dict[str, float]:
        """Mean and spread of the returns (over episodes, as of a population), extremes, and mean length."""
        returns = torch.tensor(self.returns, dtype=torch.float64)
        return {
            "eval/return_mean": returns.mean().item(),
            "eval/return_std": returns.std(correction=0).item(),
            "eval/return_min": returns.min().item(),
            "eval/return_max": returns.max().item(),
            "eval/episode_length": sum(self.lengths) / len(self.lengths),
        }


def evaluate_policy(
    environment: EnvBase, policy: Callable[[TensorDictBase], TensorDictBase], *, seed: int
) -> EvaluationResult:
    """Runs one episode in each environment of a batch.

    The policy samples (TorchRL's RANDOM exploration), as the QSM authors evaluate; add no exploration noise to it. One
    episode for each environment, however long: the first episodes to end would be the short ones. TorchRL's Evaluator
    runs episodes one after another to the same end, which took four times as long for five of HalfCheetah's.

    Args:
        environment: batch of environments from :func:`~qsm_rl.training.make_environment`, one for each episode; it is
            seeded and reset.
        policy: reads the observation, writes the action; runs on the device of its parameters.
        seed: seed of environments and policy. The caller's random generators are left as they were.

    Returns:
        Returns and lengths in the order of the environments.

    Raises:
        UserError: if an episode does not end.
    """
    parameters = policy.parameters() if isinstance(policy, nn.Module) else iter(())
    device = next((parameter.device for parameter in parameters), torch.device("cpu"))
    with isolated_random_state(seed), set_exploration_type(ExplorationType.RANDOM), torch.no_grad():
        environment.set_seed(seed)
        current = environment.reset()
        running = torch.ones(environment.batch_size, dtype=torch.bool)
        returns, lengths = torch.zeros(running.shape), torch.zeros(running.shape, dtype=torch.long)
        for _ in range(LONGEST_EPISODE):
            action = policy(current.select("observation").to(device))["action"]
            stepped, current = environment.step_and_maybe_reset(current.set("action", action.to("cpu")))
            following = stepped["next"]
            ended = running & following["done"].squeeze(-1)
            if ended.any():
                returns[ended] = following["episode_reward"].squeeze(-1)[ended]
                lengths[ended] = following["step_count"].squeeze(-1)[ended]
                running &= ~ended
                if not running.any():
                    return EvaluationResult(tuple(returns.tolist()), tuple(lengths.tolist()))
    raise UserError(
        f"an episode has not ended after {LONGEST_EPISODE:,} frames; register the environment with max_episode_steps."
    )
