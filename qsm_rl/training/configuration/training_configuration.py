"""What every recipe of the kit can be told, as one dataclass: fields, defaults, help and checks."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from qsm_rl.training.errors import UserError

__all__ = ["TrainingConfiguration"]

COUNTS = (
    *("total_frames", "eval_every", "eval_episodes", "checkpoint_every", "log_every"),
    *("seeds", "devices", "action_repeat", "num_envs", "frames_per_batch", "replay_size", "batch_size", "n_step"),
)


@dataclass(kw_only=True)
class TrainingConfiguration:
    """Settings shared by all off-policy recipes. A frame is one decision of the agent, one transition.

    A recipe's own settings are a dataclass derived from this one, which also names its ``presets``.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {"default": {}}

    env: str = "HalfCheetah-v5"
    """Environment: a Gymnasium MuJoCo id such as Hopper-v5, or dm_control/DOMAIN-TASK such as dm_control/walker-walk
    (needs the dmc extra)."""

    total_frames: int = 1_000_000
    """Frames to train for. Locomotion takes 30,000 to show progress and 1,000,000 to settle."""

    seed: int = 0
    """Seed of everything random. Report at least three seeds."""

    seeds: int = 1
    """Independent runs with the seeds seed, seed + 1, ..., in folders seed_N of run_dir: on a CPU each a process of its
    own with one thread, and the same command with their folder as --run_dir goes on with what was stopped; on a GPU,
    where the recipe can, all in one process with stacked networks, to be resumed as one run."""

    device: str = "auto"
    """Where the networks and the replay buffer live: auto (a GPU when there is one), cpu, cuda, cuda:1."""

    devices: int = 1
    """Processes that train one model together, a GPU each where device is a GPU: every update averages their gradients,
    so a batch is that many times batch_size. Each has num_envs environments and its share of replay_size; frames are
    those of all."""

    precision: Literal["auto", "float32", "tf32", "bfloat16"] = "auto"
    """Arithmetic of the matrix products in updates: float32, tf32 (a GPU's float32 with factors of about three digits),
    bfloat16 (about two and a half; weights, optimisers, outputs and losses stay float32), or auto: bfloat16 where the
    processor or GPU is made for it and the update is compiled, else tf32 on such a GPU, else float32."""

    compile: bool | Literal["auto"] = "auto"
    """Whether the update is compiled, which takes a minute before the first one: true, false, or auto: where there is a
    compiler, if at least 5,000 updates follow."""

    preset: str = "default"
    """Named set of values for everything not given otherwise."""

    run_dir: Path | None = None
    """Folder of the run; null makes runs/RECIPE/ENV/TIME-sSEED. A folder that holds anything is refused."""

    resume: Path | None = None
    """Folder of a run to continue with all its settings; only --total_frames and --stop_at_return may be given beside
    it."""

    eval_every: int = 10_000
    """Frames between evaluations. More often gives a finer curve and costs time; training itself is the same."""

    eval_episodes: int = 5
    """Episodes of one evaluation. More make the mean less noisy (5 to 20 are usual) and cost time."""

    eval_deterministic: bool = False
    """Whether each evaluation also runs eval_episodes episodes of the deterministic policy, logged apart as
    eval/deterministic/return_mean. It begins as the sampling one does, and costs its time again."""

    eval_video: bool = False
    """Whether each evaluation films its first episode, as videos/frames-N.mp4 in the run folder. Needs the video extra
    and a way to render, and takes seconds to minutes for an episode of 1,000 frames."""

    stop_at_return: float | None = None
    """Training ends behind the first evaluation whose eval/return_mean is at least this; null trains for total_frames.
    More eval_episodes make it less a matter of luck."""

    checkpoint_every: int = 5_000
    """Frames between checkpoints, from which --resume continues to the bit. All environments are reset there, in
    every run: keep it well above num_envs times the length of an episode. At most this many frames are lost by a
    crash."""

    log_every: int = 1_000
    """Frames between rows of metrics.csv and TensorBoard; a row is the average since the last one."""

    logger: dict[str, Any] | None = None
    """One more logger: a class of Lightning's such as WandbLogger, or the path of any other, with its arguments as
    --logger.NAME VALUE; in YAML class_path and init_args. Its local files go to the run folder."""

    action_repeat: int = 1
    """Simulator steps for each action, their rewards summed. More shortens the horizon; 1 is the paper's, 2 is usual
    for dm_control."""

    normalize_observation: bool = False
    """Whether observations are shifted and scaled by their running mean and spread. Helps where their sizes differ by
    orders of magnitude; unneeded for most MuJoCo tasks."""

    num_envs: int = 1
    """Environments stepped together. More give more varied data and faster collection, with fewer policies tried in
    all."""

    frames_per_batch: int = 10
    """Frames collected between two rounds of updates, rounded up to a multiple of num_envs. More is faster and acts
    with older weights; 1 is the paper's with one environment, usual range 1 to 100."""

    num_workers: int = 0
    """Processes that collect while this one updates, num_envs split over them, with weights that are one batch old; 0
    collects in this process. Pays where collecting takes long; give --frames_per_batch of 16 num_envs or more."""

    worker_backend: Literal["process", "ray"] = "process"
    """Where workers run: process (on this machine) or ray (actors on the Ray cluster that RAY_ADDRESS names, or that
    runs here; needs the ray extra)."""

    warmup_frames: int = 10_000
    """Frames of uniformly random actions before the first update, capped at a fifth of total_frames. More fills the
    replay buffer with wider data and starts learning later; usual range 1,000 to 25,000."""

    updates_per_frame: float = 1.0
    """Updates for each frame after the warm-up. More learns from fewer frames, costs time, and can overfit the critics;
    usual range 0.25 to 2."""

    replay_size: int = 1_000_000
    """Transitions kept; the oldest are overwritten. Smaller forgets sooner; usual range 100,000 to 1,000,000."""

    replay_storage: str = "memory"
    """Where the transitions lie: memory, disk (memory-mapped files in the run folder, for more than fits into memory),
    or a folder for these files, such as /scratch/me on a fast local disk. They are removed at the end of the run; its
    checkpoints hold the transitions too."""

    batch_size: int = 256
    """Transitions of one update. Larger is steadier and slower; usual range 128 to 1,024."""

    actor_learning_rate: float = 3e-4
    """Adam's step size for the actor. Higher learns faster and is less stable; usual range 1e-4 to 1e-3."""

    critic_learning_rate: float = 3e-4
    """Adam's step size for the critics. Higher learns faster and is less stable; usual range 1e-4 to 1e-3."""

    actor_hidden_dims: tuple[int, ...] = (256, 256)
    """Widths of the actor's hidden layers. Wider fits more and is slower; usual 256 to 512."""

    critic_hidden_dims: tuple[int, ...] = (256, 256)
    """Widths of the critics' hidden layers. Wider fits more and is slower; usual 256 to 1,024."""

    gamma: float = 0.99
    """Discount per frame. Higher looks further ahead with more variance; usual range 0.95 to 0.995."""

    tau: float = 0.005
    """Share of the critics that the target critics take over at each update. Higher follows faster and is less
    stable; usual range 0.001 to 0.02."""

    n_step: int = 1
    """Rewards summed before the bootstrap. More carries rewards back faster and leans on old actions; usual range 1
    to 5."""

    gradient_clipping: float | None = None
    """Largest norm of a gradient, for actor and critics each; null clips nothing. Lower is steadier and slower; usual
    range 0.5 to 10."""

    def __post_init__(self) -> None:
        """Checks every field.

        Raises:
            UserError: naming the field, its value and what was expected.
        """
        self._check("preset", self.preset in self.presets, f"one of {', '.join(self.presets)}")
        for name in COUNTS:
            self._check(name, getattr(self, name) >= 1, "at least 1")
        self._check("seed", 0 <= self.seed <= 2**32 - self.seeds, f"from 0 to {2**32 - self.seeds}")
        self._check("warmup_frames", self.warmup_frames >= 0, "0 or more")
        for name in ("updates_per_frame", "actor_learning_rate", "critic_learning_rate"):
            self._check(name, 0 < getattr(self, name) < math.inf, "a number above 0")
        for name in ("actor_hidden_dims", "critic_hidden_dims"):
            widths = tuple(getattr(self, name))
            setattr(self, name, widths)
            self._check(name, bool(widths) and all(width >= 1 for width in widths), "one or more widths of at least 1")
        self._check("stop_at_return", not math.isnan(self.stop_at_return or 0), "null or a number")
        self._check("gamma", 0 <= self.gamma <= 1, "from 0 to 1")
        self._check_workers()
        named = self.replay_storage in ("memory", "disk") or os.sep in self.replay_storage
        self._check("replay_storage", named, "memory, disk, or a folder with a / in it")
        if os.sep in self.replay_storage:
            self.replay_storage = str(Path(self.replay_storage).absolute())  # --resume is called from anywhere
        if self.devices > 1:
            self._check("device", ":" not in self.device, f"without an index for --devices {self.devices}")
            # Each rank would normalise by statistics of its own.
            self._check("normalize_observation", not self.normalize_observation, "false with several devices")
        self._check("tau", 0 < self.tau <= 1, "above 0 and at most 1")
        self._check(
            "gradient_clipping", self.gradient_clipping is None or self.gradient_clipping > 0, "null or above 0"
        )
        self.frames_per_batch = self.num_envs * math.ceil(self.frames_per_batch / self.num_envs)
        self._check(
            "device", re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", self.device) is not None, "auto, cpu, cuda or cuda:N"
        )

    @property
    def capped_warmup(self) -> int:
        """The warm-up of the run: at most a fifth of its frames, so that a short run learns something too.

        Examples:
            >>> TrainingConfiguration(warmup_frames=10_000, total_frames=2_000).capped_warmup
            400
        """
        return min(self.warmup_frames, self.total_frames // 5)

    def _check_workers(self) -> None:
        workers = self.num_workers
        self._check("num_workers", workers >= 0, "0 or more")
        if workers == 0:
            self._check(
                "worker_backend", self.worker_backend == "process", "process without workers; give --num_workers"
            )
            return
        self._check("num_envs", self.num_envs % workers == 0, f"a multiple of num_workers={workers}")
        # Each worker would normalise by statistics of its own.
        self._check("normalize_observation", not self.normalize_observation, "false with workers")

    @classmethod
    def preset_values(cls, preset: str, env: str) -> dict[str, Any]:
        """The values that a preset fills in on an environment.

        Args:
            preset: a key of ``presets``; nothing is filled in for another one, which the checks refuse.
            env: environment id, for presets that depend on it.

        Returns:
            Field names and their values.
        """
        return dict(cls.presets.get(preset, {}))

    def without_effect(self) -> dict[str, str]:
        """Settings that change nothing beside the others, each with the flag that would let it count."""
        return {}

    def _check(self, name: str, valid: bool, expected: str) -> None:
        if not valid:
            raise UserError(f"--{name} must be {expected}, got {getattr(self, name)!r}.")
