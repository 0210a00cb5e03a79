"""From the critics' values to the denoiser's target."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

__all__ = [
    "action_gradient",
    "aggregate_q_values",
    "boltzmann_q_score",
    "clip_norm",
    "mean_absolute",
    "scaled_q_score",
]


def action_gradient(q_value: Callable[[Tensor], Tensor], action: Tensor) -> Tensor:
    """The Q-score dQ/da of a critic at the given actions.

    Args:
        q_value: maps actions ``(K, *B, A)`` to Q-values ``(K, *B)``; differentiable in the action, each Q-value
            depending on its own action only.
        action: actions, shape ``(*B, A)``.

    Returns:
        dQ/da, shape ``(*B, A)``, without a graph.

    Examples:
        >>> action_gradient(lambda a: -(a**2).sum(-1), torch.tensor([[0.5, -1.0]]))
        tensor([[-1.,  2.]])
    """
    # func.grad rather than autograd.grad: torch.compile cannot capture the latter on an intermediate tensor.
    # Detached: the gradient depends on the features of an encoder, too.
    return torch.func.grad(lambda a: q_value(a.unsqueeze(0)).sum())(action.detach()).detach()


def check_aggregation(name: str, aggregation: object) -> None:
    """Raises ValueError unless ``aggregate_q_values`` accepts it."""
    finite = isinstance(aggregation, (int, float)) and math.isfinite(aggregation)
    if not (finite or aggregation in ("min", "mean")):
        raise ValueError(f"{name} must be 'min', 'mean' or a finite number rho, got {aggregation!r}.")


def aggregate_q_values(q_values: Tensor, aggregation: Literal["min", "mean"] | float) -> Tensor:
    """One Q-value from those of an ensemble: the minimum, the mean, or ``mean - rho std`` (the population's std).

    The minimum is clipped double Q-learning (Fujimoto et al. 2018, arXiv 1802.09477, equation 10). With two critics, it
    is the case ``rho = 1``; with more, it grows more pessimistic with their number, which ``mean - rho std`` does not.

    Args:
        q_values: shape ``(num_critics, *B)``.
        aggregation: ``"min"``, ``"mean"``, or rho.

    Returns:
        Shape ``(*B,)``.

    Examples:
        >>> aggregate_q_values(torch.tensor([1.0, 3.0]), 0.5)
        tensor(1.5000)
    """
    if aggregation == "min":
        return q_values.amin(0)
    mean = q_values.mean(0)
    return mean if aggregation == "mean" else mean - aggregation * q_values.std(0, correction=0)


def scaled_q_score(q_score: Tensor, scale: Tensor | float) -> Tensor:
    """The authors' target, ``-M_q dQ/da`` (Psenka et al. 2024, arXiv 2312.11752, algorithm 1).

    Args:
        q_score: dQ/da at the noised action, shape ``(*B, A)``.
        scale: M_q, the weight of the Q-score.

    Returns:
        Target of the predicted noise, shape ``(*B, A)``.

    Examples:
        >>> scaled_q_score(torch.tensor([0.1]), 50.0)
        tensor([-5.])
    """
    return -scale * q_score


def boltzmann_q_score(q_score: Tensor, sigma_t: Tensor, temperature: Tensor | float) -> Tensor:
    """``-sigma_t dQ/da / temperature``, the noise that corresponds to the score of ``exp(Q / temperature)``.

    Exact as ``sigma_t`` goes to 0 (Song et al. 2021, arXiv 2011.13456, section 3, with Q at the noised action in place
    of the noised density).

    Args:
        q_score: dQ/da at the noised action, shape ``(*B, A)``.
        sigma_t: noise level of each sample, shape ``(*B,)``.
        temperature: lambda > 0 in units of Q.

    Returns:
        Target of the predicted noise, shape ``(*B, A)``.

    Examples:
        >>> boltzmann_q_score(torch.tensor([2.0]), torch.tensor(0.5), 0.1)
        tensor([-10.])
    """
    assert q_score.shape[:-1] == sigma_t.shape, (q_score.shape, sigma_t.shape)
    return -sigma_t.unsqueeze(-1) * q_score / temperature


def clip_norm(vectors: Tensor, max_norm: float) -> Tensor:
    """Scales every vector longer than ``max_norm`` down to that Euclidean norm and keeps its direction.

    Args:
        vectors: shape ``(*B, A)``.
        max_norm: largest norm, above 0.

    Returns:
        Shape ``(*B, A)``.

    Examples:
        >>> clip_norm(torch.tensor([[3.0, 4.0], [0.3, 0.4]]), 1.0)
        tensor([[0.6000, 0.8000],
                [0.3000, 0.4000]])
    """
    norm = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return vectors * (max_norm / norm.clamp_min(max_norm))


def mean_absolute(values: Tensor) -> Tensor:
    """Mean absolute value over all entries, with a floor so that it can be a divisor; 1 if there are no entries.

    Examples:
        >>> mean_absolute(torch.tensor([-1.0, 3.0]))
        tensor(2.)
    """
    if values.numel() == 0:  # NaN would reach the gradient of the dividend, although it has no weight
        return values.new_ones(())
    return values.abs().mean().clamp_min(torch.finfo(values.dtype).tiny ** 0.5)
