"""Settings of the QSM recipe, beyond the shared ones, and its presets."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from qsm_rl.training.configuration.diffusion_configuration import DiffusionConfiguration

__all__ = ["PRESETS", "QSMConfiguration"]

# The fields' own defaults are the preset `default`. `paper` lists all of the authors' settings, even where they equal
# the defaults, so that it does not change with them. They were read from the official code, including those of the
# environment.
PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {
        "schedule": "vp",
        "num_steps": 5,
        "sampler": "ddpm",
        "clip": "sample",
        "sampler_temperature": 1.0,
        "score_target": "scaled",
        "score_scale": 50.0,
        "score_critics": "online",
        "score_aggregation": "mean",
        "bc_weight": 0.0,
        "critic_layer_norm": False,
        "critic": "mlp",
        "critic_bins": None,
        "num_critics": 2,
        "target_aggregation": "min",
        "actor_hidden_dims": (512, 512),
        "critic_hidden_dims": (512, 512),
        "actor_learning_rate": 3e-4,
        "actor_learning_rate_decay": 2_000_000,
        "critic_learning_rate": 3e-4,
        "critic_adam_beta1": 0.9,
        "policy_delay": 1,
        "best_of": 1,
        "eval_best_of": 1,
        "exploration_noise_std": 0.1,
        "target_action_noise_std": 0.1,
        "entropy_temperature": None,
        "batch_size": 256,
        "gamma": 0.99,
        "tau": 0.005,
        "n_step": 1,
        "warmup_frames": 10_000,
        "updates_per_frame": 1.0,
        "num_envs": 1,
        "frames_per_batch": 1,
        "replay_size": 1_000_000,
        "action_repeat": 1,
        "normalize_observation": False,
        "gradient_clipping": None,
        "actor_ema": None,
        "eval_episodes": 5,
    },
}

PAPER_SCORE_SCALES = {"dm_control/quadruped-walk": 120.0, "dm_control/humanoid-walk": 120.0}


@dataclass(kw_only=True)
class QSMConfiguration(DiffusionConfiguration):
    """Settings of Q-score matching."""

    presets: ClassVar[dict[str, dict[str, Any]]] = PRESETS

    preset: Literal["default", "paper"] = "default"
    """Named set of values for all settings that are not given explicitly: default (what works best) or paper (the
    authors' settings)."""

    score_target: Literal["scaled", "boltzmann", "normalized", "posterior"] = "normalized"
    """How the denoiser's target is computed from the critics. scaled: the authors' -M_q dQ/da. boltzmann: -sigma_t
    dQ/da / temperature. normalized: as boltzmann, with dQ/da divided by its mean size, so that one temperature suits
    all reward scales. posterior: exact at every noise level, from the values of Q at many actions; for few action
    dimensions."""

    score_scale: float = 50.0
    """M_q of the scaled target. Larger is greedier; it has to match the size of the rewards. The authors use 50, and
    120 on dm_control's quadruped-walk and humanoid-walk."""

    score_temperature: float = 0.1
    """Temperature of the policy exp(Q / temperature), for all targets except scaled. Lower is greedier. boltzmann: in
    units of Q; normalized: usual range 0.03 to 0.3; posterior: in units of the spread of Q over actions, usual range
    0.05 to 0.5."""

    score_sigma: bool = True
    """Whether the normalized target includes the factor sigma_t. Without it, the pull towards high Q is the same at
    every noise level, as in the authors' target."""

    score_spread: float | None = None
    """Target for tuning score_temperature automatically: the standard deviation of the policy's actions at one
    observation, in units of half the action range; null keeps the temperature fixed. Larger explores more; usual range
    0.1 to 0.4 (uniformly random actions have 0.58). Not available for the scaled target."""

    score_particles: int = 64
    """Number of actions at which the posterior target evaluates the critics. More is less noisy and costs time; usual
    range 32 to 512."""

    score_critics: Literal["online", "target"] = "online"
    """Critics from which dQ/da is computed. target is smoother but lags behind; crossq has no target critics."""

    score_aggregation: Literal["mean", "min"] = "mean"
    """How the critics are combined for dQ/da. min is more cautious."""

    bc_weight: float = 0.0
    """Weight of behaviour cloning on the replayed actions, added to the score target's loss. More keeps the policy
    closer to those actions, for offline data and fine-tuning; usual range 0.1 to 10, 0 for none."""

    critic_bins: int | None = None
    """Number of points of the value support, for critics trained by classification (two-hot cross-entropy) instead of
    regression; null uses regression. Steadier where returns are large or noisy; usual range 51 to 255."""

    critic_support: tuple[float, float] | None = None
    """Lower and upper end of the value support; targets beyond it are clipped, and train/target_clipped logs their
    share. Wide is safe, narrow is finer; all discounted returns have to fit. null takes, on both sides of 0, ten times
    the largest return that the warm-up's rewards allow: the largest abs(reward) / (1 - gamma)."""

    critic_symlog: bool = True
    """Whether the value support is fine near 0 and coarse further out, for returns of unknown size; false spaces it
    evenly."""

    best_of: int = 1
    """Actions sampled per collected frame, of which the one with the largest mean Q is taken. More is greedier and
    relies more on the critics; 1 is the policy itself; usual range 1 to 16."""

    eval_best_of: int = 1
    """The same for an additional evaluation, logged as eval/best_of_N/return_mean; eval/return_mean and the saved actor
    do not use it. 1 for none; usual range 4 to 64."""

    entropy_temperature: float | None = None
    """Weight of the policy's entropy in the TD target, in units of Q; null leaves the entropy out. More keeps the
    policy wider. The policy exp(Q / temperature), the aim of --score_target boltzmann, is soft-optimal only if both
    temperatures are equal. Usual range 0.001 to 0.1 times the size of Q."""

    entropy_samples: int = 16
    """Actions sampled in each next state to estimate this entropy. More is less noisy and costs time in proportion;
    usual range 8 to 64."""

    actor_learning_rate_decay: int | None = None
    """Number of updates over which the actor's learning rate falls to zero along a cosine; null keeps it constant. The
    authors use 2,000,000."""

    actor_ema_acts: bool = False
    """Whether the averaged actor (--actor_ema) also collects the frames. Steadier, but slower to adapt."""

    @classmethod
    def preset_values(cls, preset: str, env: str) -> dict[str, Any]:
        """The values that a preset fills in; on two tasks the authors recommend a different ``score_scale``.

        Examples:
            >>> QSMConfiguration.preset_values("paper", "dm_control/humanoid-walk")["score_scale"]
            120.0
        """
        values = super().preset_values(preset, env)
        if preset == "paper" and env in PAPER_SCORE_SCALES:
            values["score_scale"] = PAPER_SCORE_SCALES[env]
        return values

    def __post_init__(self) -> None:
        """Checks every field.

        Raises:
            UserError: naming the field, its value and what was expected.
        """
        super().__post_init__()
        self._check("score_particles", self.score_particles >= 2, "at least 2")
        spread = self.score_spread
        self._check("score_spread", spread is None or 0 < spread <= 1, "null, or above 0 and at most 1")
        tunable = spread is None or self.score_target != "scaled"
        self._check("score_spread", tunable, "null for the scaled target, which has no temperature")
        for name in ("score_scale", "score_temperature"):
            self._check(name, getattr(self, name) > 0, "above 0")
        for name in ("best_of", "eval_best_of"):
            self._check(name, getattr(self, name) >= 1, "at least 1")
        if self.critic == "crossq":
            self._check(
                "score_critics",
                self.score_critics == "online",
                "online with --critic crossq, which has no target critics",
            )
        self._check("critic_bins", self.critic_bins is None or self.critic_bins >= 2, "null or at least 2")
        low, high = self.critic_support or (-1.0, 1.0)
        self._check(
            "critic_support",
            -math.inf < low <= 0 <= high < math.inf and low < high,
            "null, or two numbers low < high that enclose 0",
        )
        without_bins = self.critic_support is None or self.critic_bins is not None
        self._check("critic_support", without_bins, "null without --critic_bins")
        bounded = self.gamma < 1 or self.critic_bins is None or self.critic_support is not None
        self._check("critic_support", bounded, "set with --gamma 1, since returns are then unbounded")
        self._check("bc_weight", self.bc_weight >= 0, "0 or more")
        entropy = self.entropy_temperature
        self._check("entropy_temperature", entropy is None or entropy > 0, "null or above 0")
        self._check("entropy_samples", self.entropy_samples >= 2, "at least 2")
        decay = self.actor_learning_rate_decay
        self._check("actor_learning_rate_decay", decay is None or decay >= 1, "null or at least 1")
        if self.actor_ema is None:
            self._check("actor_ema_acts", not self.actor_ema_acts, "false without --actor_ema")

    def without_effect(self) -> dict[str, str]:
        """See the base class."""
        idle = super().without_effect()
        of_targets = {
            "score_scale": ("scaled",),
            "score_temperature": ("boltzmann", "normalized", "posterior"),
            "score_sigma": ("normalized",),
            "score_particles": ("posterior",),
        }
        for name, targets in of_targets.items():
            if self.score_target not in targets:
                idle[name] = f"--score_target {' or '.join(targets)}"
        if self.critic_bins is None:
            idle["critic_symlog"] = "--critic_bins"
        if self.entropy_temperature is None:
            idle["entropy_samples"] = "--entropy_temperature"
        return idle
