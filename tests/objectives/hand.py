"""Losses small enough to be worked out by hand: linear networks, one action dimension, chains of one and two steps."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.data import Bounded
from torchrl.objectives import LossModule, SoftUpdate

from qsm_rl import DDPMSampler, DiffusionActor, NoiseSchedule, ScoreMLP

ONE_STEP = [0.9936]  # alpha 0.0064: a noised action is 0.08 a + sqrt(0.9936) e
TWO_STEPS = [0.36, 0.99]  # alphas 0.64 and 0.01: at t = 0 a noised action is 0.8 a + 0.6 e


class Gain(nn.Module):
    """Predicts the noise ``gain * noisy_action``."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain))

    def forward(self, noisy_action: Tensor, observation: Tensor, t: Tensor) -> Tensor:
        return self.gain * noisy_action


class Line(nn.Module):
    """A critic ``slope * action + value * observation``."""

    def __init__(self, slope: float, value: float) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(slope))
        self.value = nn.Parameter(torch.tensor(value))

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        return self.slope * action + self.value * observation


class Peak(nn.Module):
    """A critic ``-(action - at)^2``."""

    def __init__(self, at: float) -> None:
        super().__init__()
        self.at = nn.Parameter(torch.tensor(at))

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        return -((action - self.at) ** 2).sum(-1, keepdim=True)


def make(
    loss_class: type[LossModule],
    critics: list[nn.Module],
    network: nn.Module,
    *,
    betas: Tensor | list[float],
    sampler: DDPMSampler | None = None,
    low: float = -1.0,
    high: float = 1.0,
    **options: Any,
) -> LossModule:
    """The loss on these networks, its targets followed by an updater."""
    actor = DiffusionActor(
        network, action_spec=Bounded(low, high, (1,)), noise_schedule=NoiseSchedule(betas), sampler=sampler
    )
    modules = [TensorDictModule(c, ["observation", "action"], ["state_action_value"]) for c in critics]
    loss = loss_class(actor, modules, **options)
    SoftUpdate(loss, tau=0.5)
    return loss


def transitions(action: list[float], observation: list[float] | None = None) -> TensorDict:
    """A batch with these replayed actions, next states of observation 0 and rewards 0."""
    count = len(action)
    zeros = torch.zeros(count, 1)
    following = {"observation": zeros, "reward": zeros, "done": zeros.bool(), "terminated": zeros.bool()}
    now = {"observation": torch.tensor(observation or [0.0] * count).unsqueeze(-1)}
    return TensorDict({**now, "action": torch.tensor(action).unsqueeze(-1), "next": following}, [count])


def mean_action_after_training(
    loss_class: type[LossModule], updates: int, rate: float, *, data: float, **options: Any
) -> float:
    """Trains on a critic that peaks at -0.4 and replayed actions ``data``; mean of the policy's samples."""
    torch.manual_seed(0)
    network = ScoreMLP(1, 1, (32, 32), time_features=16, time_dim=16)
    options = {"betas": NoiseSchedule.vp(5).betas, "sampler": DDPMSampler(clip="clean"), **options}
    loss = make(loss_class, [Peak(-0.4)], network, **options)
    optimizer = torch.optim.Adam(loss.actor_network.parameters(), rate)
    batch = transitions([data] * 64)
    for _ in range(updates):
        optimizer.zero_grad()
        loss.actor_loss(batch)[0].backward()
        optimizer.step()
    with torch.no_grad():
        return loss.actor_network.sample(torch.zeros(1000, 1)).mean().item()
