from __future__ import annotations

import csv

import pytest

from recipes import gradient_cost


@pytest.mark.parametrize("algorithm", gradient_cost.LOSSES)
def test_the_update_trains_actor_and_critics(algorithm):
    update = gradient_cost.make_update(algorithm, 2, 16)
    before = [parameter.detach().clone() for parameter in update.actor_parameters + update.critic_parameters]
    update(gradient_cost.make_batch(8))
    after = update.actor_parameters + update.critic_parameters
    assert sum(not old.equal(new) for old, new in zip(before, after, strict=True)) > 0.8 * len(before)


def test_a_point_is_measured():
    row = gradient_cost.measure("qsm", 2, 8, 8, 1)
    assert row["updates_per_second"] > 0 and row["added_mib"] >= 0


@pytest.mark.slow
def test_a_short_run_leaves_table_and_figure(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        gradient_cost.main(
            [
                *("--algorithms", "qsm", "--steps", "2", "--batch", "8", "--hidden", "8", "--updates", "1"),
                *("--output", str(tmp_path / "deep" / "cost")),
            ]
        )
    assert ended.value.code == 0
    with (tmp_path / "deep" / "cost.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["algorithm"], row["steps"]) == ("qsm", "2")
    assert float(row["updates_per_second"]) > 0 and float(row["added_mib"]) >= 0
    assert (tmp_path / "deep" / "cost.png").read_bytes().startswith(b"\x89PNG")


def test_sizes_below_one_are_named(capsys):
    with pytest.raises(SystemExit) as ended:
        gradient_cost.main(["--steps", "0"])
    assert ended.value.code == 2
    assert "--steps" in capsys.readouterr().err
