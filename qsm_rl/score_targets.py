"""Score targets: how the critic becomes the denoiser's regression target. The formulas are in ``functional``.

The predicted noise eps is ``-sigma_t`` times a score. A score target derives that score from the critic, and an actor
that predicts it samples the policy to which the score belongs.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from qsm_rl import functional as F
from qsm_rl.float32_buffers import Float32Buffers
from qsm_rl.noise_schedule import NoiseSchedule

__all__ = [
    "BoltzmannQScore",
    "NormalizedQScore",
    "PosteriorGradientQScore",
    "PosteriorQScore",
    "ScaledQScore",
    "ScoreTarget",
]

QValue = Callable[[Tensor], Tensor]


class ScoreTarget(Float32Buffers):
    """Base of the score targets. Your own target overrides ``forward`` and names what it reports.

    Attributes:
        info_keys: names of the entries of the info dictionary that [`forward`][qsm_rl.ScoreTarget.forward] returns.

    Examples:
        >>> class ClippedQScore(ScoreTarget):
        ...     info_keys = ("q_score",)
        ...
        ...     def forward(self, q_value, noisy_action, t, noise_schedule):
        ...         q_score = F.action_gradient(q_value, noisy_action)
        ...         return -q_score.clamp(-1, 1), {"q_score": q_score}
        >>> target, info = ClippedQScore()(
        ...     lambda a: 5 * a.sum(-1), torch.zeros(2, 1), torch.tensor([0, 1]), NoiseSchedule.vp(5)
        ... )
        >>> target
        tensor([[-1.],
                [-1.]])
    """

    info_keys: tuple[str, ...] = ()

    def forward(
        self, q_value: QValue, noisy_action: Tensor, t: Tensor, noise_schedule: NoiseSchedule
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The regression target of the predicted noise.

        Args:
            q_value: maps actions in box units ``(K, *B, A)`` to Q-values ``(K, *B)``, already aggregated over the
                critics; differentiable in the action.
            noisy_action: noised actions in box units, shape ``(*B, A)``.
            t: integer timesteps, shape ``(*B,)``.
            noise_schedule: the schedule that noised them.

        Returns:
            The target, shape ``(*B, A)``, and detached diagnostics.
        """
        raise NotImplementedError


class GradientScoreTarget(ScoreTarget):
    """Base of the targets made from dQ/da at the noised action; reports it as ``q_score``, before any clipping."""

    info_keys = ("q_score",)

    def __init__(self, max_norm: float | None) -> None:
        super().__init__()
        if max_norm is not None and not 0 < max_norm < math.inf:
            raise ValueError(f"max_norm must be positive and finite, or None, got {max_norm!r}.")
        self.max_norm = max_norm

    def clip(self, q_score: Tensor) -> Tensor:
        """Clips the norm of each sample's gradient, ``(*B, A)``."""
        return q_score if self.max_norm is None else F.clip_norm(q_score, self.max_norm)

    def forward(
        self, q_value: QValue, noisy_action: Tensor, t: Tensor, noise_schedule: NoiseSchedule
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See [`ScoreTarget.forward`][qsm_rl.ScoreTarget.forward]; reports ``q_score`` as the critics give it."""
        q_score = F.action_gradient(q_value, noisy_action)
        return self.from_q_score(q_score, noise_schedule.sigmas[t]), {"q_score": q_score}

    def from_q_score(self, q_score: Tensor, sigma_t: Tensor) -> Tensor:
        """The target made from dQ/da.

        Args:
            q_score: dQ/da at the noised action, shape ``(*B, A)``.
            sigma_t: noise level of each sample, shape ``(*B,)``.

        Returns:
            The target of the predicted noise, shape ``(*B, A)``.
        """
        raise NotImplementedError


class ScaledQScore(GradientScoreTarget):
    """The QSM authors' target, ``eps* = -M_q dQ/da`` at the noised action (Psenka et al. 2024, arXiv 2312.11752).

    Costs one gradient of the critics. It works well in practice and is the default of the loss. Without a factor
    ``sigma_t`` it is not the score of any fixed policy: it pulls actions uphill with the same force at every noise
    level, and with a large scale the samples gather at the faces of the box. Use it to reproduce the paper.

    Args:
        scale: M_q > 0. Larger makes the policy greedier; it has to suit the size of the rewards. The authors use 50,
            and 120 on quadruped-walk and humanoid-walk.
        max_norm: largest Euclidean norm of a sample's dQ/da; None clips nothing. Guards against a critic that is steep
            far from its data.

    Raises:
        ValueError: if ``scale`` or ``max_norm`` is not positive.

    Examples:
        >>> target, info = ScaledQScore(50.0)(
        ...     lambda a: 0.1 * a.sum(-1), torch.zeros(2, 1), torch.tensor([0, 1]), NoiseSchedule.vp(5)
        ... )
        >>> target
        tensor([[-5.],
                [-5.]])
    """

    scale: Tensor

    def __init__(self, scale: float = 50.0, *, max_norm: float | None = None) -> None:
        super().__init__(max_norm)
        self.register_buffer("scale", _positive("scale", scale))

    def from_q_score(self, q_score: Tensor, sigma_t: Tensor) -> Tensor:
        """See [`GradientScoreTarget.from_q_score`][qsm_rl.score_targets.GradientScoreTarget.from_q_score]."""
        return F.scaled_q_score(self.clip(q_score), self.scale)


class BoltzmannQScore(GradientScoreTarget):
    """``eps* = -sigma_t dQ/da / temperature`` at the noised action.

    Costs one gradient of the critics. In the limit of no noise, this is the score of ``exp(Q / temperature)``; at
    higher noise it uses Q at the noised action in place of the noised policy, so narrow modes are weighted wrongly. Use
    it when the scale of Q is known and you want a true temperature at the cost of one gradient.

    Args:
        temperature: lambda > 0 in units of Q. Lower is greedier.
        max_norm: largest Euclidean norm of a sample's dQ/da; None clips nothing.

    Raises:
        ValueError: if ``temperature`` or ``max_norm`` is not positive.

    Examples:
        >>> target, _ = BoltzmannQScore(0.1)(
        ...     lambda a: a.sum(-1), torch.zeros(1, 1), torch.tensor([4]), NoiseSchedule.vp(5)
        ... )
        >>> target
        tensor([[-9.9679]])
    """

    temperature: Tensor

    def __init__(self, temperature: float, *, max_norm: float | None = None) -> None:
        super().__init__(max_norm)
        self.register_buffer("temperature", _positive("temperature", temperature))

    def from_q_score(self, q_score: Tensor, sigma_t: Tensor) -> Tensor:
        """See [`GradientScoreTarget.from_q_score`][qsm_rl.score_targets.GradientScoreTarget.from_q_score]."""
        return F.boltzmann_q_score(self.clip(q_score), sigma_t, self.temperature)


class NormalizedQScore(BoltzmannQScore):
    """[`BoltzmannQScore`][qsm_rl.BoltzmannQScore] with dQ/da divided by its mean absolute value over the batch.

    Costs one gradient of the critics. Thanks to the division, one temperature suits every scale of rewards and every
    stage of training; the price is that the policy's spread does not shrink where the critic knows more. The target
    keeps no state. Use it as the first choice for a new task.

    Args:
        temperature: lambda > 0, dimensionless. Lower is greedier; usual range 0.03 to 0.3. If it is too low for the
            least noise of the schedule to follow, samples scatter to the faces of the box: 0.1 suits ``cosine(10)``,
            not ``vp(5)``.
        max_norm: largest Euclidean norm of a sample's dQ/da after the division; None clips nothing.
        sigma: whether the target carries the factor ``sigma_t``. Without it this is the authors' target with ``M_q`` in
            units of the gradient's size: the same pull at every noise level.

    Raises:
        ValueError: if ``temperature`` or ``max_norm`` is not positive.

    Examples:
        >>> target, _ = NormalizedQScore(0.1)(
        ...     lambda a: 1e6 * a.sum(-1), torch.zeros(1, 1), torch.tensor([4]), NoiseSchedule.vp(5)
        ... )
        >>> target
        tensor([[-9.9679]])
    """

    def __init__(self, temperature: float = 0.1, *, max_norm: float | None = None, sigma: bool = True) -> None:
        super().__init__(temperature, max_norm=max_norm)
        self.sigma = sigma

    def from_q_score(self, q_score: Tensor, sigma_t: Tensor) -> Tensor:
        """See [`GradientScoreTarget.from_q_score`][qsm_rl.score_targets.GradientScoreTarget.from_q_score]."""
        sigma_t = sigma_t if self.sigma else torch.ones_like(sigma_t)
        return super().from_q_score(q_score / F.mean_absolute(q_score), sigma_t)


class PosteriorQScore(ScoreTarget):
    r"""The exact target of the policy ``pi(a) ~ exp(Q(a) / temperature)`` on the box, at every noise level.

    ``eps* = (a_t - sqrt(alphas_cumprod_t) E[a_0 | a_t]) / sigma_t``, where ``a_0`` lies in the box with weight
    ``exp(Q(a_0) / temperature) N(a_t; sqrt(alphas_cumprod_t) a_0, sigma_t^2 I)``. One part of the particles is drawn
    from that Gaussian restricted to the box, which spreads over the whole box at high noise and shrinks to the
    neighbourhood of ``a_t`` at low noise. The other part is drawn uniformly, which finds modes that the Gaussian
    misses. Only values of Q are used, since the gradient form of the same expectation ignores the faces of the box,
    where ``exp(Q / temperature)`` does not vanish.

    Costs ``num_particles`` evaluations of the critics for each sample, and no gradient. It is the reference when a
    policy must have the right weights on several modes. It needs few action dimensions, since the share of particles
    that hit a mode falls with every dimension. Watch the effective sample size: below about 10, the target is mostly
    noise.

    Args:
        temperature: lambda > 0, in units of Q, or of Q's spread with ``normalize``. Lower is greedier and needs more
            particles.
        num_particles: K, at least 2; the error falls as ``1 / sqrt(K)``. Usual range 32 to 512.
        uniform_fraction: share of the particles drawn uniformly in the box, in [0, 1]. More finds modes far from the
            noised action; less is more accurate when there are many action dimensions or little noise.
        normalize: whether the temperature is in units of the spread of Q: the standard deviation over the particles of
            a sample, averaged over the batch. One temperature then serves every scale of rewards.
        chunk_size: number of particles for which the critics are evaluated at once; None for all. Limits the memory.

    Raises:
        ValueError: if ``temperature`` is not positive, ``num_particles`` is below 2, ``uniform_fraction`` lies outside
            [0, 1], or ``chunk_size`` is below 1.

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> target, info = PosteriorQScore(1.0, num_particles=100_000)(
        ...     lambda a: 4 * a.squeeze(-1), torch.zeros(1, 1), torch.tensor([0]), NoiseSchedule([0.9, 0.936])
        ... )
        >>> round(target.item(), 1)  # the quadrature over the box gives -0.25
        -0.2
    """

    info_keys = ("effective_sample_size",)
    temperature: Tensor

    def __init__(
        self,
        temperature: float,
        num_particles: int = 64,
        *,
        uniform_fraction: float = 0.5,
        normalize: bool = False,
        chunk_size: int | None = None,
    ) -> None:
        super().__init__()
        self.register_buffer("temperature", _positive("temperature", temperature))
        if num_particles < 2:
            raise ValueError(f"num_particles must be at least 2, got {num_particles!r}.")
        if not 0 <= uniform_fraction <= 1:
            raise ValueError(f"uniform_fraction must lie in [0, 1], got {uniform_fraction!r}.")
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1 or None, got {chunk_size!r}.")
        self.num_particles = num_particles
        self.uniform_fraction = uniform_fraction
        self.normalize = normalize
        self.chunk_size = chunk_size

    def forward(
        self, q_value: QValue, noisy_action: Tensor, t: Tensor, noise_schedule: NoiseSchedule
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See ``ScoreTarget.forward``; reports ``effective_sample_size``, shape ``(*B,)``."""
        particles, log_weights, _ = self._weighted_particles(q_value, noisy_action, t, noise_schedule)
        cumprod = noise_schedule.alphas_cumprod[t]
        target, size = F.posterior_noise(noisy_action, cumprod, particles, log_weights)
        return target, {"effective_sample_size": size}

    def _weighted_particles(
        self, q_value: QValue, noisy_action: Tensor, t: Tensor, noise_schedule: NoiseSchedule
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Particles ``(K, *B, A)`` of ``a_0`` given ``a_t``, their log-weights ``(K, *B)``, and the temperature."""
        scale = noise_schedule.alphas_cumprod[t].sqrt().unsqueeze(-1)
        mean, std = noisy_action / scale, noise_schedule.sigmas[t].unsqueeze(-1) / scale
        particles = torch.rand((self.num_particles, *noisy_action.shape), device=noisy_action.device)
        split = round(self.uniform_fraction * self.num_particles)
        particles = torch.cat([2 * particles[:split] - 1, F.truncated_normal(mean, std, particles[split:])])
        with torch.no_grad():
            q_values = self._in_chunks(q_value, particles)
        temperature = self.temperature
        if self.normalize:
            temperature = temperature * F.mean_absolute(q_values.std(0))
        # Only differences of Q matter; Q itself over a small temperature would drown the proposal's density.
        log_weights = (q_values - q_values.amax(0)) / temperature
        log_weights = log_weights + F.log_mixture_weight(particles, mean, std, split / self.num_particles)
        return particles, log_weights, temperature

    def _in_chunks(self, function: QValue, particles: Tensor) -> Tensor:
        return torch.cat([function(chunk) for chunk in particles.split(self.chunk_size or self.num_particles)])


class PosteriorGradientQScore(PosteriorQScore):
    r"""The gradient form of [`PosteriorQScore`][qsm_rl.PosteriorQScore], wrong at the faces of the box.

    ``eps* = -sigma_t E[dQ/da(a_0) | a_t] / (temperature sqrt(alphas_cumprod_t))``, the same expectation integrated by
    parts (target score identity, De Bortoli et al. 2024, arXiv 2402.08667). The boundary terms at the faces of the box
    are dropped, so it is exact only where ``exp(Q / temperature)`` vanishes there. For Q = 4a on [-1, 1], temperature 1
    and a_t = 0 it gives -4, -12, -50 at alphas_cumprod .5, .1, .0064, where the truth is -.72, -.25, -.06. It is meant
    for comparison. At low noise, its variance is lower than that of the posterior mean; at high noise, the factor
    ``1 / sqrt(alphas_cumprod_t)`` makes it so large that training fails (root mean square error 438 at t = 19 and 0.04
    at t = 0 of ``cosine(20)`` for Q = -20 a^2, temperature 1 and 64 particles).

    Costs ``num_particles`` evaluations of the critics and as many gradients. Arguments, errors and diagnostics are
    those of [`PosteriorQScore`][qsm_rl.PosteriorQScore].

    Examples:
        >>> target, info = PosteriorGradientQScore(1.0, num_particles=100)(
        ...     lambda a: 4 * a.squeeze(-1), torch.zeros(1, 1), torch.tensor([0]), NoiseSchedule([0.5, 0.99])
        ... )
        >>> round(target.item(), 3)
        -4.0
    """

    def forward(
        self, q_value: QValue, noisy_action: Tensor, t: Tensor, noise_schedule: NoiseSchedule
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See ``ScoreTarget.forward``; reports ``effective_sample_size``, shape ``(*B,)``."""
        particles, log_weights, temperature = self._weighted_particles(q_value, noisy_action, t, noise_schedule)
        # The leading dimension of a chunk (k, *B, A) is already the critics' particle dimension.
        q_scores = self._in_chunks(torch.func.grad(lambda chunk: q_value(chunk).sum()), particles)
        cumprod = noise_schedule.alphas_cumprod[t]
        target, size = F.posterior_gradient_noise(q_scores, cumprod, temperature, log_weights)
        return target, {"effective_sample_size": size}


def _positive(name: str, value: float) -> Tensor:
    if not value > 0:
        raise ValueError(f"{name} must be positive, got {value!r}.")
    return torch.tensor(float(value))
