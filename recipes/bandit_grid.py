"""Finds which diffusion suits which score target, and how many action dimensions the exact target can handle.

    python -m recipes.bandit_grid --output docs/results/bandit_grid

Runs many small bandits. Each cell trains one actor as bandit_boltzmann.py does, in a minute or two on one core, and
adds its rows to cells.csv in the output folder. Cells in that file are not run again, so the command can be stopped at
any time and continues where it was. It writes both tables into table.md.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from qsm_rl import DDPMSampler, DiffusionActor, NoiseSchedule, ScoreTarget
from qsm_rl import training as rl
from qsm_rl.atomic_files import write_csv_atomically
from recipes import bandit_boltzmann as bandit

SCHEDULES = (("vp", 5), ("cosine", 20), ("cosine", 5), ("vp", 20))
DIMENSIONS = (2, 4, 8, 17)
PARTICLES = (bandit.PARTICLES, 512)
UPDATES = 3_000
KEY = ("target", "schedule", "num_steps", "action_dim", "particles", "updates", "seed")
COLUMNS = (*KEY, "clip", "energy_distance", "mode_weights", "mean_q", "ess_least", "ess_most", "seconds")
CLIPS = ("clean", "sample", None)


def cells(seeds: int) -> Iterator[dict[str, str]]:
    """Settings of all cells as text, the cheapest and most informative ones first."""
    for seed in range(seeds):
        for action_dim in DIMENSIONS:
            yield cell("posterior", "cosine", 20, action_dim, PARTICLES[0], seed)
        for schedule, num_steps in SCHEDULES:
            for target in ("posterior", "boltzmann", "normalized, 0.1", "scaled, 1", "scaled, 0.04"):
                yield cell(target, schedule, num_steps, 2, PARTICLES[0], seed)
        for action_dim in DIMENSIONS:
            yield cell("posterior", "cosine", 20, action_dim, PARTICLES[1], seed)


def cell(target: str, schedule: str, num_steps: int, action_dim: int, particles: int, seed: int) -> dict[str, str]:
    values = (target, schedule, num_steps, action_dim, particles, UPDATES, seed)
    return dict(zip(KEY, map(str, values), strict=True))


def run_cell(settings: dict[str, str]) -> list[dict[str, str]]:
    """Trains one actor; returns one row per clip setting, since only sampling depends on it."""
    started = time.monotonic()
    action_dim, seed = int(settings["action_dim"]), int(settings["seed"])
    critic = bandit.MixtureCritic(action_dim)
    schedule = getattr(NoiseSchedule, settings["schedule"])(int(settings["num_steps"]))
    target = bandit.TARGETS[settings["target"]](int(settings["particles"]))
    torch.manual_seed(seed)
    truth = critic.draw(bandit.SAMPLES)
    actor = bandit.make_actor(action_dim, schedule)
    bandit.train(critic, target, actor, int(settings["updates"]))
    sizes = effective_sample_sizes(critic, target, schedule)
    rows = []
    for clip in CLIPS:
        sampler = DDPMSampler(clip=clip)
        sampled = DiffusionActor(
            actor.score_network, action_spec=actor.spec["action"], noise_schedule=schedule, sampler=sampler
        )
        with torch.no_grad():
            action = sampled.sample(torch.zeros(bandit.SAMPLES, 1))
        row = {**settings, "clip": clip or "none", **bandit.measure(critic, action.clamp(-1, 1), truth)}
        if sizes is not None:
            row |= {"ess_least": f"{sizes.min():.1f}", "ess_most": f"{sizes.max():.1f}"}
        rows.append({**row, "seconds": f"{time.monotonic() - started:.0f}"})
    return rows


@torch.no_grad()
def effective_sample_sizes(critic: bandit.MixtureCritic, target: ScoreTarget, schedule: NoiseSchedule) -> Tensor | None:
    """Mean effective sample size at each timestep ``(num_steps,)``, for actions from the whole box."""
    if "effective_sample_size" not in target.info_keys:
        return None
    t = torch.arange(schedule.num_steps).repeat_interleave(256)
    noisy, _ = schedule.add_noise(torch.rand(len(t), critic.centers.shape[-1]) * 2 - 1, t)
    _, info = target(lambda a: critic(a, a).squeeze(-1), noisy, t, schedule)
    return info["effective_sample_size"].reshape(schedule.num_steps, 256).mean(1)


def table(rows: list[dict[str, str]], columns: dict[str, str]) -> str:
    """Rows as a Markdown table; ``columns`` maps headings to entries."""
    lines = [" | ".join(columns), " | ".join("---" for _ in columns)]
    lines += [" | ".join(row[entry] for entry in columns.values()) for row in rows]
    return "".join(f"| {line} |\n" for line in lines)


def tables(rows: list[dict[str, str]]) -> str:
    """Tables of the diffusions in two dimensions, and of the posterior target in more dimensions."""
    two = [row for row in rows if row["action_dim"] == "2" and row["particles"] == str(bandit.PARTICLES)]
    shared = {
        "seed": "seed",
        "energy distance": "energy_distance",
        "weights of the modes": "mode_weights",
        "mean Q": "mean_q",
    }
    columns = {"target": "target", "schedule": "schedule", "T": "num_steps", "clip": "clip", **shared}
    two.sort(key=lambda row: list(bandit.TARGETS).index(row["target"]))
    text = f"Two dimensions:\n\n{table(two, columns)}\n"
    many = [
        row
        for row in rows
        if (row["target"], row["schedule"], row["num_steps"], row["clip"]) == ("posterior", "cosine", "20", "clean")
    ]
    many.sort(key=lambda row: (int(row["action_dim"]), int(row["particles"])))
    columns = {
        "dimensions": "action_dim",
        "particles": "particles",
        **shared,
        "least effective sample size": "ess_least",
        "most": "ess_most",
    }
    return f"{text}The posterior target, cosine schedule, T = 20, clip clean:\n\n{table(many, columns)}"


def run(options: argparse.Namespace) -> None:
    """Runs the cells that are missing from the table."""
    path = options.output / "cells.csv"
    rows: list[dict[str, str]] = []
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    finished = {tuple(row[name] for name in KEY) for row in rows}
    missing = [settings for settings in cells(options.seeds) if tuple(settings.values()) not in finished]
    missing = list({tuple(settings.values()): settings for settings in missing}.values())[: options.most]
    for index, settings in enumerate(missing):
        print(f"cell {index + 1} of {len(missing)}: {', '.join(settings.values())}", flush=True)
        rows += run_cell(settings)
        write_csv_atomically(path, COLUMNS, rows)
        (options.output / "table.md").write_text(tables(rows), encoding="utf-8")
    print(f"cells.csv and table.md are in {options.output}")


@rl.exit_on_error
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds for every cell; default %(default)s")
    parser.add_argument("--most", type=int, default=None, help="maximum number of cells to run in this call")
    parser.add_argument(
        "--output", type=Path, default=Path("bandit_grid"), help="folder for the tables; default %(default)s"
    )
    options = parser.parse_args(arguments)
    if options.seeds < 1:
        raise rl.UserError(f"--seeds must be at least 1, got {options.seeds}.")
    torch.set_num_threads(1)
    with rl.exclusive(options.output):
        run(options)
    return 0


if __name__ == "__main__":
    main(sys.argv[1:])
