from __future__ import annotations

import csv
from dataclasses import replace

import pytest
import torch
import yaml
from tensordict import TensorDict
from tensordict.nn import TensorDictSequential

from qsm_rl import GaussianExploration
from qsm_rl.training import (
    QSMConfiguration,
    UserError,
    evaluate_agents,
    load_actor,
    make_environment,
    stack_seeds,
    stacks_seeds,
)
from qsm_rl.training.runs import stacked_run
from recipes import mujoco_qsm
from tests.training.small_trainer import build, env_id

FLAGS = {
    "env": "InvertedPendulum-v5",
    "seed": 5,
    "seeds": 3,
    "total_frames": 200,
    "warmup_frames": 40,
    "updates_per_frame": 0.1,
    "eval_every": 100,
    "eval_episodes": 2,
    "checkpoint_every": 100,
    "device": "cpu",
    "compile": "false",
    "actor_hidden_dims": [8],
    "critic_hidden_dims": [8],
    "replay_size": 1000,
}


@pytest.fixture
def on_a_gpu(monkeypatch):
    """The seeds are stacked as on a GPU, and trained where the test runs."""
    monkeypatch.setattr(mujoco_qsm.rl, "stacks_seeds", lambda config: config.seeds > 1)


def train(folder, **flags):
    given = [part for name, value in {**FLAGS, **flags}.items() for part in (f"--{name}", str(value))]
    with pytest.raises(SystemExit) as ended:
        mujoco_qsm.main([*given, "--run_dir", str(folder)])
    assert not ended.value.code


def table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_seed_gets_a_folder_as_a_run_of_its_own(on_a_gpu, tmp_path, capsys):
    train(tmp_path / "run")
    told = capsys.readouterr().out
    evaluations = [row for row in table(tmp_path / "run" / "metrics.csv") if row["eval/return_mean"]]
    assert [row["frames"] for row in evaluations] == ["100", "200"], "the frames of one agent are counted"
    returns = []
    for seed in (5, 6, 7):
        folder = tmp_path / "run" / f"seed_{seed}"
        rows = table(folder / "metrics.csv")
        assert [row["frames"] for row in rows] == ["100", "200"]
        returns.append([float(row["eval/return_mean"]) for row in rows])
        settings = yaml.safe_load((folder / "config.yaml").read_text())
        assert (settings["seed"], settings["seeds"], settings["env"]) == (seed, 1, "InvertedPendulum-v5")
        assert load_actor(folder / "actor")(observation=torch.zeros(4)).abs().max() <= 3
        assert f"seed_{seed}: return {returns[-1][-1]:.1f}" in told
    assert f"actor: {tmp_path / 'run' / 'seed_N' / 'actor'}" in told
    with pytest.raises(SystemExit):
        mujoco_qsm.main(["--resume", str(tmp_path / "run")])
    assert "the run finished at frame 200" in capsys.readouterr().err
    for row, values in zip(evaluations, zip(*returns, strict=True), strict=True):
        assert float(row["eval/return_mean"]) == pytest.approx(sum(values) / 3)
    weights = [load_actor(tmp_path / "run" / f"seed_{seed}" / "actor").state_dict() for seed in (5, 6)]
    name = "module.score_network.network.mlp.0.weight"
    assert not torch.equal(weights[0][name], weights[1][name])


def test_a_stopped_run_goes_on_to_the_bit(on_a_gpu, tmp_path):
    train(tmp_path / "whole")
    train(tmp_path / "parts", total_frames=100, warmup_frames=20, eval_every=100)
    with pytest.raises(SystemExit):
        mujoco_qsm.main(["--resume", str(tmp_path / "parts"), "--total_frames", "200"])
    train(tmp_path / "again", warmup_frames=20)
    for name in ("seed_5", "seed_7"):
        files = [tmp_path / run / name / "actor" / "model.safetensors" for run in ("parts", "again", "whole")]
        assert files[0].read_bytes() == files[1].read_bytes() != files[2].read_bytes()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_envs": 2}, ["num_envs 2", "--device cpu"]),
        ({"devices": 2}, ["devices 2"]),
        ({"best_of": 4}, ["--best_of 4"]),
        ({"eval_deterministic": True}, ["eval_deterministic True"]),
        ({"eval_video": True}, ["eval_video True"]),
        ({"num_workers": 1}, ["num_workers 1"]),
        ({"normalize_observation": True}, ["normalize_observation True"]),
        ({"actor_ema": 0.99}, ["actor_ema 0.99"]),
        ({"score_spread": 0.1}, ["score_spread 0.1"]),
        ({"eval_best_of": 4}, ["eval_best_of 4"]),
        ({"replay_storage": "disk"}, ["replay_storage disk"]),
        ({"compile": True}, ["not compiled", "--compile false"]),
        ({"precision": "bfloat16"}, ["--precision auto"]),
        ({"critic": "simba", "critic_bins": 51}, ['--critic_support "[LOW, HIGH]"']),
    ],
)
def test_settings_that_do_not_go_with_stacking_are_refused(monkeypatch, changes, named):
    monkeypatch.setattr(stacked_run, "choose_device", lambda name: torch.device("cuda:0"))
    config = QSMConfiguration(seeds=4)
    assert stacks_seeds(config)
    assert not stacks_seeds(replace(config, seeds=1))
    with pytest.raises(UserError) as refused:
        stacks_seeds(replace(config, **changes))
    assert all(part in str(refused.value) for part in named), refused.value


def test_stacked_agents_explore():
    spec = make_environment(env_id("Slide")).action_spec_unbatched

    def make():  # with such a noise every action lies at a bound
        update = build("Slide")[1].update
        return update, TensorDictSequential(update.actor, GaussianExploration(spec, std=1e6))

    update, acting = stack_seeds(QSMConfiguration(seed=5, seeds=3), make)
    observation = TensorDict({"observation": torch.zeros(3, 2)}, [3])
    assert (acting(observation.copy())["action"].abs() == 1).all()
    assert (update.actor(observation)["action"].abs() < 1).any()


def test_on_a_cpu_the_seeds_are_processes(tmp_path):
    assert not stacks_seeds(QSMConfiguration(seeds=4, device="cpu"))
    assert stacks_seeds(QSMConfiguration(seeds=4, device="cpu", resume=tmp_path)), "such a run goes on anywhere"


def test_each_environment_gives_its_first_episode_to_its_agent():
    """Episodes as long as their environment's seed says, with a reward of 1 for each frame."""
    environment = make_environment(env_id("Countdown"), num_envs=6)
    environment.set_seed(3)
    environment.reset()
    lengths = [env.unwrapped.left for env in environment.vector_env.envs]
    assert len(set(lengths)) > 3

    def policy(tensordict):
        assert tensordict["observation"].shape == (2, 3, 1)
        return tensordict.set("action", torch.zeros(2, 3, 1))

    results = evaluate_agents(
        make_environment(env_id("Countdown"), num_envs=6), policy, agents=2, seed=3, device=torch.device("cpu")
    )
    assert [result.lengths for result in results] == [tuple(lengths[:3]), tuple(lengths[3:])]
    assert [result.returns for result in results] == [tuple(map(float, lengths[:3])), tuple(map(float, lengths[3:]))]
