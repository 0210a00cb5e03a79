"""Independent agents trained together: their parameters are stacked, so that they share every kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase, TensorDictParams
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn

from qsm_rl.actor import DiffusionActor
from qsm_rl.training.updates.actor_critic_update import LOSS_NAMES, ActorCriticUpdate, StepOutputs
from qsm_rl.training.updates.diffusion_update import DiffusionUpdate
from qsm_rl.training.updates.update import note_failure, raise_non_finite

__all__ = ["StackedActor", "StackedUpdate"]


class StackedUpdate(ActorCriticUpdate):
    """The updates of N agents as one; each agent has its own networks, optimiser state, data and random numbers.

    Up to rounding, each agent learns exactly what its own ``DiffusionUpdate`` would teach it with the same batches and
    random numbers. On a GPU an update of small networks spends its time on launching kernels, hardly on arithmetic, so
    N agents take little longer than one.

    Args:
        updates: one update per agent, on the right device, identical except for the weights, and without averaged
            actor, spread tuner, best of N or a precision setting.
        seeds: the agents' seeds, after which they are named.
        cuda_graph: as in [`DiffusionUpdate`][qsm_rl.training.DiffusionUpdate].

    Raises:
        ValueError: if the updates have a part that cannot be stacked.
    """

    def __init__(self, updates: Sequence[DiffusionUpdate], seeds: Sequence[int], *, cuda_graph: bool = False) -> None:
        first = updates[0]
        if first.ema is not None or first.eval_best_of > 1:
            raise ValueError("an averaged actor and the best of several samples cannot be stacked.")
        params = TensorDict.from_modules(*(update.loss for update in updates), as_module=True)
        actor_parameters, critic_parameters = (
            [value for value in params[name].values(True, True) if isinstance(value, nn.Parameter)]
            for name in ("actor_network_params", "qvalue_network_params")
        )
        super().__init__(
            first.loss,
            actor_parameters,
            critic_parameters,
            actor_learning_rate=first.actor_learning_rate,
            critic_learning_rate=first.critic_learning_rate,
            critic_adam_beta1=first.critic_adam_beta1,
            policy_delay=first.policy_delay,
            actor_learning_rate_decay=first.actor_learning_rate_decay,
            gradient_clipping=first.gradient_clipping,
            cuda_graph=cuda_graph,
            deferred=True,
        )
        self.params: TensorDictParams = params
        self.agents = tuple(f"seed_{seed}" for seed in seeds)
        self.tau = first.tau
        self._targets = list(_target_pairs(params))
        self._losses = {name: self._of_all_agents(name) for name in ("qvalue_loss", "actor_loss")}
        self._qvalue_info: dict[str, Tensor] | None = None
        self._actor_info: dict[str, Tensor] | None = None

    # The loss module is only a template for all agents: its own weights are not part of this update's state.
    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The stacked parameters and buffers."""
        return self.params.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        """Loads stacked parameters and buffers."""
        with torch.no_grad():
            own = self.params.state_dict()
            for name, value in state_dict.items():
                if isinstance(value, Tensor):
                    own[name].copy_(value)

    @property
    def actors(self) -> dict[str, TensorDictModuleBase]:
        """Each agent's actor by its name, ``seed_N``; they use the stacked parameters, so they follow the training."""
        actors: dict[str, TensorDictModuleBase] = {}
        for index, name in enumerate(self.agents):
            actor = deepcopy(self.loss.actor_network)
            self.params["actor_network_params"].data[index].to_module(actor, preserve_module_state=True)
            actors[name] = actor.requires_grad_(False)
        return actors

    @property
    def actor(self) -> TensorDictModuleBase:
        """The actors of all agents as one policy."""
        return StackedActor(self.loss.actor_network, self.params["actor_network_params"])

    def forward(self, batch: TensorDictBase) -> dict[str, Tensor]:
        """See ``Update.forward``.

        Args:
            batch: transitions ``(B, N)``, those of agent n in column n.

        Returns:
            ``qvalue`` and, if the actor was updated, ``actor``: means over the agents.
        """
        acts, report, self._qvalue_info, actor_info = self._run(batch)
        if acts:
            self._actor_info = actor_info
        means = report[:, 0].mean(-1)
        losses = {"qvalue": means[0] / self.loss.num_qvalue_nets}
        return {**losses, "actor": means[1]} if acts else losses

    def _raise_non_finite(self, report: Tensor) -> None:
        for index, agent in enumerate(self.agents):
            raise_non_finite(report[..., index], [f"{name} of {agent}" for name in LOSS_NAMES])

    def diagnostics(self) -> dict[str, Tensor]:
        """The loss's diagnostics, averaged over the agents."""
        if self._qvalue_info is None or self._actor_info is None:
            return {}
        diagnostics = torch.vmap(self.loss.diagnostics)(self._qvalue_info, self._actor_info)
        return {name: value.mean() for name, value in diagnostics.items()}

    def _of_all_agents(self, name: str) -> Callable[..., Any]:
        """A method of the loss for all agents at once; the loss is a template for the weights of one agent."""
        loss = self.loss

        def of_one(params: TensorDictBase, batch: TensorDictBase) -> Any:
            actor = params["actor_network_params"].copy()
            with (
                params.to_module(loss, preserve_module_state=False),
                actor.to_module(loss.actor_network, preserve_module_state=False),
            ):
                return getattr(loss, name)(batch)

        return torch.vmap(of_one, in_dims=(0, 1), randomness="different")

    def _step(self, batch: TensorDictBase, *, acts: bool) -> StepOutputs:
        loss_qvalue, qvalue_info = self._losses["qvalue_loss"](self.params, batch)
        report = [self._descend("critic", loss_qvalue, self.critic_parameters)]
        if self._targets:
            targets, sources = zip(*self._targets, strict=True)
            torch._foreach_lerp_(targets, sources, self.tau)
        actor_info: dict[str, Tensor] = {}
        if acts:
            loss_actor, actor_info = self._losses["actor_loss"](self.params, batch)
            report.append(self._descend("actor", loss_actor, self.actor_parameters))
        return torch.stack(report), qvalue_info, actor_info

    def _descend(self, name: str, losses: Tensor, parameters: list[nn.Parameter]) -> Tensor:
        """One optimiser step; returns the losses and their gradient norms, ``(2, N)``."""
        optimizer = self.optimizers[name]
        optimizer.zero_grad(set_to_none=True)
        losses.sum().backward()  # no agent's loss depends on another's weights
        gradients = [p.grad for p in parameters if p.grad is not None]
        norms = torch.cat([gradient.flatten(1) for gradient in gradients], 1).norm(dim=1)
        watched = torch.stack([losses.detach(), norms])
        note_failure(watched, self._failed)
        if self.gradient_clipping is not None:
            factors = (self.gradient_clipping / (norms + 1e-6)).clamp(max=1.0)
            for gradient in gradients:
                gradient.mul_(factors.view(-1, *[1] * (gradient.ndim - 1)))
        optimizer.step()
        return watched


class StackedActor(TensorDictModuleBase):
    """The actors of N agents as one policy: agent n acts on row n of the observations, ``(N, *B, O)``.

    Args:
        actor: one of the actors, as a template.
        params: the stacked parameters of all actors.
    """

    def __init__(self, actor: DiffusionActor, params: TensorDictBase) -> None:
        super().__init__()
        self.in_keys, self.out_keys = actor.in_keys, actor.out_keys
        self._actor = (deepcopy(actor),)  # in a tuple: the template's parameters are not this module's
        self.params = params

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Writes the actions ``(N, *B, A)``."""
        (actor,) = self._actor

        def act(params: TensorDictBase, observations: TensorDictBase) -> Tensor:
            with params.to_module(actor, preserve_module_state=False):
                return actor(observations).get(self.out_keys[0])

        inputs = tensordict.select(*self.in_keys)
        with torch.no_grad():
            action = torch.vmap(act, randomness="different")(self.params.data, inputs)
        return tensordict.set(self.out_keys[0], action)


def _target_pairs(params: TensorDictBase) -> Iterator[tuple[Tensor, Tensor]]:
    """The stacked target parameters and the parameters that they follow."""
    for network in ("actor_network_params", "qvalue_network_params"):
        if f"target_{network}" in params.keys():  # noqa: SIM118  # a tensordict's membership test needs its keys
            sources = params[network]
            for key, target in params[f"target_{network}"].items(True, True):
                if isinstance(sources[key], nn.Parameter):
                    yield target.data, sources[key].data
