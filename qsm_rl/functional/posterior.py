"""The exact target: particles in the box, their weights, and the mean noise."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = [
    "log_mixture_weight",
    "posterior_gradient_noise",
    "posterior_noise",
    "truncated_normal",
]


def truncated_normal(mean: Tensor, std: Tensor, uniform: Tensor) -> Tensor:
    """Samples of N(mean, std^2) restricted to the box [-1, 1], by inversion of the distribution function.

    Args:
        mean: means, at any distance from the box, broadcastable with ``uniform``.
        std: standard deviations > 0, broadcastable likewise.
        uniform: draws of U(0, 1), shape ``(*S)``.

    Returns:
        Samples in [-1, 1], shape ``(*S)``, dtype of ``mean``.

    Examples:
        >>> truncated_normal(torch.tensor(0.0), torch.tensor(100.0), torch.tensor([0.25, 0.5, 1.0])).round(decimals=3)
        tensor([-0.5000,  0.0000,  1.0000])
    """
    # The left tail of the distribution function is accurate to 1e-300 in float64, the right one is not: a mean
    # left of the box is mirrored, so that the box always lies in the left half.
    side = torch.where(mean < 0, -1.0, 1.0).double()
    center = side * mean.double()
    std = std.double()
    low, high = _normal_cdf((-1 - center) / std), _normal_cdf((1 - center) / std)
    quantile = torch.special.ndtri(low + (high - low) * uniform.double())
    # Further out, all of the mass sits at the face of the box.
    sample = torch.nan_to_num(center + std * quantile, nan=1.0, posinf=1.0, neginf=1.0).clamp(-1, 1)
    return (side * sample).to(mean.dtype)


def log_mixture_weight(particles: Tensor, mean: Tensor, std: Tensor, uniform_fraction: float) -> Tensor:
    """Logarithm of the ratio of ``N(mean, std^2)`` to its mixture with the uniform distribution, on the box.

    The mixture is the proposal: a share ``uniform_fraction`` of the particles is uniform in the box, the others come
    from [`truncated_normal`][qsm_rl.functional.truncated_normal]. Each is weighted by the whole mixture's density (the
    balance heuristic, Veach and Guibas 1995), so weights stay bounded wherever either part has mass.

    Args:
        particles: points in the box, shape ``(K, *B, A)``.
        mean: means of the Gaussian, shape ``(*B, A)``.
        std: its standard deviations, broadcastable with ``mean``.
        uniform_fraction: share of uniform particles, in [0, 1].

    Returns:
        Log-weights up to a constant for each sample, shape ``(K, *B)``.

    Examples:
        >>> log_mixture_weight(torch.tensor([[0.0], [1.0]]), torch.zeros(1), torch.ones(1), 1.0).diff()
        tensor([-0.5000])
    """
    action_dim = particles.shape[-1]
    z = (particles - mean) / std
    log_normal = -(0.5 * z.square() + std.log() + 0.5 * math.log(2 * math.pi)).sum(-1)
    # Mirrored as in truncated_normal, so that the mass of a distant box is not lost to cancellation.
    center, std = -mean.double().abs(), std.double()
    mass = _normal_cdf((1 + center) / std) - _normal_cdf((center - 1) / std)
    log_mass = mass.clamp_min(torch.finfo(torch.float64).tiny).log().sum(-1).to(particles.dtype)
    log_uniform = math.log(uniform_fraction) if uniform_fraction > 0 else -math.inf
    log_gaussian = math.log1p(-uniform_fraction) if uniform_fraction < 1 else -math.inf
    return -torch.logaddexp(log_uniform - action_dim * math.log(2) - log_normal, log_gaussian - log_mass)


def _normal_cdf(x: Tensor) -> Tensor:
    # torch.special.ndtr is (1 + erf) / 2, whose left tail is 0 from 8.3 standard deviations on.
    return 0.5 * torch.special.erfc(x * -math.sqrt(0.5))


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

    Examples:
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
) -> tuple[Tensor, Tensor]:
    """The gradient form of [`posterior_noise`][qsm_rl.functional.posterior_noise].

    ``-sigma_t E[dQ/da(a_0) | a_t] / (temperature sqrt(alphas_cumprod_t))``.

    It follows from the posterior mean through integration by parts (target score identity, De Bortoli et al. 2024,
    arXiv 2402.08667). The boundary terms at the faces of the box are dropped, so the two are equal only where
    ``exp(Q / temperature)`` vanishes there.

    Args:
        q_scores: dQ/da at the particles, shape ``(K, *B, A)``.
        alphas_cumprod_t: ``alphas_cumprod`` at each sample's timestep, shape ``(*B,)``.
        temperature: temperature of the policy, in units of Q.
        log_weights: as for [`posterior_noise`][qsm_rl.functional.posterior_noise], shape ``(K, *B)``.

    Returns:
        The noise, shape ``(*B, A)``, and the effective sample size in [1, K], shape ``(*B,)``.

    Examples:
        >>> posterior_gradient_noise(torch.tensor([[3.0], [5.0]]), torch.tensor(0.64), 2.0, torch.tensor([0.0, 0.0]))
        (tensor([-1.5000]), tensor(2.))
    """
    assert q_scores.shape[:-1] == log_weights.shape, (q_scores.shape, log_weights.shape)
    weights = torch.softmax(log_weights, 0)
    q_score = (weights.unsqueeze(-1) * q_scores).sum(0)
    alphas_cumprod_t = alphas_cumprod_t.unsqueeze(-1)
    noise = -((1 - alphas_cumprod_t) / alphas_cumprod_t).sqrt() * q_score / temperature
    return noise, 1 / weights.square().sum(0)
