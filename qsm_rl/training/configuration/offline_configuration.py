"""What the recipe for offline data can be told."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from qsm_rl.training.configuration.diffusion_configuration import PlainCriticsConfiguration

__all__ = ["OfflineQSMConfiguration"]


@dataclass(kw_only=True)
class OfflineQSMConfiguration(PlainCriticsConfiguration):
    """Settings of Q-score matching on a data set, and online behind it."""

    dataset: str = ""
    """Transitions to learn from: minari:ID or d4rl:ID, which are downloaded, or a folder: of a run of the kit, or of a
    TorchRL replay buffer's dumps."""

    offline_updates: int = 100_000
    """Updates on the data set before anything is collected, rounded up to a multiple of frames_per_batch. More learns
    more from it, and can overfit a small one."""

    online_frames: int = 0
    """Frames to go on with in the environment, one update each, new transitions beside the data set's."""

    total_frames: int = 0
    """Offline updates and online frames together, which --resume may raise; less than their sum counts as their sum."""

    warmup_frames: int = 0
    """Always 0: the data set is there from the beginning."""

    score_temperature: float = 0.1
    """Temperature of the normalised score target. Lower is greedier; usual range 0.03 to 1."""

    bc_weight: float = 1.0
    """Weight of behaviour cloning on the transitions' actions beside the score target. More keeps the policy nearer to
    them, which offline data needs, since nothing corrects what the critics believe of other actions; usual range 0.1
    to 10, 0 for none."""

    def __post_init__(self) -> None:
        """Checks every field.

        Raises:
            UserError: naming the field, its value and what was expected.
        """
        self._check("offline_updates", self.offline_updates >= 1, "at least 1")
        self._check("online_frames", self.online_frames >= 0, "0 or more")
        self.total_frames = max(self.total_frames, self.offline_updates + self.online_frames)  # below again, rounded
        super().__post_init__()
        self._check("dataset", bool(self.dataset), "minari:ID, d4rl:ID or a folder")
        if self.resume is None and self.dataset.partition(":")[0] not in ("minari", "d4rl"):
            self.dataset = str(Path(self.dataset).absolute())  # --resume is called from anywhere
        self._check("score_temperature", self.score_temperature > 0, "above 0")
        self._check("bc_weight", self.bc_weight >= 0, "0 or more")
        for name, only in (("warmup_frames", 0), ("n_step", 1), ("updates_per_frame", 1), ("devices", 1)):
            self._check(name, getattr(self, name) == only, f"{only} with a data set")
        self._check("num_workers", self.num_workers == 0, "0 with a data set")
        self._check("normalize_observation", not self.normalize_observation, "false with a data set")
        self.offline_updates = self.frames_per_batch * math.ceil(self.offline_updates / self.frames_per_batch)
        self.total_frames = max(self.total_frames, self.offline_updates + self.online_frames)
