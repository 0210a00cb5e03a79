from __future__ import annotations

import multiprocessing
import os
import signal
from functools import partial

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn

from qsm_rl import DiffusionActor, GaussianExploration, NoiseSchedule, ScoreMLP
from qsm_rl.training import TrainingError, UserError, WorkerCollector, make_environment
from qsm_rl.training.data.worker_collector import Order, WorkerPolicy, _forkserver, check_ray

ENV = "InvertedPendulum-v5"


def linear_policy(weight: float) -> TensorDictModule:
    layer = nn.Linear(4, 1, bias=False)
    nn.init.constant_(layer.weight, weight)
    return TensorDictModule(layer, in_keys=["observation"], out_keys=["action"])


def acting_policy(spec) -> TensorDictSequential:
    torch.manual_seed(0)
    actor = DiffusionActor(ScoreMLP(4, 1, (16,)), action_spec=spec, noise_schedule=NoiseSchedule.vp(3))
    return TensorDictSequential(actor, GaussianExploration(spec, std=0.1))


def build(policy=None, **options) -> WorkerCollector:
    make = partial(make_environment, ENV)
    environment = make(num_envs=4)
    policy = policy or acting_policy(environment.action_spec_unbatched)
    options = {"num_workers": 2, "num_envs": 4, "frames_per_batch": 32, **options}
    return WorkerCollector(make, policy, environment, **options)


def runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_worker_acts_at_random_or_with_the_weights_of_its_order_and_says_which():
    policy = WorkerPolicy(linear_policy(0.0), make_environment(ENV).action_spec_unbatched)
    observation = torch.ones(6, 4)

    assert policy.obey(Order(3, True, {})) == 0
    out = policy(TensorDict(observation=observation, batch_size=[6]))
    assert out["action"].abs().max() > 0 and out["policy_version"].tolist() == [[3]] * 6

    weights = linear_policy(0.25).state_dict()
    assert policy.obey(Order(4, False, dict(weights))) == 3
    out = policy(TensorDict(observation=observation, batch_size=[6]))
    assert torch.equal(out["action"], torch.ones(6, 1)) and out["policy_version"].tolist() == [[4]] * 6


def test_ray_that_is_not_installed_is_refused_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'pip install "qsm_rl\[ray\]"'):
        check_ray()


@pytest.mark.slow
def test_given_seed_and_weights_batches_are_the_same_in_every_run_to_the_bit():
    collector = build(warmup_frames=64)
    weights = {name: value.clone() for name, value in collector._policy.state_dict().items()}
    try:
        runs = []
        for draws in (1, 2):
            torch.manual_seed(draws)  # what the training process draws does not matter to the workers
            collector._policy.load_state_dict(weights)
            collector.set_seed(7)
            collector._ordered_frames, before = 0, collector._version
            batches = []
            for count, batch in zip(range(5), collector, strict=False):
                assert batch.shape == (4, 8) and bool((batch["policy_version"] == before + count + 1).all())
                batches.append(batch.clone())
                with torch.no_grad():  # the learner moves the weights while the next batch is under way
                    for parameter in collector._policy.parameters():
                        parameter.add_(0.01)
            runs.append(torch.cat(batches, 1))
        for key in ("observation", "action", ("next", "reward"), ("next", "done")):
            assert torch.equal(runs[0][key], runs[1][key])
        assert 1 < runs[0]["action"][:, :16].abs().mean() < 2  # uniform in [-3, 3] during the warm-up
        assert len(runs[0]["observation"][:, 0].unique(dim=0)) == 4  # every environment has a seed of its own
        assert collector.replacements == 0
    finally:
        collector.shutdown()


@pytest.mark.slow
def test_new_weights_reach_the_workers_with_the_batch_after_next():
    policy = linear_policy(0.0)
    collector = build(policy)
    try:
        collector.set_seed(0)
        largest = []
        for count, batch in zip(range(4), collector, strict=False):
            largest.append(batch["action"].abs().max().item())
            with torch.no_grad():
                policy.module.weight.fill_(float(count + 1))
        # Batch 1 was ordered before the first change, batch 2 before the second one: never more than one batch old.
        assert largest[0] == largest[1] == 0 and largest[2] > 0
    finally:
        collector.shutdown()


@pytest.mark.slow
def test_killed_workers_are_replaced_no_transition_spans_the_gap_and_no_process_stays_behind(capfd):
    collector, started = build(), set()
    try:
        collector.set_seed(0)
        batches = iter(collector)
        previous = next(batches).clone()
        for kills in range(1, 4):
            started |= {process.pid for process in collector._workers.procs}
            os.kill(collector._workers.procs[kills % 2].pid, signal.SIGKILL)
            frames, begun_anew = 0, 0
            while not begun_anew:
                batch = next(batches).clone()
                frames += batch.numel()
                goes_on = torch.where(previous["next", "done"][:, -1], 0, previous["next", "step_count"][:, -1])
                anew = (batch["step_count"][:, 0] == 0) & (goes_on > 0)
                assert bool((anew | (batch["step_count"][:, 0] == goes_on)).all())
                inside = torch.where(batch["next", "done"][:, :-1], 0, batch["next", "step_count"][:, :-1])
                assert torch.equal(inside, batch["step_count"][:, 1:])
                begun_anew, previous = int(collector.replacements == kills), batch
            assert frames <= 4 * 32
        started |= {process.pid for process in collector._workers.procs}
        printed = capfd.readouterr().err
        assert printed.count("warning: replaced") == printed.count("ended with exit code -9") == 3
    finally:
        collector.shutdown()
    assert len(started) == 8 and not any(runs(pid) for pid in started)


def test_ctrl_c_does_not_end_a_worker_that_is_still_starting():
    with _forkserver():
        process = multiprocessing.Process(target=signal.raise_signal, args=(signal.SIGINT,))
        process.start()
    process.join(60)
    assert process.exitcode == 0
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


class Fragile(nn.Module):
    """A policy that ends its process."""

    def forward(self, observation):
        os._exit(3)


@pytest.mark.slow
def test_workers_that_die_at_once_again_and_again_end_the_run_with_a_clear_error():
    collector = build(TensorDictModule(Fragile(), in_keys=["observation"], out_keys=["action"]))
    try:
        with pytest.raises(TrainingError, match=r"(?s)2 collection workers failed 3 times in a row.*--num_workers 0"):
            next(iter(collector))
    finally:
        collector.shutdown()
