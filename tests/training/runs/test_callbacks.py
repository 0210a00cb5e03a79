from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer

from qsm_rl.training import CheckpointFolder, ReplayArchive, make_environment
from qsm_rl.training.evaluation.evaluate import EvaluationResult
from qsm_rl.training.runs import callbacks
from qsm_rl.training.runs.callbacks import CheckpointWriter, Evaluation, MetricRows, StopAtReturn, StopSignals
from tests.training.small_trainer import env_id


def test_what_a_killed_process_left_beyond_the_checkpoint_to_go_on_from_is_removed(tmp_path):
    checkpoints, archive = CheckpointFolder(tmp_path), ReplayArchive(tmp_path / "replay")
    replay = TensorDictReplayBuffer(storage=LazyTensorStorage(20), batch_size=4)
    for frames in (100, 150):
        replay.extend(TensorDict({"observation": torch.zeros(4, 1)}, [4]))
        checkpoints.save(frames, {"replay": archive.save(replay)})
    (tmp_path / "frames-000000000150.pt").write_bytes(b"cut short")
    frames = SimpleNamespace(checkpoint_every=50, first_frame=100)
    CheckpointWriter(frames, SimpleNamespace(checkpoints=tmp_path), archive, {}, StopSignals())
    assert checkpoints.frames() == [100]
    assert [path.name for path in (tmp_path / "replay").iterdir()] == ["rows-000000000000-000000000004.safetensors"]


@pytest.mark.parametrize(("target", "reached"), [(2.0, 2.0), (2.1, None), (None, None)])
def test_training_ends_where_the_mean_return_is_at_least_the_target(target, reached):
    stop = StopAtReturn(SimpleNamespace(last=EvaluationResult((1.0, 3.0), (7, 7))), target)
    trainer = SimpleNamespace(should_stop=False)
    stop.on_train_batch_end(trainer, None, None, None, 0)
    assert stop.reached == reached and trainer.should_stop == (reached is not None)


def test_rates_leave_evaluations_out_and_a_resumed_run_s_clock_goes_on(monkeypatch):
    """200 frames and 100 updates in 10 s, 6 of them for an evaluation, behind 30 s of an earlier process."""
    times, rows = iter([0.0, 100.0, 110.0]), []
    monkeypatch.setattr(callbacks, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    trainer = SimpleNamespace(loggers=[SimpleNamespace(log_metrics=lambda row, step: rows.append((step, row)))])
    module = SimpleNamespace(env_frames=1000, grad_steps=500, elapsed_seconds=30.0)
    module.metrics = lambda: {"time/evaluation_seconds": 6.0}
    writer = MetricRows(SimpleNamespace(collector=None), 100, 100)
    writer.on_train_start(trainer, module)
    module.env_frames, module.grad_steps = 1200, 600
    writer.run(trainer, module)
    rates = {"time/frames_per_second": 50.0, "time/updates_per_second": 25.0}
    assert rows == [(1200, {**rates, "time/elapsed_seconds": 40.0, "time/evaluation_seconds": 6.0})]
    assert module.elapsed_seconds == 40.0


def test_an_evaluation_normalises_as_the_training_environment_does_then():
    made, rows = [], []

    def make(seed, filmed=False):
        made.append(make_environment(env_id("Slide"), seed=seed, normalize_observation=True))
        return made[-1]

    training = make(0)
    training.rollout(20)
    network = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Tanh())
    update = SimpleNamespace(agents=(), policies={"": TensorDictModule(network, ["observation"], ["action"])})
    window = SimpleNamespace(add=rows.append)
    module = SimpleNamespace(update=update, env_frames=20, device=torch.device("cpu"), window=window)
    frames = SimpleNamespace(seed=0, collector=SimpleNamespace(env=training))
    evaluation = Evaluation(frames, 10, make, episodes=2, stop=StopSignals())
    evaluation.run(None, module)
    torch.testing.assert_close(dict(made[1].state_dict()), dict(training.state_dict()))
    assert (
        len(evaluation.last.returns) == 2
        and rows[0]["eval/return_mean"] == evaluation.last.metrics()["eval/return_mean"]
    )
