"""What a checkpoint costs beside a full replay buffer: `python tests/benchmarks/checkpoint_cost.py`.

Fills a replay buffer with rows of HalfCheetah-v5's sizes, and writes checkpoints of networks of the default sizes, each
behind 5,000 new rows, by the code that training writes them with.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torchrl.data import Bounded, LazyTensorStorage, TensorDictReplayBuffer

from qsm_rl import DiffusionActor, NoiseSchedule, QScoreMatchingLoss, QValueMLP, ScoreMLP
from qsm_rl import training as rl

OBSERVATION, ACTION = 17, 6


def rows(count: int) -> TensorDict:
    flag = torch.zeros(1, count, 1, dtype=torch.bool)
    following = {"observation": torch.randn(1, count, OBSERVATION), "reward": torch.randn(1, count, 1)}
    following |= {"done": flag, "terminated": flag.clone()}
    entries = {"observation": torch.randn(1, count, OBSERVATION), "action": torch.rand(1, count, ACTION)}
    return TensorDict({**entries, "next": following}, [1, count])


def make_update() -> rl.QSMUpdate:
    spec = Bounded(-1.0, 1.0, (ACTION,))
    actor = DiffusionActor(
        ScoreMLP(OBSERVATION, ACTION, (256, 256)), action_spec=spec, noise_schedule=NoiseSchedule.cosine(10)
    )
    critics = [
        TensorDictModule(QValueMLP(OBSERVATION, ACTION, (256, 256)), ["observation", "action"], ["state_action_value"])
        for _ in range(2)
    ]
    loss = QScoreMatchingLoss(actor, critics)
    loss.make_value_estimator(gamma=0.99)
    return rl.QSMUpdate(loss, actor_learning_rate=3e-4, critic_learning_rate=3e-4, tau=0.005)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replay_size", type=int, default=1_000_000, help="rows of the full buffer")
    parser.add_argument("--checkpoint_every", type=int, default=5_000, help="new rows before each checkpoint")
    parser.add_argument("--checkpoints", type=int, default=10, help="checkpoints to time")
    parser.add_argument("--output", type=Path, default=None, help="folder to write in; a temporary one if not given")
    options = parser.parse_args()
    torch.set_num_threads(1)
    replay = TensorDictReplayBuffer(storage=LazyTensorStorage(options.replay_size), batch_size=256)
    writer, update = rl.TransitionWriter(replay), make_update()
    for _ in range(20):
        writer.write(rows(options.replay_size // 20))
    batch = replay.sample()
    update(batch)
    begin = time.perf_counter()
    for _ in range(20):
        update(batch)
    of_update = (time.perf_counter() - begin) / 20
    with tempfile.TemporaryDirectory(dir=options.output) as folder:
        archive, checkpoints = rl.ReplayArchive(Path(folder) / "replay"), rl.CheckpointFolder(Path(folder))
        archive.save(replay)  # all rows at once, which no run does
        seconds, manifests, frames = [], [], options.replay_size
        for _ in range(options.checkpoints):
            writer.write(rows(options.checkpoint_every))
            frames += options.checkpoint_every
            before, begin = time.process_time(), time.perf_counter()
            manifests = [*manifests[-1:], archive.save(replay)]
            checkpoints.save(frames, {"training": update.checkpoint_state(), "replay": manifests[-1]})
            archive.prune(manifests)
            seconds.append((time.perf_counter() - begin, time.process_time() - before))
        newest = max((Path(folder) / "replay").iterdir()).stat().st_size
        checkpoint = max(Path(folder).glob("frames-*.pt")).stat().st_size
    taken, of_process = (statistics.median(column) for column in zip(*seconds, strict=True))
    period = options.checkpoint_every * of_update
    print(f"new rows {newest / 1e6:.2f} MB, networks and optimisers {checkpoint / 1e6:.2f} MB")
    print(f"a checkpoint: median {1e3 * taken:.0f} ms, of which this process works {1e3 * of_process:.0f} ms")
    print(f"updates between two: {options.checkpoint_every:,} of {1e3 * of_update:.1f} ms, {period:.0f} s in all")
    print(f"share of the run: {taken / (taken + period):.2%} with one update a frame and nothing else")


if __name__ == "__main__":
    main()
