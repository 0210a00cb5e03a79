"""Measures what each part of a grid costs: the updates of its variants, compared in one process.

    python -m recipes.parts_cost recipes/grids/parts.yaml --output docs/results/parts

Builds the update of every variant of the grid with the recipe's own code, on made-up transitions of walker-walk's size.
The variants take turns, so that other load on the machine affects all of them alike. One thread, float32. Writes
cost.csv.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from tensordict import TensorDict
from torchrl.data import Bounded

from qsm_rl import training as rl
from qsm_rl.atomic_files import write_csv_atomically
from recipes.mujoco_qsm import build

OBSERVATION, ACTION = 24, 6
COLUMNS = ("variant", "milliseconds", "updates_per_second", "relative", "compiled")


def transitions(count: int) -> TensorDict:
    """Random transitions."""
    flag = torch.zeros(count, 1, dtype=torch.bool)
    following = {"observation": torch.randn(count, OBSERVATION), "reward": torch.rand(count, 1)}
    return TensorDict(
        {
            "observation": torch.randn(count, OBSERVATION),
            "action": torch.rand(count, ACTION) * 2 - 1,
            "next": {**following, "done": flag, "terminated": flag.clone()},
        },
        [count],
    )


def make_update(flags: Sequence[str], compile: bool) -> tuple[rl.QSMUpdate, float]:
    """The update of a cell of the grid, ready to run, and the number of updates per frame."""
    config = rl.parse_configuration(rl.QSMConfiguration, list(flags))
    config = replace(config, compile=compile, precision="float32")
    torch.manual_seed(0)
    update, _ = build(config, OBSERVATION, Bounded(-1.0, 1.0, (ACTION,)), torch.device("cpu"))
    update.begin(transitions(1_000))
    return update, config.updates_per_frame


def measure(updates: dict[str, tuple[rl.QSMUpdate, float]], turns: int, compile: bool) -> list[dict[str, str]]:
    """The median time of one frame's updates for each variant; the variants take turns."""
    batch = transitions(256)
    times: dict[str, list[float]] = {name: [] for name in updates}
    for turn in range(turns + 1):
        for name, (update, per_frame) in updates.items():
            started = time.perf_counter()
            for _ in range(6):  # a whole number of policy delays
                update(batch.clone())
            if turn > 0:  # the first one warms up
                times[name].append((time.perf_counter() - started) / 6 * per_frame)
        print(f"turn {turn + 1} of {turns + 1}", file=sys.stderr, flush=True)
    medians = {name: statistics.median(values) for name, values in times.items()}
    first = next(iter(medians.values()))
    return [
        {
            "variant": name,
            "milliseconds": f"{1_000 * seconds:.1f}",
            "updates_per_second": f"{updates[name][1] / seconds:.0f}",
            "relative": f"{seconds / first:.2f}",
            "compiled": str(compile).lower(),
        }
        for name, seconds in medians.items()
    ]


@rl.exit_on_error
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", type=Path, help="YAML file of the grid")
    parser.add_argument(
        "--turns", type=int, default=10, help="turns per variant, of six updates each; default %(default)s"
    )
    parser.add_argument("--compile", action="store_true", help="compile every update, which takes a minute or two each")
    parser.add_argument(
        "--output", type=Path, default=Path("parts_cost"), help="folder for the table; default %(default)s"
    )
    options = parser.parse_args(arguments)
    if options.turns < 1:
        raise rl.UserError(f"--turns must be at least 1, got {options.turns}.")
    torch.set_num_threads(1)
    cells = {cell.variant: cell for cell in rl.read_grid(options.grid, Path("runs"))}
    rows = measure(
        {name: make_update(cell.flags, options.compile) for name, cell in cells.items()}, options.turns, options.compile
    )
    rl.make_folder(options.output)
    write_csv_atomically(options.output / "cost.csv", COLUMNS, rows)
    for row in rows:
        print(f"{row['variant']:40} {row['milliseconds']:>8} ms a frame, {row['relative']} times the first")
    print(f"wrote {options.output / 'cost.csv'}")
    return 0


if __name__ == "__main__":
    main(sys.argv[1:])
