"""Speed of the pieces: `pytest -m benchmark --benchmark-autosave`, and later `--benchmark-compare`."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer

from qsm_rl import (
    BoltzmannQScore,
    DDIMSampler,
    DDPMSampler,
    DiffusionActor,
    NoiseSchedule,
    NormalizedQScore,
    PosteriorQScore,
    ScaledQScore,
)
from qsm_rl.activations import mish
from qsm_rl.training import TransitionWriter, make_environment
from recipes.benchmark import SIZE, make_actor, make_batch, make_update

pytestmark = pytest.mark.benchmark
CPU = torch.device("cpu")


@pytest.fixture
def update():
    return make_update(SIZE, CPU)


@pytest.fixture
def batch():
    return make_batch(SIZE["batch"], CPU)


def test_update(benchmark, update, batch):
    benchmark(lambda: update(batch.copy()))


def test_qvalue_loss(benchmark, update, batch):
    benchmark(lambda: update.loss.qvalue_loss(batch.copy())[0].backward())


def test_actor_loss(benchmark, update, batch):
    benchmark(lambda: update.loss.actor_loss(batch)[0].backward())


@pytest.mark.parametrize("count", [1, 64, 1024])
def test_acting(benchmark, count):
    actor, tensordict = make_actor(SIZE), make_batch(count, CPU).select("observation")
    with torch.no_grad():
        benchmark(lambda: actor(tensordict))


@pytest.mark.parametrize("sampler", [DDPMSampler(), DDPMSampler(clip="clean"), DDIMSampler()], ids=repr)
def test_sampling(benchmark, sampler):
    actor = make_actor(SIZE)
    actor = DiffusionActor(
        actor.score_network,
        action_spec=actor.spec["action"],
        noise_schedule=actor.noise_schedule,
        sampler=sampler,
    )
    observation = torch.randn(SIZE["batch"], 24)
    with torch.no_grad():
        benchmark(lambda: actor.sample(observation))


@pytest.mark.parametrize(
    "target",
    [ScaledQScore(), BoltzmannQScore(0.1), NormalizedQScore(), PosteriorQScore(0.1, 64)],
    ids=lambda target: type(target).__name__,
)
def test_score_target(benchmark, target):
    schedule, action, t = NoiseSchedule.vp(5), torch.rand(256, 6), torch.randint(5, (256,))
    benchmark(lambda: target(lambda a: -(a**2).sum(-1), action, t, schedule))


@pytest.mark.parametrize("elements", [256, 256 * 512])
def test_mish(benchmark, elements):
    x = torch.randn(elements)
    benchmark(lambda: mish(x))


def test_replay_write_and_sample(benchmark, batch):
    replay = TensorDictReplayBuffer(storage=LazyTensorStorage(100_000), batch_size=SIZE["batch"])
    row: TensorDict = batch[:1]

    def write_and_sample() -> None:
        replay.extend(row)
        replay.sample()

    benchmark(write_and_sample)


@pytest.mark.parametrize("frames", [1, 10])
@pytest.mark.parametrize("n_step", [1, 5])
def test_writing_frames(benchmark, batch, n_step, frames):
    """What a batch of the collector costs on its way to the replay buffer."""
    replay = TensorDictReplayBuffer(storage=LazyTensorStorage(100_000))
    writer = TransitionWriter(replay, n_step=n_step)
    collected = batch[:frames].reshape(1, frames)
    benchmark(lambda: writer.write(collected))


@pytest.mark.parametrize("count", [1, 8])
def test_stepping_environments(benchmark, count):
    """One step and, at an episode's end, a reset, as a collector does them."""
    environment = make_environment("HalfCheetah-v5", num_envs=count, seed=0)
    state = {"now": environment.reset()}
    action = torch.zeros(count, 6)

    def step() -> None:
        _, state["now"] = environment.step_and_maybe_reset(state["now"].set("action", action))

    benchmark(step)


@pytest.mark.parametrize("together", [1, 16])
def test_drawing_batches(benchmark, together):
    replay = TensorDictReplayBuffer(storage=LazyTensorStorage(100_000))
    replay.extend(make_batch(100_000, CPU))
    benchmark(lambda: replay.sample(together * SIZE["batch"]).split(SIZE["batch"]))
