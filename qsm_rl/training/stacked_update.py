"""Independent agents trained together: their parameters stacked, so that they share every kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torch.optim import Adam

from qsm_rl.actor import DiffusionActor
from qsm_rl.training.cuda_graphs import CudaGraph
from qsm_rl.training.diffusion_update import DiffusionUpdate
from qsm_rl.training.updates import NonFiniteLossError, Update, cosine_decay

__all__ = ["StackedUpdate"]


class StackedUpdate(Update):
    def __init__(self, updates: Sequence[DiffusionUpdate], seeds: Sequence[int], cuda_graph: bool = False, compile: bool = False) -> None:
        first = updates[0]
        params = TensorDict.from_modules(*(update.loss for update in updates), as_module=True)
        actor = list(params["actor_network_params"].values(True, True))
        device = actor[0].device
        nets = {name: [p for p in params[f"{name}_network_params"].values(True, True) if p.requires_grad] for name in ("actor", "qvalue")}
        lr = first.actor_learning_rate
        rate: Any = torch.tensor(lr, device=device) if cuda_graph else lr
        critic = first.optimizers["critic"].param_groups[0]
        options: dict[str, Any] = {"fused": True, "capturable": cuda_graph}
        optimizers = {
            "actor": Adam(nets["actor"], lr=rate, **options),
            "critic": Adam(nets["qvalue"], lr=critic["lr"], betas=critic["betas"], **options),
        }
        super().__init__(first.loss, optimizers)
        self.params = params
        failed = torch.zeros((), device=device)
        for o in optimizers.values():
            o.found_inf = failed
        self.nets = nets
        self.tau = 0.005
        keys = params.keys()
        self.targets = []
        for net in ("actor", "qvalue"):
            if f"target_{net}_network_params" in keys:
                s = dict(params[f"{net}_network_params"].items(True, True))
                t = dict(params[f"target_{net}_network_params"].items(True, True))
                self.targets += [(t[k].data, s[k].data) for k in s if s[k].requires_grad]
        self._halves = {n: self._make_half(n) for n in ("qvalue_loss", "actor_loss")}
        if compile:
            self._halves = {n: torch.compile(h) for n, h in self._halves.items()}
        self._run = self._step
        if cuda_graph:
            self._run = CudaGraph(self._step)

    def _make_half(self, name: str):
        def function(params, batch):
            actor = params["actor_network_params"].copy()
            with (
                params.to_module(self.loss, preserve_module_state=False),
                actor.to_module(self.loss.actor_network, preserve_module_state=False),
            ):
                return getattr(self.loss, name)(batch)

        return torch.vmap(function, randomness="different")

    def _half(self, name, batch):
        return self._halves[name](self.params, batch)

    def _descend(self, name: str, optimizer, loss: Tensor, parameters) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss.sum().backward()
        norms = torch.cat([p.grad.flatten(1) for p in parameters if p.grad is not None], 1).norm(dim=1)
        watched = torch.stack([loss.detach(), norms])
        optimizer.found_inf.copy_(torch.maximum(optimizer.found_inf, ~torch.isfinite(watched).all()))
        optimizer.step()
        return watched

    def _step(self, batch: TensorDictBase):
        loss_q, q_info = self._half("qvalue_loss", batch)
        wq = self._descend("loss_qvalue", self.optimizers["critic"], loss_q, self.nets["qvalue"])
        if self.targets:
            torch._foreach_lerp_([t for t, _ in self.targets], [s for _, s in self.targets], self.tau)
        loss_a, a_info = self._half("actor_loss", batch)
        wa = self._descend("loss_actor", self.optimizers["actor"], loss_a, self.nets["actor"])
        return {"qvalue": loss_q.detach(), "actor": loss_a.detach()}, q_info, a_info, {"q": wq, "a": wa}

    def forward(self, batch: TensorDictBase):
        self.num_updates += 1
        losses, self.q_info, self.a_info, watched = self._run(batch)
        return losses
