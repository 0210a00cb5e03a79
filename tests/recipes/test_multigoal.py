from __future__ import annotations

import csv
import math

import numpy as np
import pytest
import torch
from tensordict.nn import TensorDictModule
from torch import nn

from recipes import multigoal


def test_the_point_moves_equally_fast_in_every_direction_and_ends_at_a_goal():
    environment = multigoal.MultiGoal()
    environment.reset(seed=0)
    for action in ([1.0, 1.0], [1.0, 0.0], [-0.6, 0.8]):
        before = environment.place.copy()
        environment.step(np.array(action, np.float32))
        assert np.linalg.norm(environment.place - before) == pytest.approx(multigoal.SPEED, rel=1e-5)
    environment.place = np.array([0.0, -0.55])
    observation, reward, terminated, truncated, _ = environment.step(np.array([0.0, -0.2], np.float32))
    assert (reward, terminated, truncated) == (pytest.approx(0.7), True, False)
    assert observation == pytest.approx([0.0, -0.6])
    environment.place = np.array([0.3, 0.3])
    assert environment.step(np.zeros(2, np.float32))[1:3] == (0.0, False)


class TwoWays(nn.Module):
    """Half of its actions go to the right, half up."""

    def forward(self, observation):
        right = torch.arange(observation[..., 0].numel()).reshape(observation.shape[:-1]) % 2
        return torch.stack([right, 1 - right], -1).float()


def test_shares_and_spread_by_hand():
    policy = TensorDictModule(TwoWays(), ["observation"], ["action"])
    places = multigoal.roll_out(policy, seed=0)
    assert places.shape[0] == multigoal.EPISODES
    row = multigoal.measure(policy, places)
    assert row["goal worth 1.0"] == row["goal worth 0.9"] == 0.5
    assert row["none"] == row["goal worth 0.8"] == 0
    assert row["mean reward"] == pytest.approx(0.95)
    assert row["goals kept"] == pytest.approx(2)
    assert row["spread of the first action"] == pytest.approx(0.5, abs=1e-3)
    # From the middle to a goal's rim at 0.6 takes three steps of 0.25, so places 4 and later are no more.
    assert np.isnan(places[:, 5:]).all()
    assert not math.isnan(places[0, 2, 0])


def test_the_soft_optimal_policy_by_hand():
    """Hot it walks at random and finds all goals alike; cold it takes the best one, unless another is a step nearer."""
    hot, cold, between = (multigoal.soft_optimal(t, seed=0, size=21, pushes=9) for t in (100.0, 0.003, 0.1))
    assert cold["goal worth 1.0"] > 0.8 and cold["mean reward"] > 0.97
    assert hot["spread of the first action"] == pytest.approx(0.577, abs=0.02)
    shares = [hot[f"goal worth {reward}"] for reward in multigoal.REWARDS]
    assert max(shares) - min(shares) < 0.06
    assert between["goal worth 1.0"] > between["goal worth 0.9"] > between["goal worth 0.8"] > between["goal worth 0.7"]


@pytest.mark.parametrize("name", ["posterior", "sac"])
def test_every_policy_trains(name):
    policy, places = multigoal.train(name, 120, seed=0)
    assert np.abs(places[~np.isnan(places)]).max() <= 1
    assert 0 < multigoal.measure(policy, places)["spread of the first action"] <= 1


def test_a_short_run_of_two_seeds_leaves_tables_and_figure(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        multigoal.main(["--policies", "sac", "--frames", "100", "--seeds", "2", "--output", str(tmp_path)])
    assert ended.value.code == 0
    with (tmp_path / "table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["policy"], row["seed"]) for row in rows] == [("soft-optimal at 0.1", "0"), ("sac", "0"), ("sac", "1")]
    assert (tmp_path / "table.md").read_text().count("\n") == 4
    assert (tmp_path / "trajectories.png").read_bytes().startswith(b"\x89PNG")


def test_table_has_means_and_ranges_over_seeds():
    assert multigoal.markdown_table({"known": [{"a": 0.5}], "A": [{"a": 0.25}, {"a": 0.75}]}).splitlines() == [
        *("| policy | a |", "|---|---|", "| known | 0.50 |", "| A | 0.50 (0.25 to 0.75) |"),
    ]


@pytest.mark.parametrize(("flag", "value"), [("--frames", "99"), ("--seeds", "0")])
def test_numbers_too_small_are_named(tmp_path, capsys, flag, value):
    with pytest.raises(SystemExit) as ended:
        multigoal.main([flag, value, "--output", str(tmp_path / "out")])
    assert ended.value.code == 2 and f"{flag} must be at least" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
