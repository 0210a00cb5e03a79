from __future__ import annotations

import sys

import numpy as np
import pytest

from qsm_rl.training import UserError, curve_intervals, interval_estimates, mean_interval, performance_profiles


def test_a_curve_s_intervals_are_those_of_its_points_and_of_the_width_that_the_bootstrap_has():
    returns = np.random.default_rng(0).normal(10.0, 2.0, (40, 50))
    means, lows, highs = curve_intervals(returns)
    assert means == pytest.approx(returns.mean(0))
    # 1.96 standard errors to each side for 40 seeds, averaged over points
    half = (np.array(highs) - np.array(lows)).mean() / 2
    assert half == pytest.approx(1.96 * returns.std(0).mean() / 40**0.5, rel=0.03)
    mean, low, high = mean_interval(returns[:, :1])
    assert (mean, low, high) == pytest.approx((means[0], lows[0], highs[0]), rel=0.01)


def test_one_seed_has_no_width():
    assert curve_intervals([[3.0, 4.0]]) == ([3.0, 4.0], [3.0, 4.0], [3.0, 4.0])


def test_aggregates_by_hand_leave_numpys_generator_alone():
    np.random.seed(3)
    expected = np.random.rand()
    np.random.seed(3)
    scores = {"a": [[0.0, 1.0], [0.2, 0.4], [0.4, 0.6], [2.0, 0.8]]}
    one = interval_estimates(scores)
    assert np.random.rand() == expected
    values = {name: round(value, 4) for name, (value, _, _) in one["a"].items()}
    # Middle half of 0, .2, .4, .4, .6, .8, 1, 2; median of the tasks' means .65 and .7; what is missing to 1.
    assert values == {"interquartile mean": 0.55, "median": 0.675, "mean": 0.675, "optimality gap": 0.45}
    assert all(low <= value <= high and low < high for value, low, high in one["a"].values())
    assert interval_estimates(scores) == one


def test_the_median_is_over_tasks_and_as_many_samples_are_drawn_as_asked_for():
    assert interval_estimates({"a": [[0.0, 1.0, 5.0]]}, repetitions=2)["a"]["median"] == (1.0, 1.0, 1.0)
    returns = np.random.default_rng(0).normal(size=(9, 1))
    assert mean_interval(returns, repetitions=3) != mean_interval(returns)


def test_a_missing_extra_is_named(monkeypatch):
    for name in ("rliable", "rliable.metrics"):
        monkeypatch.setitem(sys.modules, name, None)
    for estimate in (lambda: mean_interval([[1.0]]), lambda: interval_estimates({"a": [[1.0]]})):
        with pytest.raises(UserError, match=r'intervals over seeds need rliable: pip install "qsm_rl\[results\]"'):
            estimate()


def test_performance_profile_by_hand():
    shares, lows, highs = performance_profiles({"a": [[0.1, 0.9], [0.5, 0.9]]}, [0.0, 0.1, 0.6, 0.9])["a"]
    assert shares == [1.0, 0.75, 0.5, 0.0]
    assert lows == [1.0, 0.5, 0.5, 0.0] and highs == [1.0, 1.0, 0.5, 0.0]
