"""Interval estimates over seeds, by rliable (Agarwal et al. 2021, arXiv 2108.13264)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np

from qsm_rl.training.errors import UserError

__all__ = ["mean_interval"]


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
    try:
        from rliable.library import get_interval_estimates
    except ImportError as error:
        raise UserError('intervals over seeds need rliable: pip install "qsm_rl[results]".') from error
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="random_state is deprecated", category=FutureWarning
        )  # rliable's call
        means, intervals = get_interval_estimates(
            {"": np.asarray(scores, dtype=float)},
            lambda values: np.array([np.mean(values)]),
            reps=repetitions,
            random_state=np.random.RandomState(0),
        )
    return float(means[""][0]), float(intervals[""][0, 0]), float(intervals[""][1, 0])
