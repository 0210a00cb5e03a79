"""The module inside a diffusion actor: the reverse chain over a score network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from tensordict.nn import InteractionType
from tensordict.nn.probabilistic import interaction_type
from torch import Tensor, nn

from qsm_rl import functional as F
from qsm_rl.action_box import ActionBox
from qsm_rl.noise_schedule import NoiseSchedule
from qsm_rl.samplers import ReverseChain, Sampler

__all__ = ["DiffusionPolicy"]


class ConcatenatedScoreNetwork(nn.Module):
    """Lets a score network take its three inputs joined, ``cat[noisy action, observation, t]``."""

    def __init__(self, network: nn.Module, action_dim: int) -> None:
        super().__init__()
        self.network = network
        self.action_dim = action_dim

    def forward(self, inputs: Tensor) -> Tensor:
        noisy_action, observation, t = inputs.tensor_split((self.action_dim, inputs.shape[-1] - 1), -1)
        return self.network(noisy_action, observation, t.squeeze(-1).long())  # joining has made them floats


class DiffusionPolicy(nn.Module):
    """The module inside a ``DiffusionActor``: observation in, action in environment units out.

    ``num_steps``, ``add_noise`` and ``score_network`` are what TorchRL's DiffusionBCLoss asks of an actor's module.
    """

    def __init__(
        self, score_network: nn.Module, box: ActionBox, noise_schedule: NoiseSchedule, sampler: Sampler
    ) -> None:
        super().__init__()
        self.score_network = ConcatenatedScoreNetwork(score_network, box.action_dim)
        self.box = box
        self.noise_schedule = noise_schedule
        self._sampler = sampler
        self.steps = sampler.steps(noise_schedule)
        self._timesteps = torch.tensor([step.t for step in self.steps])

    @property
    def sampler(self) -> Sampler:
        """The sampler; it cannot be exchanged, since its steps are computed once."""
        return self._sampler

    @property
    def num_steps(self) -> int:
        """Number of diffusion steps T of the noise schedule."""
        return self.noise_schedule.num_steps

    def add_noise(self, clean_action: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Noises actions given in environment units; returns box units and the noise, as DiffusionBCLoss expects."""
        return self.noise_schedule.add_noise(self.box.to_box(clean_action), t)

    def predict_noise(self, noisy_action: Tensor, observation: Tensor, t: Tensor) -> Tensor:
        """See ``DiffusionActor.predict_noise``."""
        return fitting(
            self.score_network.network(network_input(noisy_action, observation), observation, t), noisy_action
        )

    def chain(self, observation: Tensor) -> Callable[[int, Tensor], Tensor]:
        """Noise prediction at each reverse step; a network's own ``reverse_chain``, if any, saves work."""
        if self._timesteps.device != observation.device:  # once: a CUDA graph cannot record a copy at each call
            self._timesteps = self._timesteps.to(observation.device)
        timesteps = self._timesteps
        network = self.score_network.network
        if has_own_chain(network):
            reverse_chain: Any = network.reverse_chain
            predict = reverse_chain(observation, timesteps)
            return lambda index, noisy: fitting(predict(index, network_input(noisy, observation)), noisy)
        return lambda index, noisy: self.predict_noise(noisy, observation, timesteps[index].expand(noisy.shape[:-1]))

    def run_chain(
        self,
        observation: Tensor,
        initial_noise: Tensor | None = None,
        step_noise: Tensor | Sequence[Tensor | None] | None = None,
        min_std: float = 0.0,
        return_chain: bool = False,
    ) -> tuple[Tensor, ReverseChain | None]:
        """See ``DiffusionActor.sample``; the chain is None unless asked for."""
        noisy = initial_noise
        if noisy is None:
            shape = (*observation.shape[:-1], self.box.action_dim)
            noisy = torch.randn(shape, dtype=chain_dtype(observation), device=observation.device)
        steps = self.steps
        if min_std > 0:
            steps = [step._replace(noise_std=max(step.noise_std, min_std)) for step in steps]
        if step_noise is not None and len(step_noise) != len(steps):
            raise ValueError(f"step_noise has noise for {len(step_noise)} steps, expected {len(steps)}.")
        predict_noise = self.chain(observation)
        states, samples = [noisy], []
        for index, step in enumerate(steps):
            if step_noise is not None:
                noise = step_noise[index]
            else:
                noise = torch.randn_like(noisy) if step.noise_std > 0 else None
            sample = self.sampler.draw(noisy, predict_noise(index, noisy), step, noise)
            noisy = self.sampler.clip_sample(sample)
            if return_chain:
                samples.append(sample)
                states.append(noisy)
        action = F.clamp_inward(noisy)
        if not return_chain:
            return action, None
        states[-1] = action
        return action, ReverseChain(torch.stack(states), torch.stack(samples), tuple(step.noise_std for step in steps))

    def chain_log_prob(self, observation: Tensor, chain: ReverseChain) -> Tensor:
        """See ``DiffusionActor.chain_log_prob``."""
        for step, std in zip(self.steps, chain.stds, strict=True):
            if not std > 0:
                raise ValueError(
                    f"the chain's step at t = {step.t} adds no noise and so has no density; sample the chain with a "
                    "min_std above 0, such as 0.1."
                )
        predict_noise = self.chain(observation)
        means = [
            self.sampler.mean(noisy, predict_noise(index, noisy), step)
            for index, (noisy, step) in enumerate(zip(chain.states[:-1], self.steps, strict=True))
        ]
        log_probs = [
            F.gaussian_log_prob(sample, mean, std)
            for sample, mean, std in zip(chain.samples, means, chain.stds, strict=True)
        ]
        return torch.stack(log_probs)

    def forward(self, *observations: Tensor) -> Tensor:
        """An action ``(*B, A)`` in environment units, sampled or deterministic as TorchRL's exploration type says."""
        observation = torch.cat(observations, -1) if len(observations) > 1 else observations[0]
        kind = interaction_type()
        if kind in (None, InteractionType.RANDOM):
            action, _ = self.run_chain(observation)
        else:
            shape = (*observation.shape[:-1], self.box.action_dim)
            start = torch.zeros(shape, dtype=chain_dtype(observation), device=observation.device)
            action, _ = self.run_chain(observation, start, [None] * len(self.steps))
        return self.box.clamp(self.box.from_box(action))  # rounding could move it outside


def has_own_chain(network: nn.Module) -> bool:
    """Whether a network's ``reverse_chain`` belongs to its ``forward``: a subclass may override ``forward`` alone."""
    for kind in type(network).__mro__:
        if "reverse_chain" in vars(kind):
            return True
        if "forward" in vars(kind):
            return False
    return False


def fitting(predicted: Tensor, noisy_action: Tensor) -> Tensor:
    """Predicted noise in the dtype of the noised action; raises ValueError if the shapes differ."""
    if predicted.shape != noisy_action.shape:
        raise ValueError(
            f"the score network returned shape {tuple(predicted.shape)} for noised actions of shape "
            f"{tuple(noisy_action.shape)}; its output must have the size of the action."
        )
    return predicted.to(noisy_action.dtype)


def chain_dtype(observation: Tensor) -> torch.dtype:
    """The dtype of the reverse chain and of its actions: float32 or more precise."""
    return torch.promote_types(observation.dtype, torch.float32)


def network_input(noisy_action: Tensor, observation: Tensor) -> Tensor:
    """The noised action in the observation's dtype, such as half precision; unchanged for integer observations."""
    return noisy_action.to(observation.dtype) if observation.is_floating_point() else noisy_action
