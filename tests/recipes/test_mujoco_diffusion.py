"""The recipes of the other diffusion losses as a user runs them; what all recipes do is tested with mujoco_qsm."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import pytest
import torch

from recipes import mujoco_diffusion_pg, mujoco_diffusion_ql
from tests.recipes.test_mujoco_qsm import unexplained

SMALL = [
    *("--env", "InvertedPendulum-v5", "--total_frames", "80", "--warmup_frames", "1000", "--checkpoint_every", "40"),
    *("--log_every", "20", "--eval_every", "40", "--eval_episodes", "1", "--batch_size", "8", "--num_steps", "2"),
    *("--actor_hidden_dims", "[8]", "--critic_hidden_dims", "[8]", "--replay_size", "100", "--device", "cpu"),
]
QL = [*("--bc_weight", "0.5", "--eta", "2", "--delay_actor", "true", "--actor_ema", "0.9", "--policy_delay", "2")]
PG = [*("--num_samples", "3", "--min_std", "0.2", "--num_critics", "3", "--sampler", "ddim")]


def run(recipe, *arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as ended:
        recipe.main([str(argument) for argument in arguments])
    return ended.value.code


def metrics(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [{name: value for name, value in row.items() if value and not name.startswith("time/")} for row in rows]


@pytest.mark.parametrize(
    ("recipe", "options", "logged"),
    [
        pytest.param(mujoco_diffusion_ql, QL, "train/bc_error", id="ql"),
        pytest.param(mujoco_diffusion_pg, PG, "train/advantage_size", id="pg"),
    ],
)
def test_a_run_and_the_rest_of_it_after_a_cut_are_the_same(recipe, options, logged, tmp_path, capsys):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run(recipe, *SMALL, *options, "--run_dir", whole) == 0
    rows = metrics(whole)
    assert [int(row["frames"]) for row in rows] == [20, 40, 60, 80]
    assert {"eval/return_mean", "loss/actor", "loss/qvalue", "train/policy_q_value", logged} <= rows[-1].keys()
    assert unexplained(whole) == set()
    shutil.copytree(whole, cut)
    (last,) = (cut / "checkpoints").glob("frames-*80.pt")
    last.unlink()
    assert run(recipe, "--resume", cut) == 0
    assert "checkpoint at frame 40" in capsys.readouterr().out
    assert metrics(cut) == rows
    model = Path("actor") / "model.safetensors"
    assert (whole / model).read_bytes() == (cut / model).read_bytes()
    saved = [torch.load(folder / "checkpoints" / last.name, weights_only=True)["training"] for folder in (whole, cut)]
    weights, again = (state["update"]["modules"] for state in saved)
    assert all(torch.equal(value, again[name]) for name, value in weights.items())


@pytest.mark.parametrize(
    ("recipe", "arguments", "words"),
    [
        (mujoco_diffusion_ql, ["--eta", "-1"], ["--eta must be 0 or more, got -1"]),
        (mujoco_diffusion_ql, ["--eta", "0"], ["--eta must be above 0 without --bc_weight"]),
        (mujoco_diffusion_pg, ["--num_samples", "1"], ["--num_samples must be at least 2, got 1"]),
        (mujoco_diffusion_pg, ["--min_std", "0"], ["--min_std must be above 0, got 0"]),
        (mujoco_diffusion_pg, ["--sampler", "ddim", "--sampler_temperature", "0.5"], ["--sampler_temperature"]),
    ],
)
def test_bad_input_is_named_and_makes_nothing(recipe, arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(recipe, *arguments) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and all(word in message for word in words)
    assert list(tmp_path.iterdir()) == []
