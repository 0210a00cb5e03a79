"""Writes collected batches to the replay buffer, and saves and restores the replay buffer on disk."""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import ReplayBuffer

from qsm_rl.atomic_files import read_bounded, write_atomically
from qsm_rl.comparison import first_difference, first_non_finite
from qsm_rl.training.errors import UserError

__all__ = ["ReplayArchive", "TransitionWriter", "manifests_of_ranks", "row_bytes"]

LARGEST_HEADER = 1 << 16  # bytes of a segment besides its rows
NEXT = ("observation", "reward", "done", "terminated")
ENTRIES: tuple[str | tuple[str, str], ...] = ("observation", "action", *(("next", key) for key in NEXT))

Frames = dict[str | tuple[str, str], Tensor]  # the entries of frames in order of time, (num_envs, T, size) each


class TransitionWriter:
    """Turns collected batches into the transitions of a replay buffer, joining ``n_step`` frames if requested.

    With ``n_step > 1`` a transition leads from its observation to the one ``n_step`` frames later, or to the end of the
    episode; its reward is the discounted sum of the rewards in between. ``steps_to_next_obs`` is its length, which
    TorchRL's value estimators use for the discount. If every trajectory of a batch ends with the batch, no frames are
    held back.

    Args:
        replay: replay buffer of single transitions.
        n_step: number of frames joined, at least 1.
        gamma: discount factor per frame.
        agents: whether the environments belong to independent agents: a row then holds one transition of each agent,
            ``(num_envs, size)``, instead of a single transition.
    """

    def __init__(self, replay: ReplayBuffer, *, n_step: int = 1, gamma: float = 0.99, agents: bool = False) -> None:
        self.replay = replay
        self.agents = agents
        self.n_step = n_step
        self.gamma = gamma
        self._held: Frames | None = None  # frames whose next n_step - 1 are still to come
        self._next_count: Tensor | None = None  # step_count of the frames that would continue them

    def write(self, batch: TensorDictBase) -> None:
        """Adds a batch ``(num_envs, T)`` in order of time.

        Args:
            batch: what the collector returned; its last step may be marked as truncated. If it does not continue the
                previous batch, because a worker was replaced, the end of that batch counts as truncated.
        """
        # Frames are written between any two updates, so plain tensors are used here: tensordicts would be slower.
        frames: Frames = {key: batch.get(key) for key in ENTRIES}
        if self.n_step > 1 and (count := batch.get("step_count", None)) is not None:
            if self._held is not None and self._next_count is not None and not count[:, 0].equal(self._next_count):
                held, self._held = self._held, None
                held["next", "done"][:, -1] = True
                self._write(held)
            done = frames["next", "done"][:, -1]
            self._next_count = torch.where(done, 0, batch["next", "step_count"][:, -1])
        self._write(frames)

    def entries(self, batch: TensorDictBase) -> dict[str, Any]:
        """Dtype and shape of each entry of a transition, in the form of ``ReplayArchive.save``.

        Args:
            batch: a batch like those passed to [`write`][qsm_rl.training.TransitionWriter.write], with any values.
        """
        found, agents = {}, list(batch.shape[:1]) if self.agents else []
        for key in ENTRIES:
            name = key if isinstance(key, str) else ".".join(key)
            found[name] = [str(batch[key].dtype), [*agents, *batch[key].shape[batch.ndim :]]]
        return {**found, "steps_to_next_obs": ["torch.int64", agents]} if self.n_step > 1 else found

    def _write(self, frames: Frames) -> None:
        steps = {}
        if self.n_step > 1:
            if self._held is not None:
                frames = {key: torch.cat([self._held[key], value], 1) for key, value in frames.items()}
            all_end = bool(frames["next", "done"][:, -1].all())
            count = frames["action"].shape[1] - (0 if all_end else self.n_step - 1)
            self._held = None if all_end else {key: value[:, max(count, 0) :] for key, value in frames.items()}
            if count < 1:
                return
            frames, joined = _join_steps(frames, count, self.n_step, self.gamma)
            steps["steps_to_next_obs"] = joined.transpose(0, 1) if self.agents else joined.flatten()
        flat = {key: value.transpose(0, 1) if self.agents else value.flatten(0, 1) for key, value in frames.items()}
        following = {key[1]: value for key, value in flat.items() if isinstance(key, tuple)}
        entries = {key: value for key, value in flat.items() if isinstance(key, str)}
        self.replay.extend(TensorDict({**entries, "next": following, **steps}, flat["action"].shape[:1]))


def _join_steps(frames: Frames, count: int, n_step: int, gamma: float) -> tuple[Frames, Tensor]:
    """The first ``count`` of L frames, each with ``n_step`` rewards, or fewer if the episode ends earlier.

    TorchRL's MultiStepTransform gives the same result at four times the cost for a single frame.

    Returns:
        The joined frames, and how many of them each one joins, ``(num_envs, count)``.
    """
    reward, done = frames["next", "reward"], frames["next", "done"]
    missing = count + n_step - 1 - reward.shape[1]  # above 0 only past the end of all episodes: never summed
    if missing > 0:
        reward, done = (torch.cat([x, x[:, -1:].expand(-1, missing, -1)], 1) for x in (reward, done))
    total, goes_on = reward[:, :count], ~done[:, :count]
    steps = torch.ones_like(goes_on, dtype=torch.long)
    for k in range(1, n_step):
        total = torch.addcmul(total, goes_on, reward[:, k : k + count], value=gamma**k)
        steps = steps + goes_on
        goes_on = goes_on & ~done[:, k : k + count]
    end = steps + torch.arange(-1, count - 1, device=steps.device).unsqueeze(-1)
    joined: Frames = {key: frames[key][:, :count] for key in ("observation", "action")}
    for key in (("next", "observation"), ("next", "done"), ("next", "terminated")):
        joined[key] = frames[key].gather(1, end.expand(-1, -1, frames[key].shape[-1]))
    return {**joined, ("next", "reward"): total}, steps.squeeze(-1)


def row_bytes(entries: dict[str, Any]) -> int:
    """Bytes of one transition.

    Args:
        entries: dtype and shape of each entry, see ``TransitionWriter.entries``.

    Examples:
        >>> row_bytes({"observation": ["torch.float32", [17]], "done": ["torch.bool", [1]]})
        69
    """
    sizes = ((getattr(torch, dtype.removeprefix("torch.")).itemsize, shape) for dtype, shape in entries.values())
    return sum(size * math.prod(shape) for size, shape in sizes)


def manifests_of_ranks(state: dict[str, Any]) -> list[dict[str, Any]]:
    """The replay buffer manifests of all processes that trained together, in rank order."""
    return [state["replay"], *state.get("replay_of_other_ranks", [])]


class Segment(NamedTuple):
    """A file of consecutive rows: rows ``first`` to ``last - 1``, counted since the run began."""

    first: int
    last: int
    checksum: int = 0

    @property
    def name(self) -> str:
        return f"rows-{self.first:012d}-{self.last:012d}.safetensors"


class ReplayArchive:
    """A replay buffer on disk, in files that are written once: each holds the rows added since the previous one.

    The cost of saving depends only on the new rows, however large the buffer is. Restoring reads only the files that a
    manifest names, checks them against it, and never unpickles. It restores both the rows and the write position.

    Args:
        folder: folder of the files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._segments: list[Segment] = []

    @classmethod
    def of_rank(cls, checkpoints: Path, rank: int) -> ReplayArchive:
        """The archive of one of the processes that train together, in a run's folder of checkpoints."""
        return cls(checkpoints / ("replay" if rank == 0 else f"replay-rank-{rank}"))

    def save(self, replay: ReplayBuffer) -> dict[str, Any]:
        """Writes the rows that are not on disk yet.

        Args:
            replay: a buffer of flat transitions with a tensor storage and a round-robin writer.

        Returns:
            The manifest, in plain numbers and strings: capacity, rows written since the run began, entries with dtype
            and shape, and the segments that hold the buffer.

        Raises:
            OSError: if the disk is full or not writable; earlier segments are untouched.
        """
        capacity, written = replay.storage.max_size, replay.write_count
        saved = self._segments[-1].last if self._segments else 0
        first = max(saved, written - capacity)
        if first < written:
            rows = replay.storage.get(torch.arange(first, written) % capacity)
            tensors = {key: value.cpu().contiguous() for key, value in rows.flatten_keys(".").items() if key != "index"}
            self.folder.mkdir(parents=True, exist_ok=True)
            content = save(tensors)
            segment = Segment(first, written, zlib.crc32(content))
            write_atomically(self.folder / segment.name, lambda temporary: temporary.write_bytes(content))
            self._segments.append(segment)
        self._segments = [segment for segment in self._segments if segment.last > written - capacity]
        entries = {}
        if written:
            row = replay.storage.get(torch.zeros(1, dtype=torch.long))[0].flatten_keys(".")
            entries = {key: [str(value.dtype), list(value.shape)] for key, value in row.items() if key != "index"}
        return {
            "capacity": capacity,
            "written": written,
            "entries": entries,
            "segments": [tuple(segment) for segment in self._segments],
        }

    def restore(self, replay: ReplayBuffer, manifest: dict[str, Any], entries: dict[str, Any] | None = None) -> None:
        """Fills an empty replay buffer from the files that a manifest names.

        Args:
            replay: an empty buffer with the same capacity as the saved one.
            manifest: what [`save`][qsm_rl.training.ReplayArchive.save] returned.
            entries: dtype and shape of each entry that the run writes, see
                [`TransitionWriter.entries`][qsm_rl.training.TransitionWriter.entries]; taken from the manifest if not
                given.

        Raises:
            UserError: if a file is missing, changed, malformed or foreign, or the manifest does not fit the buffer or
                the run.
        """
        saved = manifest["entries"] or entries  # an empty buffer has no entries
        if entries is not None and (difference := first_difference(saved, entries, "replay")):
            raise UserError(
                f"the replay buffer in {self.folder} comes from another environment or n_step: {difference}."
            )
        capacity, written = manifest["capacity"], manifest["written"]
        if capacity != replay.storage.max_size:
            raise UserError(
                f"the replay buffer in {self.folder} has a capacity of {capacity} rows, expected "
                f"{replay.storage.max_size}."
            )
        start = max(0, written - capacity)
        replay.writer.load_state_dict({"_cursor": start % capacity, "_write_count": start})
        for rows in self.rows(manifest):
            replay.extend(rows)
        self._segments = [Segment(*map(int, segment)) for segment in manifest["segments"]]

    def rows(self, manifest: dict[str, Any]) -> Iterator[TensorDict]:
        """The transitions of the saved buffer, the oldest first, one file at a time.

        Args:
            manifest: what [`save`][qsm_rl.training.ReplayArchive.save] returned.

        Raises:
            UserError: if a file is missing, changed, malformed or foreign.
        """
        for found in sorted(self.folder.iterdir()) if self.folder.exists() else ():
            if not re.fullmatch(r"rows-\d{12}-\d{12}\.safetensors", found.name):
                raise UserError(f"{found} does not belong to a replay buffer and is not read; move it elsewhere.")
        segments = [Segment(*map(int, segment)) for segment in manifest["segments"]]
        written = manifest["written"]
        start = max(0, written - manifest["capacity"])
        expected = segments[0].first if segments else written
        if expected > start or any(segment.first >= segment.last for segment in segments):
            raise UserError(
                f"the replay segments in {self.folder} begin at row {expected}, expected {start} or earlier."
            )
        for segment in segments:
            if segment.first != expected:
                raise UserError(f"the replay segments in {self.folder} lack rows {expected} to {segment.first}.")
            yield self._read(segment, manifest["entries"])[max(0, start - segment.first) :]
            expected = segment.last
        if expected != written:
            raise UserError(f"the replay segments in {self.folder} end at row {expected}, expected {written}.")

    def prune(self, manifests: list[dict[str, Any]]) -> None:
        """Removes the segments that none of the given manifests name."""
        kept = {Segment(*segment).name for manifest in manifests for segment in manifest["segments"]}
        for path in self.folder.glob("rows-*-*.safetensors"):
            if path.name not in kept:
                path.unlink(missing_ok=True)

    def _read(self, segment: Segment, entries: dict[str, Any]) -> TensorDict:
        path = self.folder / segment.name
        count = segment.last - segment.first
        try:
            content = read_bounded(path, LARGEST_HEADER + count * row_bytes(entries))
            if zlib.crc32(content) != segment.checksum:
                raise ValueError("it was truncated or changed after it was written")
            tensors = load(content)
        except FileNotFoundError as error:
            raise UserError(
                f"{path} is missing, and with it rows {segment.first} to {segment.last} of the replay buffer."
            ) from error
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read: {error}.") from error
        found = {key: [str(value.dtype), list(value.shape)] for key, value in tensors.items()}
        wanted = {key: [dtype, [count, *shape]] for key, (dtype, shape) in entries.items()}
        if found != wanted:
            key = min(key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key))
            raise UserError(f"{path} contains {key} as {found.get(key)}, expected {wanted.get(key)}.")
        if bad := first_non_finite(tensors):
            raise UserError(f"{path}: {bad}; the replay buffer never stores such rows, so the file was changed.")
        return TensorDict(tensors, [count]).unflatten_keys(".")
