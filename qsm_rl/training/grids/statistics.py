"""Interval estimates over seeds, with rliable (Agarwal et al. 2021, arXiv 2108.13264)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import ModuleType

import numpy as np

from qsm_rl.training.errors import UserError

__all__ = ["curve_intervals", "interval_estimates", "mean_interval", "performance_profiles", "require_rliable"]


def mean_interval(scores: Sequence[Sequence[float]], *, repetitions: int = 2000) -> tuple[float, float, float]:
    """The mean over runs and tasks with its 95 % stratified bootstrap interval.

    With three seeds the interval spans about the lowest to the highest value, which shows how little three seeds tell.

    Args:
        scores: one row per seed, one column per task, ``(seeds, tasks)``.
        repetitions: bootstrap samples.

    Returns:
        Mean, lower and upper end; the same on every call.

    Raises:
        UserError: if rliable is not installed.

    Examples:
        >>> mean_interval([[1.0], [2.0], [6.0]])
        (3.0, 1.0, 6.0)
    """
    means, (lows, highs) = bootstrap(scores, lambda values: np.array([np.mean(values)]), repetitions)
    return float(means[0]), float(lows[0]), float(highs[0])


def curve_intervals(
    returns: Sequence[Sequence[float]], *, repetitions: int = 2000
) -> tuple[list[float], list[float], list[float]]:
    """The mean over seeds at each point of a learning curve, with its 95 % bootstrap interval.

    Whole seeds are resampled, so the points of a curve stay together.

    Args:
        returns: one row per seed, one column per point, ``(seeds, points)``.
        repetitions: bootstrap samples.

    Returns:
        Means, lower and upper ends, one per point; the same on every call.

    Raises:
        UserError: if rliable is not installed.

    Examples:
        >>> curve_intervals([[1.0, 10.0], [2.0, 20.0], [6.0, 60.0]])
        ([3.0, 30.0], [1.0, 10.0], [6.0, 60.0])
    """
    one_task = np.asarray(returns, dtype=float)[:, None, :]
    means, (lows, highs) = bootstrap(one_task, lambda values: np.mean(values, axis=(0, 1)), repetitions)
    return means.tolist(), lows.tolist(), highs.tolist()


def interval_estimates(
    scores: Mapping[str, Sequence[Sequence[float]]], *, repetitions: int = 2000
) -> dict[str, dict[str, tuple[float, float, float]]]:
    """Rliable's aggregates over runs and tasks, each with its 95 % stratified bootstrap interval.

    Args:
        scores: for each algorithm the normalised scores, one row per seed, one column per task.
        repetitions: bootstrap samples.

    Returns:
        For each algorithm the interquartile mean, the median, the mean and the optimality gap (how far scores fall
        short of 1), each as value, lower and upper end; the same on every call.

    Raises:
        UserError: if rliable is not installed.

    Examples:
        >>> interval_estimates({"sac": [[0.5], [0.5]]})["sac"]["optimality gap"]
        (0.5, 0.5, 0.5)
    """
    require_rliable()
    from rliable.metrics import aggregate_iqm, aggregate_mean, aggregate_median, aggregate_optimality_gap

    aggregates = {
        "interquartile mean": aggregate_iqm,
        "median": aggregate_median,
        "mean": aggregate_mean,
        "optimality gap": aggregate_optimality_gap,
    }
    out = {}
    for name, matrix in scores.items():
        values, (lows, highs) = bootstrap(
            matrix, lambda runs: np.array([aggregate(runs) for aggregate in aggregates.values()]), repetitions
        )
        triples = zip(values.tolist(), lows.tolist(), highs.tolist(), strict=True)
        out[name] = dict(zip(aggregates, triples, strict=True))
    return out


def performance_profiles(
    scores: Mapping[str, Sequence[Sequence[float]]], thresholds: Sequence[float], *, repetitions: int = 2000
) -> dict[str, tuple[list[float], list[float], list[float]]]:
    """For each threshold, the share of runs with a higher score, with 95 % stratified bootstrap intervals.

    Args:
        scores: for each algorithm the normalised scores, one row per seed, one column per task.
        thresholds: scores that a run has to exceed.
        repetitions: bootstrap samples.

    Returns:
        For each algorithm the shares, lower and upper ends, one per threshold; the same on every call.

    Raises:
        UserError: if rliable is not installed.

    Examples:
        >>> performance_profiles({"sac": [[0.2], [0.2]]}, [0.1, 0.3])["sac"][0]
        [1.0, 0.0]
    """
    levels = np.asarray(thresholds, dtype=float)
    out = {}
    for name, matrix in scores.items():
        shares, (lows, highs) = bootstrap(
            matrix, lambda runs: (runs[..., None] > levels).mean(axis=(0, 1)), repetitions
        )
        out[name] = shares.tolist(), lows.tolist(), highs.tolist()
    return out


def require_rliable() -> ModuleType:
    """Rliable's library; lets programs check that it is installed before hours of runs.

    Raises:
        UserError: if rliable is not installed.
    """
    try:
        from rliable import library
    except ImportError as error:
        raise UserError('intervals over seeds need rliable: pip install "qsm_rl[results]".') from error
    return library


def bootstrap(
    scores: Sequence[Sequence[float]] | np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], repetitions: int
) -> tuple[np.ndarray, np.ndarray]:
    """A statistic of ``(seeds, tasks, ...)`` and its 95 % interval ``(2, ...)``, computed by rliable."""
    library = require_rliable()
    state = np.random.get_state()
    np.random.seed(0)  # rliable always draws from numpy's global generator
    try:
        estimates, intervals = library.get_interval_estimates(
            {"": np.asarray(scores, dtype=float)}, statistic, reps=repetitions
        )
    finally:
        np.random.set_state(state)
    return np.asarray(estimates[""]), np.asarray(intervals[""])
