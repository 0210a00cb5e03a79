"""The affine map between the environment's action bounds and the box [-1, 1]^A, in which all diffusion happens."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torchrl.data import Bounded, Composite, TensorSpec

from qsm_rl.float32_buffers import Float32Buffers

__all__ = ["ActionBox"]


class ActionBox(Float32Buffers):
    """Affine map between environment units ``[low, high]`` and box units ``[-1, 1]``, per dimension.

    Args:
        low: lower bounds in environment units, shape ``(A,)``.
        high: upper bounds, shape ``(A,)``, each above its lower bound.

    Attributes:
        low: lower bounds, float32, none below the given ones.
        high: upper bounds, float32, none above the given ones.

    Raises:
        ValueError: if a bound is not finite or a lower bound is not below its upper bound.

    Examples:
        >>> box = ActionBox(torch.tensor([-3.0, 0.0]), torch.tensor([3.0, 1.0]))
        >>> box.from_box(torch.tensor([0.5, 0.5]))
        tensor([1.5000, 0.7500])
        >>> box.to_box(torch.tensor([1.5, 0.75]))
        tensor([0.5000, 0.5000])
    """

    low: Tensor
    high: Tensor

    def __init__(self, low: Tensor, high: Tensor) -> None:
        super().__init__()
        low, high = _rounded_inwards(low, math.inf), _rounded_inwards(high, -math.inf)
        finite = torch.isfinite(high - low) & torch.isfinite(high + low)  # the largest number means unbounded, too
        if not bool((finite & (low < high)).all()):
            raise ValueError(
                f"the action space must be bounded with low < high in every dimension, got low={low.tolist()}, "
                f"high={high.tolist()}; give the environment finite action bounds, for example with a rescaling "
                "wrapper."
            )
        self.register_buffer("low", low)
        self.register_buffer("high", high)

    @classmethod
    def from_spec(cls, action_spec: TensorSpec) -> ActionBox:
        """The box of a TorchRL action spec.

        Leading dimensions of a spec, such as those of a vectorised environment, are dropped; the bounds must agree
        along them.

        Args:
            action_spec: a ``Bounded`` spec whose last dimension is the action's, or a
                ``Composite`` with such a spec as its single leaf.

        Raises:
            ValueError: if the spec is unbounded, discrete, without an action dimension, or bounded differently from one
                environment to the next.

        Examples:
            >>> ActionBox.from_spec(Bounded(-0.4, 0.4, shape=(8, 17))).low.shape
            torch.Size([17])
        """
        if isinstance(action_spec, Composite):
            leaves = list(action_spec.values(include_nested=True, leaves_only=True))
            if len(leaves) != 1:
                raise ValueError(
                    f"the action spec must have one leaf, got {len(leaves)}: {list(action_spec.keys(True, True))}."
                )
            action_spec = leaves[0]
        if not isinstance(action_spec, Bounded) or not action_spec.dtype.is_floating_point:
            raise ValueError(
                f"a diffusion policy needs a bounded continuous action space, got {type(action_spec).__name__} "
                f"of dtype {getattr(action_spec, 'dtype', None)}; pass a torchrl.data.Bounded as action_spec."
            )
        if action_spec.ndim == 0:
            raise ValueError("the action spec must have at least one dimension, (A,), got shape ().")
        low = action_spec.space.low.reshape(-1, action_spec.shape[-1])
        high = action_spec.space.high.reshape(-1, action_spec.shape[-1])
        if not (bool((low == low[0]).all()) and bool((high == high[0]).all())):
            raise ValueError(
                "the action bounds differ between the environments of a batch; pass the spec of one of them "
                "(env.action_spec_unbatched)."
            )
        return cls(low[0], high[0])

    @property
    def action_dim(self) -> int:
        """Number of action dimensions A."""
        return self.low.shape[0]

    def to_box(self, action: Tensor) -> Tensor:
        """Converts environment units to box units, both ``(*B, A)``; the bounds map to -1 and 1, nothing is clipped."""
        return (action - (self.high + self.low) / 2) * (2 / (self.high - self.low))

    def from_box(self, action: Tensor) -> Tensor:
        """Converts box units to environment units, both ``(*B, A)``; noised actions may lie beyond the bounds."""
        return action * ((self.high - self.low) / 2) + (self.high + self.low) / 2

    def clamp(self, action: Tensor) -> Tensor:
        """Clips an action in environment units to the bounds, which rounding in the affine map can exceed."""
        return action.clamp(self.low, self.high)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        # With other bounds, actions would leave the spec that the actor was built with.
        for name, own in (("low", self.low), ("high", self.high)):
            loaded = state_dict.get(prefix + name)
            if loaded is not None and not torch.equal(loaded.to(own), own):
                args[-1].append(
                    f"{prefix}{name}: the state_dict was saved with different action bounds ({loaded.tolist()}) from "
                    f"these ({own.tolist()}); build the actor with the same action_spec, or load only the networks."
                )
                return
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """Summary shown by ``print(box)``."""
        return f"action_dim={self.action_dim}"


def _rounded_inwards(bound: Tensor, inwards: float) -> Tensor:
    """A copy of a bound in float32: the nearest number, or the next one inwards if the nearest lies outside."""
    rounded = bound.float().clone()
    outside = (bound - rounded.to(bound.dtype)) * math.copysign(1.0, inwards) > 0
    return torch.where(outside, torch.nextafter(rounded, torch.full_like(rounded, inwards)), rounded)
