"""What happens between the policy's sample and the environment: exploration."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from tensordict.nn import InteractionType, TensorDictModuleBase
from tensordict.nn.probabilistic import interaction_type
from tensordict.utils import NestedKey
from torchrl.data import TensorSpec

from qsm_rl.action_box import ActionBox

__all__ = ["GaussianExploration"]


class GaussianExploration(TensorDictModuleBase):
    """Adds Gaussian noise to the action in box units and clips it to the bounds, as the QSM authors do when acting.

    Acts under ``ExplorationType.RANDOM`` or none, and leaves the action alone otherwise. Put it behind the actor for
    collection, ``TensorDictSequential(actor, GaussianExploration(spec))``, and leave it out for evaluation. TorchRL's
    AdditiveGaussianModule has one sigma in environment units; here the noise follows each dimension's range.

    Args:
        action_spec: bounded action spec, the action as its last dimension.
        std: standard deviation in box units, at least 0; more explores more widely around what the policy samples.
            Usual range 0 to 0.2; the authors take 0.1.
        action_key: entry that is read and written.

    Raises:
        ValueError: if the spec is unbounded or discrete, or ``std`` is negative.

    Example:
        >>> from tensordict import TensorDict
        >>> from torchrl.data import Bounded
        >>> explore = GaussianExploration(Bounded(-2.0, 2.0, shape=(3,)), std=0.1)
        >>> explore(TensorDict({"action": torch.full((4, 3), 2.0)}, [4]))["action"].max()
        tensor(2.)
    """

    def __init__(self, action_spec: TensorSpec, std: float = 0.1, action_key: NestedKey = "action") -> None:
        super().__init__()
        if not std >= 0:
            raise ValueError(f"std must be at least 0, got {std!r}.")
        self.box = ActionBox.from_spec(action_spec)
        self.std = std
        self.action_key = action_key
        self.in_keys = [action_key]
        self.out_keys = [action_key]

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Replaces the action, shape ``(*B, A)``, in place."""
        if interaction_type() in (None, InteractionType.RANDOM):
            action = tensordict.get(self.action_key)
            scale = self.std * (self.box.high - self.box.low) / 2
            noised = self.box.clamp(action + scale * torch.randn_like(action))
            tensordict.set(self.action_key, noised.to(action.dtype))
        return tensordict
