"""Shared parts of actor-critic updates: optimisers, the delay of the actor, CUDA graphs, and deferred checks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn
from torch.optim import Adam
from torchrl.objectives import LossModule

from qsm_rl.training.updates.cuda_graphs import CudaGraph
from qsm_rl.training.updates.piecewise_adam import PiecewiseAdam
from qsm_rl.training.updates.update import NonFiniteLossError, Update, cosine_decay

__all__ = ["LOSS_NAMES", "ActorCriticUpdate", "StepOutputs"]

LOSS_NAMES = ("loss_qvalue", "loss_actor")

# Rows (loss, gradient norm) of the critics and, if it is updated, the actor; then the info of both losses.
StepOutputs = tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]


class ActorCriticUpdate(Update):
    """Updates the critics every time and the actor every ``policy_delay``-th time, as a CUDA graph if requested.

    A subclass overrides ``_step``, which changes weights in place, and ``_raise_non_finite``.

    Args:
        loss: the loss, as for ``Update``.
        actor_parameters: parameters that the actor's optimiser trains.
        critic_parameters: parameters that the critics' optimiser trains.
        actor_learning_rate: Adam's learning rate for the actor.
        critic_learning_rate: Adam's learning rate for the critics.
        critic_adam_beta1: Adam's beta1 for the critics.
        policy_delay: critic updates per actor update.
        actor_learning_rate_decay: see ``cosine_decay``; counted in actor updates.
        gradient_clipping: maximum gradient norm; None does not clip.
        cuda_graph: whether a step is recorded as a CUDA graph.
        deferred: whether non-finite values are reported by ``check`` later; required with a CUDA graph.
    """

    def __init__(
        self,
        loss: LossModule,
        actor_parameters: Sequence[nn.Parameter],
        critic_parameters: Sequence[nn.Parameter],
        *,
        actor_learning_rate: float,
        critic_learning_rate: float,
        critic_adam_beta1: float,
        policy_delay: int,
        actor_learning_rate_decay: int | None,
        gradient_clipping: float | None,
        cuda_graph: bool,
        deferred: bool,
    ) -> None:
        device = actor_parameters[0].device
        rate: float | Tensor = actor_learning_rate
        if cuda_graph:  # it reads the rate from memory; a plain number would be recorded as a constant
            rate = torch.tensor(actor_learning_rate, device=device)
        adam = partial(PiecewiseAdam if cuda_graph else Adam, fused=True, capturable=cuda_graph)
        actor = adam(actor_parameters, lr=rate)
        critic = adam(critic_parameters, lr=critic_learning_rate, betas=(critic_adam_beta1, 0.999))
        super().__init__(loss, {"actor": actor, "critic": critic})
        self.actor_parameters = list(actor_parameters)
        self.critic_parameters = list(critic_parameters)
        self.actor_learning_rate = actor_learning_rate
        self.critic_learning_rate = critic_learning_rate
        self.critic_adam_beta1 = critic_adam_beta1
        self.policy_delay = policy_delay
        self.actor_learning_rate_decay = actor_learning_rate_decay
        self.gradient_clipping = gradient_clipping
        self.cuda_graph = cuda_graph
        self._reports: list[Tensor] = []
        self._deferred = deferred
        self._failed = torch.zeros((), device=device)
        if deferred:
            for optimizer in self.optimizers.values():
                optimizer.found_inf = self._failed  # type: ignore[attr-defined]  # shared: one failure stops both
        # One step for the critics alone, one for the whole update.
        self._steps: dict[bool, Callable[[TensorDictBase], StepOutputs]] = {
            acts: partial(self._step, acts=acts) for acts in (False, True)
        }
        if cuda_graph:
            self._steps = {acts: CudaGraph(step) for acts, step in self._steps.items()}

    def check(self) -> None:
        """See ``Update.check``."""
        reports, self._reports = self._reports, []
        if not reports or torch.stack([report.sum() for report in reports]).isfinite().all():
            return  # after waiting for the GPU once
        for index, report in enumerate(reports):
            try:
                self._raise_non_finite(report)
            except NonFiniteLossError as error:
                error.updates_since = len(reports) - 1 - index
                raise

    def _run(self, batch: TensorDictBase) -> tuple[bool, Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """Whether the actor was updated, and what ``_step`` returned."""
        self.num_updates += 1
        acts = self.num_updates % self.policy_delay == 0
        if acts:
            self._set_actor_rate()
        report, qvalue_info, actor_info = self._steps[acts](batch)
        if self._deferred:
            report = report.clone()  # the next update overwrites it
            self._reports.append(report)
        return acts, report, qvalue_info, actor_info

    def _step(self, batch: TensorDictBase, *, acts: bool) -> StepOutputs:
        """Updates the critics, their targets and, if ``acts``, the actor: everything that a CUDA graph may contain."""
        raise NotImplementedError

    def _raise_non_finite(self, report: Tensor) -> None:
        """Raises ``NonFiniteLossError`` for a report that is not finite."""
        raise NotImplementedError

    def _set_actor_rate(self) -> None:
        if self.actor_learning_rate_decay is None:
            return
        steps = self.num_updates // self.policy_delay - 1
        rate = self.actor_learning_rate * cosine_decay(steps, self.actor_learning_rate_decay)
        group = self.optimizers["actor"].param_groups[0]
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
