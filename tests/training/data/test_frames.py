from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch

from qsm_rl.training.data.frames import FramesDataset, period_ended
from tests.training.small_trainer import build


def test_periods_end_at_their_multiples_also_when_stepped_over():
    ended = [
        after for before, after in zip(range(0, 40, 4), range(4, 44, 4), strict=True) if period_ended(before, after, 10)
    ]
    assert ended == [12, 20, 32, 40]


def test_frames_of_all_processes_and_of_one_agent_are_counted():
    collector = SimpleNamespace(requested_frames_per_batch=6)
    options = {"seed": 0, "total_frames": 100, "checkpoint_every": 50, "first_frame": 40}
    for ranks, agents, counted, batches in ((1, 1, 6, 10), (2, 1, 12, 5), (1, 3, 2, 30)):
        frames = FramesDataset(collector, num_ranks=ranks, num_agents=agents, **options)
        assert (frames.count(6), len(frames)) == (counted, batches)


def test_trajectories_are_cut_at_checkpoints_and_the_end_and_begin_anew_there():
    frames, _ = build("Slide", total=60)
    batches = list(frames)
    assert len(batches) == len(frames) == 60
    real_ends = [i for i, batch in enumerate(batches) if batch["next", "episode_end"].any()]
    marked = [i for i, batch in enumerate(batches) if batch["next", "done"].any()]
    assert sorted({*real_ends, 24, 49, 59}) == marked
    assert not any(batch["next", "terminated"][0, 0] for i, batch in enumerate(batches) if i not in real_ends)
    assert [i for i, batch in enumerate(batches) if batch["step_count"].item() == 0] == [
        0,
        *[i + 1 for i in marked[:-1]],
    ]


def test_what_follows_a_cut_depends_on_seed_and_frame_count_only():
    whole = list(build("Slide", total=60)[0])
    torch.manual_seed(123)
    np.random.seed(5)
    frames, _ = build("Slide", total=60, warmup=0)
    frames.first_frame = 25
    rest = list(frames)
    assert len(rest) == len(frames) == 35
    # random actions and networks differ by construction: compare the first state behind each cut
    assert torch.equal(rest[0]["observation"], whole[25]["observation"])
    assert torch.equal(rest[25]["observation"], whole[50]["observation"])
    assert not torch.equal(whole[25]["observation"], whole[0]["observation"])
