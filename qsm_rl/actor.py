"""The diffusion policy as a TensorDictModule."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from tensordict import TensorDictBase
from tensordict.nn import InteractionType, TensorDictModule
from tensordict.nn.probabilistic import interaction_type
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torchrl.data import Bounded, Composite, TensorSpec

from qsm_rl.action_box import ActionBox
from qsm_rl.noise_schedule import NoiseSchedule
from qsm_rl.samplers import DDPMSampler, Sampler

__all__ = ["DiffusionActor"]


class ConcatenatedScoreNetwork(nn.Module):
    """A score network that also takes its three inputs joined, ``cat[noisy action, observation, t]``."""

    def __init__(self, network: nn.Module, action_dim: int) -> None:
        super().__init__()
        self.network = network
        self.action_dim = action_dim

    def forward(self, inputs: Tensor) -> Tensor:
        noisy_action, observation, t = inputs.tensor_split((self.action_dim, inputs.shape[-1] - 1), -1)
        return self.network(noisy_action, observation, t.squeeze(-1))


class DiffusionPolicy(nn.Module):
    """The module inside a :class:`DiffusionActor`: observation in, action in environment units out.

    ``num_steps``, ``add_noise`` and ``score_network`` are what TorchRL's DiffusionBCLoss asks of an actor's module.
    """

    def __init__(
        self, score_network: nn.Module, box: ActionBox, noise_schedule: NoiseSchedule, sampler: Sampler
    ) -> None:
        super().__init__()
        self.score_network = ConcatenatedScoreNetwork(score_network, box.action_dim)
        self.box = box
        self.noise_schedule = noise_schedule
        self.sampler = sampler
        self.steps = sampler.steps(noise_schedule)

    @property
    def num_steps(self) -> int:
        """Number of diffusion steps T of the noise schedule."""
        return self.noise_schedule.num_steps

    def add_noise(self, clean_action: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Noises actions given in environment units; returns box units and the noise, as DiffusionBCLoss expects."""
        return self.noise_schedule.add_noise(self.box.to_box(clean_action), t)

    def predict_noise(self, noisy_action: Tensor, observation: Tensor, t: Tensor) -> Tensor:
        # The chain runs in float32 or more; a half-precision network gets half-precision inputs.
        predicted = self.score_network.network(noisy_action.to(observation.dtype), observation, t)
        if predicted.shape != noisy_action.shape:
            raise ValueError(
                f"the score network returned shape {tuple(predicted.shape)} for noised actions of shape "
                f"{tuple(noisy_action.shape)}; its output size must be the action's."
            )
        return predicted.to(noisy_action.dtype)

    def chain(self, observation: Tensor) -> Callable[[int, Tensor], Tensor]:
        """Noise prediction at each reverse step; a network's own ``reverse_chain`` shares work."""
        timesteps = [step.t for step in self.steps]
        network = self.score_network.network
        reverse_chain = getattr(network, "reverse_chain", None)
        if reverse_chain is not None:
            predict = reverse_chain(observation, timesteps)
            return lambda index, noisy: predict(index, noisy.to(observation.dtype)).to(noisy.dtype)
        times = torch.tensor(timesteps, dtype=observation.dtype, device=observation.device)
        return lambda index, noisy: self.predict_noise(noisy, observation, times[index].expand(noisy.shape[:-1]))

    def sample(
        self,
        observation: Tensor,
        initial_noise: Tensor | None = None,
        step_noise: Tensor | Sequence[Tensor | None] | None = None,
    ) -> Tensor:
        noisy = initial_noise
        if noisy is None:
            shape = (*observation.shape[:-1], self.box.action_dim)
            noisy = torch.randn(shape, dtype=chain_dtype(observation), device=observation.device)
        predict_noise = self.chain(observation)
        for index, step in enumerate(self.steps):
            if step_noise is not None:
                noise = step_noise[index]
            else:
                noise = torch.randn_like(noisy) if step.noise_std > 0 else None
            noisy = self.sampler.step(noisy, predict_noise(index, noisy), step, noise)
        return noisy.clamp(-1, 1)

    def forward(self, *observations: Tensor) -> Tensor:
        observation = torch.cat(observations, -1) if len(observations) > 1 else observations[0]
        kind = interaction_type()
        if kind in (None, InteractionType.RANDOM):
            action = self.sample(observation)
        else:
            shape = (*observation.shape[:-1], self.box.action_dim)
            start = torch.zeros(shape, dtype=chain_dtype(observation), device=observation.device)
            action = self.sample(observation, start, [None] * len(self.steps))
        return self.box.clamp(self.box.from_box(action)).to(observation.dtype)


def chain_dtype(observation: Tensor) -> torch.dtype:
    """The reverse chain runs in float32 or more."""
    return torch.promote_types(observation.dtype, torch.float32)


class DiffusionActor(TensorDictModule):
    """A diffusion policy: turns Gaussian noise into an action by the reverse chain of a learned noise prediction.

    Under ``ExplorationType.RANDOM`` (TorchRL's collectors' default) or none, calling the actor samples the policy.
    Under any other type it follows the mean of each reverse step from zero noise: repeatable, but neither the mean nor
    the mode of the policy, which usually has several modes; evaluate with RANDOM, as the QSM authors do. Actions are
    always inside the spec. Diffusion runs in box units, ``[-1, 1]^A``; the tensordict's actions are in environment
    units.

    Args:
        score_network: any module called as ``score_network(noisy_action (*B, A), observation (*B, O), t (*B,))`` that
            returns the predicted noise ``(*B, A)``, for example :class:`~qsm_rl.ScoreMLP`. A method ``reverse_chain``
            like that class's is used for sampling where there is one.
        action_spec: bounded action spec, :class:`~torchrl.data.Bounded` with the action as its last dimension.
        noise_schedule: the forward process; its number of steps is the length of the chain for
            :class:`~qsm_rl.DDPMSampler`.
        sampler: the reverse process; default ``DDPMSampler()``, the authors'.
        in_keys: observation entries, each ``(*B, size)``, joined along the last dimension in this order.
        out_keys: the one entry that the action is written to.

    Attributes:
        noise_schedule: the given schedule.
        sampler: the given sampler.
        box: :class:`~qsm_rl.ActionBox`, the map between environment and box units.

    Raises:
        ValueError: if the action spec is unbounded or discrete, the sampler does not fit the schedule, or there is not
            exactly one out_key.

    Example:
        >>> from qsm_rl import DiffusionActor, NoiseSchedule, ScoreMLP
        >>> from tensordict import TensorDict
        >>> spec = Bounded(-3.0, 3.0, shape=(2,))
        >>> actor = DiffusionActor(ScoreMLP(4, 2), action_spec=spec, noise_schedule=NoiseSchedule.vp(5))
        >>> action = actor(TensorDict({"observation": torch.randn(8, 4)}, [8]))["action"]
        >>> action.shape, bool(spec.is_in(action))
        (torch.Size([8, 2]), True)
    """

    def __init__(
        self,
        score_network: nn.Module,
        *,
        action_spec: TensorSpec,
        noise_schedule: NoiseSchedule,
        sampler: Sampler | None = None,
        in_keys: Sequence[NestedKey] = ("observation",),
        out_keys: Sequence[NestedKey] = ("action",),
    ) -> None:
        if len(out_keys) != 1:
            raise ValueError(f"out_keys must name one entry, the action, got {list(out_keys)!r}.")
        box = ActionBox.from_spec(action_spec)
        policy = DiffusionPolicy(score_network, box, noise_schedule, DDPMSampler() if sampler is None else sampler)
        super().__init__(policy, in_keys=list(in_keys), out_keys=list(out_keys))

    @property
    def noise_schedule(self) -> NoiseSchedule:
        """The noise schedule of the forward process."""
        return self.module.noise_schedule

    @property
    def sampler(self) -> Sampler:
        """The sampler of the reverse process."""
        return self.module.sampler

    @property
    def box(self) -> ActionBox:
        """The map between environment units and box units."""
        return self.module.box

    @property
    def score_network(self) -> nn.Module:
        """The network that predicts the noise, as given."""
        return self.module.score_network.network

    @property
    def spec(self) -> Composite:
        """Spec of the written action."""
        box = self.box
        return Composite({self.out_keys[0]: Bounded(box.low.clone(), box.high.clone(), dtype=torch.float32)})

    def observation(self, tensordict: TensorDictBase) -> Tensor:
        """The in_keys of a tensordict joined in order.

        Args:
            tensordict: holds every in_key, each ``(*B, size)``.

        Returns:
            The observation, shape ``(*B, O)``.

        Raises:
            KeyError: if an in_key is missing.
        """
        observations = [tensordict.get(key) for key in self.in_keys]
        if any(observation is None for observation in observations):
            missing = [key for key in self.in_keys if tensordict.get(key, None) is None]
            raise KeyError(
                f"the batch lacks the actor's in_keys {missing}; it has {sorted(map(str, tensordict.keys()))}."
            )
        return torch.cat(observations, -1) if len(observations) > 1 else observations[0]

    def predict_noise(self, noisy_action: Tensor, observation: Tensor, t: Tensor) -> Tensor:
        """The network's prediction of the noise in a noised action.

        Args:
            noisy_action: noised actions in box units, shape ``(*B, A)``.
            observation: joined observation, shape ``(*B, O)``.
            t: timesteps, shape ``(*B,)``.

        Returns:
            Predicted noise, shape ``(*B, A)``.
        """
        return self.module.predict_noise(noisy_action, observation, t)

    def sample(
        self,
        observation: Tensor,
        initial_noise: Tensor | None = None,
        step_noise: Tensor | Sequence[Tensor | None] | None = None,
    ) -> Tensor:
        """Samples the policy by the whole reverse chain, whatever the exploration type.

        Args:
            observation: joined observation, shape ``(*B, O)``.
            initial_noise: start of the chain, shape ``(*B, A)``; drawn from N(0, I) when not given.
            step_noise: fresh noise of each reverse step in order of use, shape ``(steps, *B, A)``; drawn when not
                given. A None in a sequence takes that step's mean; the last step uses none.

        Returns:
            Actions in box units, shape ``(*B, A)``, inside the box. Gradients flow through the chain unless disabled.
        """
        return self.module.sample(observation, initial_noise, step_noise)
