"""One update of soft actor-critic."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torch.optim import Adam, Optimizer
from torchrl.objectives import SACLoss, SoftUpdate

from qsm_rl.training.updates.mlp_actors import DeterministicPolicy, TanhGaussianActor
from qsm_rl.training.updates.update import Precision, Update, accelerated, gradient_step

__all__ = ["SACUpdate"]


class SACUpdate(Update):
    """Updates the critics, then their targets, then the actor with the new critics, then the entropy temperature.

    Args:
        loss: TorchRL's loss, version 2 (without a value network), with its value estimator made and on its device.
        actor_learning_rate: Adam's learning rate for the actor, and for the temperature unless it is fixed.
        critic_learning_rate: Adam's learning rate for the critics.
        tau: fraction by which the target critics move towards the critics at each update.
        gradient_clipping: maximum gradient norm, for actor and critics separately; None does not clip.
        precision: arithmetic of the matrix products, ``"float32"``, ``"tf32"`` or ``"bfloat16"``.
        compile: whether to compile the losses with ``torch.compile``; their first call then takes about a minute.
    """

    loss: SACLoss

    def __init__(
        self,
        loss: SACLoss,
        *,
        actor_learning_rate: float,
        critic_learning_rate: float,
        tau: float,
        gradient_clipping: float | None = None,
        precision: Precision = "float32",
        compile: bool = False,
    ) -> None:
        loss.target_entropy  # noqa: B018  becomes a buffer on first access, and checkpoints need it
        self.actor_parameters = list(loss.actor_network_params.parameters())
        self.critic_parameters = list(loss.qvalue_network_params.parameters())
        optimizers: dict[str, Optimizer] = {
            "actor": Adam(self.actor_parameters, lr=actor_learning_rate, fused=True),
            "critic": Adam(self.critic_parameters, lr=critic_learning_rate, fused=True),
        }
        if not loss.fixed_alpha:
            optimizers["temperature"] = Adam([loss.log_alpha], lr=actor_learning_rate)
        super().__init__(loss, optimizers)
        self.gradient_clipping = gradient_clipping
        self.target_updater = SoftUpdate(loss, tau=tau)
        # A view of the loss's parameters; in a tuple, so that they are not registered twice.
        self._actor = (loss.get_stateful_net("actor_network"),)
        self._qvalue_loss = accelerated(loss.qvalue_v2_loss, precision, compile)
        self._actor_loss = accelerated(loss.actor_loss, precision, compile)
        self._infos: tuple[dict[str, Tensor], dict[str, Tensor]] | None = None

    @property
    def actor(self) -> TanhGaussianActor:
        """The actor to save; it samples."""
        return self._actor[0]

    @property
    def policies(self) -> dict[str, TensorDictModuleBase]:
        """The policy to evaluate: the squashed mean, as is usual."""
        return {"": DeterministicPolicy(self.actor)}

    def forward(self, batch: TensorDictBase) -> dict[str, Tensor]:
        """See ``Update.forward``; returns ``qvalue`` (mean over critics), ``actor`` and ``temperature``."""
        loss_qvalue, qvalue_info = self._qvalue_loss(batch)
        critic = self.optimizers["critic"]
        gradient_step("loss_qvalue", loss_qvalue, critic, self.critic_parameters, self.gradient_clipping)
        self.target_updater.step()

        loss_actor, actor_info = self._actor_loss(batch)
        actor = self.optimizers["actor"]
        gradient_step("loss_actor", loss_actor, actor, self.actor_parameters, self.gradient_clipping)
        losses = {"qvalue": loss_qvalue.detach() / self.loss.num_qvalue_nets, "actor": loss_actor.detach()}

        if "temperature" in self.optimizers:
            loss_temperature = self.loss.alpha_loss(actor_info["log_prob"]).mean()
            gradient_step("loss_temperature", loss_temperature, self.optimizers["temperature"], [self.loss.log_alpha])
            losses["temperature"] = loss_temperature.detach()

        self.num_updates += 1
        self._infos = qvalue_info, actor_info
        return losses

    @torch.no_grad()
    def diagnostics(self) -> dict[str, Tensor]:
        """Temperature, entropy of the policy in box units, and size of the TD error."""
        if self._infos is None:
            return {}
        qvalue_info, actor_info = self._infos
        return {
            "temperature": self.loss.log_alpha.exp(),
            "entropy": -actor_info["log_prob"].mean(),
            "td_error": qvalue_info["td_error"].mean(),
        }
