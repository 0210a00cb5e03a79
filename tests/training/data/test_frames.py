from __future__ import annotations

import numpy as np
import torch

from qsm_rl.training.data.frames import period_ended
from tests.training.small_trainer import build


def test_periods_end_at_their_multiples_also_when_stepped_over():
    ended = [
        after for before, after in zip(range(0, 40, 4), range(4, 44, 4), strict=True) if period_ended(before, after, 10)
    ]
    assert ended == [12, 20, 32, 40]


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
