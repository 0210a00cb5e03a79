"""Observations shifted and scaled by statistics that were gathered beforehand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

__all__ = ["NormalizedObservations", "normalize"]

EPSILON = 1e-8
CLIP = 10.0


def normalize(observation: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """``clip((observation - mean) / sqrt(variance + 1e-8), -10, 10)``, computed in the statistics' precision.

    Args:
        observation: observations, shape ``(*B, O)``.
        mean: mean of each feature, shape ``(O,)``.
        variance: variance of each feature, shape ``(O,)``.

    Returns:
        Normalised observations, shape ``(*B, O)``, in the precision of ``observation``, or in that of the statistics if
        it holds integers.

    Examples:
        >>> import torch
        >>> normalize(torch.tensor([4.0, 100.0]), torch.tensor([2.0, 0.0]), torch.tensor([1.0, 4.0]))
        tensor([ 2., 10.])
    """
    normalized = (observation - mean) / (variance + EPSILON).sqrt()
    dtype = observation.dtype if observation.is_floating_point() else normalized.dtype
    return normalized.clamp(-CLIP, CLIP).to(dtype)


class NormalizedObservations(nn.Module):
    """A score network that takes the environment's raw observations and normalises them by fixed statistics.

    Args:
        network: the score network, with a method ``reverse_chain`` as ``ScoreMLP`` has.
        mean: mean of each feature, shape ``(O,)``.
        variance: variance of each feature, shape ``(O,)``.
    """

    mean: Tensor
    variance: Tensor

    def __init__(self, network: nn.Module, mean: Tensor, variance: Tensor) -> None:
        super().__init__()
        self.network: Any = network
        self.register_buffer("mean", mean)
        self.register_buffer("variance", variance)

    def forward(self, noisy_action: Tensor, observation: Tensor, t: Tensor) -> Tensor:
        """Predicts the noise in a noised action, as the network does."""
        return self.network(noisy_action, normalize(observation, self.mean, self.variance), t)

    def reverse_chain(self, observation: Tensor, timesteps: Tensor) -> Callable[[int, Tensor], Tensor]:
        """Noise prediction along a reverse chain, as by the network."""
        reverse_chain: Any = self.network.reverse_chain
        return reverse_chain(normalize(observation, self.mean, self.variance), timesteps)
