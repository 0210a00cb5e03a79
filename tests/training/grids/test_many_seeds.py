from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from qsm_rl.training import QSMConfiguration, UserError, run_seeds
from qsm_rl.training.grids import grid, many_seeds
from tests.training.grids.test_grid import FAKE, calls, rows


@pytest.fixture
def script(tmp_path, monkeypatch):
    monkeypatch.setattr(grid, "POLL_SECONDS", 0.1)
    path = tmp_path / "fake.py"
    path.write_text(FAKE)
    return path


def configuration(folder, **values):
    return QSMConfiguration(env="Pendulum-v1", seed=3, seeds=3, total_frames=20, run_dir=folder, **values)


def test_every_seed_runs_with_the_given_settings_and_the_interval_is_told(tmp_path, script, capsys):
    folder = tmp_path / "runs"
    config = configuration(folder, tau=0.25, actor_hidden_dims=(8, 8), gradient_clipping=None)
    assert run_seeds(config, script) == 0
    told = capsys.readouterr().out
    assert "last evaluation of 3 seeds: mean 25.0, 95 % interval 25.0 to 25.0 (25.0, 25.0, 25.0)" in told
    flags = sorted(calls(tmp_path), key=lambda call: call["--seed"])
    assert [call["--seed"] for call in flags] == ["3", "4", "5"]
    assert [call["--run_dir"] for call in flags] == [str(folder / f"seed_{seed}") for seed in (3, 4, 5)]
    assert flags[0]["--tau"] == "0.25"
    assert json.loads(flags[0]["--actor_hidden_dims"]) == [8, 8]
    assert flags[0]["--gradient_clipping"] == "null"
    assert not {"--seeds", "--resume"} & flags[0].keys()

    run_seeds(config, script)
    assert len(calls(tmp_path)) == 3, "finished seeds ran again"


def test_returns_are_told_without_rliable(tmp_path, script, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "rliable", None)
    assert run_seeds(configuration(tmp_path / "runs", tau=0.25), script) == 0
    told = capsys.readouterr().out
    assert "mean 25.0, no interval: " in told and "(25.0, 25.0, 25.0)" in told


def test_a_failed_seed_is_told_and_the_same_command_goes_on(tmp_path, script, capsys):
    folder = tmp_path / "runs"
    (tmp_path / "fail").write_text("4")
    assert run_seeds(configuration(folder), script) == 1
    said = capsys.readouterr()
    assert "seed 4: it broke" in said.err and re.search("of 2 seeds: mean .*, 95 % interval", said.out)
    (tmp_path / "fail").unlink()
    assert run_seeds(configuration(folder), script) == 0
    assert calls(tmp_path)[-1] == {"--resume": str(folder / "seed_4")}
    assert {row["seed"] for row in rows(folder)} == {"3", "4", "5"}


def test_one_seed_alone_has_no_interval(tmp_path, script, capsys):
    (tmp_path / "fail").write_text("4")
    script.write_text(FAKE.replace("5,,,0,7", "5,3,1,0,7"))  # three evaluations
    assert run_seeds(replace(configuration(tmp_path / "runs", tau=0.25), seeds=2), script) == 1
    assert "last evaluation of 1 seeds: mean 25.0, one seed (25.0)" in capsys.readouterr().out


def test_without_a_finished_seed_there_is_no_mean(tmp_path, script, capsys):
    (tmp_path / "fail").write_text("3")
    assert run_seeds(replace(configuration(tmp_path / "runs"), seeds=1), script) == 1
    said = capsys.readouterr()
    assert "last evaluation" not in said.out and "seed 3: it broke" in said.err


@pytest.mark.parametrize(("cores", "workers"), [(2, 2), (64, 3)])
def test_a_folder_is_made_where_none_is_given_and_what_to_type_next_is_told(
    tmp_path, script, capsys, monkeypatch, cores, workers
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(many_seeds, "available_cores", lambda: cores)
    assert run_seeds(configuration(None), script) == 0
    (folder,) = Path("runs/fake/Pendulum-v1").glob("*-3-seeds")
    told = capsys.readouterr().out
    assert f"3 seeds, {workers} at a time; runs in {folder}, their output in seed_N.log" in told
    assert f"curves: python plot.py {folder}/seed_*[0-9] --output {folder}-curves" in told
    assert {path.name for path in folder.glob("seed_*[0-9]")} == {"seed_3", "seed_4", "seed_5"}


def test_a_folder_of_another_kind_is_refused(tmp_path, script):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "config.yaml").touch()
    with pytest.raises(UserError, match="something other"):
        run_seeds(configuration(tmp_path / "runs"), script)


def test_a_folder_named_like_a_run_is_left_alone(tmp_path, script):
    precious = tmp_path / "runs" / "seed_3" / "precious.txt"
    precious.parent.mkdir(parents=True)
    precious.write_text("mine")
    with pytest.raises(UserError, match="something other"):
        run_seeds(configuration(tmp_path / "runs"), script)
    assert precious.read_text() == "mine"


def test_finished_runs_are_not_reported_as_those_of_other_settings(tmp_path, script):
    folder = tmp_path / "runs"
    assert run_seeds(configuration(folder, actor_learning_rate=1e-3), script) == 0
    before = rows(folder)
    with pytest.raises(UserError, match=r"other settings \(actor_learning_rate 0.001, now 0.005\)"):
        run_seeds(configuration(folder, actor_learning_rate=5e-3), script)
    assert rows(folder) == before
    assert len(calls(tmp_path)) == 3


@pytest.mark.parametrize("below", [False, True])
def test_a_file_in_the_folder_s_place_is_named(tmp_path, script, below):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be created"):
        run_seeds(configuration(tmp_path / "file" / "runs" if below else tmp_path / "file"), script)


def test_one_run_s_settings_are_not_taken_for_many_seeds(tmp_path, script):
    with pytest.raises(UserError, match=r"is a single run, but its config.yaml has seeds: 3; set it back to 1"):
        run_seeds(configuration(None, resume=tmp_path / "run"), script)
    assert list(tmp_path.iterdir()) == [script]


def test_a_stop_says_how_the_seeds_go_on(tmp_path, script, capsys, monkeypatch):
    def stopped(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("qsm_rl.training.grids.many_seeds.run_cells", stopped)
    with pytest.raises(KeyboardInterrupt):
        run_seeds(configuration(tmp_path / "my runs"), script)
    assert f"to continue: the same command with --run_dir '{tmp_path / 'my runs'}'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"env": "Pendulun-v1"}, "Pendulun"),
        ({"device": "cuda:9"}, "cuda:9"),
        ({"eval_video": True}, "no video can be made"),
    ],
)
def test_what_every_seed_would_refuse_is_refused_before_there_is_a_folder(
    tmp_path, script, values, message, monkeypatch
):
    def no_video(*arguments):
        raise UserError("no video can be made")

    monkeypatch.setattr("qsm_rl.training.runs.training_run.check_filming", no_video)
    folder = tmp_path / "runs"
    with pytest.raises(UserError, match=message):
        run_seeds(replace(configuration(folder), **values), script)
    assert not folder.exists()
