"""One update of the losses of diffusion actor-critics: critics, targets, actor."""

from __future__ import annotations

from typing import cast

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchrl.objectives import SoftUpdate

from qsm_rl.action_selection import BestOfN
from qsm_rl.actor import DiffusionActor
from qsm_rl.objectives.diffusion_actor_critic import DiffusionActorCriticLoss
from qsm_rl.training.random_state import isolated_random_state
from qsm_rl.training.ranks import average_batch_statistics
from qsm_rl.training.updates.actor_critic_update import LOSS_NAMES, ActorCriticUpdate, StepOutputs
from qsm_rl.training.updates.update import (
    Precision,
    accelerated,
    gradient_step,
    raise_non_finite,
    watch,
)

__all__ = ["SPREAD_OBSERVATIONS", "SPREAD_SAMPLES", "DiffusionUpdate"]

SPREAD_SAMPLES = 8
SPREAD_OBSERVATIONS = 32


class DiffusionUpdate(ActorCriticUpdate):
    """Updates the critics, then their targets, then the actor with the new critics, for any of the kit's losses.

    The order is: ``qvalue_loss``, critic step, Polyak step of the target networks if the loss has any, ``actor_loss``,
    actor step.

    Args:
        loss: the loss, with its value estimator made and on its device.
        actor_learning_rate: Adam's learning rate for the actor.
        critic_learning_rate: Adam's learning rate for the critics.
        tau: fraction by which the target critics, if there are any, move towards the critics at each update.
        critic_adam_beta1: Adam's beta1 for the critics, in [0, 1).
        policy_delay: critic updates per actor update, at least 1.
        actor_learning_rate_decay: actor updates over which the actor's learning rate falls to zero along a cosine; None
            keeps it constant.
        gradient_clipping: maximum gradient norm, for actor and critics separately; None does not clip.
        actor_ema: decay of the moving average of the actor; None for no average.
        eval_best_of: number of samples N for an additional evaluation that acts by the sample with the largest mean Q;
            1 for none.
        precision: arithmetic of the matrix products, ``"float32"``, ``"tf32"`` or ``"bfloat16"``. With bfloat16 the
            losses run under ``torch.autocast``; weights, optimisers, Q-values, predicted noises and losses stay
            float32.
        compile: whether to compile the losses with ``torch.compile``; their first call then takes about a minute.
        cuda_graph: whether to record the kernels of an update once and launch them together from then on, which is
            several times as fast for networks of this size. Needs a GPU, a single process, and batches of one shape. A
            non-finite loss is then reported by ``check``, not at once.

    Attributes:
        ema: the averaged actor; None without ``actor_ema``.
    """

    loss: DiffusionActorCriticLoss

    def __init__(
        self,
        loss: DiffusionActorCriticLoss,
        *,
        actor_learning_rate: float,
        critic_learning_rate: float,
        tau: float,
        critic_adam_beta1: float = 0.9,
        policy_delay: int = 1,
        actor_learning_rate_decay: int | None = None,
        gradient_clipping: float | None = None,
        actor_ema: float | None = None,
        eval_best_of: int = 1,
        precision: Precision = "float32",
        compile: bool = False,
        cuda_graph: bool = False,
    ) -> None:
        actor_parameters = list(loss.actor_network_params.parameters())
        critic_parameters = list(loss.qvalue_network_params.parameters())
        super().__init__(
            loss,
            actor_parameters,
            critic_parameters,
            actor_learning_rate=actor_learning_rate,
            critic_learning_rate=critic_learning_rate,
            critic_adam_beta1=critic_adam_beta1,
            policy_delay=policy_delay,
            actor_learning_rate_decay=actor_learning_rate_decay,
            gradient_clipping=gradient_clipping,
            cuda_graph=cuda_graph,
            deferred=cuda_graph,
        )
        self.eval_best_of = eval_best_of
        has_targets = loss.delay_actor or loss.delay_qvalue
        self.tau = tau
        self.target_updater = SoftUpdate(loss, tau=tau) if has_targets else None
        # A view of the loss's parameters; in a tuple, so that they are not registered twice.
        self._actor = (loss.get_stateful_net("actor_network"),)
        self.ema: AveragedModel | None = None
        if actor_ema is not None:
            self.ema = AveragedModel(self._actor[0], multi_avg_fn=get_ema_multi_avg_fn(actor_ema))
        self._qvalue_loss = accelerated(loss.qvalue_loss, precision, compile)
        self._actor_loss = accelerated(loss.actor_loss, precision, compile)
        self._watch = torch.compile(watch) if compile else watch
        self._qvalue_info: dict[str, Tensor] | None = None
        self._actor_info: dict[str, Tensor] | None = None
        self._observation: Tensor | None = None

    @property
    def actor(self) -> DiffusionActor:
        """The actor to save: the averaged actor if there is one, else the actor itself."""
        return self._actor[0] if self.ema is None else cast(DiffusionActor, self.ema.module)

    @property
    def policies(self) -> dict[str, TensorDictModuleBase]:
        """``actor``, and with ``eval_best_of`` above 1 also its best sample by the current critics."""
        policies = super().policies
        if self.eval_best_of > 1:
            critics = self.loss.trained_critics(live=True)
            policies[f"best_of_{self.eval_best_of}"] = BestOfN(self.actor, critics, num_samples=self.eval_best_of)
        return policies

    def begin(self, transitions: TensorDictBase) -> None:
        """Chooses the value support of critics that were not given one."""
        self.loss.choose_value_support(transitions)

    def forward(self, batch: TensorDictBase) -> dict[str, Tensor]:
        """See ``Update.forward``; returns ``qvalue`` (mean over critics) and, if the actor was updated, ``actor``."""
        acts, report, self._qvalue_info, actor_info = self._run(batch)
        if acts:
            self._actor_info = actor_info
            if self.ema is not None:
                self.ema.update_parameters(self._actor[0])
        self._observation = self._actor[0].observation(batch)[:SPREAD_OBSERVATIONS]
        losses = {"qvalue": report[0, 0] / self.loss.num_qvalue_nets}
        return {**losses, "actor": report[1, 0]} if acts else losses

    def _raise_non_finite(self, report: Tensor) -> None:
        raise_non_finite(report, LOSS_NAMES)

    def _step(self, batch: TensorDictBase, *, acts: bool) -> StepOutputs:
        """Updates the critics, their targets and, if ``acts``, the actor: everything that a CUDA graph may contain."""
        loss_qvalue, qvalue_info = self._qvalue_loss(batch)
        report = [self._descend("critic", "loss_qvalue", loss_qvalue, self.critic_parameters)]
        average_batch_statistics(self.loss.qvalue_network_params)
        if self.target_updater is not None:
            self.target_updater.step()
        actor_info: dict[str, Tensor] = {}
        if acts:
            loss_actor, actor_info = self._actor_loss(batch)
            report.append(self._descend("actor", "loss_actor", loss_actor, self.actor_parameters))
        return torch.stack(report), qvalue_info, actor_info

    def diagnostics(self) -> dict[str, Tensor]:
        """The loss's diagnostics, spreads of Q and its targets, share of saturated actions, spread of the policy."""
        qvalue_info, actor_info = self._qvalue_info, self._actor_info
        if qvalue_info is None or actor_info is None:
            return {}
        out = self.loss.diagnostics(qvalue_info, actor_info)
        q_value = qvalue_info["q_value"]  # (critics, batch)
        out["q_value_spread"] = q_value.mean(0).std(correction=0)
        out["target_value_spread"] = qvalue_info["target_value"].std(correction=0)
        out["critic_disagreement"] = q_value.std(0, correction=0).mean()
        out["action_saturation"] = (qvalue_info["next_action"].abs() > 0.999).float().mean()
        with isolated_random_state(0):  # the frequency of log rows must not change the training
            out["policy_spread"] = self._samples().std(0, correction=0).mean()
        return out

    @torch.no_grad()
    def _samples(self) -> Tensor:
        """Actions sampled from the policy in box units, ``(SPREAD_SAMPLES, SPREAD_OBSERVATIONS, A)``."""
        assert self._observation is not None, "asked before the first update"
        return self._actor[0].sample(self._observation.expand(SPREAD_SAMPLES, *self._observation.shape))

    def _descend(self, name: str, loss_name: str, loss: Tensor, parameters: list[nn.Parameter]) -> Tensor:
        """One optimiser step; returns the loss and its gradient norm, ``(2,)``."""
        optimizer = self.optimizers[name]
        if not self._deferred:
            return gradient_step(loss_name, loss, optimizer, parameters, self.gradient_clipping)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        watched = self._watch(loss, [p.grad for p in parameters if p.grad is not None], self._failed)
        if self.gradient_clipping is not None:
            nn.utils.clip_grads_with_norm_(parameters, self.gradient_clipping, watched[1])
        optimizer.step()
        return watched
