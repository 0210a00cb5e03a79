"""What updates of an actor and its critics share: optimisers, turns, CUDA graphs, and checks that do not wait."""

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

# Rows (loss, norm of its gradient) of the critics and, where it acts, the actor; the info of both losses.
StepOutputs = tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]


class ActorCriticUpdate(Update):
    """Critics at every update, the actor at each ``policy_delay``-th; as a CUDA graph where asked for.

    A subclass overrides ``_step``, which changes weights in place, and ``_raise_non_finite``.

    Args:
        loss: as of ``Update``.
        actor_parameters: what the actor's optimiser trains.
        critic_parameters: what the critics' optimiser trains.
        actor_learning_rate: Adam's step size for the actor.
        critic_learning_rate: Adam's step size for the critics.
        critic_adam_beta1: decay of the critics' momentum.
        policy_delay: critic updates for each of the actor's.
        actor_learning_rate_decay: see ``cosine_decay``, in the actor's updates.
        gradient_clipping: largest gradient norm; None clips nothing.
        cuda_graph: whether a step is recorded as a CUDA graph.
        deferred: whether what is not finite shows in ``check``; a CUDA graph needs it.
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
        if cuda_graph:  # which reads the rate where it lies, and a number would be recorded
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
        # One for the critics alone, one for the whole update.
        self._steps: dict[bool, Callable[[TensorDictBase], StepOutputs]] = {
            acts: partial(self._step, acts=acts) for acts in (False, True)
        }
        if cuda_graph:
            self._steps = {acts: CudaGraph(step) for acts, step in self._steps.items()}

    def check(self) -> None:
        """See ``Update.check``."""
        reports, self._reports = self._reports, []
        if not reports or torch.stack([report.sum() for report in reports]).isfinite().all():
            return  # having waited for the GPU once
        for index, report in enumerate(reports):
            try:
                self._raise_non_finite(report)
            except NonFiniteLossError as error:
                error.updates_since = len(reports) - 1 - index
                raise

    def _run(self, batch: TensorDictBase) -> tuple[bool, Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """Whether it was the actor's turn, and what ``_step`` returned."""
        self.num_updates += 1
        acts = self.num_updates % self.policy_delay == 0
        if acts:
            self._set_actor_rate()
        report, qvalue_info, actor_info = self._steps[acts](batch)
        if self._deferred:
            report = report.clone()  # the next update writes where it lies
            self._reports.append(report)
        return acts, report, qvalue_info, actor_info

    def _step(self, batch: TensorDictBase, *, acts: bool) -> StepOutputs:
        """The critics, their targets and, where it acts, the actor: all that a CUDA graph may hold."""
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
