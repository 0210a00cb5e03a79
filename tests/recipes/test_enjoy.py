"""The recipe as a user runs it, through its command line in this process."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from qsm_rl import DiffusionActor, NoiseSchedule, ScoreMLP
from qsm_rl.training import UserError, make_environment, publish_actor
from qsm_rl.training.evaluation import videos
from recipes import enjoy

PRETRAINED = Path(__file__).parents[2] / "recipes" / "pretrained"


def run(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as ended:
        enjoy.main([str(argument) for argument in arguments])
    return ended.value.code


@pytest.fixture
def run_dir(tmp_path):
    """The folder of a run whose actor has learned nothing, so its episodes are short."""
    return publish(tmp_path, "InvertedPendulum-v5")


def test_help_shows_commands_that_can_be_copied(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    assert run("--help") == 0
    printed = capsys.readouterr().out.splitlines()
    assert {"python recipes/enjoy.py RUN_DIR", "python recipes/enjoy.py recipes/pretrained/inverted_pendulum"} <= {
        *printed
    }


def publish(folder: Path, env: str, **about: int) -> Path:
    environment = make_environment(env)
    actor = DiffusionActor(
        ScoreMLP(environment.observation_spec["observation"].shape[-1], environment.action_spec.shape[-1], (8,)),
        action_spec=environment.action_spec_unbatched,
        noise_schedule=NoiseSchedule.vp(3),
    )
    publish_actor(folder / "actor", actor, environment=environment, env=env, **about)
    return folder


def test_actions_are_held_as_in_training_and_the_mean_is_of_the_returns_told(tmp_path, capsys):
    """An episode of HalfCheetah is 1,000 steps; the folder is the actor's own."""
    assert run(publish(tmp_path, "HalfCheetah-v5", action_repeat=250) / "actor", "--episodes", "2", "--no_video") == 0
    printed = capsys.readouterr().out
    returns = [float(value) for value in re.findall(r"episode \d: return (-?[\d.]+), 4 frames", printed)]
    mean, spread = map(float, re.search(r"mean (-?[\d.]+), standard deviation ([\d.]+) over 2 ep", printed).groups())
    assert mean == pytest.approx(sum(returns) / 2, abs=0.2) and spread == pytest.approx(
        abs(returns[0] - returns[1]) / 2, abs=0.2
    )


def test_every_actor_that_comes_with_the_recipes_is_small_and_keeps_what_its_readme_says(capsys):
    folders = [path for path in PRETRAINED.iterdir() if path.is_dir()]
    assert folders
    for folder in folders:
        files = [path for path in folder.rglob("*") if path.is_file() and path.parent.name != "videos"]
        assert sum(path.stat().st_size for path in files) < 200_000
        text = (folder / "README.md").read_text(encoding="utf-8")
        measured = float(re.search(r"return: mean ([\d.]+), standard deviation", text).group(1))
        assert run(folder, "--episodes", "1", "--no_video") == 0
        told = capsys.readouterr().out
        (played,) = re.findall(r"episode 1: return ([\d.]+)", told)
        assert "over 1 episode\n" in told
        assert float(played) >= 0.9 * measured


def test_returns_and_a_film_of_the_first_episode(run_dir, capsys, monkeypatch):
    assert run(run_dir, "--episodes", "3", "--no_video") == 0
    printed = capsys.readouterr().out
    lengths = [int(length) for length in re.findall(r"(\d+) frames", printed)]
    assert len(lengths) == 3 and "sampling" in printed
    assert "video" not in printed and not (run_dir / "videos").exists()
    assert run(run_dir, "--episodes", "3", "--deterministic", "--no_video") == 0
    assert "deterministic" in capsys.readouterr().out

    pytest.importorskip("imageio_ffmpeg")
    monkeypatch.setenv("MUJOCO_GL", "")
    videos.choose_renderer()
    if not videos.os.environ["MUJOCO_GL"]:
        pytest.skip("no OpenGL here")
    assert run(run_dir, "--episodes", "3") == 0
    filmed = capsys.readouterr().out
    assert filmed.startswith(printed) and f"video of episode 1: {run_dir / 'videos' / 'enjoy.mp4'}" in filmed
    assert (run_dir / "videos" / "enjoy.mp4").stat().st_size > 1000
    assert run(run_dir, "--episodes", "1", "--video", run_dir / "mine.mp4") == 0
    assert (run_dir / "mine.mp4").stat().st_size > 1000


def test_what_stands_in_the_way_is_said(run_dir, tmp_path_factory, capsys, monkeypatch):
    def no_video(*arguments):
        raise UserError("no video can be made")

    monkeypatch.setattr(enjoy.rl, "check_filming", no_video)
    assert run(run_dir, "--episodes", "1") == 0  # the returns come without a video
    assert capsys.readouterr().out.startswith("no video can be made\n")
    for arguments, words in (
        ([tmp_path_factory.mktemp("empty")], "contains no actor"),
        ([run_dir, "--episodes", "0"], "--episodes must be at least 1, got 0"),
        ([run_dir, "--video", "film"], "--video must end in .mp4, got film"),
        ([run_dir, "--seed", str(2**32)], "--seed must be from 0 to 4294967295, got 4294967296"),
    ):
        assert run(*arguments) == 2
        assert words in capsys.readouterr().err
    config = run_dir / "actor" / "config.json"
    about = json.loads(config.read_text())
    config.write_text(json.dumps({name: value for name, value in about.items() if name != "env"}))
    assert run(run_dir) == 2
    assert "config.json does not name the environment; save the actor with publish_actor" in capsys.readouterr().err
    config.write_text("{")
    assert run(run_dir) == 2
    assert "config.json" in capsys.readouterr().err
