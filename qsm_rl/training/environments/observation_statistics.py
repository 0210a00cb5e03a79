"""Normalises observations by running statistics, which evaluations copy."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from torchrl.envs import EnvBase, Transform

from qsm_rl.observation_norm import normalize

__all__ = ["RunningObservationNorm", "copy_observation_statistics"]


class RunningObservationNorm(Transform):
    """Shifts and scales observations by the running mean and standard deviation of all observations so far.

    ``observation`` becomes ``clip((observation - mean) / sqrt(variance + 1e-8), -10, 10)``. Each new observation,
    including those of resets, first enters the statistics (float64, equal weights, Chan, Golub and LeVeque 1983). The
    statistics are buffers, so ``environment.state_dict()`` stores and ``environment.load_state_dict(...)`` restores
    them. Observations in the replay buffer were normalised with the statistics of their time; these settle within some
    thousand frames.

    Args:
        observation_dim: Number of features O of ``observation``, shape ``(*B, O)``.

    Examples:
        >>> norm = RunningObservationNorm(1)
        >>> norm.update(torch.tensor([[1.0], [3.0]]))
        >>> norm.normalize(torch.tensor([4.0]))
        tensor([2.])
    """

    # Why not TorchRL's VecNormV2 (0.14.1): with decay=1 it returns NaN where rounding makes its E[x^2] - E[x]^2
    # negative (Hopper-v5 and Humanoid-v5 within 300 frames); with the default decay its bias correction of the variance
    # is wrong: for a feature of mean 1.25 and standard deviation 0.1 the scale is still 0.47 after 20,000 frames.
    def __init__(self, observation_dim: int) -> None:
        super().__init__(in_keys=["observation"], out_keys=["observation"])
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(observation_dim, dtype=torch.float64))
        self.register_buffer("variance", torch.ones(observation_dim, dtype=torch.float64))
        # TorchRL keeps the transforms of an environment in eval mode, so `training` cannot tell whether to update. It
        # also copies them when an environment is wrapped again; the copies share buffers, but not plain attributes.
        self.register_buffer("frozen", torch.zeros((), dtype=torch.bool), persistent=False)

    def freeze(self) -> RunningObservationNorm:
        """Stops the updates of the statistics, for evaluation; returns itself."""
        self.frozen.fill_(True)
        return self

    def update(self, observation: torch.Tensor) -> None:
        """Adds observations ``(*B, O)`` to the statistics, unless they are frozen."""
        if self.frozen or observation.numel() == 0:
            return
        batch = observation.detach().reshape(-1, observation.shape[-1]).double()
        total = self.count + len(batch)
        fraction = len(batch) / total
        difference = batch.mean(0) - self.mean
        between = fraction * (1 - fraction) * difference.square()
        self.variance.mul_(1 - fraction).add_(fraction * batch.var(0, correction=0)).add_(between)
        self.mean.add_(fraction * difference)
        self.count.copy_(total)

    def normalize(self, observation: torch.Tensor) -> torch.Tensor:
        """Normalises observations ``(*B, O)`` with the current statistics, without updating them."""
        return normalize(observation, self.mean, self.variance)

    def _apply_transform(self, observation: torch.Tensor) -> torch.Tensor:
        return self.normalize(observation)

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        self.update(next_tensordict["observation"])
        return self._call(next_tensordict)

    def _reset(self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase) -> TensorDictBase:
        observation = tensordict_reset["observation"]
        reset = tensordict.get("_reset", None)
        # A partial reset also returns the rows that continue; these were counted when they were stepped.
        self.update(observation if reset is None else observation[reset.reshape(observation.shape[:-1])])
        return self._call(tensordict_reset)


def copy_observation_statistics(source: EnvBase, target: EnvBase) -> None:
    """Gives ``target`` a copy of the observation statistics of ``source``, frozen.

    Call it before each evaluation: the evaluation environment then normalises as the training environment does at that
    moment, without changing the statistics of either. If neither of the two normalises, nothing happens.

    Args:
        source: The training environment, from [`make_environment`][qsm_rl.training.make_environment].
        target: The evaluation environment, from [`make_environment`][qsm_rl.training.make_environment].

    Raises:
        ValueError: If only one of them normalises its observations.

    Examples:
        >>> from qsm_rl.training.environments.make_environment import make_environment
        >>> training = make_environment("InvertedPendulum-v5", seed=0, normalize_observation=True)
        >>> evaluation = make_environment("InvertedPendulum-v5", seed=1, normalize_observation=True)
        >>> rollout = training.rollout(20)
        >>> copy_observation_statistics(training, evaluation)
    """
    source_norm, target_norm = _find_observation_norm(source), _find_observation_norm(target)
    if source_norm is None and target_norm is None:
        return
    if source_norm is None or target_norm is None:
        names = ("the source", "the target") if target_norm is None else ("the target", "the source")
        raise ValueError(
            f"{names[0]} environment normalises its observations, but {names[1]} does not; "
            "build both with the same normalize_observation."
        )
    target_norm.load_state_dict(source_norm.state_dict())
    target_norm.freeze()


def _find_observation_norm(environment: EnvBase) -> RunningObservationNorm | None:
    return next((module for module in environment.modules() if isinstance(module, RunningObservationNorm)), None)
