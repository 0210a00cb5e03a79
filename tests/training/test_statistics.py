from __future__ import annotations

import numpy as np
import pytest

from qsm_rl.training import curve_intervals, mean_interval


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
