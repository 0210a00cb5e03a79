"""One diffusion actor, shared by a loss and the code outside it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from typing import Any, Self

import torch
from tensordict import TensorDictParams
from torch import Tensor, nn
from torchrl.objectives import LossModule

from qsm_rl.actor import DiffusionActor
from qsm_rl.float32_buffers import Float32Buffers

__all__ = ["SharedActorLoss"]


class SharedActorLoss(LossModule):
    """Base of the losses whose ``actor_network`` is the very actor passed in, trained and moved with the loss."""

    actor_network: DiffusionActor
    actor_network_params: TensorDictParams
    target_actor_network_params: TensorDictParams
    qvalue_network: nn.Module
    qvalue_network_params: TensorDictParams
    delay_actor: bool

    def _share_with_actor(self) -> None:
        """Makes the actor's parameters and buffers those of ``actor_network_params``, so that they move together."""
        self.actor_network_params.to_module(self.actor_network, preserve_module_state=False)

    def _target_actor(self) -> AbstractContextManager:
        """In this context ``actor_network`` holds the weights with which the TD target samples."""
        if not self.delay_actor:
            return nullcontext()  # its own, see _share_with_actor
        return self.target_actor_network_params.copy().to_module(self.actor_network, preserve_module_state=False)

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
        # Above all the discount: 0.999 in bfloat16 is 1.
        modules = [self] if self._value_estimator is None else [self, *self._value_estimator.modules()]
        own = [(module._buffers, name, value) for module in modules for name, value in module._buffers.items()]
        # A batch moves a critic's running statistics by less than half precision can resolve.
        statistics = [
            (buffer, buffer.data)
            for path, layer in self.qvalue_network.named_modules()
            if isinstance(layer, Float32Buffers)
            for name, _ in layer.named_buffers(path, recurse=False)
            for buffer in [self.qvalue_network_params.get(tuple(name.split(".")))]
        ]
        super()._apply(fn)
        for buffer, data in constants:
            buffer.data = data.to(buffer.device)
        for buffer, data in statistics:
            if data.is_floating_point() and buffer.dtype.itemsize < 4:
                buffer.data = data.to(buffer.device, torch.float32)
        for buffers, name, value in own:
            moved = buffers[name]
            if value is not None and moved is not None and moved.is_floating_point() and moved.dtype.itemsize < 4:
                buffers[name] = value.to(moved.device, torch.float32)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        errors: list[str] = []
        for name in ("noise_schedule", "box"):
            constants = getattr(self.actor_network, name)
            own_prefix = f"{prefix}actor_network_params.module.{name}."
            constants._load_from_state_dict(state_dict, own_prefix, {}, False, [], [], errors)
        if errors:
            raise RuntimeError(errors[0])
        super()._load_from_state_dict(state_dict, prefix, *args)
