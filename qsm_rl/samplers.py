"""Samplers: which timesteps the reverse chain visits, and the reverse step between them.

All samplers share one form of step. With ``clean`` the clean action implied by the predicted noise, it is

    next = clean_weight * clean + noisy_weight * noisy + noise_std * z,   z ~ N(0, I).

A sampler is the table of the three coefficients at each timestep that it visits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from qsm_rl import functional as F
from qsm_rl.noise_schedule import NoiseSchedule

__all__ = ["DDIMSampler", "DDPMSampler", "ReverseChain", "ReverseStep", "Sampler"]

Clip = Literal["sample", "clean", None]


class ReverseStep(NamedTuple):
    """Coefficients of one reverse step, in the order in which the chain uses them.

    Attributes:
        t: timestep whose noise is predicted and removed.
        sqrt_alpha_cumprod: share of the clean action in the noised one at ``t``.
        sigma: standard deviation of the noise at ``t``.
        clean_weight: weight of the predicted clean action in the next sample.
        noisy_weight: weight of the current sample in the next one.
        noise_std: standard deviation of the fresh noise; 0 for a deterministic step.
    """

    t: int
    sqrt_alpha_cumprod: float
    sigma: float
    clean_weight: float
    noisy_weight: float
    noise_std: float


class ReverseChain(NamedTuple):
    """A sampled reverse chain, from noise to action, in box units.

    Attributes:
        states: ``x_T .. x_0``: the starting point of each step, then the action, inside the box; shape
            ``(steps + 1, *B, A)``.
        samples: what each step drew, before clipping, shape ``(steps, *B, A)``. Clipping turns a draw into the next
            state. A clipped state has no density, but these draws have one.
        stds: standard deviation of each step's Gaussian; 0 for a step without fresh noise, whose draw has no density.
    """

    states: Tensor
    samples: Tensor
    stds: tuple[float, ...]


class Sampler:
    """Base of the samplers: the clipping and the reverse step. Use ``DDPMSampler`` or ``DDIMSampler``."""

    clip: Clip

    def __post_init__(self) -> None:
        if self.clip not in get_args(Clip):
            raise ValueError(f"clip must be one of {get_args(Clip)}, got {self.clip!r}.")

    def steps(self, noise_schedule: NoiseSchedule) -> list[ReverseStep]:
        """The reverse steps in order of use, from the most to the least noise."""
        raise NotImplementedError

    def step(self, noisy: Tensor, predicted_noise: Tensor, step: ReverseStep, noise: Tensor | None) -> Tensor:
        """One reverse step.

        Args:
            noisy: current sample in box units, shape ``(*B, A)``.
            predicted_noise: predicted noise at ``step.t``, shape ``(*B, A)``.
            step: one entry of [`steps`][qsm_rl.samplers.Sampler.steps].
            noise: standard normal noise, shape ``(*B, A)``; None takes the step's mean.

        Returns:
            The next sample, shape ``(*B, A)``.
        """
        return self.clip_sample(self.draw(noisy, predicted_noise, step, noise))

    def draw(self, noisy: Tensor, predicted_noise: Tensor, step: ReverseStep, noise: Tensor | None) -> Tensor:
        """The step's draw before ``clip_sample``, from N(``mean``, noise_std^2); takes the arguments of ``step``."""
        mean = self._mean(noisy, predicted_noise, step, F.clamp_inward)  # a loss may differentiate through it
        return mean if noise is None or step.noise_std == 0 else torch.add(mean, noise, alpha=step.noise_std)

    def mean(self, noisy: Tensor, predicted_noise: Tensor, step: ReverseStep) -> Tensor:
        """Mean of the step's Gaussian, ``(*B, A)``; takes the arguments of [`step`][qsm_rl.samplers.Sampler.step].

        Its gradient is the exact one, clipping included, not that of ``clamp_inward``: with any other, the gradient of
        a likelihood would not be the policy's score.
        """
        return self._mean(noisy, predicted_noise, step, lambda clean: clean.clamp(-1, 1))

    def _mean(
        self, noisy: Tensor, predicted_noise: Tensor, step: ReverseStep, clamp: Callable[[Tensor], Tensor]
    ) -> Tensor:
        # torch.add(x, y, alpha=c) is x + c y in one call; for one observation, the calls are the cost of a step.
        if self.clip == "clean":
            clean = torch.add(noisy, predicted_noise, alpha=-step.sigma).div(step.sqrt_alpha_cumprod)
            return torch.add(step.noisy_weight * noisy, clamp(clean), alpha=step.clean_weight)
        # The same mean with the prediction multiplied out: nothing is divided by a small number first.
        ratio = step.clean_weight / step.sqrt_alpha_cumprod
        return torch.add((step.noisy_weight + ratio) * noisy, predicted_noise, alpha=-ratio * step.sigma)

    def clip_sample(self, sample: Tensor) -> Tensor:
        """A draw as the next step sees it, shape ``(*B, A)``: clipped to the box if ``clip`` is ``"sample"``."""
        return F.clamp_inward(sample) if self.clip == "sample" else sample


@dataclass(frozen=True)
class DDPMSampler(Sampler):
    """Ancestral sampling over every timestep of the schedule (Ho et al. 2020, arXiv 2006.11239, algorithm 2).

    Args:
        clip: ``"sample"`` clips the sample to the box after each step, as the QSM authors do, with the variance
            ``beta_t``. ``"clean"`` clips the predicted clean action instead and takes the variance of the posterior
            ``q(a_{t-1} | a_t, a_0)``, ``beta_t (1 - alphas_cumprod_{t-1}) / (1 - alphas_cumprod_t)``; intermediate
            samples may then leave the box, as the noised actions in training do. None clips nothing (variance
            ``beta_t``). The posterior's variance is a lower bound on the correct one, so with few steps the samples are
            too narrow: for a policy of standard deviation 0.158, ``cosine(10)`` gives 0.094 with it and 0.157 with
            ``beta_t``.
        temperature: factor on the fresh noise of each step, at least 0. Below 1 the policy is greedier, above 1 it
            explores more; the initial noise is not scaled. 1 samples what was learned.

    Raises:
        ValueError: for an unknown ``clip`` or a negative ``temperature``.

    Examples:
        >>> [step.t for step in DDPMSampler().steps(NoiseSchedule.vp(3))]
        [2, 1, 0]
    """

    clip: Clip = "sample"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.temperature >= 0:
            raise ValueError(f"temperature must be at least 0, got {self.temperature!r}.")

    def steps(self, noise_schedule: NoiseSchedule) -> list[ReverseStep]:
        """The T reverse steps from ``t = T - 1`` to ``t = 0``; the last one adds no noise."""
        betas = noise_schedule.betas.double().tolist()
        alphas_cumprod = (1 - noise_schedule.betas.double()).cumprod(0).tolist()
        steps = []
        for t in reversed(range(noise_schedule.num_steps)):
            beta, cumprod, previous = betas[t], alphas_cumprod[t], alphas_cumprod[t - 1] if t > 0 else 1.0
            posterior = (1 - previous) / (1 - cumprod)
            variance = beta * posterior if self.clip == "clean" else beta
            steps.append(
                ReverseStep(
                    t=t,
                    sqrt_alpha_cumprod=math.sqrt(cumprod),
                    sigma=math.sqrt(1 - cumprod),
                    clean_weight=math.sqrt(previous) * beta / (1 - cumprod),
                    noisy_weight=math.sqrt(1 - beta) * posterior,
                    noise_std=self.temperature * math.sqrt(variance) if t > 0 else 0.0,
                )
            )
        return steps


@dataclass(frozen=True)
class DDIMSampler(Sampler):
    """Implicit sampling; with ``eta = 0`` it is deterministic given the initial noise.

    Song et al. 2021 (arXiv 2010.02502), equation 12.

    Args:
        num_steps: how many of the schedule's timesteps to visit, evenly spaced and including both ends; None visits
            all. Fewer are faster and coarser.
        eta: 0 adds no noise after the start; 1 adds as much as the ancestral sampler with the posterior's variance.
        clip: ``"clean"`` clips the predicted clean action and recomputes the noise from it, ``"sample"`` clips the
            sample after each step, None clips nothing.

    Raises:
        ValueError: for ``num_steps`` below 1 or above the schedule's, ``eta`` outside [0, 1], or an unknown ``clip``.

    Examples:
        >>> [step.t for step in DDIMSampler(num_steps=3).steps(NoiseSchedule.cosine(9))]
        [8, 4, 0]
    """

    num_steps: int | None = None
    eta: float = 0.0
    clip: Clip = "clean"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_steps is not None and self.num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, or None for all steps, got {self.num_steps!r}.")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must lie in [0, 1], got {self.eta!r}.")

    def steps(self, noise_schedule: NoiseSchedule) -> list[ReverseStep]:
        """The reverse steps over the visited timesteps; the last one lands on the clean action."""
        total = noise_schedule.num_steps
        count = total if self.num_steps is None else self.num_steps
        if count > total:
            raise ValueError(
                f"DDIMSampler(num_steps={count}) has more steps than the schedule ({total}); lower num_steps."
            )
        timesteps = torch.linspace(total - 1, 0, count, dtype=torch.float64).round().long().tolist()
        alphas_cumprod = (1 - noise_schedule.betas.double()).cumprod(0).tolist()
        steps = []
        for t, t_next in zip(timesteps, [*timesteps[1:], None], strict=True):
            cumprod = alphas_cumprod[t]
            previous = 1.0 if t_next is None else alphas_cumprod[t_next]
            noise_std = self.eta * math.sqrt((1 - previous) / (1 - cumprod) * (1 - cumprod / previous))
            direction = math.sqrt(max(1 - previous - noise_std**2, 0.0)) / math.sqrt(1 - cumprod)
            steps.append(
                ReverseStep(
                    t=t,
                    sqrt_alpha_cumprod=math.sqrt(cumprod),
                    sigma=math.sqrt(1 - cumprod),
                    # predicted noise = (noisy - sqrt_alpha_cumprod * clean) / sigma, taken from the clipped clean
                    # action
                    clean_weight=math.sqrt(previous) - direction * math.sqrt(cumprod),
                    noisy_weight=direction,
                    noise_std=noise_std,
                )
            )
        return steps
