"""The noise schedule of the diffusion: how much noise each timestep carries."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qsm_rl import functional as F
from qsm_rl.float32_buffers import Float32Buffers

__all__ = ["NoiseSchedule"]

_TERMINAL_SIGNAL_LIMIT = 0.1
_LEAST_BETA = 1e-5  # 1 - beta in float32 is off by 6e-8


class NoiseSchedule(Float32Buffers):
    """Betas of the forward diffusion and the quantities derived from them.

    Timestep ``t = 0`` carries the least noise, ``t = num_steps - 1`` the most. All tensors are float32 buffers of shape
    ``(num_steps,)``; they follow ``.to(device)`` and stay float32 under ``.to(torch.bfloat16)``, since products of
    alphas lose their meaning in half precision. See Ho et al. 2020 (arXiv 2006.11239), section 2.

    Args:
        betas: variance added at each step, shape ``(num_steps,)``. Every value lies in (0, 1), also after rounding to
            float32, and the first is at least 1e-5. Sampling starts from N(0, I), so the betas should destroy the
            signal: a warning is given when ``sqrt(alphas_cumprod[-1]) > 0.1``.

    Attributes:
        betas: variance added at each step.
        alphas: ``1 - betas``.
        alphas_cumprod: running product of ``alphas``: the share of the clean action's variance left at each step.
        sigmas: ``sqrt(1 - alphas_cumprod)``, the standard deviation of the noise at each step.

    Raises:
        ValueError: if ``betas`` is not one-dimensional, is empty, or holds a value out of its range.

    Examples:
        >>> schedule = NoiseSchedule.vp(5)
        >>> schedule.alphas_cumprod
        tensor([0.8041, 0.4352, 0.1585, 0.0389, 0.0064])
        >>> noisy, noise = schedule.add_noise(torch.zeros(3, 2), torch.tensor([0, 2, 4]))
        >>> torch.allclose(schedule.predict_clean(noisy, noise, torch.tensor([0, 2, 4])), torch.zeros(3, 2), atol=1e-6)
        True
    """

    betas: Tensor
    alphas: Tensor
    alphas_cumprod: Tensor
    sigmas: Tensor

    def __init__(self, betas: Tensor | Sequence[float]) -> None:
        super().__init__()
        betas = torch.as_tensor(betas, dtype=torch.float64)
        if betas.ndim != 1 or betas.numel() == 0:
            raise ValueError(
                f"betas must be a one-dimensional tensor with at least one value, got shape {tuple(betas.shape)}."
            )
        outside = ~((betas.float() > 0) & (betas.float() < 1))
        if bool(outside.any()):
            bad = betas[outside][0].item()
            raise ValueError(f"every beta must lie strictly between 0 and 1, got {bad:g}.")
        if betas[0] < _LEAST_BETA:
            raise ValueError(
                f"the first beta must be at least {_LEAST_BETA:g}, got {betas[0].item():g}: in float32 "
                "such a step leaves the action practically unchanged."
            )
        alphas = 1 - betas
        alphas_cumprod = alphas.cumprod(0)
        terminal_signal = alphas_cumprod[-1].sqrt().item()
        if terminal_signal > _TERMINAL_SIGNAL_LIMIT:
            warnings.warn(
                f"sqrt(alphas_cumprod[-1]) is {terminal_signal:.3f}: the last timestep keeps that share of the action, "
                "but sampling starts from pure noise N(0, I), which the network never sees in training. Lower it to at "
                f"most {_TERMINAL_SIGNAL_LIMIT} with more steps, larger betas, NoiseSchedule.cosine or "
                "NoiseSchedule.vp.",
                stacklevel=2,
            )
        self.register_buffer("betas", betas.float())
        self.register_buffer("alphas", alphas.float())
        self.register_buffer("alphas_cumprod", alphas_cumprod.float())
        self.register_buffer("sigmas", (1 - alphas_cumprod).sqrt().float())

    @classmethod
    def vp(cls, num_steps: int, beta_min: float = 0.1, beta_max: float = 10.0) -> NoiseSchedule:
        """The discretised variance-preserving schedule, the QSM authors' choice with ``num_steps=5``.

        Args:
            num_steps: number of steps T, at least 1. More steps sample more finely and cost one network call each;
                usual range 5 to 20.
            beta_min: noise rate at the clean end.
            beta_max: noise rate at the noisy end.

        Raises:
            ValueError: if ``num_steps`` is not a positive integer.

        Examples:
            >>> NoiseSchedule.vp(5).betas
            tensor([0.1959, 0.4588, 0.6358, 0.7549, 0.8350])
        """
        return cls(F.vp_betas(_positive_steps(num_steps), beta_min, beta_max))

    @classmethod
    def cosine(cls, num_steps: int) -> NoiseSchedule:
        """The squared-cosine schedule; it spends more steps at low noise than ``vp``.

        Nichol and Dhariwal 2021 (arXiv 2102.09672), equation 17.

        Args:
            num_steps: number of steps T, at least 1; usual range 5 to 50.

        Raises:
            ValueError: if ``num_steps`` is not a positive integer.

        Examples:
            >>> NoiseSchedule.cosine(4).sigmas
            tensor([0.3911, 0.7114, 0.9251, 0.9999])
        """
        return cls(F.cosine_betas(_positive_steps(num_steps)))

    @classmethod
    def linear(cls, num_steps: int, beta_start: float = 1e-4, beta_end: float = 2e-2) -> NoiseSchedule:
        """Linearly growing betas (Ho et al. 2020); the default ends need about 1000 steps to destroy the signal.

        Args:
            num_steps: number of steps T, at least 1.
            beta_start: first beta, from 1e-5 to below 1.
            beta_end: last beta, in (0, 1). Larger ends destroy more signal in fewer steps.

        Raises:
            ValueError: if ``num_steps`` is not a positive integer or a beta lies out of its range.

        Examples:
            >>> NoiseSchedule.linear(3, 0.5, 0.99).betas
            tensor([0.5000, 0.7450, 0.9900])
        """
        return cls(F.linear_betas(_positive_steps(num_steps), beta_start, beta_end))

    @property
    def num_steps(self) -> int:
        """Number of diffusion steps T."""
        return self.betas.shape[0]

    def add_noise(self, clean: Tensor, t: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Noises clean actions to timestep ``t``: ``sqrt(alphas_cumprod_t) clean + sigma_t noise``.

        Args:
            clean: clean actions in box units, shape ``(*B, A)``.
            t: integer timesteps in ``0 .. num_steps - 1``, shape ``(*B,)``.
            noise: standard normal noise, shape ``(*B, A)``; drawn when not given.

        Returns:
            The noised actions and the noise, both ``(*B, A)``.
        """
        if noise is None:
            noise = torch.randn_like(clean)
        return F.add_noise(clean, noise, self._signal(t)), noise

    def predict_clean(self, noisy: Tensor, predicted_noise: Tensor, t: Tensor) -> Tensor:
        """The clean action that a predicted noise implies; inverse of [`add_noise`][qsm_rl.NoiseSchedule.add_noise].

        Args:
            noisy: noised actions in box units, shape ``(*B, A)``.
            predicted_noise: the network's noise prediction, shape ``(*B, A)``.
            t: integer timesteps in ``0 .. num_steps - 1``, shape ``(*B,)``.

        Returns:
            Clean actions, shape ``(*B, A)``, not clipped.
        """
        return F.predict_clean(noisy, predicted_noise, self._signal(t))

    def _signal(self, t: Tensor) -> Tensor:
        """``alphas_cumprod`` at timesteps ``(*B,)``; plain indexing would count a negative one from the end."""
        return self.alphas_cumprod.gather(0, t.flatten()).reshape(t.shape)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        # The samplers' coefficients are computed from the betas once, so a state_dict cannot change the schedule.
        loaded = state_dict.get(prefix + "betas")
        error_msgs = args[-1]
        if loaded is not None and not torch.equal(loaded.to(self.betas), self.betas):
            error_msgs.append(
                f"{prefix}betas: the state_dict was saved with a different noise schedule ({loaded.numel()} steps) "
                f"from this one ({self.num_steps} steps); build the actor with the same NoiseSchedule."
            )
            return
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """Summary shown by ``print(schedule)``."""
        return f"num_steps={self.num_steps}"


def _positive_steps(num_steps: int) -> int:
    if isinstance(num_steps, bool) or not isinstance(num_steps, int) or num_steps < 1:
        raise ValueError(f"num_steps must be an integer of at least 1, got {num_steps!r}.")
    return num_steps
