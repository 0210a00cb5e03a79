"""The recipe as a user runs it, through its command line in this process."""

from __future__ import annotations

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
    environment = make_environment("InvertedPendulum-v5")
    actor = DiffusionActor(
        ScoreMLP(4, 1, (8,)), action_spec=environment.action_spec_unbatched, noise_schedule=NoiseSchedule.vp(3)
    )
    publish_actor(tmp_path / "actor", actor, environment=environment, env="InvertedPendulum-v5")
    return tmp_path


def test_every_actor_that_comes_with_the_recipes_is_small_and_keeps_what_its_readme_says(capsys):
    folders = [path for path in PRETRAINED.iterdir() if path.is_dir()]
    assert folders
    for folder in folders:
        files = [path for path in folder.rglob("*") if path.is_file() and path.parent.name != "videos"]
        assert sum(path.stat().st_size for path in files) < 200_000
        text = (folder / "README.md").read_text(encoding="utf-8")
        measured = float(re.search(r"return: mean ([\d.]+), standard deviation", text).group(1))
        assert run(folder, "--episodes", "1", "--no_video") == 0
        (played,) = re.findall(r"episode 1: return ([\d.]+)", capsys.readouterr().out)
        assert float(played) >= 0.9 * measured


def test_returns_and_a_film_of_the_first_episode(run_dir, capsys, monkeypatch):
    assert run(run_dir, "--episodes", "3", "--no_video") == 0
    printed = capsys.readouterr().out
    lengths = [int(length) for length in re.findall(r"(\d+) frames", printed)]
    assert len(lengths) == 3 and "sampling" in printed and not (run_dir / "videos").exists()
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


def test_what_stands_in_the_way_is_said(run_dir, tmp_path_factory, capsys, monkeypatch):
    def no_video(*arguments):
        raise UserError("no video can be made")

    monkeypatch.setattr(enjoy.rl, "check_filming", no_video)
    assert run(run_dir, "--episodes", "1") == 0  # the returns come without a video
    assert capsys.readouterr().out.startswith("no video can be made\n")
    for arguments, words in (
        ([tmp_path_factory.mktemp("empty")], "holds no actor"),
        ([run_dir, "--episodes", "0"], "--episodes must be at least 1, got 0"),
        ([run_dir, "--video", "film"], "--video must end in .mp4, got film"),
        ([run_dir, "--seed", str(2**32)], "--seed must be from 0 to 4294967295, got 4294967296"),
    ):
        assert run(*arguments) == 2
        assert words in capsys.readouterr().err
    (run_dir / "actor" / "config.json").write_text("{")
    assert run(run_dir) == 2
    assert "config.json" in capsys.readouterr().err
