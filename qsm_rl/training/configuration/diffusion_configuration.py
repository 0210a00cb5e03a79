"""Settings of the diffusion policy recipes, beyond the shared ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qsm_rl.training.configuration.training_configuration import TrainingConfiguration

__all__ = [
    "DiffusionConfiguration",
    "DiffusionPGConfiguration",
    "DiffusionQLConfiguration",
    "PlainCriticsConfiguration",
]


@dataclass(kw_only=True)
class DiffusionConfiguration(TrainingConfiguration):
    """Settings of a diffusion policy and its critics, independent of how they are trained."""

    warmup_frames: int = 1_000
    """Frames of uniformly random actions before the first update, capped at a fifth of total_frames. More fills the
    replay buffer with more diverse data and delays learning; usual range 1,000 to 10,000."""

    num_steps: int = 10
    """Denoising steps T of the policy. More allows finer policies but slows down acting and TD targets; usual range 5
    to 20."""

    schedule: Literal["vp", "cosine", "linear"] = "cosine"
    """How the noise grows over the denoising steps. linear is meant for hundreds of steps."""

    sampler: Literal["ddpm", "ddim"] = "ddpm"
    """Reverse process: ddpm adds fresh noise at each step; ddim draws noise only at the start."""

    clip: Literal["sample", "clean", "none"] = "clean"
    """What the sampler clips to the action bounds at each step: sample (the sample itself, as the QSM authors do),
    clean (the predicted clean action), or none."""

    sampler_temperature: float = 1.0
    """Factor on the fresh noise that the ddpm sampler adds at each step, in acting and in TD targets. Below 1 is
    greedier, above 1 explores more; usual range 0.3 to 1."""

    critic: Literal["mlp", "simba", "crossq"] = "crossq"
    """Network of the critics. crossq: batch renormalisation in place of target critics (tau then has no effect); learns
    from the fewest frames; its authors use critic_hidden_dims [2048, 2048] and policy_delay 3. mlp: plain hidden
    layers. simba: residual blocks with layer norms, one block per entry of critic_hidden_dims, which must all be equal;
    a block costs eight times as much as a plain layer, but wider critics and more updates stay stable."""

    actor_learning_rate: float = 1e-3
    """Adam's learning rate for the actor. Higher follows the critics faster and is less stable; usual range 3e-4 to
    1e-3."""

    critic_learning_rate: float = 1e-3
    """Adam's learning rate for the critics. Higher learns faster and is less stable; usually 1e-3 for crossq and 3e-4
    for the others."""

    critic_adam_beta1: float = 0.5
    """Adam's beta1 for the critics, the decay of its momentum. Lower follows moving targets faster; usually 0.5 for
    crossq and 0.9 for the others."""

    target_aggregation: Literal["min", "mean"] | float = "mean"
    """How the TD target combines the critics: min, mean, or a number rho for the mean minus rho times their standard
    deviation. min is the most cautious, learns later, and grows more pessimistic with the number of critics; mean suits
    critics that do not diverge; a larger rho is more pessimistic, usual range 0 to 1."""

    critic_layer_norm: bool = True
    """Whether mlp critics apply layer normalisation before each activation. Keeps Q-values bounded away from the
    data."""

    num_critics: int = 2
    """Number of critics in the ensemble. More is steadier and costs time in proportion; usual range 2 to 10."""

    exploration_noise_std: float = 0.1
    """Standard deviation of the Gaussian noise added to actions during collection, in units of half the action range;
    the result is clipped. More explores more widely; usual range 0 to 0.2."""

    target_action_noise_std: float = 0.1
    """Standard deviation of the Gaussian noise added to the next action in the TD target, in units of half the action
    range; the result is clipped. More smooths Q over actions; usual range 0 to 0.2."""

    policy_delay: int = 1
    """Critic updates per actor update. More saves time and lets the critics settle; usual range 1 to 3."""

    actor_ema: float | None = None
    """Decay of an exponential moving average of the actor, which is then evaluated and saved in place of the actor;
    null uses the actor itself. Higher is smoother and lags more; usual range 0.99 to 0.9999."""

    def __post_init__(self) -> None:
        """Checks every field.

        Raises:
            UserError: naming the field, its value and what was expected.
        """
        super().__post_init__()
        for name in ("num_steps", "num_critics", "policy_delay"):
            self._check(name, getattr(self, name) >= 1, "at least 1")
        self._check("sampler_temperature", self.sampler_temperature >= 0, "0 or more")
        if self.sampler == "ddim":
            self._check(
                "sampler_temperature", self.sampler_temperature == 1, "1 with the ddim sampler, which adds no noise"
            )
        for name in ("exploration_noise_std", "target_action_noise_std"):
            self._check(name, getattr(self, name) >= 0, "0 or more")
        self._check("critic_adam_beta1", 0 <= self.critic_adam_beta1 < 1, "0 or more and below 1")
        if self.critic == "simba":
            self._check(
                "critic_hidden_dims", len(set(self.critic_hidden_dims)) == 1, "of equal widths with --critic simba"
            )
        self._check("actor_ema", self.actor_ema is None or 0 < self.actor_ema < 1, "null or between 0 and 1")

    def without_effect(self) -> dict[str, str]:
        """See the base class."""
        idle = super().without_effect()
        if self.critic != "mlp":
            idle["critic_layer_norm"] = "--critic mlp"
        if self.critic == "crossq":
            idle["tau"] = "--critic mlp or simba"
        return idle


@dataclass(kw_only=True)
class DiffusionQLConfiguration(DiffusionConfiguration):
    """Settings of Diffusion-QL."""

    eta: float = 1.0
    """Weight of the Q term, which is divided by its mean size, relative to behaviour cloning. More is greedier; the
    paper uses 0.005 to 3.5, depending on the task. Without behaviour cloning it has no effect."""

    bc_weight: float = 0.0
    """Weight of behaviour cloning on the replayed actions. More keeps the policy closer to them; 1 is the paper's
    offline setting, 0 the online variant."""

    delay_actor: bool = False
    """Whether TD targets sample from a slowly following copy of the actor, as in the paper. Steadier, but slower to
    adapt."""

    def __post_init__(self) -> None:
        """Checks every field.

        Raises:
            UserError: naming the field, its value and what was expected.
        """
        super().__post_init__()
        for name in ("eta", "bc_weight"):
            self._check(name, getattr(self, name) >= 0, "0 or more")
        self._check(
            "eta", self.eta > 0 or self.bc_weight > 0, "above 0 without --bc_weight (otherwise nothing is learned)"
        )

    def without_effect(self) -> dict[str, str]:
        """See the base class; the delayed copy of the actor also follows at the rate tau."""
        idle = super().without_effect()
        if self.delay_actor:
            idle.pop("tau", None)
        return idle


@dataclass(kw_only=True)
class PlainCriticsConfiguration(DiffusionConfiguration):
    """Settings of a diffusion policy with plain critics and target critics, as in the field's baselines.

    A policy gradient queries Q away from the data, and in offline training nothing corrects the critics there. Both
    learn more safely from these critics than from those of the other diffusion policies.
    """

    critic: Literal["mlp", "simba", "crossq"] = "mlp"
    """Network of the critics. mlp, with target critics, is the one tested here. simba: residual blocks with layer
    norms. crossq: batch renormalisation in place of target critics; with it a policy gradient narrowed too early."""

    actor_learning_rate: float = 3e-4
    """Adam's learning rate for the actor. Higher follows the critics faster and is less stable; usual range 1e-4 to
    1e-3."""

    critic_learning_rate: float = 3e-4
    """Adam's learning rate for the critics. Higher learns faster and is less stable; usually 3e-4, or 1e-3 for
    crossq."""

    critic_adam_beta1: float = 0.9
    """Adam's beta1 for the critics, the decay of its momentum. Lower follows moving targets faster; usually 0.9, or 0.5
    for crossq."""

    target_aggregation: Literal["min", "mean"] | float = "min"
    """How the TD target combines the critics: min, mean, or a number rho for the mean minus rho times their standard
    deviation. Such a policy is drawn to actions that the critics overestimate, so the more cautious choice is safer."""


@dataclass(kw_only=True)
class DiffusionPGConfiguration(PlainCriticsConfiguration):
    """Settings of the policy gradient on the likelihood of the chain.

    It queries values of Q away from the data, not their gradient. With the critics, learning rates and warm-up of the
    other diffusion policies it narrows too early, so it uses those of the baselines.
    """

    warmup_frames: int = 10_000
    """Frames of uniformly random actions before the first update, capped at a fifth of total_frames. More fills the
    replay buffer with more diverse data and delays learning; usual range 5,000 to 25,000."""

    num_samples: int = 4
    """Chains sampled per observation in an update and compared with each other. More is less noisy and costs time in
    proportion; usual range 4 to 16."""

    min_std: float = 0.1
    """Minimum standard deviation of the noise of every reverse step during updates, in units of half the action range.
    Lower is closer to the acting policy and makes the gradient noisier; usual range 0.05 to 0.2."""

    def __post_init__(self) -> None:
        """Checks every field.

        Raises:
            UserError: naming the field, its value and what was expected.
        """
        super().__post_init__()
        self._check("num_samples", self.num_samples >= 2, "at least 2")
        self._check("min_std", self.min_std > 0, "above 0")
