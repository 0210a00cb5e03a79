"""Evaluation: complete episodes of the current policy, with separate random numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.collectors import Evaluator
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType, set_exploration_type

from qsm_rl.training.errors import UserError
from qsm_rl.training.evaluation.videos import Film
from qsm_rl.training.random_state import isolated_random_state
from qsm_rl.training.updates.cuda_graphs import CudaGraphPolicy

__all__ = ["EvaluationResult", "evaluate_agents", "evaluate_policy"]

LONGEST_EPISODE = 100_000
FRAMES_PER_BATCH = 200
ENDLESS = f"an episode has not ended after {LONGEST_EPISODE:,} frames; register the environment with max_episode_steps."


@dataclass(frozen=True)
class EvaluationResult:
    """Episodes of one evaluation.

    Attributes:
        returns: undiscounted sums of rewards, one per episode.
        lengths: number of frames of each episode.
    """

    returns: tuple[float, ...]
    lengths: tuple[int, ...]

    def metrics(self, way: str = "") -> dict[str, float]:
        """Mean, population standard deviation, minimum and maximum of the returns over episodes, and mean length.

        Args:
            way: how the policy acted, which becomes part of the names: ``eval/WAY/return_mean``.

        Returns:
            The values by the names under which they are logged.
        """
        prefix = f"eval/{way}/" if way else "eval/"
        returns = torch.tensor(self.returns, dtype=torch.float64)
        return {
            f"{prefix}return_mean": returns.mean().item(),
            f"{prefix}return_std": returns.std(correction=0).item(),
            f"{prefix}return_min": returns.min().item(),
            f"{prefix}return_max": returns.max().item(),
            f"{prefix}episode_length": sum(self.lengths) / len(self.lengths),
        }


def evaluate_policy(
    environment: EnvBase,
    policy: TensorDictModuleBase,
    *,
    episodes: int,
    seed: int,
    deterministic: bool = False,
    film: Film | None = None,
) -> EvaluationResult:
    """Runs complete episodes of a policy, one after another, with TorchRL's Evaluator.

    The policy samples (RANDOM exploration), as in the QSM authors' evaluations; do not add exploration noise to it.
    Episodes run in a single environment: with several stepped together, the first episodes to end would be the short
    ones. With the same seed every policy starts its first episode in the same state, which makes comparisons less
    noisy.

    Args:
        environment: a newly made environment with ``num_envs=1``; it is seeded, and closed after the evaluation. A used
            one would start where an earlier evaluation stopped.
        policy: reads the observation, writes the action.
        episodes: how many, at least 1.
        seed: seed of environment and policy. The caller's random generators are restored afterwards.
        deterministic: whether the policy acts under DETERMINISTIC instead of RANDOM exploration: a
            [`DiffusionActor`][qsm_rl.DiffusionActor] then follows the mean of each reverse step from zero noise.
        film: records the first episode in ``environment``; nothing else changes.

    Returns:
        Returns and lengths, in the order of the episodes.

    Raises:
        UserError: if an episode does not end.
    """
    results: list[EvaluationResult] = []

    def keep(trajectories: TensorDictBase) -> dict[str, float]:
        ended = trajectories["next", "done"]
        returns, lengths = trajectories["next", "episode_reward"][ended], trajectories["next", "step_count"][ended]
        results.append(EvaluationResult(tuple(returns.tolist()), tuple(lengths.tolist())))
        return {}

    device = next((parameter.device for parameter in policy.parameters()), torch.device("cpu"))
    with isolated_random_state(seed):
        environment.set_seed(seed)
        evaluator = Evaluator(
            environment,
            _WatchedPolicy(policy, film),
            num_trajectories=episodes,
            exploration_type=ExplorationType.DETERMINISTIC if deterministic else ExplorationType.RANDOM,
            frames_per_batch=FRAMES_PER_BATCH,
            device=device,
            metrics_fn=keep,
            collector_kwargs={
                "env_device": "cpu",
                "policy_device": device,
                "storing_device": "cpu",
                "traj_format": "cat",
                "auto_register_policy_transforms": False,
            },
        )
        try:
            evaluator.evaluate()
        finally:
            evaluator.shutdown()
    return results[0]


@torch.no_grad()
def evaluate_agents(
    environment: EnvBase, policy: TensorDictModuleBase, *, agents: int, seed: int, device: torch.device
) -> list[EvaluationResult]:
    """Runs one complete episode in every environment, for several agents that act together.

    Each environment contributes its first episode, whatever its length, so short ones are not favoured. All episodes,
    of the same agent and of different agents, begin in different states.

    Args:
        environment: a newly made environment with ``num_envs`` a multiple of ``agents``; environment k belongs to agent
            ``k // (num_envs / agents)``. It is seeded, and closed after the evaluation.
        policy: acts for all agents, on observations ``(agents, num_envs / agents, O)``, by sampling.
        agents: number of agents.
        seed: seed of environment and policy. The caller's random generators are restored afterwards.
        device: device of the policy.

    Returns:
        The result of each agent.

    Raises:
        UserError: if an episode does not end.
    """
    count = environment.batch_size[0]
    with isolated_random_state(seed), set_exploration_type(ExplorationType.RANDOM):
        environment.set_seed(seed)
        try:
            act = CudaGraphPolicy(policy, device) if device.type == "cuda" else policy
            current, ended = environment.reset(), torch.zeros(count, dtype=torch.bool)
            returns, lengths = torch.zeros(count), torch.zeros(count, dtype=torch.int64)
            while not ended.all():
                observation = current["observation"].unflatten(0, (agents, -1))
                acted = act(TensorDict({"observation": observation}, observation.shape[:2]))
                current["action"] = acted["action"].flatten(0, 1)
                step, current = environment.step_and_maybe_reset(current)
                ends = step["next", "done"].squeeze(-1) & ~ended
                returns[ends] = step["next", "episode_reward"].squeeze(-1)[ends]
                lengths[ends] = step["next", "step_count"].squeeze(-1)[ends]
                ended |= ends
                if bool((step["next", "step_count"] > LONGEST_EPISODE).any()):
                    raise UserError(ENDLESS)
        finally:
            environment.close()
    pairs = zip(returns.view(agents, -1).tolist(), lengths.view(agents, -1).tolist(), strict=True)
    return [EvaluationResult(tuple(own), tuple(their_lengths)) for own, their_lengths in pairs]


class _WatchedPolicy(TensorDictModuleBase):
    """The policy, which raises an error in an episode without end and passes each step to the film."""

    def __init__(self, policy: TensorDictModuleBase, film: Film | None) -> None:
        super().__init__()
        self.policy = policy
        self.film = film
        self.in_keys = [*policy.in_keys, "step_count"]
        self.out_keys = policy.out_keys

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        if bool((tensordict["step_count"] >= LONGEST_EPISODE).any()):
            raise UserError(ENDLESS)
        if self.film is not None:
            self.film.watch(int(tensordict["step_count"]))
        return self.policy(tensordict)
