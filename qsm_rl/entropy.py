"""The entropy of a policy, estimated from samples, and the bonus that it earns in the TD target."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qsm_rl.float32_buffers import Float32Buffers

__all__ = ["EntropyBonus", "nearest_neighbour_entropy"]


def nearest_neighbour_entropy(samples: Tensor) -> Tensor:
    """Differential entropy of a distribution on the box [-1, 1]^A, estimated from the distances between samples.

    ``H = psi(N) - psi(1) + mean_n log vol(C_n)`` with C_n the cube around sample n whose half side is the distance to
    its nearest neighbour in the maximum norm (Kozachenko and Leonenko 1987). Here the cubes are cut at the faces of the
    box: samples near a face would otherwise count as if the distribution continued beyond it.

    The errors below, for one state and in nats, are mean +- standard deviation over 4,000 states at N = 16, with those
    at N = 64 in parentheses. Uniform actions: 0.00 +- 0.41 (0.00 +- 0.21) in 6 dimensions and 0.00 +- 0.36
    (0.00 +- 0.18) in 1. Four Gaussian modes of unequal weights and std 0.12 in 2 dimensions, entropy -0.12:
    0.01 +- 0.45 (-0.06 +- 0.23). The same with four more Gaussian dimensions, entropy -2.93: 0.71 +- 0.68
    (0.14 +- 0.31). For comparison, the entropy of a fitted Gaussian is off by 1.46 +- 0.20 on the four modes, whatever
    N, and by 0.35 +- 0.39 on uniform actions in 6 dimensions; cubes that are not cut are off by about 1.2 on the
    latter.

    Distances have a floor of ``1e-3 / N``, far below the distances between N distinct samples, so that equal samples,
    for example at a face of the box, do not give minus infinity.

    Args:
        samples: N >= 2 samples of each distribution, in box units, shape ``(N, *B, A)``.

    Returns:
        Entropy in nats, shape ``(*B,)``; apart from sampling error at most about ``A log 2``, that of uniform actions.

    Examples:
        >>> nearest_neighbour_entropy(torch.tensor([[0.0], [0.5]]))  # both cubes have length 1; psi(2) - psi(1) = 1
        tensor(1.)
    """
    assert samples.ndim >= 2 and samples.shape[0] >= 2, samples.shape
    count = samples.shape[0]
    points = samples.movedim(0, -2)
    distances = (points.unsqueeze(-2) - points.unsqueeze(-3)).abs().amax(-1)
    itself = torch.eye(count, dtype=torch.bool, device=samples.device)
    nearest = distances.masked_fill(itself, math.inf).amin(-1, keepdim=True).clamp_min(1e-3 / count)
    # Not the difference of the cube's ends, in which a small distance would be rounded away.
    sides = torch.minimum(nearest, 1 - points) + torch.minimum(nearest, 1 + points)
    harmonic = sum(1 / n for n in range(1, count))  # psi(N) - psi(1)
    return harmonic + sides.log().sum(-1).mean(-1)


class EntropyBonus(Float32Buffers):
    """Temperature times the policy's entropy, added to the next state's value in the TD target.

    With it, the critics learn the soft value of maximum-entropy reinforcement learning,
    ``V(s) = E[Q(s, a)] + lambda H(pi(. | s))`` (Haarnoja et al. 2017, arXiv 1702.08165, section 2). A score target
    makes the policy ``exp(Q / lambda)``. That is the soft-optimal policy only if the TD target includes this bonus at
    the same lambda, so give both the same temperature. Without the bonus, the critics value the policy's returns alone,
    and the policy is greedy with respect to them up to noise of size lambda.

    A diffusion policy has no density in closed form. Its entropy is estimated by
    [`nearest_neighbour_entropy`][qsm_rl.entropy.nearest_neighbour_entropy] from ``num_samples`` further samples for
    each next state, whose reverse chains are most of the cost of an update. It is the entropy of the policy itself in
    box units, without the noise that exploration and the TD target add. It can have either sign (uniform actions have
    ``A log 2``), so where episodes can end early it also rewards or punishes staying alive. With n-step returns, only
    the last state earns it.

    Args:
        temperature: lambda > 0 in units of Q; higher keeps the policy wider. A buffer, so that it can be scheduled.
        num_samples: N, at least 2. More samples give less noise and cost proportionally more time; usual range 8 to 64.

    Raises:
        ValueError: if the temperature is not positive or ``num_samples`` below 2.

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> bonus = EntropyBonus(temperature=0.1)
        >>> uniform = 2 * torch.rand(16, 1000, 2) - 1
        >>> bonus(uniform).mean().round(decimals=2)  # 0.1 * 2 log 2 = 0.139
        tensor(0.1400)
    """

    temperature: Tensor

    def __init__(self, temperature: float, num_samples: int = 16) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature!r}.")
        if num_samples < 2:
            raise ValueError(f"num_samples must be at least 2, got {num_samples!r}.")
        self.register_buffer("temperature", torch.tensor(float(temperature)))
        self.num_samples = num_samples

    def forward(self, samples: Tensor) -> Tensor:
        """The bonus in units of Q.

        Args:
            samples: samples of the policy in box units, shape ``(N, *B, A)``.

        Returns:
            Shape ``(*B,)``.
        """
        return self.temperature * nearest_neighbour_entropy(samples)
