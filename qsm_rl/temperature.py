"""Tuning of a score target's temperature towards a given spread of actions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qsm_rl.score_targets import ScoreTarget

__all__ = ["SpreadTuner"]


class SpreadTuner(nn.Module):
    """Adjusts the temperature of a score target until the policy's actions have the wanted spread.

    SAC tunes its temperature towards an entropy (Haarnoja et al. 2018, arXiv 1812.05905, section 5); a diffusion policy
    has no density in closed form, but its samples show their spread. Each step multiplies the temperature by
    ``(target_spread / spread)^rate``: it rises while the actions lie too close together and falls while they lie too
    far apart.

    Args:
        score_target: a target with a ``temperature`` buffer, which is changed in place.
        target_spread: wanted standard deviation of the actions for one observation, in box units, averaged over action
            dimensions and observations, in (0, 1]. Larger explores more; uniform actions have 0.577. Usual range 0.1 to
            0.4.
        rate: speed of the adjustment, in (0, 1]. Larger follows faster and oscillates more, since the policy needs time
            to follow. Usual range 0.001 to 0.01 for one step per update.

    Raises:
        ValueError: if the target has no temperature, or a number is out of range.

    Examples:
        >>> from qsm_rl import NormalizedQScore
        >>> target = NormalizedQScore(0.1)
        >>> tuner = SpreadTuner(target, target_spread=0.2, rate=0.5)
        >>> spread = tuner(torch.tensor([[-0.4], [0.4]]).unsqueeze(1))  # two samples of one observation
        >>> round(spread.item(), 3), round(target.temperature.item(), 4)
        (0.4, 0.0707)
    """

    def __init__(self, score_target: ScoreTarget, target_spread: float, rate: float = 0.003) -> None:
        super().__init__()
        if "temperature" not in dict(score_target.named_buffers()):
            raise ValueError(f"{type(score_target).__name__} has no temperature buffer to tune.")
        if not 0 < target_spread <= 1:
            raise ValueError(f"target_spread must lie in (0, 1], got {target_spread!r}.")
        if not 0 < rate <= 1:
            raise ValueError(f"rate must lie in (0, 1], got {rate!r}.")
        self.score_target = score_target
        self.target_spread = target_spread
        self.rate = rate

    @torch.no_grad()
    def forward(self, actions: Tensor) -> Tensor:
        """Takes one step.

        Args:
            actions: samples of the policy in box units, shape ``(N, *B, A)``: N >= 2 for each observation. Few samples
                underestimate the spread: they give 0.90 of a Gaussian's standard deviation at N = 8, the recipe's
                choice, and 0.56 at N = 2.

        Returns:
            The measured spread, shape ``()``.

        Raises:
            ValueError: if N is below 2.
        """
        if actions.shape[0] < 2:
            raise ValueError(f"a spread needs at least 2 samples per observation, got shape {tuple(actions.shape)}.")
        spread = actions.std(0, correction=0).mean()
        # A policy that has collapsed to a point would otherwise ask for an infinite step.
        ratio = (self.target_spread / spread).clamp(0.1, 10)
        self.score_target.get_buffer("temperature").mul_(ratio**self.rate)
        return spread
