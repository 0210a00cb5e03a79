"""Minari and D4RL data sets, made here in their own formats, since nothing is downloaded by tests."""

from __future__ import annotations

import sys

import h5py
import minari
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from minari.data_collector import EpisodeBuffer
from torchrl.data.datasets import MinariExperienceReplay, d4rl

from qsm_rl.training import UserError, make_environment, read_dataset

OBSERVATIONS = Box(-np.inf, np.inf, (4,), np.float64)
ACTIONS = Box(-3, 3, (1,), np.float32)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Minari's and TorchRL's folders of data sets."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    return tmp_path


def write_minari(identity: str, observation_space=OBSERVATIONS) -> None:
    """Episodes of 3 frames that terminated and of 2 that were cut off; observations count the frames."""
    episodes = []
    for first, length, terminated in ((0, 3, True), (10, 2, False)):
        observations = np.arange(first, first + length + 1.0)[:, None].repeat(4, 1)
        last = [False] * (length - 1) + [True]
        episodes.append(
            EpisodeBuffer(
                observations=observations if observation_space is OBSERVATIONS else {"observation": observations},
                actions=observations[:-1, :1].astype(np.float32) / 10,
                rewards=list(observations[:-1, 0] + 0.5),
                terminations=last if terminated else [False] * length,
                truncations=[False] * length if terminated else last,
            )
        )
    with pytest.warns(UserWarning):  # that nobody is named as the author
        minari.create_dataset_from_buffers(
            identity, buffer=episodes, observation_space=observation_space, action_space=ACTIONS
        )


def test_minari_transitions_are_those_of_the_episodes():
    write_minari("test/pole-v0")
    data = read_dataset("minari:test/pole-v0", make_environment("InvertedPendulum-v5"))
    assert data["observation"][:, 3].tolist() == [0, 1, 2, 10, 11]
    assert data["next", "observation"][:, 0].tolist() == [1, 2, 3, 11, 12]
    torch.testing.assert_close(data["action"], torch.tensor([[0.0], [0.1], [0.2], [1.0], [1.1]]))
    assert data["next", "reward"].tolist() == [[0.5], [1.5], [2.5], [10.5], [11.5]]
    assert data["next", "terminated"].squeeze(-1).tolist() == [False, False, True, False, False]
    assert data["next", "done"].squeeze(-1).tolist() == [False, False, True, False, True]
    assert data["observation"].dtype == data["next", "reward"].dtype == torch.float32


def test_torchrl_still_reads_zeros_from_minari():
    """Why the kit does not use its loader. Once this fails, it can."""
    write_minari("test/pole-v0")
    replay = MinariExperienceReplay("test/pole-v0", batch_size=1, load_from_local_minari=True)
    assert replay[:]["observation"].shape == (5, 4) and not replay[:]["observation"].any()


def test_minari_observations_that_are_no_vectors_are_named():
    from gymnasium.spaces import Dict

    write_minari("test/goal-v0", Dict({"observation": OBSERVATIONS}))
    with pytest.raises(UserError, match=r"minari:test/goal-v0 has observations of type dict, expected vectors"):
        read_dataset("minari:test/goal-v0", make_environment("InvertedPendulum-v5"))


def test_a_missing_package_is_named_with_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "minari", None)
    with pytest.raises(UserError, match=r"qsm_rl\[offline\]"):
        read_dataset("minari:test/pole-v0", make_environment("InvertedPendulum-v5"))


def write_d4rl(home, monkeypatch, **flags: list[int]) -> None:
    """Eight frames under the name pole-v0; flags say at which of them terminals and timeouts are set."""
    with h5py.File(home / "pole.hdf5", "w") as file:
        count = np.arange(8, dtype=np.float32)
        file["observations"] = count[:, None].repeat(4, 1) + 1
        file["next_observations"] = count[:, None].repeat(4, 1) + 2
        file["actions"] = count[:, None] / 10
        file["rewards"] = count + 0.5
        file["infos/action_log_probs"] = -count
        for name, places in flags.items():
            file[name] = np.isin(np.arange(8), places)
    monkeypatch.setitem(d4rl.D4RL_DATASETS, "pole-v0", (home / "pole.hdf5").as_uri())


def test_d4rl_transitions_leave_out_what_nobody_saw(home, monkeypatch):
    """Frame 5 was cut off by time, and what followed frame 7 is not in the file."""
    write_d4rl(home, monkeypatch, terminals=[2], timeouts=[5])
    data = read_dataset("d4rl:pole-v0", make_environment("InvertedPendulum-v5"))
    assert data["observation"][:, 0].tolist() == [1, 2, 3, 4, 5, 7]
    torch.testing.assert_close(data["action"].squeeze(-1), torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4, 0.6]))
    assert data["next", "reward"].squeeze(-1).tolist() == [0.5, 1.5, 2.5, 3.5, 4.5, 6.5]
    assert data["next", "terminated"].squeeze(-1).tolist() == [False, False, True, False, False, False]
    assert data["next", "done"].equal(data["next", "terminated"])
    followed = ~data["next", "terminated"].squeeze(-1)
    assert data["next", "observation"][followed, 0].tolist() == [2, 3, 5, 6, 8]


def test_unknown_names_are_named():
    environment = make_environment("InvertedPendulum-v5")
    with pytest.raises(UserError, match="d4rl:no-such-v0 could not be loaded"):
        read_dataset("d4rl:no-such-v0", environment)
