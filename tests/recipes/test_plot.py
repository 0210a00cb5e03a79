from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

PLOT = Path(__file__).parents[2] / "recipes" / "plot.py"


def plot(*arguments, **options):
    return subprocess.run([sys.executable, PLOT, *map(str, arguments)], capture_output=True, text=True, **options)


def write_run(folder, seed, returns):
    folder.mkdir()
    (folder / "config.yaml").write_text(f"env: Hopper-v5\npreset: default\nseed: {seed}\n")
    rows = "".join(f"{frames},{value},1.0\n" for frames, value in returns.items())
    (folder / "metrics.csv").write_text(f"frames,eval/return_mean,eval/return_std\n500,,\n{rows}")
    return folder


def test_table_and_picture_over_seeds(tmp_path):
    first = write_run(tmp_path / "a", 0, {1000: 10.0, 2000: 30.0, 3000: 99.0})
    second = write_run(tmp_path / "b", 1, {1000: 20.0, 2000: 50.0})
    reference = tmp_path / "reference.csv"
    reference.write_text("env,curve,frames,return_mean\nHopper-v5,elsewhere,1000,15\nHopper-v5,elsewhere,2000,25\n")
    result = plot(first, second, "--output", tmp_path / "out" / "curves", "--reference", reference)
    assert result.returncode == 0, result.stderr
    assert "Hopper-v5, qsm default, 2,000 frames: mean 40.0, seeds [30.0, 50.0]" in result.stdout
    with (tmp_path / "out" / "curves.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["seed"], row["frames"], row["return_mean"]) for row in rows] == [
        ("0", "1000", "10.0"),
        ("0", "2000", "30.0"),
        ("0", "3000", "99.0"),
        ("1", "1000", "20.0"),
        ("1", "2000", "50.0"),
    ]
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_no_run_is_refused_in_a_line(tmp_path):
    result = plot(tmp_path / "nothing", cwd=tmp_path)
    assert result.returncode == 2
    assert "is not the folder of a run" in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())
