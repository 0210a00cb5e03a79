"""The policies of the baselines: plain multilayer perceptrons with actions inside the environment's bounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from tensordict import TensorDictBase
from tensordict.nn import (
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    TensorDictModuleBase,
)
from torch import Tensor, nn
from torchrl.data import Bounded, TensorSpec
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import TanhNormal

from qsm_rl.action_box import ActionBox
from qsm_rl.networks import mlp
from qsm_rl.observation_norm import normalize
from qsm_rl.pretrained import read_files, write_files

__all__ = ["DeterministicPolicy", "TanhActor", "TanhGaussianActor"]

LOG_STD_RANGE = (-20.0, 2.0)
BOX = "box."


class BoxTanhNormal(TanhNormal):
    """TorchRL's squashed Gaussian with its density in box units, ``[-1, 1]^A``, whatever the bounds are.

    The entropy of the policy, and therefore the entropy bonus, is then the same for robots that differ only in the
    range of their actions, and minus A is a suitable target entropy for all of them.
    """

    def _log_volume(self) -> Tensor:
        return ((self.high - self.low) / 2).log().expand(self.event_shape).sum()

    def rsample_and_log_prob(self, sample_shape: torch.Size | tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
        """An action in environment units and the logarithm of its density in box units."""
        action, log_prob = super().rsample_and_log_prob(sample_shape)
        return action, log_prob + self._log_volume()

    def log_prob(self, value: Tensor) -> Tensor:
        """The logarithm of the density in box units of an action in environment units."""
        return super().log_prob(value) + self._log_volume()


class Network(nn.Module):
    """A multilayer perceptron on observations, which are normalised first if statistics are given."""

    mean: Tensor | None
    variance: Tensor | None

    def __init__(
        self,
        observation_dim: int,
        output_dim: int,
        hidden_dims: Sequence[int],
        statistics: tuple[Tensor, Tensor] | None,
    ) -> None:
        super().__init__()
        self.observation_dim, self.hidden_dims = observation_dim, list(hidden_dims)
        self.mlp = mlp(observation_dim, hidden_dims, output_dim, nn.ReLU)
        for name, value in zip(("mean", "variance"), statistics or (None, None), strict=True):
            self.register_buffer(name, value)

    def outputs(self, observation: Tensor) -> Tensor:
        """Output of the last layer, shape ``(*B, output_dim)``."""
        if self.mean is not None and self.variance is not None:
            observation = normalize(observation, self.mean, self.variance)
        return self.mlp(observation)


class GaussianParameters(Network):
    """Mean and standard deviation before squashing, both functions of the observation."""

    def forward(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = self.outputs(observation).chunk(2, -1)
        return mean, log_std.clamp(*LOG_STD_RANGE).exp()


class SquashedMean(Network):
    """The network's output squashed into the bounds by tanh, in environment units."""

    def __init__(self, box: ActionBox, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.box = box

    def forward(self, observation: Tensor) -> Tensor:
        return self.box.clamp(self.box.from_box(self.outputs(observation).tanh()))


class MLPActor:
    """Shared parts of both actors: files that can be read without running code, as for ``DiffusionActor``."""

    def __init__(
        self,
        observation_dim: int,
        action_spec: TensorSpec,
        hidden_dims: Sequence[int],
        *,
        statistics: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        raise NotImplementedError

    @property
    def box(self) -> ActionBox:
        """The bounds."""
        raise NotImplementedError

    @property
    def network(self) -> Network:
        """The network, which reads observations."""
        raise NotImplementedError

    def normalized(self, mean: Tensor, variance: Tensor) -> Self:
        """A copy on the CPU that takes raw observations and normalises them by fixed statistics, ``(O,)``."""
        network, spec = self.network, Bounded(self.box.low.cpu(), self.box.high.cpu())
        statistics = (mean.cpu(), variance.cpu())
        copy = type(self)(network.observation_dim, spec, network.hidden_dims, statistics=statistics)
        copy.network.mlp.load_state_dict(network.mlp.state_dict())
        return copy

    def save_pretrained(self, folder: Path | str, about: Mapping[str, Any] | None = None) -> None:
        """Writes model.safetensors and config.json.

        Args:
            folder: created if missing; files of an earlier call are replaced.
            about: plain values to store in config.json in addition to the settings.
        """
        config = {
            "actor": type(self).__name__,
            "observation_dim": self.network.observation_dim,
            "hidden_dims": self.network.hidden_dims,
            "normalize_observation": self.network.mean is not None,
        }
        state = {name: value for name, value in self.network.state_dict().items() if not name.startswith(BOX)}
        tensors = {**state, BOX + "low": self.box.low, BOX + "high": self.box.high}
        write_files(Path(folder), tensors, {**(about or {}), **config})

    @classmethod
    def from_pretrained(cls, folder: Path | str) -> Self:
        """The actor that ``save_pretrained`` wrote, on the CPU; reading runs no code.

        Raises:
            ValueError: if a file is missing, malformed or from another version, or the files do not fit each other.
        """
        try:
            config, tensors = read_files(Path(folder))
            if config["actor"] != cls.__name__:
                raise ValueError(f"it is a {str(config['actor'])[:40]}, expected a {cls.__name__}")
            statistics = (tensors["mean"], tensors["variance"]) if config["normalize_observation"] else None
            spec = Bounded(tensors[BOX + "low"], tensors[BOX + "high"])
            actor = cls(config["observation_dim"], spec, config["hidden_dims"], statistics=statistics)
            state = actor.network.state_dict()
            state.update({name: value for name, value in tensors.items() if name in state or not name.startswith(BOX)})
            actor.network.load_state_dict(state)
        except (OSError, LookupError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"{folder} contains no readable actor: {reason}") from error
        return actor


class TanhGaussianActor(MLPActor, ProbabilisticTensorDictSequential):
    """SAC's policy (Haarnoja et al. 2018, arXiv 1812.05905): a Gaussian squashed into the bounds by tanh.

    Samples under ``ExplorationType.RANDOM`` or no exploration type, and uses the squashed mean under DETERMINISTIC.

    Args:
        observation_dim: size O of ``observation``.
        action_spec: bounded action spec, with the action as its last dimension.
        hidden_dims: widths of the hidden layers, with ReLU between them.
        statistics: mean and variance for normalising observations, ``(O,)`` each; None does not normalise.

    Raises:
        ValueError: if the action spec is unbounded or discrete.

    Examples:
        >>> from tensordict import TensorDict
        >>> actor = TanhGaussianActor(4, Bounded(-3.0, 3.0, (2,)), (32, 32))
        >>> actor(TensorDict({"observation": torch.randn(8, 4)}, [8]))["action"].shape
        torch.Size([8, 2])
    """

    def __init__(
        self,
        observation_dim: int,
        action_spec: TensorSpec,
        hidden_dims: Sequence[int],
        *,
        statistics: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        box = ActionBox.from_spec(action_spec)
        network = GaussianParameters(observation_dim, 2 * box.action_dim, hidden_dims, statistics)
        ProbabilisticTensorDictSequential.__init__(
            self,
            TensorDictModule(network, ["observation"], ["loc", "scale"]),
            ProbabilisticTensorDictModule(
                in_keys=["loc", "scale"],
                out_keys=["action"],
                distribution_class=BoxTanhNormal,
                distribution_kwargs={"low": box.low, "high": box.high, "event_dims": 1, "safe_tanh": False},
                default_interaction_type=ExplorationType.RANDOM,
            ),
        )
        self.bounds = box

    @property
    def box(self) -> ActionBox:
        """The bounds."""
        return self.bounds

    @property
    def network(self) -> Network:
        """The network."""
        return self.module[0].module


class TanhActor(MLPActor, TensorDictModule):
    """TD3's policy (Fujimoto et al. 2018, arXiv 1802.09477): one action for each observation, inside the bounds.

    Args:
        observation_dim: size O of ``observation``.
        action_spec: bounded action spec, with the action as its last dimension.
        hidden_dims: widths of the hidden layers, with ReLU between them.
        statistics: mean and variance for normalising observations, ``(O,)`` each; None does not normalise.

    Raises:
        ValueError: if the action spec is unbounded or discrete.

    Examples:
        >>> from tensordict import TensorDict
        >>> actor = TanhActor(4, Bounded(-3.0, 3.0, (2,)), (32, 32))
        >>> actor(TensorDict({"observation": torch.randn(8, 4)}, [8]))["action"].shape
        torch.Size([8, 2])
    """

    def __init__(
        self,
        observation_dim: int,
        action_spec: TensorSpec,
        hidden_dims: Sequence[int],
        *,
        statistics: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        box = ActionBox.from_spec(action_spec)
        network = SquashedMean(box, observation_dim, box.action_dim, hidden_dims, statistics)
        TensorDictModule.__init__(self, network, in_keys=["observation"], out_keys=["action"])

    @property
    def network(self) -> Network:
        """The network."""
        return self.module

    @property
    def box(self) -> ActionBox:
        """The bounds."""
        return self.module.box


class DeterministicPolicy(TensorDictModuleBase):
    """A policy that always acts under ``ExplorationType.DETERMINISTIC``, as SAC is usually evaluated.

    Args:
        actor: the policy.
    """

    def __init__(self, actor: TensorDictModuleBase) -> None:
        super().__init__()
        self.actor = actor
        self.in_keys, self.out_keys = actor.in_keys, actor.out_keys

    def forward(self, tensordict: TensorDictBase) -> Any:
        """Writes the action, shape ``(*B, A)``."""
        with set_exploration_type(ExplorationType.DETERMINISTIC):
            return self.actor(tensordict)
