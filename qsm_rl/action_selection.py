"""What happens between the policy's samples and the environment: the choice among several samples, and exploration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from tensordict import TensorDictBase
from tensordict.nn import InteractionType, TensorDictModuleBase, dispatch
from tensordict.nn.probabilistic import interaction_type
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor, nn
from torchrl.data import TensorSpec

from qsm_rl import functional as F
from qsm_rl.action_box import ActionBox
from qsm_rl.functional.q_scores import check_aggregation

__all__ = ["BestOfN", "GaussianExploration"]


class BestOfN(TensorDictModuleBase):
    """Acts with the best of N samples of a policy, as judged by the critics.

    ``a = argmax_n Q(s, a_n)`` with ``a_1 .. a_N`` drawn from the policy (for diffusion policies, Hansen-Estruch et al.
    2023, IDQL, arXiv 2304.10573). The larger N is, the greedier the policy: one of density ``pi(a)`` becomes one of
    density ``N F(Q(a))^(N - 1) pi(a)``, where F is the distribution function of Q under pi. A larger N also exploits
    the critics' errors more.

    Give it the critics that are being trained, ``loss.trained_critics(live=True)``, and it always uses their current
    weights. It takes the actor's place:
    ``TensorDictSequential(BestOfN(actor, critics, num_samples=8), GaussianExploration(spec))``.

    Args:
        actor: reads observations and writes the action, for example [`DiffusionActor`][qsm_rl.DiffusionActor]. Under
            exploration types that make its samples equal, the best of them is that same action.
        critics: one or more critics that read the action in environment units.
        num_samples: N, at least 1; 1 is the actor itself. Usual range 4 to 64; acting costs as much as with a batch N
            times as large.
        aggregation: how the critics' values are combined, as in
            [`aggregate_q_values`][qsm_rl.functional.aggregate_q_values]. ``"min"`` avoids actions on which they
            disagree.
        value_key: entry that the critics write, ``(*B, 1)``.
        action_key: entry to which the actor writes its action; by default the actor's only out_key.

    Raises:
        ValueError: if ``num_samples`` is below 1, there is no critic, ``aggregation`` is unknown, or it is unclear
            which of the actor's entries is the action.

    Examples:
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule
        >>> actor = TensorDictModule(lambda observation: torch.randn_like(observation), ["observation"], ["action"])
        >>> critic = TensorDictModule(lambda action: -action.abs(), ["action"], ["state_action_value"])
        >>> best = BestOfN(actor, critic, num_samples=100)
        >>> bool((best(TensorDict({"observation": torch.zeros(5, 1)}, [5]))["action"].abs() < 0.2).all())
        True
    """

    def __init__(
        self,
        actor: TensorDictModuleBase,
        critics: TensorDictModuleBase | Sequence[TensorDictModuleBase],
        *,
        num_samples: int,
        aggregation: Literal["min", "mean"] | float = "mean",
        value_key: NestedKey = "state_action_value",
        action_key: NestedKey | None = None,
    ) -> None:
        super().__init__()
        check_aggregation("aggregation", aggregation)
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {num_samples!r}.")
        self.actor = actor
        critics = [critics] if isinstance(critics, nn.Module) else list(critics)
        if not critics:
            raise ValueError("critics is empty; pass at least one critic.")
        self.critics = nn.ModuleList(critics).eval()
        self.num_samples = num_samples
        self.aggregation = aggregation
        self.value_key = value_key
        written = list(map(unravel_key, actor.out_keys))
        if action_key is None and len(written) == 1:
            action_key = written[0]
        if action_key is None or unravel_key(action_key) not in written:
            raise ValueError(
                f"the actor writes {written}, but action_key is {action_key!r}; set it to the entry that is the action."
            )
        self.action_key = unravel_key(action_key)
        read = [*actor.in_keys, *(key for critic in critics for key in critic.in_keys)]
        self.in_keys = [key for key in dict.fromkeys(map(unravel_key, read)) if key not in written]
        self.out_keys = [self.action_key]

    def train(self, mode: bool = True) -> BestOfN:
        """Sets the actor's mode; the critics, which are only evaluated, stay in evaluation mode.

        In training mode they would change the batch statistics of the loss whose weights they share.
        """
        super().train(mode)
        self.critics.eval()
        return self

    @dispatch(auto_batch_size=False)
    @torch.no_grad()
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Writes the action, shape ``(*B, A)``."""
        samples = tensordict.select(*self.in_keys).expand(self.num_samples, *tensordict.batch_size)
        samples = self.actor(samples)
        q_values = torch.stack([self._q_value(critic, samples) for critic in self.critics])
        best = F.aggregate_q_values(q_values, self.aggregation).argmax(0, keepdim=True)
        action = samples.get(self.action_key).take_along_dim(best, 0).squeeze(0)
        return tensordict.set(self.action_key, action)

    def _q_value(self, critic: nn.Module, samples: TensorDictBase) -> Tensor:
        """A critic's Q-values ``(N, *B, 1)``."""
        q_value = critic(samples.copy()).get(self.value_key, None)
        # Not the batch_size: it is empty in a call with keywords, where only the entries have the batch dimensions.
        expected = (*samples.get(self.action_key).shape[:-1], 1)
        if q_value is None or q_value.shape != expected:
            found = "nothing" if q_value is None else f"shape {tuple(q_value.shape)}"
            raise ValueError(
                f"a critic wrote {found} as {self.value_key!r}, expected shape {expected}; if its value has another "
                "name, set value_key."
            )
        return q_value


class GaussianExploration(TensorDictModuleBase):
    """Adds Gaussian noise to the action in box units and clips it to the bounds, as the QSM authors do when acting.

    Adds noise under ``ExplorationType.RANDOM`` or no exploration type, and leaves the action alone otherwise. For
    collection, put it after the actor, ``TensorDictSequential(actor, GaussianExploration(spec))``; for evaluation,
    leave it out. TorchRL's AdditiveGaussianModule has one sigma in environment units; here the noise scales with each
    dimension's range.

    Args:
        action_spec: bounded action spec with the action as its last dimension.
        std: standard deviation in box units, at least 0; more explores more widely around what the policy samples.
            Usual range 0 to 0.2; the authors use 0.1.
        action_key: entry that is read and written.

    Raises:
        ValueError: if the spec is unbounded or discrete, or ``std`` is negative.

    Examples:
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

    @dispatch(auto_batch_size=False)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Replaces the action, shape ``(*B, A)``, in place."""
        if interaction_type() in (None, InteractionType.RANDOM):
            action = tensordict.get(self.action_key, None)
            if action is None or action.shape[-1:] != self.box.low.shape:
                found = "none" if action is None else f"shape {tuple(action.shape)}"
                raise ValueError(
                    f"{self.action_key!r} must contain actions of size {self.box.action_dim}, found {found}; put "
                    "GaussianExploration after the actor, and pass it the actor's action_spec."
                )
            scale = self.std * (self.box.high - self.box.low) / 2
            noised = self.box.clamp(action + scale * torch.randn_like(action))
            tensordict.set(self.action_key, noised.to(action.dtype))
        return tensordict
