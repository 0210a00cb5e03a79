"""Settings of the recipe for offline data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from qsm_rl.training.configuration.diffusion_configuration import PlainCriticsConfiguration

__all__ = ["OfflineQSMConfiguration"]


@dataclass(kw_only=True)
class OfflineQSMConfiguration(PlainCriticsConfiguration):
    """Settings of Q-score matching on a data set, with optional online training afterwards."""

    dataset: str = ""
    """Transitions to learn from: minari:ID or d4rl:ID, which are downloaded, or the folder of one of the kit's runs or
    of a TorchRL replay buffer's dumps."""

    offline_updates: int = 100_000
    """Updates on the data set before any frames are collected, rounded up to a multiple of frames_per_batch. More
    learns more from the data set but can overfit a small one."""

    online_frames: int = 0
    """Frames to collect in the environment afterwards, with one update each. The new transitions are added to those of
    the data set. 0 trains offline only."""

    total_frames: int = 0
    """Offline updates plus online frames; --resume may raise it. Values below their sum are raised to it."""

    warmup_frames: int = 0
    """Always 0, since the data set is available from the start."""

    score_temperature: float = 0.1
    """Temperature of the normalized score target. Lower is greedier; usual range 0.03 to 1."""

    bc_weight: float = 1.0
    """Weight of behaviour cloning on the actions of the transitions, added to the score target's loss. More keeps the
    policy closer to them. Offline data needs this, because nothing corrects the critics' values of other actions; usual
    range 0.1 to 10, 0 for none."""

    def __post_init__(self) -> None:
        """Checks every field.

        Raises:
            UserError: naming the field, its value and what was expected.
        """
        self._check("offline_updates", self.offline_updates >= 1, "at least 1")
        self._check("online_frames", self.online_frames >= 0, "0 or more")
        self.total_frames = max(self.total_frames, self.offline_updates + self.online_frames)  # again below, rounded
        super().__post_init__()
        self._check("dataset", bool(self.dataset), "minari:ID, d4rl:ID or a folder")
        if self.resume is None and self.dataset.partition(":")[0] not in ("minari", "d4rl"):
            self.dataset = str(Path(self.dataset).absolute())  # --resume may be called from any folder
        self._check("score_temperature", self.score_temperature > 0, "above 0")
        self._check("bc_weight", self.bc_weight >= 0, "0 or more")
        for name, only in (("warmup_frames", 0), ("n_step", 1), ("updates_per_frame", 1), ("devices", 1)):
            self._check(name, getattr(self, name) == only, f"{only} with a data set")
        self._check("num_workers", self.num_workers == 0, "0 with a data set")
        self._check("normalize_observation", not self.normalize_observation, "false with a data set")
        self.offline_updates = self.frames_per_batch * math.ceil(self.offline_updates / self.frames_per_batch)
        self.total_frames = max(self.total_frames, self.offline_updates + self.online_frames)
