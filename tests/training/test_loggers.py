from __future__ import annotations

import math

from qsm_rl.training import read_metrics
from qsm_rl.training.loggers import MetricsTable


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
