"""The update of Q-score matching in plain PyTorch, which recipes/benchmark.py compares with the kit."""

from __future__ import annotations

import copy
import math

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from qsm_rl import NoiseSchedule

OBSERVATION, ACTION = 24, 6


class HandWritten(nn.Module):
    """One update, as one would write it in a single PyTorch file."""

    def __init__(self, size: dict[str, int], device: torch.device) -> None:
        super().__init__()
        hidden, self.steps = size["hidden"], size["steps"]
        self.frequencies = nn.Parameter(0.2 * torch.randn(1, 32))
        self.time = nn.Sequential(nn.Linear(64, 128), nn.Mish(), nn.Linear(128, 128))
        self.denoiser = nn.Sequential(
            *(nn.Linear(ACTION + OBSERVATION + 128, hidden), nn.Mish()),
            *(nn.Linear(hidden, hidden), nn.Mish(), nn.Linear(hidden, ACTION)),
        )
        self.critics = nn.ModuleList(
            nn.Sequential(
                *(nn.Linear(OBSERVATION + ACTION, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()),
                nn.Linear(hidden, 1),
            )
            for _ in range(size["critics"])
        )
        self.targets = copy.deepcopy(self.critics)
        self.register_buffer("betas", NoiseSchedule.vp(self.steps).betas)
        self.to(device)
        self.cumprod = (1 - self.betas).cumprod(0)
        self.coefficients = list(zip(self.betas.tolist(), self.cumprod.tolist(), strict=True))
        actor = [self.frequencies, *self.time.parameters(), *self.denoiser.parameters()]
        self.actor_adam = torch.optim.Adam(actor, lr=3e-4, fused=True)
        self.critic_adam = torch.optim.Adam(self.critics.parameters(), lr=3e-4, fused=True)

    def predict_noise(self, noisy: Tensor, observation: Tensor, t: Tensor) -> Tensor:
        angles = 2 * math.pi * t[:, None] * self.frequencies
        time_embedding = self.time(torch.cat([angles.cos(), angles.sin()], -1))
        return self.denoiser(torch.cat([noisy, observation, time_embedding], -1))

    @torch.no_grad()
    def sample(self, observation: Tensor) -> Tensor:
        x = torch.randn(observation.shape[0], ACTION, device=observation.device)
        for t in reversed(range(self.steps)):
            beta, share = self.coefficients[t]
            noise = self.predict_noise(x, observation, x.new_full((x.shape[0],), float(t)))
            x = (x - beta / math.sqrt(1 - share) * noise) / math.sqrt(1 - beta)
            if t > 0:
                x = x + math.sqrt(beta) * torch.randn_like(x)
            x = x.clamp(-1, 1)
        return x

    def q_values(self, critics: nn.ModuleList, observation: Tensor, action: Tensor) -> Tensor:
        inputs = torch.cat([observation, action], -1)
        return torch.stack([critic(inputs) for critic in critics])

    def update(self, batch: TensorDict) -> None:
        observation, action, following = batch["observation"], batch["action"], batch["next", "observation"]
        with torch.no_grad():
            next_action = (self.sample(following) + 0.1 * torch.randn_like(action)).clamp(-1, 1)
            future = self.q_values(self.targets, following, next_action).amin(0)
            target = batch["next", "reward"] + 0.99 * (~batch["next", "terminated"]) * future
        loss = ((self.q_values(self.critics, observation, action) - target) ** 2).mean((1, 2)).sum()
        self.critic_adam.zero_grad()
        loss.backward()
        self.critic_adam.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(self.targets.parameters()), list(self.critics.parameters()), 0.005)
        t = torch.randint(self.steps, action.shape[:1], device=action.device)
        share = self.cumprod[t][:, None]
        noisy = (share.sqrt() * action + (1 - share).sqrt() * torch.randn_like(action)).requires_grad_()
        (score,) = torch.autograd.grad(self.q_values(self.critics, observation, noisy).mean(0).sum(), noisy)
        loss = ((self.predict_noise(noisy.detach(), observation, t.float()) + 50 * score) ** 2).mean()
        self.actor_adam.zero_grad()
        loss.backward()
        self.actor_adam.step()
