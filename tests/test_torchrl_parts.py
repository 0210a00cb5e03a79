"""The kit among TorchRL's own parts: environments, collectors, replay buffers, transforms, losses, compilers."""

from __future__ import annotations

import functools
import io
import warnings
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import Tensor, nn
from torchrl.collectors import Collector, MultiAsyncCollector, MultiSyncCollector
from torchrl.data import Bounded, LazyMemmapStorage, LazyTensorStorage, PrioritizedSampler, TensorDictReplayBuffer
from torchrl.envs import EnvBase, GymEnv, MultiStepTransform, ParallelEnv, SerialEnv
from torchrl.envs.utils import ExplorationType, check_env_specs, set_exploration_type
from torchrl.modules import DiffusionActor as StockDiffusionActor
from torchrl.objectives import DiffusionBCLoss, SoftUpdate

from qsm_rl import DiffusionActor, GaussianExploration, NoiseSchedule, QScoreMatchingLoss, QValueMLP, ScoreMLP
from qsm_rl.training.environments.make_environment import make_environment


class PointEnv(gymnasium.Env):
    """A point on a line, pushed by the action; the episode terminates where the point leaves [-1, 1].

    The full range of actions moves it by the same distance whatever the bounds.
    """

    def __init__(self, bound: float) -> None:
        self.bound = bound
        self.action_space = Box(-bound, bound, (1,), np.float32)
        self.observation_space = Box(-np.inf, np.inf, (2,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.state = self.np_random.uniform(-0.5, 0.5, 2).astype(np.float32)
        return self.state, {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.state = point_dynamics(torch.as_tensor(self.state), torch.as_tensor(action), self.bound).numpy()
        return self.state, float(1 - abs(self.state[0])), bool(abs(self.state[0]) > 1), False, {}


def point_dynamics(state: Tensor, action: Tensor, bound: float) -> Tensor:
    """The next state ``(*B, 2)``: position, and the push that led to it."""
    push = 0.5 * action / bound
    return torch.cat([state[..., :1] + push, push], -1).float()


# Registered where the module is imported, worker processes included: Gymnasium imports what stands before the colon.
TIME_LIMIT = 5
POINT, WIDE_POINT = (f"qsm_rl_test/Point{bound}-v0" for bound in (1, 3))
for name, bound in ((POINT, 1.0), (WIDE_POINT, 3.0)):
    if name not in gymnasium.registry:
        gymnasium.register(name, PointEnv, max_episode_steps=TIME_LIMIT, kwargs={"bound": bound})


def make_gym_env(name: str = POINT) -> EnvBase:
    return GymEnv(f"{__name__}:{name}")


def make_point(name: str = POINT, **options: Any) -> EnvBase:
    return make_environment(f"{__name__}:{name}", **options)


def make_actor(bound: float = 1.0) -> DiffusionActor:
    return DiffusionActor(
        ScoreMLP(2, 1, (16, 16)), action_spec=Bounded(-bound, bound, (1,)), noise_schedule=NoiseSchedule.vp(5)
    )


def make_loss(actor: DiffusionActor, **options: Any) -> QScoreMatchingLoss:
    critics = [
        TensorDictModule(QValueMLP(2, 1, (16, 16)), in_keys=["observation", "action"], out_keys=["state_action_value"])
        for _ in range(2)
    ]
    loss = QScoreMatchingLoss(actor, critics, **options)
    loss.make_value_estimator(gamma=0.9)
    return loss


def train(loss: QScoreMatchingLoss, sample: Callable[[], TensorDictBase], num_updates: int) -> list[dict[str, float]]:
    """A user's training loop; returns the losses of each update."""
    updater = SoftUpdate(loss, tau=0.1)
    optimizer = torch.optim.Adam(loss.parameters(), 1e-3)
    history = []
    for _ in range(num_updates):
        output = loss(sample())
        optimizer.zero_grad()
        (output["loss_actor"] + output["loss_qvalue"]).backward()
        optimizer.step()
        updater.step()
        history.append({key: output[key].item() for key in ("loss_actor", "loss_qvalue")})
    return history


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# --- environments ---

BATCHED_ENVIRONMENTS = {
    "gymnasium-vector": lambda: make_point(num_envs=2),
    "serial": lambda: SerialEnv(2, make_gym_env),
    "parallel": lambda: ParallelEnv(2, make_gym_env, mp_start_method="spawn"),
}
each_batched_environment = pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind == "parallel")) for kind in BATCHED_ENVIRONMENTS]
)


@each_batched_environment
def test_transitions_are_true_also_where_episodes_end(kind):
    environment = BATCHED_ENVIRONMENTS[kind]()
    environment.set_seed(0)
    collector = Collector(
        environment,
        TensorDictSequential(make_actor(), GaussianExploration(environment.action_spec, std=0.5)),
        frames_per_batch=80,
        total_frames=160,
        auto_register_policy_transforms=False,
    )
    frames = torch.cat([batch.clone() for batch in collector], -1)
    collector.shutdown()
    assert frames.batch_size == (2, 80)
    following = frames["next"]
    # At termination and truncation as anywhere else, the next observation is where the step led.
    expected = point_dynamics(frames["observation"], frames["action"], bound=1.0)
    torch.testing.assert_close(following["observation"], expected)
    torch.testing.assert_close(following["reward"], 1 - expected[..., :1].abs())
    terminated = expected[..., :1].abs() > 1
    assert torch.equal(following["terminated"], terminated)
    assert torch.equal(following["done"], terminated | following["truncated"])
    assert terminated.any() and (following["truncated"] & ~terminated).any()
    # Behind the end a new episode begins, and inside an episode nothing is lost or inserted.
    done = following["done"][:, :-1]
    torch.testing.assert_close(
        torch.where(done, 0.0, frames["observation"][:, 1:]), torch.where(done, 0.0, following["observation"][:, :-1])
    )
    assert (frames["observation"][:, 1:][done.squeeze(-1)].abs() <= 0.5).all()


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (make_environment, {"env": "InvertedPendulum-v5"}),
        (make_environment, {"env": "HalfCheetah-v5", "num_envs": 2, "action_repeat": 2, "normalize_observation": True}),
        (make_environment, {"env": "dm_control/cartpole-swingup", "num_envs": 2}),
        (SerialEnv, {"num_workers": 2, "create_env_fn": functools.partial(GymEnv, "InvertedPendulum-v5")}),
        pytest.param(
            *(ParallelEnv, {"num_workers": 2, "create_env_fn": functools.partial(GymEnv, "InvertedPendulum-v5")}),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["gymnasium", "gymnasium-vector", "dm_control", "serial", "parallel"],
)
def test_environments_keep_their_specs(make, options):
    if str(options.get("env")).startswith("dm_control"):
        pytest.importorskip("dm_control", reason="needs the dmc extra")
    environment = make(**options)
    check_env_specs(environment)
    environment.close()


# --- collectors and storages ---


@pytest.mark.parametrize("storage", [LazyTensorStorage, LazyMemmapStorage])
def test_trains_from_a_collector_through_a_replay_buffer(storage):
    environment = make_point(num_envs=2, seed=0)
    actor = make_actor()
    loss = make_loss(actor)
    collector = Collector(
        environment,
        TensorDictSequential(actor, GaussianExploration(environment.action_spec_unbatched)),
        frames_per_batch=40,
        total_frames=200,
        init_random_frames=40,
        auto_register_policy_transforms=False,
    )
    replay = TensorDictReplayBuffer(storage=storage(200), batch_size=32)
    before = [parameter.detach().clone() for parameter in actor.parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing of the kit is deprecated by the parts it meets
        for frames in collector:
            replay.extend(frames.reshape(-1))
            history = train(loss, replay.sample, 3)
    collector.shutdown()
    assert len(replay) == 200
    assert all(np.isfinite(list(losses.values())).all() for losses in history)
    assert all(not torch.equal(old, new) for old, new in zip(before, actor.parameters(), strict=True))
    # What the loss writes back goes into a replay buffer too.
    batch = replay.sample()
    loss(batch)
    assert batch["td_error"].shape == (32,)


class AlwaysHigh(nn.Module):
    """A score network that drives every action to the upper bound, once its weight is positive."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, noisy_action: Tensor, observation: Tensor, t: Tensor) -> Tensor:
        return -self.weight.expand_as(noisy_action)


@pytest.mark.slow
@pytest.mark.parametrize("collector_class", [MultiSyncCollector, MultiAsyncCollector])
def test_trains_from_worker_processes(collector_class):
    environment = make_point()
    actor = DiffusionActor(
        AlwaysHigh(), action_spec=environment.action_spec_unbatched, noise_schedule=NoiseSchedule.vp(5)
    )
    loss = make_loss(actor)
    collector = collector_class(
        [functools.partial(make_point, num_envs=2, seed=seed) for seed in (0, 1)],
        actor,
        frames_per_batch=40,
        total_frames=-1,
        auto_register_policy_transforms=False,
    )
    try:
        batches = iter(collector)
        frames = next(batches)
        assert frames.numel() == 40
        assert (frames["action"].abs() <= 1).all() and not (frames["action"] == 1).all()
        expected = point_dynamics(frames["observation"], frames["action"], bound=1.0)
        torch.testing.assert_close(frames["next", "observation"], expected)
        history = train(loss, frames.reshape(-1).clone, 2)
        assert all(np.isfinite(list(losses.values())).all() for losses in history)
        # Trained weights reach the workers: an asynchronous one may still hand over a batch of the old ones.
        with torch.no_grad():
            actor.score_network.weight.fill_(1e4)
        collector.update_policy_weights_()
        assert any(bool((next(batches)["action"] == 1).all()) for _ in range(6))
    finally:
        collector.shutdown()


def test_multi_step_transform():
    """Three steps joined; a window that meets the end stops there, and keeps what the end means for the bootstrap."""
    gamma, steps = 0.5, 6
    frames = TensorDict(
        {
            "observation": torch.arange(6.0).unsqueeze(-1).expand(6, 2),
            "action": torch.zeros(6, 1),
            "next": {
                "observation": torch.arange(1.0, 7.0).unsqueeze(-1).expand(6, 2),
                "reward": torch.ones(6, 1),
                **{key: torch.zeros(6, 1, dtype=torch.bool) for key in ("done", "terminated", "truncated")},
            },
        },
        [steps],
    )
    for key in ("done", "terminated"):
        frames["next", key][3] = True
    # By default TorchRL leaves the end flags of each first frame in place, and the window ending in a terminal state
    # would be bootstrapped from it; with done_keys=[] they are taken from the window's last frame.
    replay = TensorDictReplayBuffer(
        storage=LazyTensorStorage(10),
        transform=MultiStepTransform(n_steps=3, gamma=gamma, done_keys=[]),
        batch_size=3,
    )
    replay.extend(frames)
    batch = replay[:]
    assert batch["steps_to_next_obs"].squeeze(-1).tolist() == [3, 3, 2]
    assert batch["next", "observation"][:, 0].tolist() == [3.0, 4.0, 4.0]
    assert batch["next", "terminated"].squeeze(-1).tolist() == [False, True, True]

    actor = make_actor()
    critic = TensorDictModule(
        lambda observation, action: 8 * observation[..., :1] + 0 * action,
        in_keys=["observation", "action"],
        out_keys=["state_action_value"],
    )
    loss = QScoreMatchingLoss(actor, critic, num_qvalue_nets=1, delay_qvalue=False).make_value_estimator(gamma=gamma)
    _, info = loss.qvalue_loss(batch)
    # 1 + 1/2 + 1/4 and, from observation 3, 8 * 3 / 2^3; then 1 + 1/2 + 1/4 and 1 + 1/2, both to the end
    torch.testing.assert_close(info["target_value"], torch.tensor([1.75 + 3.0, 1.75, 1.5]))


def test_prioritised_sampler():
    try:
        sampler = PrioritizedSampler(max_capacity=8, alpha=0.5, beta=1.0)
    except RuntimeError as error:
        pytest.skip(f"TorchRL's compiled extension does not load with torch {torch.__version__}: {error}")
    replay = TensorDictReplayBuffer(
        storage=LazyTensorStorage(8), sampler=sampler, batch_size=64, priority_key="td_error"
    )
    frames = make_point(num_envs=2, seed=0).rollout(4, break_when_any_done=False).reshape(-1)
    frames["next", "reward"][5] = 1e3  # the one surprise
    replay.extend(frames)
    loss = make_loss(make_actor())
    batch = replay.sample()
    loss(batch)
    replay.update_tensordict_priority(batch)
    batch = replay.sample()
    assert 0.5 < (batch["index"] == 5).float().mean() < 1  # uniformly it would be one in eight
    weighted, unweighted = loss(batch)["loss_qvalue"], loss(batch.exclude("priority_weight"))["loss_qvalue"]
    assert weighted < unweighted  # the weights undo the preference


# --- the same problem under other bounds ---


def test_the_same_problem_under_wider_bounds_gives_the_same_losses():
    """Everything is scaled: bounds, dynamics and what the critics make of an action."""

    class ScaledCritic(nn.Module):
        def __init__(self, bound: float) -> None:
            super().__init__()
            self.critic, self.bound = QValueMLP(2, 1, (16, 16)), bound

        def forward(self, observation: Tensor, action: Tensor) -> Tensor:
            return self.critic(observation, action / self.bound)

    histories, actions = [], []
    for name, bound in ((POINT, 1.0), (WIDE_POINT, 3.0)):
        torch.manual_seed(0)
        environment = make_point(name, num_envs=2, seed=0)
        assert environment.action_spec_unbatched.space.high == bound
        actor = DiffusionActor(
            ScoreMLP(2, 1, (16, 16)),
            action_spec=environment.action_spec_unbatched,
            noise_schedule=NoiseSchedule.vp(5),
        )
        critics = [
            TensorDictModule(ScaledCritic(bound), ["observation", "action"], ["state_action_value"]) for _ in range(2)
        ]
        loss = QScoreMatchingLoss(actor, critics).make_value_estimator(gamma=0.9)
        collector = Collector(
            environment,
            TensorDictSequential(actor, GaussianExploration(environment.action_spec_unbatched)),
            frames_per_batch=20,
            total_frames=100,
            auto_register_policy_transforms=False,
        )
        replay = TensorDictReplayBuffer(storage=LazyTensorStorage(100), batch_size=16)
        history = []
        for frames in collector:
            replay.extend(frames.reshape(-1))
            history += [tuple(losses.values()) for losses in train(loss, replay.sample, 4)]
        collector.shutdown()
        histories.append(torch.tensor(history))
        actions.append(replay[:]["action"] / bound)
    assert histories[0].shape == (20, 2) and (histories[0] > 0).all()
    torch.testing.assert_close(histories[1], histories[0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(actions[1], actions[0], rtol=0, atol=1e-3)


# --- compilers and devices ---


def draws(batch_size: int, num_steps: int = 5) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """All random numbers of the two halves: compiled code has a random stream of its own."""
    shape = (batch_size, 1)
    qvalue = {
        "initial_noise": torch.randn(shape),
        "step_noise": torch.randn(num_steps, *shape),
        "target_action_noise": 0.1 * torch.randn(shape),
    }
    return qvalue, {"t": torch.randint(num_steps, (batch_size,)), "noise": torch.randn(shape)}


def batch_of(size: int) -> TensorDict:
    return make_point(num_envs=size, seed=0).rollout(1)[:, 0].detach()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:Using lock_")  # TorchRL's own, while it is compiled
@pytest.mark.parametrize("half", ["qvalue_loss", "actor_loss"])
def test_both_halves_compile_as_one_graph(half):
    loss, batch = make_loss(make_actor()), batch_of(8)
    SoftUpdate(loss, tau=0.1)
    arguments = draws(8)[half == "actor_loss"]
    results = []
    for function in (getattr(loss, half), torch.compile(getattr(loss, half), fullgraph=True)):
        loss.zero_grad()
        value, info = function(batch.clone(), **arguments)
        value.backward()
        gradients = {name: p.grad.clone() for name, p in loss.named_parameters() if p.grad is not None}
        results.append((value.detach(), info, gradients))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
    owner = {"qvalue_loss": "qvalue_network", "actor_loss": "actor_network"}[half]
    assert results[1][2].keys() == {n for n, _ in loss.named_parameters() if n.startswith(f"{owner}_params")}


@pytest.mark.parametrize("exploration_type", [ExplorationType.RANDOM, ExplorationType.DETERMINISTIC])
@pytest.mark.parametrize("any_batch_size", [False, True])
def test_an_exported_actor_acts_alike_after_a_reload(exploration_type, any_batch_size):
    actor, file = make_actor(bound=3.0), io.BytesIO()
    observation = torch.randn(4, 2)
    with set_exploration_type(exploration_type), torch.no_grad():
        if any_batch_size:  # of the module inside, whose observations are positional
            batch_dim = {0: torch.export.Dim("batch")}
            exported = torch.export.export(actor.module, (observation,), dynamic_shapes={"observations": (batch_dim,)})
        else:  # of the actor itself, called by keyword
            exported = torch.export.export(actor, (), {"observation": observation})
        torch.export.save(exported, file)
        file.seek(0)
        reloaded = torch.export.load(file).module()
        for batch_size in (4, 7) if any_batch_size else (4,):
            observation = torch.randn(batch_size, 2)
            torch.manual_seed(0)
            expected = actor(observation=observation)
            torch.manual_seed(0)
            action = reloaded(observation) if any_batch_size else reloaded(observation=observation)
            torch.testing.assert_close(action, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_same_losses():
    loss, batch = make_loss(make_actor(), delay_qvalue=False), batch_of(8)
    arguments = draws(8)
    results = []
    for device in ("cpu", "cuda"):
        loss.to(device)
        qvalue, actor = ({name: draw.to(device) for name, draw in half.items()} for half in arguments)
        moved = batch.to(device)
        results.append([loss.qvalue_loss(moved, **qvalue)[0].cpu(), loss.actor_loss(moved, **actor)[0].cpu()])
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-4)


# --- TorchRL's own diffusion parts ---


def test_the_stock_behaviour_cloning_loss_trains_our_actor():
    """Demonstrations at 0.5 and 2.5 under bounds [-1, 3], told apart by the observation."""
    actor = DiffusionActor(
        ScoreMLP(1, 1, (64, 64)), action_spec=Bounded(-1.0, 3.0, (1,)), noise_schedule=NoiseSchedule.vp(5)
    )
    loss = DiffusionBCLoss(actor)
    optimizer = torch.optim.Adam(loss.parameters(), 3e-3)
    observation = torch.tensor([-1.0, 1.0]).repeat(128).unsqueeze(-1)
    demonstrations = TensorDict({"observation": observation, "action": 1.5 + observation}, [256])
    for _ in range(300):
        optimizer.zero_grad()
        loss(demonstrations)["loss_diffusion_bc"].backward()
        optimizer.step()
    with torch.no_grad():
        action = actor(observation=observation)
    assert (action - demonstrations["action"]).abs().mean() < 0.15


def test_the_stock_actor_is_refused_with_what_it_lacks():
    with pytest.raises(TypeError) as caught:
        make_loss(StockDiffusionActor(action_dim=1, obs_dim=2, num_steps=5))
    message = str(caught.value)
    assert len(message.splitlines()) <= 2
    assert "DiffusionActor without observation, sample, predict_noise, noise_schedule, box" in message
    assert "pass a qsm_rl.DiffusionActor" in message
