"""SAC and TD3 as a user runs them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict

from qsm_rl.training import load_actor
from recipes import mujoco_sac, mujoco_td3
from tests.recipes.test_mujoco_qsm import checkpoint, differences, metrics, unexplained

SMALL = [
    *("--env", "InvertedPendulum-v5", "--total_frames", "120", "--warmup_frames", "1000", "--checkpoint_every", "60"),
    *("--log_every", "30", "--eval_every", "60", "--eval_episodes", "2", "--batch_size", "8", "--device", "cpu"),
    *("--actor_hidden_dims", "[8]", "--critic_hidden_dims", "[8]", "--replay_size", "100", "--n_step", "2"),
    *("--num_envs", "2", "--frames_per_batch", "4", "--normalize_observation", "true"),
]


def run(recipe, *arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as ended:
        recipe.main([str(argument) for argument in arguments])
    return ended.value.code


@pytest.mark.parametrize(("recipe", "kind"), [(mujoco_sac, "TanhGaussianActor"), (mujoco_td3, "TanhActor")])
def test_a_run_leaves_an_actor_and_goes_on_to_the_bit(tmp_path, capsys, recipe, kind):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run(recipe, *SMALL, "--run_dir", whole) == 0
    rows = metrics(whole)
    assert [int(row["frames"]) for row in rows if "eval/return_mean" in row] == [60, 120]
    assert {"loss/qvalue", "loss/actor", "train/td_error"} <= rows[-1].keys()
    assert unexplained(whole) == set()

    shutil.copytree(whole, cut)
    (cut / "checkpoints" / "frames-000000000120.pt").unlink()
    assert run(recipe, "--resume", cut) == 0
    assert "checkpoint at frame 60" in capsys.readouterr().out
    assert differences(checkpoint(whole, 120), checkpoint(cut, 120)) == []
    assert metrics(whole) == metrics(cut)

    assert json.loads((whole / "actor" / "config.json").read_text())["actor"] == kind
    actor = load_actor(whole / "actor")
    action = actor(TensorDict({"observation": torch.randn(64, 4)}, [64]))["action"]
    assert action.shape == (64, 1) and bool((action.abs() <= 3).all()) and action.std() > 0
