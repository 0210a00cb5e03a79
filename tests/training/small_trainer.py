"""A small QSM trainer on environments of its own, without Lightning's loop around it."""

from __future__ import annotations

import multiprocessing
import os

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer

from qsm_rl import DiffusionActor, GaussianExploration, NoiseSchedule, QScoreMatchingLoss, QValueMLP, ScoreMLP
from qsm_rl.training import (
    FramesDataset,
    OffPolicyModule,
    QSMUpdate,
    TransitionWriter,
    make_environment,
)

WIDE = 3.0


class Slide(gymnasium.Env):
    """A point on a line, moved by the action as a share of its bound; ends beyond 1."""

    observation_space = Box(-np.inf, np.inf, (2,), np.float32)

    def __init__(self, bound: float, spoiled: str = "") -> None:
        self.bound, self.spoiled, self.time = bound, spoiled, 0
        self.action_space = Box(-bound, bound, (2,), np.float32)

    def _observation(self):
        return np.array([self.place, self.speed], np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place, self.speed = self.np_random.uniform(-0.5, 0.5, 2)
        return self._observation(), {}

    def step(self, action):
        self.time += 1
        push = np.asarray(action, np.float64) / self.bound
        self.speed = 0.9 * self.speed + 0.1 * push[0]
        self.place += 0.2 * self.speed + 0.02 * push[1]
        reward = -abs(self.place) - 0.01 * float(push @ push)
        observation = self._observation()
        if self.time > 12:
            reward = np.nan if self.spoiled == "reward" else reward
            observation = observation + (np.inf if self.spoiled == "observation" else 0)
        return observation, reward, bool(abs(self.place) > 1), False, {}


class Spoiled(Slide):
    """The point on a line, whose reward is NaN at one of the process's frames: the environment variable SPOIL_AT."""

    frames = 0

    def step(self, action):
        observation, reward, *ends = super().step(action)
        Spoiled.frames += 1
        return observation, np.nan if Spoiled.frames == int(os.environ.get("SPOIL_AT", "0")) else reward, *ends


class Counted(Slide):
    """The point on a line; each step in a worker process is a byte of a file: the environment variable STEPS."""

    def step(self, action):
        if multiprocessing.parent_process() is not None:
            with open(os.environ["STEPS"], "ab", buffering=0) as file:
                file.write(b".")
        return super().step(action)


class Countdown(gymnasium.Env):
    """Each environment of a batch ends after as many steps as its seed says; the reward is 1."""

    observation_space, action_space = Box(-1, 1, (1,), np.float32), Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left = int(self.np_random.integers(1, 30))
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.left -= 1
        return np.zeros(1, np.float32), 1.0, self.left == 0, False, {}


def env_id(name: str) -> str:
    """The registered name of one of the environments here."""
    return f"qsm_rl_test/{name}-v0"


for name, entry, options in (
    ("Slide", Slide, {"bound": 1.0}),
    ("WideSlide", Slide, {"bound": WIDE}),
    ("NanReward", Slide, {"bound": 1.0, "spoiled": "reward"}),
    ("InfObservation", Slide, {"bound": 1.0, "spoiled": "observation"}),
    ("Spoiled", Spoiled, {"bound": 1.0}),
    ("Counted", Counted, {"bound": 1.0}),
    ("Countdown", Countdown, {}),
):
    gymnasium.register(env_id(name), entry, kwargs=options, max_episode_steps=40)


class ScaledInput(nn.Module):
    """A critic that sees the action as a share of its bound."""

    def __init__(self, critic: nn.Module, bound: float) -> None:
        super().__init__()
        self.critic, self.bound = critic, bound

    def forward(self, observation, action):
        return self.critic(observation, action / self.bound)


def build(
    env: str,
    *,
    bound: float = 1.0,
    warmup: int = 20,
    total: int = 60,
    num_envs: int = 1,
    score_target=None,
    checkpoint_every: int = 25,
    device: str = "cpu",
    **options,
):
    """A small QSM trainer on one of the environments above: data set and module; the options are QSMUpdate's."""
    torch.manual_seed(0)
    environment = make_environment(env_id(env), num_envs=num_envs, seed=0)
    spec = environment.action_spec_unbatched
    actor = DiffusionActor(ScoreMLP(2, 2, (16,)), action_spec=spec, noise_schedule=NoiseSchedule.vp(3))
    critics = [
        TensorDictModule(
            ScaledInput(QValueMLP(2, 2, (16,)), bound),
            in_keys=["observation", "action"],
            out_keys=["state_action_value"],
        )
        for _ in range(2)
    ]
    loss = QScoreMatchingLoss(actor, critics, score_target=score_target).to(device)
    loss.make_value_estimator(gamma=0.9)
    options = {"actor_learning_rate": 1e-3, "critic_learning_rate": 1e-3, "tau": 0.05, **options}
    update = QSMUpdate(loss, **options)
    replay = TensorDictReplayBuffer(storage=LazyTensorStorage(1000), batch_size=16)
    collector = Collector(
        environment,
        TensorDictSequential(actor, GaussianExploration(spec)),
        frames_per_batch=num_envs,
        init_random_frames=warmup,
        env_device="cpu",
        policy_device=device,
        storing_device="cpu",
        track_traj_ids=False,
        auto_register_policy_transforms=False,
    )
    frames = FramesDataset(collector, seed=0, total_frames=total, checkpoint_every=checkpoint_every)
    module = OffPolicyModule(update, TransitionWriter(replay), env=env, warmup_frames=warmup, updates_per_frame=1.0)
    return frames, module


def run(frames, module):
    """Trains; the losses of every step."""
    losses = []
    for index, batch in enumerate(frames):
        module.training_step(batch, index)
        losses.append(module.window.pop())
    return losses
