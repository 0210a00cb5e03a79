"""Speed of the pieces: `pytest -m benchmark --benchmark-autosave`, and later `--benchmark-compare`."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict

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
    from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer

    replay = TensorDictReplayBuffer(storage=LazyTensorStorage(100_000), batch_size=SIZE["batch"])
    row: TensorDict = batch[:1]

    def write_and_sample() -> None:
        replay.extend(row)
        replay.sample()

    benchmark(write_and_sample)
