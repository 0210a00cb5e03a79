"""The data set of online training: frames from a collector, with trajectories cut at checkpoints."""

from __future__ import annotations

from collections.abc import Iterator

from tensordict import TensorDictBase
from torch.utils.data import IterableDataset
from torchrl.collectors import Collector

from qsm_rl.training.data.worker_collector import WorkerCollector
from qsm_rl.training.random_state import derived_seed, seed_everything

__all__ = ["FramesDataset", "period_ended"]


def period_ended(before: int, after: int, period: int) -> bool:
    """Whether a multiple of ``period`` lies after frame ``before`` and not after frame ``after``.

    Examples:
        >>> period_ended(990, 1000, 1000), period_ended(1000, 1010, 1000)
        (True, False)
    """
    return after // period > before // period


class FramesDataset(IterableDataset[TensorDictBase]):
    """Batches of frames from a collector, until ``total_frames`` have been collected.

    Every ``checkpoint_every`` frames, and at the end of the run, the trajectories are cut: the last frame of the batch
    is marked as truncated. Before the next batch, all random generators and environments are seeded with a seed that
    depends only on the run's seed and the frame count, and the environments are reset. Everything after a cut is
    therefore a function of the networks, the replay buffer and the frame count. A run resumed there is bitwise
    identical to the uninterrupted one, and the state of the simulators need not be stored.

    Batches have the collector's shape ``(num_envs, T)``; ``("next", "episode_end")`` marks where episodes really ended.

    Args:
        collector: collects ``frames_per_batch`` frames at a time, without end.
        seed: the run's seed.
        total_frames: frames of the whole run.
        checkpoint_every: frames between cuts.
        first_frame: frames that an earlier process has collected; must be a cut.
        num_ranks: processes that collect together, each the same number of frames; the frames of all are counted.
        num_agents: independent agents that share the batches, each with its own environments; the frames of one agent
            are counted.
    """

    def __init__(
        self,
        collector: Collector | WorkerCollector,
        *,
        seed: int,
        total_frames: int,
        checkpoint_every: int,
        first_frame: int = 0,
        num_ranks: int = 1,
        num_agents: int = 1,
    ) -> None:
        self.collector = collector
        self.seed = seed
        self.total_frames = total_frames
        self.checkpoint_every = checkpoint_every
        self.first_frame = first_frame
        self.num_ranks = num_ranks
        self.num_agents = num_agents

    def __len__(self) -> int:
        """Number of batches. With it, Lightning does not prefetch, and the newest actor collects each batch."""
        frames = self.count(self.collector.requested_frames_per_batch)
        return max(0, -(-(self.total_frames - self.first_frame) // frames))

    def __iter__(self) -> Iterator[TensorDictBase]:
        """Collects batches; draws no random numbers before the first one is requested."""
        batches = iter(self.collector)
        frames, cut = self.first_frame, True
        while frames < self.total_frames:
            if cut:
                self._begin(frames)
            batch = next(batches)
            before, frames = frames, frames + self.count(batch.numel())
            batch["next", "episode_end"] = batch["next", "done"].clone()
            cut = self.is_cut(before, frames)
            if cut:
                for key in ("truncated", "done"):
                    batch["next", key][..., -1, :] = True
            yield batch

    def count(self, numel: int) -> int:
        """Number of frames for which a batch of ``numel`` frames on this rank counts."""
        return numel * self.num_ranks // self.num_agents

    def is_cut(self, before: int, after: int) -> bool:
        """Whether the trajectories are cut after a batch that took the frame count from ``before`` to ``after``."""
        return period_ended(before, after, self.checkpoint_every) or after >= self.total_frames

    def close(self) -> None:
        """Closes the collector and its environments."""
        self.collector.shutdown()

    def _begin(self, frames: int) -> None:
        self.collector.set_seed(derived_seed(self.seed, "environments", frames))
        self.collector.reset()
        seed_everything(derived_seed(self.seed, "training", frames))
