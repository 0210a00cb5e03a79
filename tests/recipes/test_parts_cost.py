from __future__ import annotations

import csv
from pathlib import Path

import pytest

from qsm_rl import training as rl
from recipes import parts_cost

GRIDS = Path(__file__).parents[2] / "recipes" / "grids"
SMALL = """
recipe: mujoco_qsm
seeds: [0, 1]
settings: {num_steps: 2, actor_hidden_dims: [8], critic_hidden_dims: [8], total_frames: 100}
tasks: {InvertedPendulum-v5: {}}
variants:
  centre: {}
  twice as often: {updates_per_frame: 2.0}
  crossq: {critic: crossq, critic_bins: 11, policy_delay: 3}
"""


def test_every_variant_is_measured(tmp_path, capsys):
    (tmp_path / "grid.yaml").write_text(SMALL)
    with pytest.raises(SystemExit) as ended:
        parts_cost.main([str(tmp_path / "grid.yaml"), "--turns", "1", "--output", str(tmp_path)])
    assert ended.value.code == 0
    with (tmp_path / "cost.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["variant"] for row in rows] == ["centre", "twice as often", "crossq"]
    assert rows[0]["relative"] == "1.00" and all(float(row["milliseconds"]) > 0 for row in rows)


def test_the_grid_of_parts_fits_the_recipe(tmp_path):
    cells = {cell.variant: cell for cell in rl.read_grid(GRIDS / "parts.yaml", tmp_path)}
    for cell in cells.values():
        rl.parse_configuration(rl.QSMConfiguration, cell.flags)
    assert len(cells) > 15
