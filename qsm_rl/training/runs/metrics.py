"""Rows of the log: averages of the values since the previous row."""

from __future__ import annotations

from torch import Tensor

__all__ = ["MetricWindow"]


class MetricWindow:
    """Collects values between two rows of the log.

    Examples:
        >>> import torch
        >>> window = MetricWindow()
        >>> window.add({"loss/actor": torch.tensor(1.0)})
        >>> window.add({"loss/actor": torch.tensor(2.0)})
        >>> window.pop()
        {'loss/actor': 1.5}
        >>> window.pop()
        {}
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor | float] = {}
        self._counts: dict[str, int] = {}

    def add(self, values: dict[str, Tensor] | dict[str, float]) -> None:
        """Adds one scalar value of each metric; tensors stay on their device until ``pop``."""
        for name, value in values.items():
            if name in self._sums:
                self._sums[name] = self._sums[name] + value
                self._counts[name] += 1
            else:
                self._sums[name], self._counts[name] = value, 1

    def pop(self) -> dict[str, float]:
        """Returns the mean of each metric since the last call, and starts over."""
        means = {name: float(value) / self._counts[name] for name, value in self._sums.items()}
        self._sums, self._counts = {}, {}
        return means
