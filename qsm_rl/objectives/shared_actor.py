"""One diffusion actor inside and outside a loss."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from typing import Any, Self

from tensordict import TensorDictParams
from torch import Tensor
from torchrl.objectives import LossModule

from qsm_rl.actor import DiffusionActor
from qsm_rl.noise_schedule import Float32Buffers

__all__ = ["SharedActorLoss"]


class SharedActorLoss(LossModule):
    """Base of the losses whose ``actor_network`` is the very actor that was given, trained and moved with the loss."""

    actor_network: DiffusionActor
    actor_network_params: TensorDictParams
    target_actor_network_params: TensorDictParams
    delay_actor: bool

    def _share_with_actor(self) -> None:
        """Makes the actor's parameters and buffers those of ``actor_network_params``, so that they move together."""
        self.actor_network_params.to_module(self.actor_network, preserve_module_state=False)

    def _target_actor(self) -> AbstractContextManager:
        """In this block ``actor_network`` holds the weights that the TD target samples with."""
        if not self.delay_actor:
            return nullcontext()  # its own, see _share_with_actor
        return self.target_actor_network_params.to_module(self.actor_network, preserve_module_state=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        copy = self.__new__(type(self))
        memo[id(self)] = copy
        copy.__dict__.update(deepcopy(self.__dict__, memo))
        copy._share_with_actor()  # a TensorDictParams copies itself without regard to the memo
        return copy

    def _apply(self, fn: Callable[[Tensor], Tensor]) -> Self:
        constants = [
            (buffer, buffer.data)
            for module in self.actor_network.modules()
            if isinstance(module, Float32Buffers)
            for buffer in module.buffers(recurse=False)
        ]
        super()._apply(fn)
        for buffer, data in constants:
            buffer.data = data.to(buffer.device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        schedule_prefix = f"{prefix}actor_network_params.module.noise_schedule."
        errors: list[str] = []
        self.actor_network.noise_schedule._load_from_state_dict(state_dict, schedule_prefix, {}, False, [], [], errors)
        if errors:
            raise RuntimeError(errors[0])
        super()._load_from_state_dict(state_dict, prefix, *args)
