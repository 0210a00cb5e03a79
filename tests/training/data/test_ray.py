"""Collection on a local Ray cluster of two actors: pytest -m slow on this file, with the ray extra."""

from __future__ import annotations

import os
import signal
import time
from functools import partial

import pytest
import torch
from tensordict.nn import TensorDictModule
from torch import nn

from qsm_rl.training import UserError, WorkerCollector, make_environment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]  # an actor that begins anew imports everything
ray = pytest.importorskip("ray", reason='Ray is not installed: pip install "qsm_rl[ray]"')

ENV = "InvertedPendulum-v5"


class Constant(nn.Module):
    """A policy whose action is its one weight; large enough a module that Ray keeps it in its object store."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.ballast = nn.Parameter(torch.zeros(100_000))

    def forward(self, observation):
        return self.weight.expand(*observation.shape[:-1], 1)


def build(num_workers: int = 2) -> WorkerCollector:
    make = partial(make_environment, ENV)
    policy = TensorDictModule(Constant(), in_keys=["observation"], out_keys=["action"])
    return WorkerCollector(
        make, policy, make(num_envs=4), num_workers=num_workers, num_envs=4, frames_per_batch=32, backend="ray"
    )


@pytest.fixture(autouse=True)
def cluster(monkeypatch):
    """A cluster of this test, shut down behind it."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def actor_pids() -> list[int]:
    """The processes of the collecting actors."""
    pids = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/cmdline") as file:
                    line = file.read()
            except OSError:
                continue
            if line.startswith("ray::") and "Collector" in line:
                pids.append(int(name))
    return pids


def test_all_frames_arrive_with_weights_of_at_most_one_batch_ago_and_three_kills_are_survived(capfd):
    collector = build()
    weight = collector._policy.module.weight
    try:
        collector.set_seed(3)
        frames = 0
        for count, batch in enumerate(collector):
            assert batch.shape == (4, 8)
            frames += batch.numel()
            # The action says which weights were used: the learner has set them to the number of batches it has seen.
            acted = {round(action, 4) for action in batch["action"].flatten().tolist()}
            assert len(acted) == 1
            age = count - round(acted.pop() * 100)
            assert 0 <= age <= 1
            with torch.no_grad():
                weight.fill_((count + 1) / 100)
            if count in (3, 6, 9):
                os.kill(actor_pids()[count % 2], signal.SIGKILL)
            if count == 15:
                break
        assert frames == 16 * 32 and collector.replacements >= 3
    finally:
        collector.shutdown()
    begun = time.monotonic()
    while actor_pids() and time.monotonic() - begun < 30:  # Ray ends them a little later
        time.sleep(0.2)
    assert not actor_pids()


def test_a_cluster_with_too_few_cpus_is_refused():
    with pytest.raises(UserError, match=r"--num_workers 4 needs 4 CPUs, but the Ray cluster has 2"):
        build(num_workers=4)
