"""Independent agents trained together: their parameters stacked, so that they share every kernel."""

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
    """The updates of N agents as one: each agent has networks, optimiser state, data and random numbers of its own.

    What each agent learns is what its own ``DiffusionUpdate`` would have taught it on the same batches and draws, up to
    rounding. On a GPU, where an update of small networks costs its kernels' launches and hardly their arithmetic, N
    agents take little longer than one.

    Args:
        updates: an update for each agent, alike but for their weights, on their device, without an averaged actor,
            spread tuner, best of N or precision of their own.
        seeds: the agents' seeds, which name them.
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

    # The loss that the agents take turns in belongs to none of them: its weights are no state of this update.
    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The stacked parameters and buffers."""
        return self.params.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        """Takes over stacked parameters and buffers."""
        with torch.no_grad():
            own = self.params.state_dict()
            for name, value in state_dict.items():
                if isinstance(value, Tensor):
                    own[name].copy_(value)

    @property
    def actors(self) -> dict[str, TensorDictModuleBase]:
        """Each agent's actor by its name, ``seed_N``; on the stacked parameters, so they follow the training."""
        actors: dict[str, TensorDictModuleBase] = {}
        for index, name in enumerate(self.agents):
            actor = deepcopy(self.loss.actor_network)
            self.params["actor_network_params"].data[index].to_module(actor, preserve_module_state=True)
            actors[name] = actor.requires_grad_(False)
        return actors

    @property
    def actor(self) -> TensorDictModuleBase:
        """All agents at once."""
        return StackedActor(self.loss.actor_network, self.params["actor_network_params"])

    def forward(self, batch: TensorDictBase) -> dict[str, Tensor]:
        """See ``Update.forward``.

        Args:
            batch: transitions ``(B, N)``, those of agent n in column n.

        Returns:
            ``qvalue`` and, where it is its turn, ``actor``: means over the agents.
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
        """The loss's own, means over the agents."""
        if self._qvalue_info is None or self._actor_info is None:
            return {}
        diagnostics = torch.vmap(self.loss.diagnostics)(self._qvalue_info, self._actor_info)
        return {name: value.mean() for name, value in diagnostics.items()}

    def _of_all_agents(self, name: str) -> Callable[..., Any]:
        """A method of the loss for every agent at once; the loss itself is a mould that holds one's weights."""
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
        """An optimiser's step; returns the losses and their gradients' norms, ``(2, N)``."""
        optimizer = self.optimizers[name]
        optimizer.zero_grad(set_to_none=True)
        losses.sum().backward()  # no agent's loss knows another's weights
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
        actor: one of them, as a mould.
        params: the parameters of all, stacked.
    """

    def __init__(self, actor: DiffusionActor, params: TensorDictBase) -> None:
        super().__init__()
        self.in_keys, self.out_keys = actor.in_keys, actor.out_keys
        self._actor = (deepcopy(actor),)  # a mould in a tuple: what it holds is not this module's
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
    """The stacked target parameters and what they follow."""
    for network in ("actor_network_params", "qvalue_network_params"):
        if f"target_{network}" in params.keys():  # noqa: SIM118  # a tensordict is asked by its keys
            sources = params[network]
            for key, target in params[f"target_{network}"].items(True, True):
                if isinstance(sources[key], nn.Parameter):
                    yield target.data, sources[key].data
