from __future__ import annotations

from qsm_rl.training.runs.metrics import MetricWindow


def test_window_averages_each_metric_over_its_own_count():
    window = MetricWindow()
    window.add({"a": 1.0, "b": 10.0})
    window.add({"a": 4.0})
    assert window.pop() == {"a": 2.5, "b": 10.0}
    assert window.pop() == {}
