from __future__ import annotations

import pytest
from matplotlib import image

from qsm_rl.training import plot_learning_curve
from qsm_rl.training.runs.loggers import MetricsTable


@pytest.mark.parametrize("rows", [[], [(100, {"x": 1.0})], [(100, {"train/return_mean": 3.0})], "full"])
def test_learning_curve_is_drawn_from_what_there_is(tmp_path, rows):
    table = MetricsTable(tmp_path / "metrics.csv")
    if rows == "full":
        rows = [
            (
                f,
                {
                    "eval/return_mean": f / 10,
                    "eval/return_std": 2.0,
                    "eval/best_of_4/return_mean": f / 5,
                    "train/return_mean": 1.0,
                },
            )
            for f in (10, 20, 30)
        ]
    table.log_metrics({"time/x": 0.0}, step=1)
    for step, row in rows:
        table.log_metrics(row, step=step)
    plot_learning_curve(table.path, tmp_path / "curve.png", title="QSM on Hopper-v5")
    pixels = image.imread(tmp_path / "curve.png")
    assert pixels.shape[0] > 400 and pixels.shape[1] > 700
    drawn_blue = ((pixels[..., 2] - pixels[..., 0]) > 0.3).sum()
    assert (drawn_blue > 100) == any("eval/return_mean" in row for _, row in rows)
    drawn_orange = ((pixels[..., 0] - pixels[..., 2]) > 0.3).sum()
    assert (drawn_orange > 100) == any("eval/best_of_4/return_mean" in row for _, row in rows)
