from __future__ import annotations

import math

import pytest
from matplotlib import image

from qsm_rl.training import plot_learning_curve, read_metrics
from qsm_rl.training.loggers import MetricsTable
from qsm_rl.training.metrics import MetricWindow


def test_table_grows_by_rows_and_columns(tmp_path):
    path = tmp_path / "metrics.csv"
    table = MetricsTable(path)
    table.log_metrics({"a": 1.0}, step=100)
    table.log_metrics({"a": 1 / 3, "eval/b": -2.5}, step=200)
    table.log_metrics({"eval/b": 4.0}, step=300)
    assert path.read_text().splitlines() == ["frames,a,eval/b", "100,1.0,", "200,0.3333333333333333,-2.5", "300,,4.0"]
    columns = read_metrics(path)
    assert columns["frames"] == [100, 200, 300]
    assert columns["a"][:2] == [1.0, 1 / 3]  # to the bit
    assert math.isnan(columns["a"][2])


def test_continued_table_drops_what_lies_beyond_and_what_was_torn(tmp_path):
    path = tmp_path / "metrics.csv"
    table = MetricsTable(path)
    for step in (100, 200, 300):
        table.log_metrics({"a": step / 10, "b": 1.0}, step=step)
    with path.open("a") as file:
        file.write("40")  # the process was killed while appending
    table = MetricsTable(path, last_frame=200)
    table.log_metrics({"a": 7.0}, step=300)
    assert read_metrics(path)["frames"] == [100, 200, 300]
    assert read_metrics(path)["a"] == [10, 20, 7]


def test_window_averages_each_metric_over_its_own_count():
    window = MetricWindow()
    window.add({"a": 1.0, "b": 10.0})
    window.add({"a": 4.0})
    assert window.pop() == {"a": 2.5, "b": 10.0}
    assert window.pop() == {}


@pytest.mark.parametrize("rows", [[], [(100, {"x": 1.0})], [(100, {"train/return_mean": 3.0})], "full"])
def test_learning_curve_is_drawn_from_what_there_is(tmp_path, rows):
    table = MetricsTable(tmp_path / "metrics.csv")
    if rows == "full":
        rows = [
            (f, {"eval/return_mean": f / 10, "eval/return_std": 2.0, "train/return_mean": 1.0}) for f in (10, 20, 30)
        ]
    table.log_metrics({"time/x": 0.0}, step=1)
    for step, row in rows:
        table.log_metrics(row, step=step)
    plot_learning_curve(table.path, tmp_path / "curve.png", title="QSM on Hopper-v5")
    pixels = image.imread(tmp_path / "curve.png")
    assert pixels.shape[0] > 400 and pixels.shape[1] > 700
    drawn_blue = ((pixels[..., 2] - pixels[..., 0]) > 0.3).sum()
    assert (drawn_blue > 100) == any("eval/return_mean" in row for _, row in rows)
