"""Measures the cost of an update as the chain grows: Q-score matching, Diffusion-QL and the chain's policy gradient.

Diffusion-QL differentiates through all T steps and keeps their activations; Q-score matching's actor never runs the
chain. Each point runs in a separate process with one thread and eager float32, and counts processor time, so that other
load on the machine matters little. Writes OUTPUT.csv and OUTPUT.png.

python recipes/gradient_cost.py --steps 2 10 50 --updates 10
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torchrl.data import Bounded

from qsm_rl import (
    DDPMSampler,
    DiffusionActor,
    DiffusionPolicyGradientLoss,
    DiffusionQLLoss,
    NoiseSchedule,
    QScoreMatchingLoss,
    QValueMLP,
    ScoreMLP,
)
from qsm_rl import training as rl
from qsm_rl.atomic_files import write_csv_atomically

OBSERVATION, ACTION = 24, 6
LOSSES = {
    "qsm": ("Q-score matching", QScoreMatchingLoss),
    "diffusion-ql": ("Diffusion-QL", partial(DiffusionQLLoss, bc_weight=0.0, delay_actor=False)),
    "diffusion-pg": ("policy gradient, 4 chains", DiffusionPolicyGradientLoss),
}


def make_update(algorithm: str, steps: int, hidden: int) -> rl.DiffusionUpdate:
    """The update of an algorithm; the networks are the same for all algorithms."""
    actor = DiffusionActor(
        ScoreMLP(OBSERVATION, ACTION, (hidden, hidden)),
        action_spec=Bounded(-1.0, 1.0, (ACTION,)),
        noise_schedule=NoiseSchedule.cosine(steps),
        sampler=DDPMSampler(clip="clean"),
    )
    critics = [
        TensorDictModule(
            QValueMLP(OBSERVATION, ACTION, (hidden, hidden)), ["observation", "action"], ["state_action_value"]
        )
        for _ in range(2)
    ]
    loss = LOSSES[algorithm][1](actor, critics)
    loss.make_value_estimator(gamma=0.99)
    return rl.DiffusionUpdate(loss, actor_learning_rate=3e-4, critic_learning_rate=3e-4, tau=0.005)


def make_batch(size: int) -> TensorDict:
    following = {"observation": torch.randn(size, OBSERVATION), "reward": torch.randn(size, 1)}
    following |= {name: torch.zeros(size, 1, dtype=torch.bool) for name in ("done", "terminated")}
    entries = {"observation": torch.randn(size, OBSERVATION), "action": torch.rand(size, ACTION) * 2 - 1}
    return TensorDict({**entries, "next": following}, [size])


def measure(algorithm: str, steps: int, batch: int, hidden: int, updates: int) -> dict[str, float]:
    """Median updates per second of processor time, and the memory that they add at the peak.

    The baseline is the memory of the process before its first update, including libraries and networks.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    update, data = make_update(algorithm, steps, hidden), make_batch(batch)
    unit = 2**20 if sys.platform == "darwin" else 2**10  # macOS counts bytes, Linux kibibytes
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    seconds = []
    for index in range(updates + 2):
        begin = time.process_time()
        update(data.copy())
        if index >= 2:  # the first two allocate memory
            seconds.append(time.process_time() - begin)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    return {"updates_per_second": 1 / statistics.median(seconds), "added_mib": peak - before}


def draw_figure(rows: Sequence[dict[str, float | str]], picture: Path) -> None:
    figure = Figure(figsize=(8, 3.2), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    for algorithm in dict.fromkeys(row["algorithm"] for row in rows):
        own = [row for row in rows if row["algorithm"] == algorithm]
        steps = [row["steps"] for row in own]
        left.plot(steps, [1000 / row["updates_per_second"] for row in own], "o-", label=LOSSES[algorithm][0], ms=3)
        right.plot(steps, [row["added_mib"] for row in own], "o-", ms=3)
    left.set(xlabel="T", ylabel="ms of processor time for an update", ylim=(0, None))
    right.set(xlabel="T", ylabel="MiB added at the peak", ylim=(0, None))
    left.legend(frameon=False, fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture)


@rl.exit_on_error
def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--algorithms", nargs="+", choices=LOSSES, default=list(LOSSES), help="algorithms to measure; default all"
    )
    parser.add_argument(
        "--steps", nargs="+", type=int, default=[2, 5, 10, 20, 50], help="chain lengths T; default 2 5 10 20 50"
    )
    parser.add_argument("--batch", type=int, default=256, help="transitions per update; default %(default)s")
    parser.add_argument("--hidden", type=int, default=256, help="width of the two hidden layers; default %(default)s")
    parser.add_argument(
        "--updates",
        type=int,
        default=10,
        help="updates measured per point, after two unmeasured ones; default %(default)s",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("runs/gradient_cost"),
        help="files to write, without extension; default %(default)s",
    )
    parser.add_argument("--point", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.point:
        print(json.dumps(measure(*json.loads(options.point))))
        return 0
    if min(*options.steps, options.batch, options.hidden, options.updates) < 1:
        raise rl.UserError("--steps, --batch, --hidden and --updates must be at least 1.")
    rows: list[dict[str, float | str]] = []
    for algorithm in options.algorithms:
        for steps in options.steps:
            point = json.dumps([algorithm, steps, options.batch, options.hidden, options.updates])
            # One mapping per large block, so that freed memory is returned and the peak is that of one update.
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
            command = [sys.executable, __file__, "--point", point]
            done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
            rows.append({"algorithm": algorithm, "steps": steps, **json.loads(done.stdout)})
            rate, added = rows[-1]["updates_per_second"], rows[-1]["added_mib"]
            print(f"{algorithm}, T = {steps}: {rate:.1f} updates/s, {added:.0f} MiB added", flush=True)
    rl.make_folder(options.output.parent)
    write_csv_atomically(options.output.with_suffix(".csv"), list(rows[0]), rows)
    draw_figure(rows, options.output.with_suffix(".png"))
    print(f"wrote {options.output.with_suffix('.csv')} and {options.output.with_suffix('.png')}")
    return 0


if __name__ == "__main__":
    main(sys.argv[1:])
