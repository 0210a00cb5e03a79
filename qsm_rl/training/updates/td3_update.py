"""One update of TD3, and what its recipe can be told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tensordict import TensorDictBase
from torch import Tensor
from torch.optim import Adam, Optimizer
from torchrl.objectives import SoftUpdate, TD3Loss

from qsm_rl.training.configuration.training_configuration import TrainingConfiguration
from qsm_rl.training.updates.mlp_actors import TanhActor
from qsm_rl.training.updates.update import Precision, Update, accelerated, gradient_step

__all__ = ["TD3Configuration", "TD3Update"]


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


class TD3Update(Update):
    """The critics at every update; actor and all target networks at every ``policy_delay``-th, behind the critics.

    Args:
        loss: TorchRL's loss with two critics and a delayed actor, its value estimator made, on its device.
        actor_learning_rate: Adam's step size for the actor.
        critic_learning_rate: Adam's step size for the critics.
        tau: share of actor and critics that the target networks take over.
        policy_delay: updates of the critics for each of the actor.
        gradient_clipping: largest gradient norm, for actor and critics each; None clips nothing.
        precision: arithmetic of the matrix products, ``"float32"``, ``"tf32"`` or ``"bfloat16"``.
        compile: whether the losses go through ``torch.compile``; their first call then takes about a minute.
    """

    loss: TD3Loss

    def __init__(
        self,
        loss: TD3Loss,
        *,
        actor_learning_rate: float,
        critic_learning_rate: float,
        tau: float,
        policy_delay: int = 2,
        gradient_clipping: float | None = None,
        precision: Precision = "float32",
        compile: bool = False,
    ) -> None:
        self.actor_parameters = list(loss.actor_network_params.parameters())
        self.critic_parameters = list(loss.qvalue_network_params.parameters())
        optimizers: dict[str, Optimizer] = {
            "actor": Adam(self.actor_parameters, lr=actor_learning_rate, fused=True),
            "critic": Adam(self.critic_parameters, lr=critic_learning_rate, fused=True),
        }
        super().__init__(loss, optimizers)
        self.policy_delay = policy_delay
        self.gradient_clipping = gradient_clipping
        self.target_updater = SoftUpdate(loss, tau=tau)
        # A view on the loss's parameters; in a tuple, so that they are not registered a second time.
        self._actor = (loss.get_stateful_net("actor_network"),)
        self._qvalue_loss = accelerated(loss.value_loss, precision, compile)
        self._actor_loss = accelerated(loss.actor_loss, precision, compile)
        self._info: dict[str, Tensor] | None = None

    @property
    def actor(self) -> TanhActor:
        """What is evaluated and published."""
        return self._actor[0]

    def forward(self, batch: TensorDictBase) -> dict[str, Tensor]:
        """See ``Update.forward``; returns ``qvalue`` (mean over critics), and ``actor`` where it was updated."""
        loss_qvalue, self._info = self._qvalue_loss(batch)
        critic = self.optimizers["critic"]
        gradient_step("loss_qvalue", loss_qvalue, critic, self.critic_parameters, self.gradient_clipping)
        losses = {"qvalue": loss_qvalue.detach() / self.loss.num_qvalue_nets}
        self.num_updates += 1
        if self.num_updates % self.policy_delay == 0:
            loss_actor, _ = self._actor_loss(batch)
            actor = self.optimizers["actor"]
            gradient_step("loss_actor", loss_actor, actor, self.actor_parameters, self.gradient_clipping)
            losses["actor"] = loss_actor.detach()
            self.target_updater.step()
        return losses

    def diagnostics(self) -> dict[str, Tensor]:
        """Means of Q-values, TD targets and TD errors of the last batch."""
        if self._info is None:
            return {}
        return {
            "q_value": self._info["pred_value"].mean(),
            "target_value": self._info["target_value"].mean(),
            "td_error": self._info["td_error"].detach().sqrt().mean(),
        }
