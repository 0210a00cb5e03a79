from __future__ import annotations

import zlib

import pytest
import torch
from safetensors.torch import load_file, save_file
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs.transforms import MultiStepTransform

from qsm_rl.training import ReplayArchive, TransitionWriter, UserError


def new_replay(capacity: int) -> TensorDictReplayBuffer:
    return TensorDictReplayBuffer(storage=LazyTensorStorage(capacity), batch_size=4)


def frames(first: int, count: int, *, terminated: tuple[int, ...] = (), done: tuple[int, ...] = ()) -> TensorDict:
    """Frames t = first, ... of one environment: observation t, action t, reward 10^t, next observation t + 1."""
    t = torch.arange(first, first + count, dtype=torch.float64).float().reshape(1, count, 1)
    ends = torch.tensor([[[i in terminated] for i in range(first, first + count)]])
    stops = torch.tensor([[[i in (*terminated, *done)] for i in range(first, first + count)]])
    following = {"observation": t + 1, "reward": 10**t, "done": stops, "terminated": ends, "truncated": stops & ~ends}
    return TensorDict({"observation": t, "action": t, "done": stops & False, "next": following}, [1, count])


def column(replay: TensorDictReplayBuffer, *key: str) -> list:
    return replay[:][key if len(key) > 1 else key[0]].flatten().tolist()


def test_single_transitions_are_stored_as_collected():
    replay = new_replay(10)
    TransitionWriter(replay).write(frames(0, 3, terminated=(1,)))
    assert column(replay, "observation") == [0, 1, 2]
    assert column(replay, "next", "observation") == [1, 2, 3]
    assert column(replay, "next", "terminated") == [False, True, False]
    assert column(replay, "next", "reward") == [1, 10, 100]


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_three_steps_with_termination_and_time_limit_by_hand(batch):
    """Frames 0 to 4; the task ends at 2, a time limit cuts at 4. gamma is 0.5."""
    replay = new_replay(20)
    writer = TransitionWriter(replay, n_step=3, gamma=0.5)
    whole = frames(0, 5, terminated=(2,), done=(4,))
    for start in range(0, 5, batch):
        writer.write(whole[:, start : start + batch])
    assert column(replay, "observation") == [0, 1, 2, 3, 4]
    assert column(replay, "next", "observation") == [3, 3, 3, 5, 5]
    assert column(replay, "next", "terminated") == [True, True, True, False, False]
    assert column(replay, "steps_to_next_obs") == [3, 2, 1, 2, 1]
    rewards = [1 + 5 + 25, 10 + 50, 100, 1000 + 5000, 10000]
    assert column(replay, "next", "reward") == pytest.approx(rewards)
    writer.write(frames(5, 1, done=(5,)))  # nothing of the trajectories before is left over
    assert column(replay, "observation") == [0, 1, 2, 3, 4, 5]


def test_frames_whose_future_is_open_are_held_back():
    replay = new_replay(20)
    writer = TransitionWriter(replay, n_step=2, gamma=1.0)
    writer.write(frames(0, 4))
    assert column(replay, "next", "observation") == [2, 3, 4]
    writer.write(frames(4, 1))
    assert column(replay, "observation") == [0, 1, 2, 3]


def test_joined_steps_do_not_span_the_gap_that_a_replaced_worker_leaves():
    """Frames 0 to 2, then the environment was reset: frames 10 and 11 begin an episode. gamma is 1."""
    replay = new_replay(20)
    writer = TransitionWriter(replay, n_step=3, gamma=1.0)
    for first, count, steps in ((0, 2, 0), (2, 1, 2), (10, 2, 0), (12, 1, 2)):
        batch = frames(first, count, done=(12,))
        batch["step_count"] = torch.arange(steps, steps + count).reshape(1, count, 1)
        batch["next", "step_count"] = batch["step_count"] + 1
        writer.write(batch)
    assert column(replay, "observation") == [0, 1, 2, 10, 11, 12]
    assert column(replay, "next", "observation") == [3, 3, 3, 13, 13, 13]
    assert column(replay, "steps_to_next_obs") == [3, 2, 1, 3, 2, 1]
    assert not any(column(replay, "next", "terminated"))


def test_steps_joined_over_several_environments_equal_torchrls():
    """Episodes of random lengths in three environments, in uneven batches; the last one ends all of them."""
    torch.manual_seed(0)
    done = torch.rand(3, 40, 1) < 0.2
    done[:, -1] = True
    following = {"observation": torch.randn(3, 40, 2), "reward": torch.randn(3, 40, 1), "done": done}
    following["terminated"] = done & (torch.rand(3, 40, 1) < 0.5)
    entries = {"observation": torch.randn(3, 40, 2), "action": torch.arange(120.0).reshape(3, 40, 1)}
    whole = TensorDict({**entries, "next": following}, [3, 40])
    replay = new_replay(200)
    writer = TransitionWriter(replay, n_step=4, gamma=0.9)
    for first, last in ((0, 1), (1, 2), (2, 3), (3, 4), (4, 20), (20, 22), (22, 40)):
        writer.write(whole[:, first:last])
    ours = replay[:]
    ours = ours[ours["action"].flatten().argsort()]
    padded = torch.cat([whole, whole[:, -1:].expand(3, 4).clone()], 1)  # its transform holds the last frames back
    theirs = MultiStepTransform(4, 0.9, done_keys=[]).inv(padded)[:, :40].reshape(-1)
    assert len(ours) == 120
    for key in ("observation", "action", "steps_to_next_obs", *(("next", name) for name in following)):
        torch.testing.assert_close(ours[key], theirs[key], msg=str(key))


def test_restored_buffer_has_the_same_rows_in_the_same_places_and_goes_on_the_same(tmp_path):
    """Capacity 10, 27 rows in uneven parts: the buffer has wrapped twice, and one segment is half overwritten."""
    replay, archive = new_replay(10), ReplayArchive(tmp_path)
    writer, at = TransitionWriter(replay), 0
    for count in (4, 1, 9, 6, 7):
        writer.write(frames(at % 30, count))
        at += count
        manifest = archive.save(replay)
    restored, other = new_replay(10), ReplayArchive(tmp_path)
    other.restore(restored, manifest)
    for step in range(3):
        assert torch.equal(restored[:]["observation"], replay[:]["observation"])
        assert torch.equal(restored[:]["next", "reward"], replay[:]["next", "reward"])
        assert (len(restored), restored.write_count) == (len(replay), replay.write_count)
        for buffer in (replay, restored):
            TransitionWriter(buffer).write(frames(step, 4))
    torch.manual_seed(0)
    drawn = replay.sample()["observation"]
    torch.manual_seed(0)
    assert torch.equal(restored.sample()["observation"], drawn)
    assert other.save(restored)["segments"] == archive.save(replay)["segments"]


def test_saving_writes_new_rows_only_and_drops_overwritten_segments(tmp_path):
    replay, archive = new_replay(10), ReplayArchive(tmp_path)
    writer = TransitionWriter(replay)
    manifests = []
    for _ in range(5):
        writer.write(frames(0, 4))
        manifests.append(archive.save(replay))
    assert [segment[:2] for segment in manifests[-1]["segments"]] == [(8, 12), (12, 16), (16, 20)]
    for path in tmp_path.iterdir():
        assert len(load_file(path)["observation"]) == 4
    assert archive.save(replay) == manifests[-1]  # nothing new, nothing written
    archive.prune(manifests[-2:])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"rows-{first:012d}-{first + 4:012d}.safetensors" for first in (4, 8, 12, 16)
    ]


def test_an_empty_buffer_is_saved_and_restored(tmp_path):
    manifest = ReplayArchive(tmp_path).save(new_replay(10))
    restored = new_replay(10)
    ReplayArchive(tmp_path).restore(restored, manifest)
    assert len(restored) == 0


def cut_short(path, manifest):
    path.write_bytes(path.read_bytes()[:-1])


def one_bit(path, manifest):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def remove(path, manifest):
    path.unlink()


def same_size_nonsense(path, manifest):
    path.write_bytes(b"\xff" * path.stat().st_size)


def link_elsewhere(path, manifest):
    target = path.with_name("elsewhere")
    path.rename(target)
    path.symlink_to(target)


def other_shape(path, manifest):
    tensors = load_file(path)
    tensors["observation"] = tensors["observation"].reshape(1, 4, 1)
    save_file(tensors, path)
    manifest["segments"][-1] = (*manifest["segments"][-1][:2], zlib.crc32(path.read_bytes()))


def gap(path, manifest):
    del manifest["segments"][1]


def lost_end(path, manifest):
    del manifest["segments"][-1]


def other_capacity(path, manifest):
    manifest["capacity"] = 11


@pytest.mark.parametrize(
    "spoil",
    [cut_short, one_bit, remove, same_size_nonsense, link_elsewhere, other_shape, gap, lost_end, other_capacity],
)
def test_whatever_does_not_fit_the_manifest_is_refused(tmp_path, spoil):
    replay, archive = new_replay(20), ReplayArchive(tmp_path)
    for _ in range(3):
        TransitionWriter(replay).write(frames(0, 4))
        manifest = archive.save(replay)
    ReplayArchive(tmp_path).restore(new_replay(20), manifest)
    spoil(tmp_path / "rows-000000000008-000000000012.safetensors", manifest)
    with pytest.raises(UserError):
        ReplayArchive(tmp_path).restore(new_replay(20), manifest)


def test_a_segment_of_many_rows_is_read(tmp_path):
    """4,000 rows of 4 numbers and 2 flags: 72,000 bytes, more than a header may have."""
    replay, archive = new_replay(4000), ReplayArchive(tmp_path)
    batch = frames(0, 4000)
    batch["next", "reward"] = batch["observation"]
    TransitionWriter(replay).write(batch)
    restored = new_replay(4000)
    ReplayArchive(tmp_path).restore(restored, archive.save(replay))
    assert column(restored, "next", "reward") == list(range(4000))


def test_rows_outside_the_manifest_are_not_read_and_other_files_are_refused(tmp_path):
    replay, archive = new_replay(20), ReplayArchive(tmp_path)
    TransitionWriter(replay).write(frames(0, 4))
    manifest = archive.save(replay)
    (tmp_path / "rows-000000000004-000000000008.safetensors").write_bytes(b"left over by a killed process")
    restored = new_replay(20)
    ReplayArchive(tmp_path).restore(restored, manifest)
    assert len(restored) == 4
    (tmp_path / "prefetch.pkl").write_bytes(b"\x80\x04.")
    with pytest.raises(UserError, match=r"prefetch\.pkl does not belong to a replay buffer"):
        ReplayArchive(tmp_path).restore(new_replay(20), manifest)
