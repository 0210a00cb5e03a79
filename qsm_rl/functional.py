"""The formulas of the kit as pure functions on tensors.

Notation, everywhere the same: ``T = num_steps``, ``t`` in ``0 .. T-1`` with ``t = 0`` the least noise,
``alphas = 1 - betas``, ``alphas_cumprod[t]`` the product of ``alphas[0..t]``, ``sigma_t = sqrt(1 -
alphas_cumprod[t])``. Actions are in box units: the box is ``[-1, 1]^A``. ``q_score`` is the action gradient dQ/da.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

__all__ = [
    "action_gradient",
    "add_noise",
    "aggregate_q_values",
    "boltzmann_q_score",
    "clip_norm",
    "cosine_betas",
    "linear_betas",
    "log_mixture_weight",
    "mean_absolute",
    "posterior_gradient_noise",
    "posterior_noise",
    "predict_clean",
    "scaled_q_score",
    "truncated_normal",
    "vp_betas",
]


def vp_betas(num_steps: int, beta_min: float = 0.1, beta_max: float = 10.0) -> Tensor:
    """Betas of the variance-preserving diffusion, discretised in ``num_steps`` steps.

    ``alpha_i = exp(-beta_min / T - (beta_max - beta_min) (2 i - 1) / (2 T^2))`` for ``i = 1 .. T``
    (Song et al. 2021, arXiv 2011.13456, appendix C, as discretised by Xiao et al. 2022, arXiv 2112.07804, and used by
    the QSM authors).

    Args:
        num_steps: number of diffusion steps T, at least 1.
        beta_min: noise rate at the clean end.
        beta_max: noise rate at the noisy end.

    Returns:
        Betas in (0, 1), float64, shape ``(num_steps,)``.

    Example:
        >>> vp_betas(2)
        tensor([0.7240, 0.9768], dtype=torch.float64)
    """
    i = torch.arange(1, num_steps + 1, dtype=torch.float64)
    return -torch.expm1(-beta_min / num_steps - 0.5 * (beta_max - beta_min) * (2 * i - 1) / num_steps**2)


def cosine_betas(num_steps: int, offset: float = 0.008, max_beta: float = 0.999) -> Tensor:
    """Betas whose ``alphas_cumprod`` follows a squared cosine.

    Nichol and Dhariwal 2021 (arXiv 2102.09672), equation 17.

    Args:
        num_steps: number of diffusion steps T, at least 1.
        offset: the paper's ``s``; keeps the first betas from vanishing.
        max_beta: ceiling of every beta; the last step would otherwise divide by zero.

    Returns:
        Betas in (0, ``max_beta``], float64, shape ``(num_steps,)``.

    Example:
        >>> cosine_betas(2)
        tensor([0.5062, 0.9990], dtype=torch.float64)
    """
    time = torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)
    alphas_cumprod = torch.cos((time + offset) / (1 + offset) * math.pi / 2) ** 2
    return (1 - alphas_cumprod[1:] / alphas_cumprod[:-1]).clamp(0, max_beta)


def linear_betas(num_steps: int, beta_start: float = 1e-4, beta_end: float = 2e-2) -> Tensor:
    """Betas that grow linearly from ``beta_start`` to ``beta_end`` (Ho et al. 2020, arXiv 2006.11239, section 4).

    Args:
        num_steps: number of diffusion steps T, at least 1. The two defaults suit T = 1000; with few steps noise remains
            far from N(0, I) at the end.
        beta_start: beta of the first step.
        beta_end: beta of the last step.

    Returns:
        Betas, float64, shape ``(num_steps,)``.

    Example:
        >>> linear_betas(3, 0.1, 0.5)
        tensor([0.1000, 0.3000, 0.5000], dtype=torch.float64)
    """
    return torch.linspace(beta_start, beta_end, num_steps, dtype=torch.float64)


def add_noise(clean: Tensor, noise: Tensor, alphas_cumprod_t: Tensor) -> Tensor:
    """Sample of the forward process, ``sqrt(alphas_cumprod_t) clean + sigma_t noise`` (Ho et al. 2020, equation 4).

    Args:
        clean: clean actions, shape ``(*B, A)``.
        noise: standard normal noise, shape ``(*B, A)``.
        alphas_cumprod_t: ``alphas_cumprod`` at each sample's timestep, shape ``(*B,)``.

    Returns:
        Noised actions, shape ``(*B, A)``.

    Example:
        >>> add_noise(torch.tensor([1.0]), torch.tensor([2.0]), torch.tensor(0.64))
        tensor([2.])
    """
    assert clean.shape == noise.shape, (clean.shape, noise.shape)
    alphas_cumprod_t = alphas_cumprod_t.unsqueeze(-1)
    return alphas_cumprod_t.sqrt() * clean + (1 - alphas_cumprod_t).sqrt() * noise


def predict_clean(noisy: Tensor, predicted_noise: Tensor, alphas_cumprod_t: Tensor) -> Tensor:
    """Inverse of :func:`add_noise` for a predicted noise: ``(noisy - sigma_t noise) / sqrt(alphas_cumprod_t)``.

    Args:
        noisy: noised actions, shape ``(*B, A)``.
        predicted_noise: predicted noise, shape ``(*B, A)``.
        alphas_cumprod_t: ``alphas_cumprod`` at each sample's timestep, shape ``(*B,)``.

    Returns:
        Predicted clean actions, shape ``(*B, A)``, not clipped.

    Example:
        >>> predict_clean(torch.tensor([2.0]), torch.tensor([2.0]), torch.tensor(0.64)).round(decimals=4)
        tensor([1.])
    """
    assert noisy.shape == predicted_noise.shape, (noisy.shape, predicted_noise.shape)
    alphas_cumprod_t = alphas_cumprod_t.unsqueeze(-1)
    return (noisy - (1 - alphas_cumprod_t).sqrt() * predicted_noise) / alphas_cumprod_t.sqrt()


def action_gradient(q_value: Callable[[Tensor], Tensor], action: Tensor) -> Tensor:
    """The Q-score dQ/da of a critic at the given actions.

    Args:
        q_value: maps actions ``(K, *B, A)`` to Q-values ``(K, *B)``; differentiable in the action, each Q-value
            depending on its own action only.
        action: actions, shape ``(*B, A)``.

    Returns:
        dQ/da, shape ``(*B, A)``, without a graph.

    Example:
        >>> action_gradient(lambda a: -(a**2).sum(-1), torch.tensor([[0.5, -1.0]]))
        tensor([[-1.,  2.]])
    """
    # func.grad rather than autograd.grad: the latter cannot be captured by torch.compile on an intermediate.
    return torch.func.grad(lambda a: q_value(a.unsqueeze(0)).sum())(action.detach())


def aggregate_q_values(q_values: Tensor, aggregation: Literal["min", "mean"] | float) -> Tensor:
    """One Q-value from those of an ensemble: the minimum, the mean, or ``mean - rho std`` (the population's std).

    The minimum is clipped double Q-learning (Fujimoto et al. 2018, arXiv 1802.09477, equation 10). Of two critics it is
    the case ``rho = 1``; of more it grows more pessimistic with their number, which ``mean - rho std`` does not.

    Args:
        q_values: shape ``(num_critics, *B)``.
        aggregation: ``"min"``, ``"mean"``, or rho.

    Returns:
        Shape ``(*B,)``.

    Example:
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

    Example:
        >>> scaled_q_score(torch.tensor([0.1]), 50.0)
        tensor([-5.])
    """
    return -scale * q_score


def boltzmann_q_score(q_score: Tensor, sigma_t: Tensor, temperature: Tensor | float) -> Tensor:
    """``-sigma_t dQ/da / temperature``, the noise that belongs to the score of ``exp(Q / temperature)``.

    Exact as ``sigma_t`` goes to 0 (Song et al. 2021, arXiv 2011.13456, section 3, with Q at the noised action in place
    of the noised density).

    Args:
        q_score: dQ/da at the noised action, shape ``(*B, A)``.
        sigma_t: noise level of each sample, shape ``(*B,)``.
        temperature: lambda > 0 in units of Q.

    Returns:
        Target of the predicted noise, shape ``(*B, A)``.

    Example:
        >>> boltzmann_q_score(torch.tensor([2.0]), torch.tensor(0.5), 0.1)
        tensor([-10.])
    """
    assert q_score.shape[:-1] == sigma_t.shape, (q_score.shape, sigma_t.shape)
    return -sigma_t.unsqueeze(-1) * q_score / temperature


def clip_norm(vectors: Tensor, max_norm: float) -> Tensor:
    """Scales every vector longer than ``max_norm`` down to that Euclidean norm; its direction stays.

    Args:
        vectors: shape ``(*B, A)``.
        max_norm: largest norm, above 0.

    Returns:
        Shape ``(*B, A)``.

    Example:
        >>> clip_norm(torch.tensor([[3.0, 4.0], [0.3, 0.4]]), 1.0)
        tensor([[0.6000, 0.8000],
                [0.3000, 0.4000]])
    """
    norm = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return vectors * (max_norm / norm.clamp_min(max_norm))


def mean_absolute(values: Tensor) -> Tensor:
    """Mean of the absolute value over all entries, floored so that it can be divided by.

    Example:
        >>> mean_absolute(torch.tensor([-1.0, 3.0]))
        tensor(2.)
    """
    return values.abs().mean().clamp_min(torch.finfo(values.dtype).tiny ** 0.5)


def truncated_normal(mean: Tensor, std: Tensor, uniform: Tensor) -> Tensor:
    """Samples of N(mean, std^2) restricted to the box [-1, 1], by inversion of the distribution function.

    Args:
        mean: means, any distance outside the box, broadcastable with ``uniform``.
        std: standard deviations > 0, broadcastable likewise.
        uniform: draws of U(0, 1), shape ``(*S)``.

    Returns:
        Samples in [-1, 1], shape ``(*S)``, dtype of ``mean``.

    Example:
        >>> truncated_normal(torch.tensor(0.0), torch.tensor(100.0), torch.tensor([0.25, 0.5, 1.0])).round(decimals=3)
        tensor([-0.5000,  0.0000,  1.0000])
    """
    # The left tail of the distribution function is accurate to 1e-300 in float64, the right one is not: a mean
    # left of the box is mirrored, so that the box always lies in the left half.
    side = torch.where(mean < 0, -1.0, 1.0).double()
    center = side * mean.double()
    std = std.double()
    low, high = torch.special.ndtr((-1 - center) / std), torch.special.ndtr((1 - center) / std)
    quantile = torch.special.ndtri(low + (high - low) * uniform.double())
    # Beyond that the mass sits at the face of the box.
    sample = torch.nan_to_num(center + std * quantile, nan=1.0, posinf=1.0, neginf=1.0).clamp(-1, 1)
    return (side * sample).to(mean.dtype)


def log_mixture_weight(particles: Tensor, mean: Tensor, std: Tensor, uniform_fraction: float) -> Tensor:
    """Logarithm of ``N(mean, std^2)`` over the density of a proposal that mixes it with the uniform law, on the box.

    A share ``uniform_fraction`` of the particles is uniform in the box, the others are :func:`truncated_normal`. Each
    is weighted by the whole mixture's density (the balance heuristic, Veach and Guibas 1995), so weights stay bounded
    wherever either part has mass.

    Args:
        particles: points in the box, shape ``(K, *B, A)``.
        mean: means of the Gaussian, shape ``(*B, A)``.
        std: its standard deviations, broadcastable with ``mean``.
        uniform_fraction: share of uniform particles, in [0, 1].

    Returns:
        Log-weights up to a constant for each sample, shape ``(K, *B)``.

    Example:
        >>> log_mixture_weight(torch.tensor([[0.0], [1.0]]), torch.zeros(1), torch.ones(1), 1.0).diff()
        tensor([-0.5000])
    """
    action_dim = particles.shape[-1]
    z = (particles - mean) / std
    log_normal = -(0.5 * z.square() + std.log() + 0.5 * math.log(2 * math.pi)).expand_as(particles).sum(-1)
    # Mirrored as in truncated_normal, so that the mass of a far box does not cancel.
    center, std = -mean.double().abs(), std.double()
    mass = torch.special.ndtr((1 + center) / std) - torch.special.ndtr((center - 1) / std)
    log_mass = mass.clamp_min(torch.finfo(torch.float64).tiny).log().expand_as(mean).sum(-1).to(particles.dtype)
    log_uniform = math.log(uniform_fraction) if uniform_fraction > 0 else -math.inf
    log_gaussian = math.log1p(-uniform_fraction) if uniform_fraction < 1 else -math.inf
    return -torch.logaddexp(log_uniform - action_dim * math.log(2) - log_normal, log_gaussian - log_mass)


def posterior_noise(
    noisy: Tensor, alphas_cumprod_t: Tensor, particles: Tensor, log_weights: Tensor
) -> tuple[Tensor, Tensor]:
    """``E[noise | noisy action]`` by self-normalised importance sampling.

    With clean actions ``a_0`` of weight ``w``, ``E[noise | a_t] = (a_t - sqrt(alphas_cumprod_t) sum(w a_0) / sum(w)) /
    sigma_t`` (Tweedie's formula, Robbins 1956; Efron 2011, equation 2.8).

    Args:
        noisy: noised actions ``a_t``, shape ``(*B, A)``.
        alphas_cumprod_t: ``alphas_cumprod`` at each sample's timestep, shape ``(*B,)``.
        particles: clean actions, shape ``(K, *B, A)``.
        log_weights: logarithm of target over proposal density at the particles, up to a constant, shape ``(K, *B)``.

    Returns:
        The noise, shape ``(*B, A)``, and the effective sample size ``(sum w)^2 / sum w^2`` in [1, K], shape ``(*B,)``.

    Example:
        >>> noise, size = posterior_noise(
        ...     torch.tensor([0.8]), torch.tensor(0.64), torch.tensor([[1.0], [0.5]]), torch.tensor([0.0, 0.0])
        ... )
        >>> noise.round(decimals=4), size
        (tensor([0.3333]), tensor(2.))
    """
    assert particles.shape[1:] == noisy.shape, (particles.shape, noisy.shape)
    assert particles.shape[:-1] == log_weights.shape, (particles.shape, log_weights.shape)
    weights = torch.softmax(log_weights, 0)
    clean = (weights.unsqueeze(-1) * particles).sum(0)
    alphas_cumprod_t = alphas_cumprod_t.unsqueeze(-1)
    noise = (noisy - alphas_cumprod_t.sqrt() * clean) / (1 - alphas_cumprod_t).sqrt()
    return noise, 1 / weights.square().sum(0)


def posterior_gradient_noise(
    q_scores: Tensor, alphas_cumprod_t: Tensor, temperature: Tensor | float, log_weights: Tensor
) -> Tensor:
    """The gradient form of :func:`posterior_noise`.

    ``-sigma_t E[dQ/da(a_0) | a_t] / (temperature sqrt(alphas_cumprod_t))``.

    Integration by parts makes it of the posterior mean (target score identity, De Bortoli et al. 2024, arXiv
    2402.08667), which leaves out the faces of the box: equal only where ``exp(Q / temperature)`` vanishes there.

    Args:
        q_scores: dQ/da at the particles, shape ``(K, *B, A)``.
        alphas_cumprod_t: ``alphas_cumprod`` at each sample's timestep, shape ``(*B,)``.
        temperature: temperature of the policy, in units of Q.
        log_weights: as for :func:`posterior_noise`, shape ``(K, *B)``.

    Returns:
        The noise, shape ``(*B, A)``.

    Example:
        >>> posterior_gradient_noise(torch.tensor([[3.0], [5.0]]), torch.tensor(0.64), 2.0, torch.tensor([0.0, 0.0]))
        tensor([-1.5000])
    """
    assert q_scores.shape[:-1] == log_weights.shape, (q_scores.shape, log_weights.shape)
    q_score = (torch.softmax(log_weights, 0).unsqueeze(-1) * q_scores).sum(0)
    alphas_cumprod_t = alphas_cumprod_t.unsqueeze(-1)
    return -((1 - alphas_cumprod_t) / alphas_cumprod_t).sqrt() * q_score / temperature
