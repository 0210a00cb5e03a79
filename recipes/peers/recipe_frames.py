"""Prints as JSON the frames per second of recipes/mujoco_qsm.py and of its update alone; run by recipes/benchmark.py.

The recipe runs as users run it, except that its update interrupts it from time to time and runs alone for a while. The
two take turns in one process, on the same compiled functions.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import runpy
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import ClassVar

import torch
from tensordict import TensorDictBase
from torch import Tensor

from qsm_rl import training as rl

FIRST = 60  # updates before the clock starts: the first two compile
TURN = 100  # updates of a turn, a multiple of frames_per_batch


class InterleavedUpdate(rl.QSMUpdate):
    """The recipe's update; after every ``TURN`` updates of the recipe it runs as many alone.

    Attributes:
        seconds: wall-clock and processor time of every turn, with the recipe and alone.
    """

    seconds: ClassVar[dict[str, list[tuple[float, float]]]] = {"recipe": [], "alone": []}
    calls = 0

    def forward(self, batch: TensorDictBase) -> dict[str, Tensor]:
        kind = type(self)
        since = kind.calls - FIRST
        kind.calls += 1
        if since >= 0 and since % TURN == 0:
            if since > 0:
                kind.seconds["recipe"].append(self._since_begin())
            self._begin()
            for _ in range(TURN):
                super().forward(batch.copy())
            kind.seconds["alone"].append(self._since_begin())
            self._begin()
        return super().forward(batch)

    def _begin(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._clocks = time.perf_counter(), time.process_time()

    def _since_begin(self) -> tuple[float, float]:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        wall, processor = self._clocks
        return time.perf_counter() - wall, time.process_time() - processor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--frames_per_batch", type=int, default=1)
    parser.add_argument(
        "--turns", type=int, default=5, help=f"number of turns, each of {TURN} frames and as many updates alone"
    )
    parser.add_argument("--env", default="dm_control/walker-walk" if importlib.util.find_spec("dm_control") else None)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    best = rl.choose_arithmetic(rl.QSMConfiguration(), rl.choose_device(options.device))
    updates = FIRST + options.turns * TURN + 1
    warmup = 300
    total_frames = max(warmup + updates, 5 * warmup)  # the warm-up is at most a fifth
    flags = {
        "env": options.env or "HalfCheetah-v5",
        "total_frames": total_frames,
        "warmup_frames": warmup,
        "actor_hidden_dims": [options.hidden] * 2,
        "critic_hidden_dims": [options.hidden] * 2,
        "num_steps": options.steps,
        "frames_per_batch": options.frames_per_batch,
        "device": options.device,
        "compile": best.compile,
        "precision": best.precision,
        **dict.fromkeys(("eval_every", "checkpoint_every"), total_frames),
        "eval_episodes": 1,
    }
    arguments = [
        part
        for name, value in flags.items()
        for part in (f"--{name}", value if isinstance(value, str) else json.dumps(value))
    ]
    rl.QSMUpdate = InterleavedUpdate  # type: ignore[misc]  # the class that the recipe builds
    recipe = runpy.run_path(str(Path(__file__).parents[1] / "mujoco_qsm.py"))["main"]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        try:
            recipe([*arguments, "--run_dir", f"{folder}/run"])
        except SystemExit as ended:
            if ended.code:
                raise
    wall, processor = (
        {name: statistics.median(turn[clock] for turn in turns) for name, turns in InterleavedUpdate.seconds.items()}
        for clock in (0, 1)
    )
    size = f"{options.hidden} x {options.hidden}, T = {options.steps}, {options.frames_per_batch} frames a batch"
    rows = [
        {
            "part": "frames",
            "what": f"{what}, {size}, {best.precision}{', compiled' if best.compile else ''}",
            "per_second": TURN / wall[name],
            "ratio": wall["alone"] / wall[name],
            "processor_ms": 1000 * processor[name] / TURN,
            "processor_ratio": processor["alone"] / processor[name],
        }
        for name, what in (("alone", "update alone"), ("recipe", f"recipe on {flags['env']}"))
    ]
    print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
