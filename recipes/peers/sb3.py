"""SAC and TD3 of Stable-Baselines3 under the kit's protocol, for comparison with recipes/mujoco_sac.py and
mujoco_td3.py.

Frames, warm-up, networks, updates per frame and evaluations are the same; an evaluation runs episodes of the policy
without noise in a new environment. Needs a separate Python environment (pip install stable-baselines3
"gymnasium[mujoco]").

python recipes/peers/sb3.py --algo sac --env HalfCheetah-v5 --seeds 3 --output docs/results/comparison/sb3_sac.csv

Finished seeds are recorded in the CSV, with the columns of recipes/grid.py's cells.csv, and are not run again.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import time
from importlib.metadata import version
from pathlib import Path

import gymnasium
import numpy as np
import torch
from stable_baselines3 import SAC, TD3
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.noise import NormalActionNoise

COLUMNS = ("env", "variant", "seed", "frames", "return_mean", "return_std", "updates_per_second", "settings")


class Evaluations(BaseCallback):
    """Evaluates periodically, and keeps its own time separate from that of the updates."""

    def __init__(self, env: str, seed: int, every: int, episodes: int, warmup_frames: int) -> None:
        super().__init__()
        self.env, self.seed, self.every, self.episodes, self.warmup_frames = env, seed, every, episodes, warmup_frames
        self.rows: list[tuple[int, float, float]] = []
        self.begin = 0.0
        self.spent = 0.0

    def _on_step(self) -> bool:
        if self.num_timesteps == self.warmup_frames:
            self.begin, self.spent = time.perf_counter(), 0.0
        return True

    def _on_rollout_start(self) -> None:
        """Runs after the updates of the previous frame."""
        if self.num_timesteps and self.num_timesteps % self.every == 0:
            self.evaluate()

    def evaluate(self) -> None:
        """Adds one row."""
        begin = time.perf_counter()
        environment = Monitor(gymnasium.make(self.env))
        environment.reset(seed=self.seed * 1_000_003 + self.num_timesteps)
        returns, _ = evaluate_policy(
            self.model, environment, n_eval_episodes=self.episodes, deterministic=True, return_episode_rewards=True
        )
        environment.close()
        self.rows.append((self.num_timesteps, statistics.mean(returns), statistics.pstdev(returns)))
        self.spent += time.perf_counter() - begin
        print(f"{self.num_timesteps:,} frames: return {self.rows[-1][1]:.1f} ± {self.rows[-1][2]:.1f}", flush=True)


def run(options: argparse.Namespace, seed: int) -> list[dict[str, object]]:
    """Trains one seed; returns its evaluations, one row each."""
    environment = Monitor(gymnasium.make(options.env))
    settings = {"learning_starts": options.warmup_frames, "policy_kwargs": {"net_arch": [256, 256]}}
    # Other settings are the library's defaults: 3e-4 (TD3: 1e-3), batch 256, gamma .99, tau .005, entropy "auto".
    if options.algo == "td3":
        deviation = 0.1 * np.ones(environment.action_space.shape)
        noise = NormalActionNoise(np.zeros_like(deviation), deviation)
        settings |= {"learning_rate": 3e-4, "train_freq": 1, "gradient_steps": 1}
        model = TD3("MlpPolicy", environment, seed=seed, action_noise=noise, device="cpu", **settings)
    else:
        model = SAC("MlpPolicy", environment, seed=seed, device="cpu", **settings)
    evaluations = Evaluations(options.env, seed, options.eval_every, options.eval_episodes, options.warmup_frames)
    model.learn(options.total_frames, callback=evaluations)
    seconds = time.perf_counter() - evaluations.begin - evaluations.spent
    evaluations.evaluate()
    rate = (options.total_frames - options.warmup_frames) / seconds
    saved = json.dumps({"stable_baselines3": version("stable_baselines3"), "torch": torch.__version__, **settings})
    return [
        dict(
            zip(
                COLUMNS,
                (options.env, f"sb3-{options.algo}", seed, frames, f"{mean:.2f}", f"{std:.2f}", f"{rate:.1f}", saved),
                strict=True,
            )
        )
        for frames, mean, std in evaluations.rows
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algo", choices=["sac", "td3"], required=True)
    parser.add_argument("--env", default="HalfCheetah-v5")
    parser.add_argument("--total_frames", type=int, default=30_000)
    parser.add_argument("--warmup_frames", type=int, default=6_000, help="default: the kit's, a fifth of 30,000")
    parser.add_argument("--eval_every", type=int, default=5_000)
    parser.add_argument("--eval_episodes", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (0, 1, ...)")
    parser.add_argument("--output", type=Path, required=True, help="CSV for this algorithm")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    if options.output.exists():
        with options.output.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    others = {json.loads(row["settings"])["learning_starts"] for row in rows} - {options.warmup_frames}
    if others:
        parser.error(
            f"{options.output} contains runs with a warm-up of {others}, not {options.warmup_frames}; choose another "
            "--output."
        )
    for seed in range(options.seeds):
        if any((row["env"], row["seed"]) == (options.env, str(seed)) for row in rows):
            continue
        print(f"{options.algo} on {options.env}, seed {seed}", flush=True)
        rows += run(options, seed)
        options.output.parent.mkdir(parents=True, exist_ok=True)
        whole = options.output.with_suffix(".incomplete")
        with whole.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        whole.replace(options.output)


if __name__ == "__main__":
    main()
