"""Frames, module, update and evaluation, without Lightning's loop around them."""

from __future__ import annotations

import random

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.modules import RandomPolicy

from qsm_rl import DiffusionActor, GaussianExploration, NoiseSchedule, QScoreMatchingLoss, QValueMLP, ScoreMLP
from qsm_rl.training import (
    FramesDataset,
    OffPolicyModule,
    QSMUpdate,
    TransitionWriter,
    UserError,
    evaluate_policy,
    make_environment,
)
from qsm_rl.training.frames import period_ended
from qsm_rl.training.module import NonFiniteDataError
from qsm_rl.training.random_state import derived_seed, isolated_random_state
from qsm_rl.training.updates import NonFiniteLossError, cosine_decay

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


for name, entry, options in (
    ("Slide", Slide, {"bound": 1.0}),
    ("WideSlide", Slide, {"bound": WIDE}),
    ("NanReward", Slide, {"bound": 1.0, "spoiled": "reward"}),
    ("InfObservation", Slide, {"bound": 1.0, "spoiled": "observation"}),
    ("Countdown", Countdown, {}),
):
    gymnasium.register(f"qsm_rl_loop/{name}-v0", entry, kwargs=options, max_episode_steps=40)


class ScaledInput(nn.Module):
    """A critic that sees the action as a share of its bound."""

    def __init__(self, critic: nn.Module, bound: float) -> None:
        super().__init__()
        self.critic, self.bound = critic, bound

    def forward(self, observation, action):
        return self.critic(observation, action / self.bound)


def build(env: str, *, bound: float = 1.0, warmup: int = 20, total: int = 60, num_envs: int = 1, **update_options):
    """A small QSM trainer on one of the environments above: data set and module."""
    torch.manual_seed(0)
    environment = make_environment(f"qsm_rl_loop/{env}-v0", num_envs=num_envs, seed=0)
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
    loss = QScoreMatchingLoss(actor, critics)
    loss.make_value_estimator(gamma=0.9)
    options = {"actor_learning_rate": 1e-3, "critic_learning_rate": 1e-3, "tau": 0.05, **update_options}
    update = QSMUpdate(loss, **options)
    replay = TensorDictReplayBuffer(storage=LazyTensorStorage(1000), batch_size=16)
    collector = Collector(
        environment,
        TensorDictSequential(actor, GaussianExploration(spec)),
        frames_per_batch=num_envs,
        init_random_frames=warmup,
        track_traj_ids=False,
        auto_register_policy_transforms=False,
    )
    frames = FramesDataset(collector, seed=0, total_frames=total, checkpoint_every=25)
    module = OffPolicyModule(update, TransitionWriter(replay), env=env, warmup_frames=warmup, updates_per_frame=1.0)
    return frames, module


def run(frames, module):
    """Trains; the losses of every step."""
    losses = []
    for index, batch in enumerate(frames):
        module.training_step(batch, index)
        losses.append(module.window.pop())
    return losses


# --- frames ---


def test_periods_end_at_their_multiples_also_when_stepped_over():
    ended = [
        after for before, after in zip(range(0, 40, 4), range(4, 44, 4), strict=True) if period_ended(before, after, 10)
    ]
    assert ended == [12, 20, 32, 40]


def test_trajectories_are_cut_at_checkpoints_and_the_end_and_begin_anew_there():
    frames, _ = build("Slide", total=60)
    batches = list(frames)
    assert len(batches) == len(frames) == 60
    real_ends = [i for i, batch in enumerate(batches) if batch["next", "episode_end"].any()]
    marked = [i for i, batch in enumerate(batches) if batch["next", "done"].any()]
    assert sorted({*real_ends, 24, 49, 59}) == marked
    assert not any(batch["next", "terminated"][0, 0] for i, batch in enumerate(batches) if i not in real_ends)
    assert [i for i, batch in enumerate(batches) if batch["step_count"].item() == 0] == [
        0,
        *[i + 1 for i in marked[:-1]],
    ]


def test_what_follows_a_cut_depends_on_seed_and_frame_count_only():
    whole = list(build("Slide", total=60)[0])
    torch.manual_seed(123)
    np.random.seed(5)
    frames, _ = build("Slide", total=60, warmup=0)
    frames.first_frame = 25
    rest = list(frames)
    assert len(rest) == len(frames) == 35
    # random actions and networks differ by construction: compare the first state behind each cut
    assert torch.equal(rest[0]["observation"], whole[25]["observation"])
    assert torch.equal(rest[25]["observation"], whole[50]["observation"])
    assert not torch.equal(whole[25]["observation"], whole[0]["observation"])


# --- module ---


@pytest.mark.parametrize(
    ("updates_per_frame", "num_envs", "expected"),
    [
        (1.0, 1, {19: 0, 20: 1, 21: 2, 30: 11}),  # as the authors': one update with the last warm-up frame
        (0.5, 1, {20: 0, 21: 1, 22: 1, 23: 2}),
        (2.0, 1, {20: 2, 21: 4}),
        (1.0, 4, {16: 0, 20: 1, 24: 5}),
    ],
)
def test_updates_follow_the_frames(updates_per_frame, num_envs, expected):
    frames, module = build("Slide", total=32, num_envs=num_envs)
    module.updates_per_frame = updates_per_frame
    done = {}
    for index, batch in enumerate(frames):
        module.training_step(batch, index)
        done[module.env_frames] = module.grad_steps
    assert {frame: done[frame] for frame in expected} == expected


def test_same_seed_gives_the_same_losses_and_bounds_change_nothing():
    """The same problem under bounds [-1, 1] and [-3, 3]: dynamics and critics see the action's share of its bound."""
    narrow, again = run(*build("Slide")), run(*build("Slide"))
    assert narrow == again
    wide = run(*build("WideSlide", bound=WIDE))
    assert sum("loss/actor" in row for row in narrow) == 41
    for one, other in zip(narrow, wide, strict=True):
        assert one == pytest.approx(other, rel=1e-3)


def test_replay_holds_actions_in_environment_units():
    frames, module = build("WideSlide", bound=WIDE, total=40)
    run(frames, module)
    actions = module.writer.replay[:]["action"].abs()
    assert 1 < actions.max() <= WIDE


@pytest.mark.parametrize(("env", "entry"), [("NanReward", "next reward"), ("InfObservation", "next observation")])
def test_non_finite_frames_are_refused_before_replay(env, entry):
    frames, module = build(env)
    with pytest.raises(NonFiniteDataError, match=rf"{entry} of {env} is (nan|inf).*12"):
        run(frames, module)
    stored = module.writer.replay[:]
    assert len(stored) == 12
    assert all(value.isfinite().all() for value in stored.flatten_keys().values())


def test_a_non_finite_action_is_refused_by_name():
    frames, module = build("Slide")
    batch = next(iter(frames))
    batch["action"][..., 1] = float("nan")
    with pytest.raises(NonFiniteDataError, match="action of Slide is nan"):
        module.training_step(batch, 0)
    assert len(module.writer.replay) == 0


def test_a_non_finite_loss_stops_before_the_weights_are_touched():
    frames, module = build("Slide")
    run(frames, module)
    before = {name: value.clone() for name, value in module.update.state_dict().items()}
    batch = module.writer.replay.sample()
    batch["next", "reward"][3] = float("inf")
    with pytest.raises(NonFiniteLossError, match="loss_qvalue is inf"):
        module.update(batch)
    for name, value in module.update.state_dict().items():
        assert torch.equal(value, before[name]), name
    module.writer.replay.sample = lambda: batch
    with pytest.raises(NonFiniteLossError, match="at frame 61, update 41"):
        module.training_step(next(iter(build("Slide")[0])), 0)


def test_metrics_average_losses_and_count_only_whole_episodes():
    frames, module = build("Slide", total=60)
    returns, losses = [], []
    for index, batch in enumerate(frames):
        module.training_step(batch, index)
        ended = batch["next", "episode_end"]
        returns += batch["next", "episode_reward"][ended].tolist()
        if module.grad_steps:
            losses.append(float(module.window._sums["loss/actor"]))
    row = module.metrics()
    if returns:
        assert row["train/return_mean"] == pytest.approx(sum(returns) / len(returns))
    assert row["loss/actor"] == pytest.approx(losses[-1] / module.grad_steps)
    assert 0 <= row["train/action_saturation"] <= 1
    assert "loss/actor" not in module.metrics()


# --- update ---


def test_the_actor_learns_from_the_critics_just_updated():
    """The update against the same steps written out, critics first."""
    _, module = build("Slide", gradient_clipping=0.5)
    frames, _ = build("Slide", total=40)
    for batch in frames:
        module.writer.write(batch)
    batch = module.writer.replay.sample()

    _, other = build("Slide")
    loss = other.update.loss
    optimizers = {
        name: torch.optim.Adam(getattr(loss, f"{network}_params").parameters(), lr=1e-3)
        for name, network in (("critic", "qvalue_network"), ("actor", "actor_network"))
    }
    torch.manual_seed(7)
    for name, half in (("critic", loss.qvalue_loss), ("actor", loss.actor_loss)):
        value, _ = half(batch)
        optimizers[name].zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(optimizers[name].param_groups[0]["params"], 0.5)
        optimizers[name].step()
        if name == "critic":
            online, target = loss.qvalue_network_params.data, loss.target_qvalue_network_params.data
            for key, value in online.items(True, True):
                target.set_(key, 0.95 * target.get(key) + 0.05 * value)

    torch.manual_seed(7)
    module.update(batch)
    for (name, mine), theirs in zip(module.update.loss.state_dict().items(), loss.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6, msg=name)


def test_actor_rate_decays_by_updates_and_the_critics_stays():
    assert cosine_decay(0, 4) == 1
    assert cosine_decay(1, 4) == pytest.approx(0.8535534)  # (1 + cos(45 degrees)) / 2
    assert cosine_decay(4, 4) == cosine_decay(9, 4) == 0
    frames, module = build("Slide", actor_learning_rate_decay=4)
    run(frames, module)
    rates = {name: optimizer.param_groups[0]["lr"] for name, optimizer in module.update.optimizers.items()}
    assert rates == {"actor": 0.0, "critic": 1e-3}


def test_averaged_actor_is_what_is_evaluated_and_does_not_train():
    _, module = build("Slide", actor_ema=0.75)
    live = [parameter.detach().clone() for parameter in module.update.actor_parameters]
    average = [parameter.clone() for parameter in live]
    batches = list(build("Slide", total=40)[0])
    for batch in batches:
        module.writer.write(batch)
    for step in range(3):
        module.update(module.writer.replay.sample())
        live = [parameter.detach().clone() for parameter in module.update.actor_parameters]
        # the first call takes the actor over, as torch's AveragedModel does
        average = live if step == 0 else [0.75 * a + 0.25 * b for a, b in zip(average, live, strict=True)]
    mine = list(module.update.policy.parameters())
    assert len(mine) == len(average)
    for a, b in zip(mine, average, strict=True):
        torch.testing.assert_close(a.detach(), b)
    assert not torch.equal(mine[0], live[0])


# --- evaluation and random state ---


def test_evaluation_leaves_every_generator_as_it_was_and_repeats_itself():
    environment = make_environment("qsm_rl_loop/Slide-v0", num_envs=3)
    policy = DiffusionActor(
        ScoreMLP(2, 2, (8,)), action_spec=environment.action_spec_unbatched, noise_schedule=NoiseSchedule.vp(3)
    )
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    first = evaluate_policy(environment, policy, seed=1)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()
    assert random.getstate() == states[2]
    torch.manual_seed(99)
    assert evaluate_policy(environment, policy, seed=1) == first
    assert evaluate_policy(environment, policy, seed=2) != first


def test_generators_are_put_back_behind_an_error_too():
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError), isolated_random_state(0):
        torch.rand(3)
        raise RuntimeError
    assert torch.equal(torch.get_rng_state(), state)


def test_each_environment_gives_its_first_episode_however_long():
    environment = make_environment("qsm_rl_loop/Countdown-v0", num_envs=6)
    policy = RandomPolicy(environment.full_action_spec)
    result = evaluate_policy(environment, policy, seed=3)
    environment.set_seed(3)
    environment.reset()
    counts = tuple(inner.unwrapped.left for inner in environment.base_env._env.envs)
    assert len(set(counts)) > 2
    assert result.lengths == counts
    assert result.returns == pytest.approx(counts)
    metrics = result.metrics()
    assert metrics["eval/return_mean"] == pytest.approx(np.mean(counts))
    assert metrics["eval/return_std"] == pytest.approx(np.std(counts))


def test_an_environment_without_end_is_named(monkeypatch):
    monkeypatch.setattr("qsm_rl.training.evaluation.LONGEST_EPISODE", 3)  # it takes longer to slide off
    environment = make_environment("qsm_rl_loop/Slide-v0")
    with pytest.raises(UserError, match="max_episode_steps"):
        evaluate_policy(environment, RandomPolicy(environment.full_action_spec), seed=0)


def test_derived_seeds_are_apart_and_the_same_everywhere():
    seeds = {derived_seed(seed, purpose, frame) for seed in range(5) for purpose in ("a", "b") for frame in range(50)}
    assert len(seeds) == 500
    assert derived_seed(0, "training", 5000) == derived_seed(0, "training", 5000)
    assert all(0 <= seed < 2**31 for seed in seeds)
