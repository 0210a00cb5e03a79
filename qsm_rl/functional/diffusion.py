"""Noise schedules and the forward process."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "add_noise",
    "clamp_inward",
    "cosine_betas",
    "linear_betas",
    "predict_clean",
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

    Examples:
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
        max_beta: upper limit of every beta; without it, the last step would divide by zero.

    Returns:
        Betas in (0, ``max_beta``], float64, shape ``(num_steps,)``.

    Examples:
        >>> cosine_betas(2)
        tensor([0.5062, 0.9990], dtype=torch.float64)
    """
    time = torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)
    alphas_cumprod = torch.cos((time + offset) / (1 + offset) * math.pi / 2) ** 2
    return (1 - alphas_cumprod[1:] / alphas_cumprod[:-1]).clamp(0, max_beta)


def linear_betas(num_steps: int, beta_start: float = 1e-4, beta_end: float = 2e-2) -> Tensor:
    """Betas that grow linearly from ``beta_start`` to ``beta_end`` (Ho et al. 2020, arXiv 2006.11239, section 4).

    Args:
        num_steps: number of diffusion steps T, at least 1. The two defaults suit T = 1000; with few steps, the last
            noised action is still far from N(0, I).
        beta_start: beta of the first step.
        beta_end: beta of the last step.

    Returns:
        Betas, float64, shape ``(num_steps,)``.

    Examples:
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

    Examples:
        >>> add_noise(torch.tensor([1.0]), torch.tensor([2.0]), torch.tensor(0.64))
        tensor([2.])
    """
    assert clean.shape == noise.shape, (clean.shape, noise.shape)
    alphas_cumprod_t = alphas_cumprod_t.unsqueeze(-1)
    return alphas_cumprod_t.sqrt() * clean + (1 - alphas_cumprod_t).sqrt() * noise


def predict_clean(noisy: Tensor, predicted_noise: Tensor, alphas_cumprod_t: Tensor) -> Tensor:
    """Inverse of ``add_noise`` for a predicted noise: ``(noisy - sigma_t noise) / sqrt(alphas_cumprod_t)``.

    Args:
        noisy: noised actions, shape ``(*B, A)``.
        predicted_noise: predicted noise, shape ``(*B, A)``.
        alphas_cumprod_t: ``alphas_cumprod`` at each sample's timestep, shape ``(*B,)``.

    Returns:
        Predicted clean actions, shape ``(*B, A)``, not clipped.

    Examples:
        >>> predict_clean(torch.tensor([2.0]), torch.tensor([2.0]), torch.tensor(0.64)).round(decimals=4)
        tensor([1.])
    """
    assert noisy.shape == predicted_noise.shape, (noisy.shape, predicted_noise.shape)
    alphas_cumprod_t = alphas_cumprod_t.unsqueeze(-1)
    return (noisy - (1 - alphas_cumprod_t).sqrt() * predicted_noise) / alphas_cumprod_t.sqrt()


def clamp_inward(action: Tensor) -> Tensor:
    """Clips to the box, but passes gradients that lead back into it.

    ``clamp`` has no gradient outside the box, so a policy that maximises Q through it never comes back once all its
    actions have left the box. Here a coordinate outside keeps a gradient by which gradient descent would move it
    towards the box, and loses one that would move it further away. Inside, value and gradient are those of ``clamp``.
    Inverting gradients (Hausknecht and Stone 2016, arXiv 1511.04143) are a related idea.

    Args:
        action: actions in box units, any shape.

    Returns:
        Actions inside ``[-1, 1]``, same shape.

    Examples:
        >>> action = torch.tensor([-3.0, 0.5, 3.0], requires_grad=True)
        >>> clamp_inward(action).sum().backward()  # descent makes every action smaller
        >>> action.grad
        tensor([0., 1., 1.])
    """
    if not torch.is_grad_enabled():
        return action.clamp(-1, 1)
    # action.requires_grad is not consulted: under vmap it is False.
    return (_ClampInward if torch.compiler.is_compiling() else _EagerClampInward).apply(action)


class _ClampInward(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(action: Tensor) -> Tensor:
        return action.clamp(-1, 1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (action,) = ctx.saved_tensors
        # Descent moves the action against its gradient.
        outward = ((action > 1) & (gradient < 0)) | ((action < -1) & (gradient > 0))
        return gradient.masked_fill(outward, 0)


class _EagerClampInward(_ClampInward):
    """Adds forward mode, which torch.compile refuses: that of clamp, since no direction of descent is known."""

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        (action,) = ctx.saved_tensors
        return tangent.masked_fill(action.abs() > 1, 0)
