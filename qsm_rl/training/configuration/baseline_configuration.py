"""What the recipes of the baselines can be told beyond the shared settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qsm_rl.training.configuration.training_configuration import TrainingConfiguration

__all__ = ["SACConfiguration", "TD3Configuration"]


@dataclass(kw_only=True)
class SACConfiguration(TrainingConfiguration):
    """Settings of soft actor-critic."""

    compile: bool | Literal["auto"] = False
    """Whether the update is compiled. TorchRL's loss of this algorithm is then compiled anew more often than pays."""

    num_critics: int = 2
    """Critics of the ensemble, of which the minimum is taken. More are warier and cost time in proportion; usual range
    2 to 10."""

    entropy_temperature: float | None = None
    """Weight of the policy's entropy, in units of Q; null tunes it towards target_entropy, beginning at 1. More keeps
    the policy wider; usual range 0.01 to 1."""

    target_entropy: float | None = None
    """Entropy that the tuning aims at, in box units (where uniform actions have 0.69 for each number of the action);
    null takes minus the number of actuators. Higher keeps the policy wider."""

    def __post_init__(self) -> None:
        """Checks every field.

        Raises:
            UserError: naming the field, its value and what was expected.
        """
        super().__post_init__()
        self._check("num_critics", self.num_critics >= 1, "at least 1")
        temperature = self.entropy_temperature
        self._check("entropy_temperature", temperature is None or temperature > 0, "null or above 0")


@dataclass(kw_only=True)
class TD3Configuration(TrainingConfiguration):
    """Settings of TD3. Noise is in box units: 1 is half the range of the action."""

    compile: bool | Literal["auto"] = False
    """Whether the update is compiled. TorchRL's loss of this algorithm is then compiled anew more often than pays."""

    exploration_noise_std: float = 0.1
    """Gaussian noise added to actions while collecting, in units of half the action range, then clipped. More explores
    wider; usual range 0.05 to 0.3."""

    target_action_noise_std: float = 0.2
    """Gaussian noise added to the next action of the TD target, in units of half the action range, then clipped. More
    smooths Q over actions; usual range 0 to 0.3."""

    target_action_noise_clip: float = 0.5
    """Largest size of that noise, in the same units."""

    policy_delay: int = 2
    """Updates of the critics for each update of the actor and the target networks. More lets the critics settle; usual
    range 1 to 4."""

    def __post_init__(self) -> None:
        """Checks every field.

        Raises:
            UserError: naming the field, its value and what was expected.
        """
        super().__post_init__()
        for name in ("exploration_noise_std", "target_action_noise_std", "target_action_noise_clip"):
            self._check(name, getattr(self, name) >= 0, "0 or more")
        self._check("policy_delay", self.policy_delay >= 1, "at least 1")
