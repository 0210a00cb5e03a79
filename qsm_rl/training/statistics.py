"""Interval estimates over seeds, by rliable (Agarwal et al. 2021, arXiv 2108.13264)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import numpy as np

from qsm_rl.training.errors import UserError

__all__ = ["curve_intervals", "mean_interval"]


def mean_interval(scores: Sequence[Sequence[float]], *, repetitions: int = 2000) -> tuple[float, float, float]:
    """The mean over runs and tasks with its 95 % stratified bootstrap interval.

    Of three seeds the interval reaches about from the lowest to the highest: it says how little three seeds say.

    Args:
        scores: one row for each seed, one column for each task, ``(seeds, tasks)``.
        repetitions: bootstrap samples.

    Returns:
        Mean, lower and upper end; the same on every call.

    Raises:
        UserError: if rliable is not installed.

    Example:
        >>> mean_interval([[1.0], [2.0], [6.0]])
        (3.0, 1.0, 6.0)
    """
    means, (lows, highs) = bootstrap(scores, lambda values: np.array([np.mean(values)]), repetitions)
    return float(means[0]), float(lows[0]), float(highs[0])


def curve_intervals(
    returns: Sequence[Sequence[float]], *, repetitions: int = 2000
) -> tuple[list[float], list[float], list[float]]:
    """The mean over seeds at each point of a learning curve, with its 95 % bootstrap interval.

    Seeds are drawn as a whole, so the points of a curve stay together.

    Args:
        returns: one row for each seed, one column for each point, ``(seeds, points)``.
        repetitions: bootstrap samples.

    Returns:
        Means, lower and upper ends, one for each point; the same on every call.

    Raises:
        UserError: if rliable is not installed.

    Example:
        >>> curve_intervals([[1.0, 10.0], [2.0, 20.0], [6.0, 60.0]])
        ([3.0, 30.0], [1.0, 10.0], [6.0, 60.0])
    """
    one_task = np.asarray(returns, dtype=float)[:, None, :]
    means, (lows, highs) = bootstrap(one_task, lambda values: np.mean(values, axis=(0, 1)), repetitions)
    return means.tolist(), lows.tolist(), highs.tolist()


def bootstrap(
    scores: Sequence[Sequence[float]] | np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], repetitions: int
) -> tuple[np.ndarray, np.ndarray]:
    """A statistic of ``(seeds, tasks, ...)`` and its 95 % interval ``(2, ...)``, by rliable."""
    try:
        from rliable.library import get_interval_estimates
    except ImportError as error:
        raise UserError('intervals over seeds need rliable: pip install "qsm_rl[results]".') from error
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="random_state is deprecated", category=FutureWarning
        )  # rliable's call
        estimates, intervals = get_interval_estimates(
            {"": np.asarray(scores, dtype=float)},
            statistic,
            reps=repetitions,
            random_state=np.random.RandomState(0),
        )
    return np.asarray(estimates[""]), np.asarray(intervals[""])
