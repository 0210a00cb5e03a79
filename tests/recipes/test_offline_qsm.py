"""Offline data: read from a run of the kit and from a TorchRL replay folder, learned from, gone on with online."""

from __future__ import annotations

import shutil

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, ReplayBuffer

from qsm_rl.training import CheckpointFolder, OfflineQSMConfiguration, UserError, make_environment, read_dataset
from qsm_rl.training.runs import training_run
from recipes import mujoco_qsm, offline_qsm
from tests.recipes.test_mujoco_qsm import SMALL, checkpoint, differences, metrics

OFFLINE = [
    *("--env", "InvertedPendulum-v5", "--offline_updates", "80", "--online_frames", "40", "--checkpoint_every", "60"),
    *("--log_every", "20", "--eval_every", "60", "--eval_episodes", "1", "--batch_size", "8", "--num_steps", "2"),
    *("--actor_hidden_dims", "[8]", "--critic_hidden_dims", "[8]", "--replay_size", "100", "--device", "cpu"),
]


def run(recipe, *arguments) -> int:
    with pytest.raises(SystemExit) as ended:
        recipe.main([str(argument) for argument in arguments])
    return ended.value.code


def test_offline_updates_are_whole_batches_of_frames():
    config = OfflineQSMConfiguration(dataset="minari:x", offline_updates=25, online_frames=7, frames_per_batch=10)
    assert (config.offline_updates, config.total_frames, config.dataset) == (30, 37, "minari:x")


@pytest.fixture(scope="module")
def collected(tmp_path_factory):
    """A run whose replay buffer is the data set."""
    folder = tmp_path_factory.mktemp("runs") / "collected"
    assert run(mujoco_qsm, *SMALL, "--n_step", "1", "--run_dir", folder) == 0
    return folder


def transitions(count: int = 50, observation_dim: int = 4, action: float = 1.0) -> TensorDict:
    done = torch.zeros(count, 1, dtype=torch.bool)
    following = {"observation": torch.randn(count, observation_dim), "reward": torch.ones(count, 1)}
    return TensorDict(
        {
            "observation": torch.randn(count, observation_dim),
            "action": torch.full((count, 1), action),
            "next": {**following, "done": done, "terminated": done},
        },
        [count],
    )


def dumped(folder, data: TensorDict):
    replay = ReplayBuffer(storage=LazyTensorStorage(200), batch_size=4)
    replay.extend(data)
    replay.dumps(folder)
    return folder


def test_a_run_and_a_torchrl_folder_give_back_what_was_stored(tmp_path, collected):
    environment = make_environment("InvertedPendulum-v5", seed=0)
    data = read_dataset(str(collected), environment)
    assert data.shape == (100,) and data["observation"].shape == (100, 4)  # the replay buffer holds 100
    stored = transitions()
    again = read_dataset(str(dumped(tmp_path / "replay", stored)), environment)
    for key in stored.keys(True, True):
        assert torch.equal(again[key], stored[key]), key


def test_of_processes_that_trained_together_all_transitions_are_read(tmp_path, collected):
    shutil.copytree(collected, tmp_path / "together")
    checkpoints = CheckpointFolder(tmp_path / "together" / "checkpoints")
    shutil.copytree(checkpoints.path / "replay", checkpoints.path / "replay-rank-1")
    state = checkpoints.newest()
    checkpoints.save(state["frames"], {**state, "replay_of_other_ranks": [state["replay"]]})
    environment = make_environment("InvertedPendulum-v5")
    one, both = (read_dataset(str(folder), environment) for folder in (collected, tmp_path / "together"))
    assert (both == torch.cat([one, one])).all()


def test_offline_then_online_and_resumed_to_the_bit(tmp_path, collected, capsys, monkeypatch):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    with monkeypatch.context() as elsewhere:
        elsewhere.chdir(collected.parent)
        assert run(offline_qsm, *OFFLINE, "--dataset", collected.name, "--run_dir", whole) == 0
    said = capsys.readouterr().out
    assert f"to train longer: python recipes/offline_qsm.py --resume {whole} --total_frames 240" in said
    assert "the full run" not in said  # its length is the user's to say
    last = checkpoint(whole, 120)
    assert last["training"]["grad_steps"] == 120
    assert last["replay"]["written"] == last["replay"]["capacity"] == 100 + 40
    assert checkpoint(whole, 60)["replay"]["written"] == 100  # nothing is collected for the first 80
    assert "train/bc_error" in metrics(whole)[-1]
    shutil.copytree(whole, cut)
    (cut / "checkpoints" / "frames-000000000120.pt").unlink()
    asked = {}
    with monkeypatch.context() as spied:
        spied.setattr(training_run, "check_space", lambda folder, **needs: asked.update(needs))
        assert run(offline_qsm, "--resume", cut) == 0
    assert (asked["rows"], asked["stored"]) == (100 + 40, 100), "what lies on the disk needs no room once more"
    assert differences(last, checkpoint(cut, 120)) == []
    assert metrics(whole) == metrics(cut)


def test_what_is_collected_takes_no_place_from_the_data_set(tmp_path, collected, monkeypatch):
    """The data set fills replay_size; room for both is asked for before anything is trained."""
    asked = {}

    def check_space(folder, **needs):
        asked.update(needs)
        raise UserError("no room")

    monkeypatch.setattr(training_run, "check_space", check_space)
    assert run(offline_qsm, *OFFLINE, "--dataset", collected, "--run_dir", tmp_path / "run") == 2
    assert (asked["rows"], asked["stored"]) == (100 + 40, 0)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--env", "InvertedPendulum-v4"], "a run with env InvertedPendulum-v5, expected InvertedPendulum-v4"),
        (["--action_repeat", "2"], "a run with action_repeat 1, expected 2"),
    ],
)
def test_a_run_on_another_problem_is_no_data_set(tmp_path, collected, capsys, arguments, words):
    folder = tmp_path / "run"
    assert run(offline_qsm, *OFFLINE, *arguments, "--dataset", collected, "--run_dir", folder) == 2
    assert words in capsys.readouterr().err
    assert not folder.exists()


def test_a_run_that_normalised_its_observations_is_no_data_set(tmp_path):
    folder = tmp_path / "run"
    assert run(mujoco_qsm, *SMALL, "--normalize_observation", "true", "--run_dir", folder) == 0
    with pytest.raises(UserError, match="normalize_observation True, expected False"):
        read_dataset(str(folder), make_environment("InvertedPendulum-v5", seed=0))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (transitions(observation_dim=5), r"observation has shape \(50, 5\), expected \(N, 4\)"),
        (transitions().reshape(25, 2), r"observation has shape \(25, 2, 4\), expected \(N, 4\)"),
        (transitions(action=-4.0), "largest action is 1.33 times the bound"),
        (transitions().exclude(("next", "reward")), "lacks next reward"),
        (transitions(action=float("nan")), "NaN or infinity in action"),
    ],
)
def test_data_that_do_not_fit_are_named(tmp_path, data, message):
    with pytest.raises(UserError, match=message):
        read_dataset(str(dumped(tmp_path / "replay", data)), make_environment("InvertedPendulum-v5", seed=0))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["--dataset must be minari:ID"]),
        (["--dataset", "nowhere"], ["nowhere is not a data set", "minari:ID"]),
        (["--dataset", "minari:no/such-v0"], ["minari:no/such-v0"]),
        (["--dataset", "x", "--n_step", "3"], ["--n_step must be 1 with a data set, got 3"]),
        (["--dataset", "x", "--offline_updates", "0"], ["--offline_updates must be at least 1, got 0"]),
    ],
)
def test_bad_input_is_named_and_nothing_is_left(tmp_path, capsys, arguments, words):
    assert run(offline_qsm, "--env", "InvertedPendulum-v5", "--run_dir", tmp_path / "run", *arguments) == 2
    message = capsys.readouterr().err
    assert all(word in message for word in words), message
    assert not (tmp_path / "run").exists()


def test_a_folder_with_pickles_is_refused(tmp_path):
    folder = dumped(tmp_path / "replay", transitions())
    (folder / "storage" / "prefetch.pkl").write_bytes(b"x")
    with pytest.raises(UserError, match="unpickled"):
        read_dataset(str(folder), make_environment("InvertedPendulum-v5", seed=0))
