from __future__ import annotations

import csv

import pytest
import torch

from qsm_rl import BoltzmannQScore, NoiseSchedule, PosteriorQScore
from recipes import bandit_boltzmann as bandit
from recipes import bandit_grid as grid


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        grid.main(list(arguments))
    return ended.value.code


def test_cells_are_kept_and_the_tables_hold_them(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(grid, "UPDATES", 2)
    monkeypatch.setattr(bandit, "SAMPLES", 50)
    assert run("--most", "1", "--output", str(tmp_path)) == 0
    first = (tmp_path / "cells.csv").read_text()
    assert run("--most", "1", "--output", str(tmp_path)) == 0
    second = (tmp_path / "cells.csv").read_text()
    assert second.startswith(first) and len(second.splitlines()) == 1 + 2 * 3  # a row for each clip
    with (tmp_path / "cells.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["clip"] for row in rows[:3]] == ["clean", "sample", "none"]
    assert {row["action_dim"] for row in rows} == {"2", "4"} and all(float(row["ess_least"]) >= 1 for row in rows)
    two, dimensions = (tmp_path / "table.md").read_text().split("The posterior target")
    assert two.count("| posterior | cosine | 20 |") == 3  # the cell of two dimensions
    assert [line[:11] for line in dimensions.splitlines()[4:]] == ["| 2 | 128 |", "| 4 | 128 |"]
    assert run("--seeds", "0", "--output", str(tmp_path)) == 2


def test_effective_sample_size_falls_with_the_dimensions():
    torch.manual_seed(0)
    schedule = NoiseSchedule.cosine(5)
    sizes = [
        grid.effective_sample_sizes(bandit.MixtureCritic(dim), PosteriorQScore(1.0, 64), schedule) for dim in (2, 8)
    ]
    assert sizes[0].shape == (5,) and (sizes[1] < 0.5 * sizes[0]).all() and (sizes[1] >= 1).all()
    assert grid.effective_sample_sizes(bandit.MixtureCritic(2), BoltzmannQScore(1.0), schedule) is None


def test_the_score_field_is_drawn(tmp_path):
    actor = bandit.make_actor(3, NoiseSchedule.cosine(4))
    bandit.draw_score_field(bandit.MixtureCritic(3), actor, actor, tmp_path / "field.png")
    assert (tmp_path / "field.png").read_bytes()[:4] == b"\x89PNG"
