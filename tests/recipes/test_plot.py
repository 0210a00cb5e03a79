from __future__ import annotations

import csv

import pytest
from matplotlib import image

from recipes.plot import main


def plot(*arguments) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return ended.value.code


def write_run(folder, seed, returns, recipe="mujoco_qsm"):
    """A run's files; the best of two samples has twice the return."""
    folder.mkdir()
    head = f"# python recipes/{recipe}.py\n" if recipe else ""
    (folder / "config.yaml").write_text(f"{head}env: Hopper-v5\npreset: default\nseed: {seed}\n")
    rows = "".join(f"{frames},{value},1.0,{2 * value},2.0\n" for frames, value in returns.items())
    names = [f"eval/{way}return_{name}" for way in ("", "best_of_2/") for name in ("mean", "std")]
    (folder / "metrics.csv").write_text(f"frames,{','.join(names)}\n500,,,,\n{rows}")
    return folder


def test_table_and_picture_over_seeds(tmp_path, capsys):
    first = write_run(tmp_path / "a", 0, {1000: 10.0, 2000: 30.0, 3000: 99.0})
    second = write_run(tmp_path / "b", 1, {1000: 20.0, 2000: 50.0})
    reference = tmp_path / "reference.csv"
    reference.write_text("env,curve,frames,return_mean\nHopper-v5,elsewhere,1000,15\nHopper-v5,elsewhere,2000,25\n")
    assert plot(first, second, "--output", tmp_path / "out" / "v1.0", "--reference", reference) == 0
    printed = capsys.readouterr().out
    assert "| Hopper-v5 | qsm default | 2,000 | 2 | 40.0 | 30.0 to 50.0 | 30.0, 50.0 |" in printed
    with (tmp_path / "out" / "v1.0.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["seed"], row["frames"], row["return_mean"]) for row in rows] == [
        ("0", "1000", "10.0"),
        ("0", "2000", "30.0"),
        ("0", "3000", "99.0"),
        ("1", "1000", "20.0"),
        ("1", "2000", "50.0"),
    ]
    pixels = image.imread(tmp_path / "out" / "v1.0.png")
    assert ((pixels[..., 2] - pixels[..., 0]) > 0.3).sum() > 300  # the blue curve in its band


def test_references_may_be_written_as_people_do_and_must_be_numbers(tmp_path, capsys):
    run, reference = write_run(tmp_path / "a", 0, {1000: 10.0}), tmp_path / "reference.csv"
    reference.write_text("env,curve,frames,return_mean\nHopper-v5,elsewhere,1e3,15\n")
    assert plot(run, "--output", tmp_path / "curves", "--reference", reference) == 0
    reference.write_text("env,curve,frames,return_mean\nHopper-v5,elsewhere,many,15\n")
    assert plot(run, "--output", tmp_path / "curves", "--reference", reference) == 2
    assert "must contain numbers in the columns frames and return_mean" in capsys.readouterr().err


def test_runs_of_other_settings_are_named(tmp_path, capsys):
    runs = [write_run(tmp_path / "a", 0, {1000: 10.0}), write_run(tmp_path / "b", 1, {1000: 20.0})]
    for run, line in zip(runs, ("eval_every: 5\n", "eval_every: 7\ntau: 0.1\n"), strict=True):
        with (run / "config.yaml").open("a") as file:
            file.write(line)
    assert plot(*runs, "--output", tmp_path / "curves.png") == 0
    said = capsys.readouterr()
    assert f"{runs[1]} is plotted as a seed of the curve 'Hopper-v5, qsm default', but differs from another" in said.err
    assert "of its runs in tau; plot" in said.err
    assert (tmp_path / "curves.png").exists() and (tmp_path / "curves.csv").exists()


def test_recipes_and_ways_of_acting_are_curves_of_their_own(tmp_path, capsys):
    runs = [write_run(tmp_path / "a", 0, {1000: 10.0}), write_run(tmp_path / "b", 0, {1000: 7.0}, "mujoco_sac")]
    assert plot(*runs, "--output", tmp_path / "c", "--ways", "sampling", "best_of_2") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[1:5] for line in lines if line.startswith("| Hopper")] == [
        ["qsm default", "1,000", "1", "10.0"],
        ["qsm default, best_of_2", "1,000", "1", "20.0"],
        ["sac default", "1,000", "1", "7.0"],
        ["sac default, best_of_2", "1,000", "1", "14.0"],
    ]


def test_a_seed_out_of_a_stacked_run_is_drawn_beside_one_with_a_process_of_its_own(tmp_path, capsys):
    """What such a run splits into has settings without the recipe's name."""
    runs = [write_run(tmp_path / "a", 0, {1000: 10.0}), write_run(tmp_path / "seed_1", 1, {1000: 20.0}, recipe=None)]
    assert plot(*runs, "--output", tmp_path / "curves") == 0
    assert "| qsm default | 1,000 | 2 | 15.0 |" in capsys.readouterr().out


def test_what_cannot_be_drawn_is_refused_in_a_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    first, again = (write_run(tmp_path / name, 0, {1000: 10.0}) for name in ("a", "b"))
    other, begun = write_run(tmp_path / "c", 1, {1500: 10.0}), write_run(tmp_path / "e", 1, {})
    (begun / "metrics.csv").unlink()
    for arguments, words in (
        ([tmp_path / "nothing"], "is not the folder of a run"),
        ([begun], "is not the folder of a run: it lacks config.yaml or metrics.csv"),
        ([first, again], "two runs of Hopper-v5, qsm default have seed 0"),
        ([first, other], "were never evaluated at the same frame"),
        ([first, "--ways", "deterministic"], "choose --ways from sampling, best_of_2"),
        ([first, "--last_frame", "600"], "no evaluation up to frame 600"),
        ([write_run(tmp_path / "d", 2, {}), "--last_frame", "600"], "it has no evaluation yet; wait for one"),
    ):
        assert plot(*arguments) == 2
        assert words in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", "c", "d", "e"}
