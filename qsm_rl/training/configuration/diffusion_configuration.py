"""What the recipes of diffusion policies can be told beyond the shared settings."""

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
    """Settings of a diffusion policy and its critics, whatever trains them."""

    warmup_frames: int = 1_000
    """Frames of uniformly random actions before the first update, capped at a fifth of total_frames. More fills the
    replay buffer with wider data and starts learning later; usual range 1,000 to 10,000."""

    num_steps: int = 10
    """Denoising steps T of the policy. More makes finer policies and costs time in acting and in TD targets; usual
    range 5 to 20."""

    schedule: Literal["vp", "cosine", "linear"] = "cosine"
    """How noise grows over the steps. linear is made for hundreds of steps."""

    sampler: Literal["ddpm", "ddim"] = "ddpm"
    """Reverse process: ddpm adds fresh noise at each step, ddim only at the start."""

    clip: Literal["sample", "clean", "none"] = "clean"
    """What the sampler clips to the action bounds at each step: the sample (the QSM authors), the predicted clean
    action, or nothing."""

    sampler_temperature: float = 1.0
    """Factor on the fresh noise of the ddpm sampler's steps, in acting and in TD targets. Below 1 is greedier, above 1
    explores more; usual range 0.3 to 1."""

    critic: Literal["mlp", "simba", "crossq"] = "crossq"
    """Network of the critics. crossq: batch renormalisation in place of target critics (tau then means nothing), learns
    from the fewest frames; its authors take critic_hidden_dims [2048, 2048] and policy_delay 3; mlp; simba: residual
    blocks with layer norms, one for each of critic_hidden_dims, which must be equal, each eight times the work of a
    layer, bears wider critics and more updates."""

    actor_learning_rate: float = 1e-3
    """Adam's step size for the actor. Higher follows the critics faster and is less stable; usual range 3e-4 to
    1e-3."""

    critic_learning_rate: float = 1e-3
    """Adam's step size for the critics. Higher learns faster and is less stable; usual 1e-3 for crossq, 3e-4 for the
    others."""

    critic_adam_beta1: float = 0.5
    """Decay of the critics' momentum in Adam. Lower follows moving targets faster; usual 0.5 for crossq, 0.9 for the
    others."""

    target_aggregation: Literal["min", "mean"] | float = "mean"
    """How the critics are joined in the TD target: min, mean, or a number rho for mean minus rho times their standard
    deviation. min is the most cautious and learns later, mean is for critics that do not run away; min grows more
    pessimistic with the number of critics; usual range of rho 0 to 1, more is more pessimistic."""

    critic_layer_norm: bool = True
    """Whether mlp critics normalise before each activation. Keeps Q-values bounded away from the data."""

    num_critics: int = 2
    """Critics of the ensemble. More are steadier and cost time in proportion; usual range 2 to 10."""

    exploration_noise_std: float = 0.1
    """Gaussian noise added to actions while collecting, in units of half the action range, then clipped. More explores
    wider; usual range 0 to 0.2."""

    target_action_noise_std: float = 0.1
    """Gaussian noise added to the next action of the TD target, in units of half the action range, then clipped. More
    smooths Q over actions; usual range 0 to 0.2."""

    policy_delay: int = 1
    """Critic updates for each update of the actor. More saves time and lets the critics settle; usual range 1 to 3."""

    actor_ema: float | None = None
    """Decay of an exponential moving average of the actor, used for evaluation and published; null uses the actor
    itself. Higher is smoother and lags more; usual range 0.99 to 0.9999."""

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
                "critic_hidden_dims", len(set(self.critic_hidden_dims)) == 1, "equal widths with --critic simba"
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
    """Weight of Q, in units of its mean size, beside behaviour cloning. More is greedier; the paper takes 0.005 to 3.5
    by task. Without behaviour cloning it changes nothing."""

    bc_weight: float = 0.0
    """Weight of behaviour cloning on the replayed actions. More keeps the policy nearer to them; 1 is the paper's,
    which is offline, 0 the online variant."""

    delay_actor: bool = False
    """Whether TD targets sample a slowly following copy of the actor, as the paper's do. Steadier, and later to
    change."""

    def __post_init__(self) -> None:
        """Checks every field.

        Raises:
            UserError: naming the field, its value and what was expected.
        """
        super().__post_init__()
        for name in ("eta", "bc_weight"):
            self._check(name, getattr(self, name) >= 0, "0 or more")
        self._check("eta", self.eta > 0 or self.bc_weight > 0, "above 0 without --bc_weight, or nothing is learned")

    def without_effect(self) -> dict[str, str]:
        """See the base class; the copy of the actor follows by tau, too."""
        idle = super().without_effect()
        if self.delay_actor:
            idle.pop("tau", None)
        return idle


@dataclass(kw_only=True)
class PlainCriticsConfiguration(DiffusionConfiguration):
    """Settings of a diffusion policy with plain critics and their target copies, as the field's baselines have them.

    A policy gradient asks for values of Q away from the data, and nobody corrects critics of a data set there: both
    learn more safely from these than from the other diffusion policies' critics.
    """

    critic: Literal["mlp", "simba", "crossq"] = "mlp"
    """Network of the critics. mlp, with target critics, is what has been tried here; simba: residual blocks with layer
    norms; crossq: batch renormalisation in place of target critics, with which a policy gradient narrowed too early."""

    actor_learning_rate: float = 3e-4
    """Adam's step size for the actor. Higher follows the critics faster and is less stable; usual range 1e-4 to
    1e-3."""

    critic_learning_rate: float = 3e-4
    """Adam's step size for the critics. Higher learns faster and is less stable; usual 3e-4, 1e-3 for crossq."""

    critic_adam_beta1: float = 0.9
    """Decay of the critics' momentum in Adam. Lower follows moving targets faster; usual 0.9, 0.5 for crossq."""

    target_aggregation: Literal["min", "mean"] | float = "min"
    """How the critics are joined in the TD target: min, mean, or a number rho for mean minus rho times their standard
    deviation. What they overrate is what such a policy is drawn to: the more cautious, the safer."""


@dataclass(kw_only=True)
class DiffusionPGConfiguration(PlainCriticsConfiguration):
    """Settings of the policy gradient of the chain's likelihood.

    It asks for values of Q away from the data, not for their slope, and narrows too early with the other diffusion
    policies' critics, rates and warm-up: its own are those of the baselines.
    """

    warmup_frames: int = 10_000
    """Frames of uniformly random actions before the first update, capped at a fifth of total_frames. More fills the
    replay buffer with wider data and starts learning later; usual range 5,000 to 25,000."""

    num_samples: int = 4
    """Chains sampled for each observation of an update, compared with each other. More is less noisy and costs time in
    proportion; usual range 4 to 16."""

    min_std: float = 0.1
    """Floor of the noise of every reverse step in updates, in units of half the action range. Less is closer to the
    acting policy and makes the gradient noisier; usual range 0.05 to 0.2."""

    def __post_init__(self) -> None:
        """Checks every field.

        Raises:
            UserError: naming the field, its value and what was expected.
        """
        super().__post_init__()
        self._check("num_samples", self.num_samples >= 2, "at least 2")
        self._check("min_std", self.min_std > 0, "above 0")
