"""Formulas of the policy gradients: through a sampled reverse chain, and by the likelihood of its steps."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qsm_rl.functional.q_scores import mean_absolute

__all__ = ["gaussian_log_prob", "leave_one_out_advantage", "normalized_q_value"]


def gaussian_log_prob(sample: Tensor, mean: Tensor, std: Tensor | float) -> Tensor:
    """Logarithm of the density of N(mean, std^2 I) at a sample, ``sum_A -(z^2 / 2 + log std + log(2 pi) / 2)``.

    Args:
        sample: shape ``(*B, A)``.
        mean: shape ``(*B, A)``.
        std: standard deviation above 0, a number or broadcastable with ``(*B,)``.

    Returns:
        Shape ``(*B,)``.

    Examples:
        >>> gaussian_log_prob(torch.tensor([0.0, 1.0]), torch.zeros(2), 1.0)
        tensor(-2.3379)
    """
    assert sample.shape == mean.shape, (sample.shape, mean.shape)
    std = torch.as_tensor(std, dtype=mean.dtype, device=mean.device)
    squared = ((sample - mean) / std.unsqueeze(-1)).square().sum(-1)
    return -0.5 * squared - sample.shape[-1] * (std.log() + 0.5 * math.log(2 * math.pi))


def leave_one_out_advantage(q_values: Tensor) -> Tensor:
    """Each sample's Q-value minus the mean over the other samples for the same state.

    A baseline that does not depend on the sample it is for leaves a likelihood-ratio gradient unbiased (Kool et al.
    2019, "Buy 4 REINFORCE samples, get a baseline for free!").

    Args:
        q_values: Q-values of M >= 2 samples for each state, shape ``(M, *B)``.

    Returns:
        Shape ``(M, *B)``; sums to zero over the samples.

    Examples:
        >>> leave_one_out_advantage(torch.tensor([1.0, 2.0, 6.0]))
        tensor([-3.0000, -1.5000,  4.5000])
    """
    count = q_values.shape[0]
    assert count >= 2, q_values.shape
    return (q_values - q_values.mean(0)) * (count / (count - 1))


def normalized_q_value(q_value: Tensor, other_q_value: Tensor) -> Tensor:
    """A critic's Q-values divided by another's mean size, ``Q_1 / mean(abs(Q_2))``; Q_2 gets no gradient.

    Makes the weight of the Q term independent of the scale of rewards (Wang et al. 2023, arXiv 2208.06193, below
    equation 3; dividing by the other critic is what the authors' code does).

    Args:
        q_value: Q-values, shape ``(*B,)``.
        other_q_value: Q-values of another critic, any shape.

    Returns:
        Shape ``(*B,)``.

    Examples:
        >>> normalized_q_value(torch.tensor([1.0, -3.0]), torch.tensor([-1.0, 3.0]))
        tensor([ 0.5000, -1.5000])
    """
    return q_value / mean_absolute(other_q_value.detach())
