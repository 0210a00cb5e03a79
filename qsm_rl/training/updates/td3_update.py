"""One update of TD3."""

from __future__ import annotations

from tensordict import TensorDictBase
from torch import Tensor
from torch.optim import Adam, Optimizer
from torchrl.objectives import SoftUpdate, TD3Loss

from qsm_rl.training.updates.mlp_actors import TanhActor
from qsm_rl.training.updates.update import Precision, Update, accelerated, gradient_step

__all__ = ["TD3Update"]


class TD3Update(Update):
    """Updates the critics every time, and then, every ``policy_delay``-th time, the actor and all target networks.

    Args:
        loss: TorchRL's loss with two critics and a delayed actor, with its value estimator made and on its device.
        actor_learning_rate: Adam's learning rate for the actor.
        critic_learning_rate: Adam's learning rate for the critics.
        tau: fraction by which the target networks move towards actor and critics.
        policy_delay: critic updates per actor update.
        gradient_clipping: maximum gradient norm, for actor and critics separately; None does not clip.
        precision: arithmetic of the matrix products, ``"float32"``, ``"tf32"`` or ``"bfloat16"``.
        compile: whether to compile the losses with ``torch.compile``; their first call then takes about a minute.
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
        # A view of the loss's parameters; in a tuple, so that they are not registered twice.
        self._actor = (loss.get_stateful_net("actor_network"),)
        self._qvalue_loss = accelerated(loss.value_loss, precision, compile)
        self._actor_loss = accelerated(loss.actor_loss, precision, compile)
        self._info: dict[str, Tensor] | None = None

    @property
    def actor(self) -> TanhActor:
        """The actor to evaluate and save."""
        return self._actor[0]

    def forward(self, batch: TensorDictBase) -> dict[str, Tensor]:
        """See ``Update.forward``; returns ``qvalue`` (mean over critics), and ``actor`` if it was updated."""
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
            "td_error": self._info["td_error"].detach().amax(0).sqrt().mean(),  # squares, one row per critic
        }
