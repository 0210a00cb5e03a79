"""Settings of the baseline recipes, beyond the shared ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qsm_rl.training.configuration.training_configuration import TrainingConfiguration

__all__ = ["SACConfiguration", "TD3Configuration"]


@dataclass(kw_only=True)
class SACConfiguration(TrainingConfiguration):
    """Settings of soft actor-critic."""

    compile: bool | Literal["auto"] = False
    """Whether to compile the update. Usually not worth it here: TorchRL's loss for this algorithm is recompiled too
    often."""

    num_critics: int = 2
    """Number of critics in the ensemble, of which the minimum is taken. More is more pessimistic and costs time in
    proportion; usual range 2 to 10."""

    entropy_temperature: float | None = None
    """Weight of the policy's entropy, in units of Q; null starts at 1 and tunes it towards target_entropy. More keeps
    the policy wider; usual range 0.01 to 1."""

    target_entropy: float | None = None
    """Entropy that the automatic tuning aims at, in box units (where uniform actions have 0.69 per action dimension);
    null uses minus the number of action dimensions. Higher keeps the policy wider."""

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
    """Settings of TD3.

    Noise is in box units: 1 is half the range of the action.
    """

    compile: bool | Literal["auto"] = False
    """Whether to compile the update. Usually not worth it here: TorchRL's loss for this algorithm is recompiled too
    often."""

    exploration_noise_std: float = 0.1
    """Standard deviation of the Gaussian noise added to actions during collection, in units of half the action range;
    the result is clipped. More explores more widely; usual range 0.05 to 0.3."""

    target_action_noise_std: float = 0.2
    """Standard deviation of the Gaussian noise added to the next action in the TD target, in units of half the action
    range; the result is clipped. More smooths Q over actions; usual range 0 to 0.3."""

    target_action_noise_clip: float = 0.5
    """Bound at which this noise is clipped, in the same units."""

    policy_delay: int = 2
    """Critic updates per update of the actor and the target networks. More lets the critics settle; usual range 1 to
    4."""

    def __post_init__(self) -> None:
        """Checks every field.

        Raises:
            UserError: naming the field, its value and what was expected.
        """
        super().__post_init__()
        for name in ("exploration_noise_std", "target_action_noise_std", "target_action_noise_clip"):
            self._check(name, getattr(self, name) >= 0, "0 or more")
        self._check("policy_delay", self.policy_delay >= 1, "at least 1")
