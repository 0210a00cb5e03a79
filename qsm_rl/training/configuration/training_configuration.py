"""Settings that all recipes of the kit share, as one dataclass: fields, defaults, help and checks."""

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
    """Settings shared by all off-policy recipes. A frame is one decision of the agent, that is, one transition.

    A recipe's own settings are a dataclass derived from this one, which also names its ``presets``.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {"default": {}}

    env: str = "HalfCheetah-v5"
    """Environment: a Gymnasium MuJoCo id such as Hopper-v5, or dm_control/DOMAIN-TASK such as dm_control/walker-walk
    (needs the dmc extra)."""

    total_frames: int = 1_000_000
    """Number of frames to train for. Locomotion takes 30,000 to show progress and 1,000,000 to settle."""

    seed: int = 0
    """Seed of all random number generators. Report results over at least three seeds."""

    seeds: int = 1
    """Number of independent runs, with the seeds seed, seed + 1, ..., in folders seed_N of run_dir. On a CPU each run
    is a process with one thread; to continue after an interruption, repeat the command with their parent folder as
    --run_dir. On a GPU, where the recipe supports it, all run in one process with stacked networks and are resumed as
    one run."""

    device: str = "auto"
    """Where the networks and the replay buffer live: auto (a GPU if there is one), cpu, cuda, cuda:1."""

    devices: int = 1
    """Number of processes that train one model together, each on its own GPU where device is a GPU. Every update
    averages their gradients, so the effective batch is devices times batch_size. Each process has num_envs environments
    and its share of replay_size; frame counts are totals over all processes."""

    precision: Literal["auto", "float32", "tf32", "bfloat16"] = "auto"
    """Arithmetic of the matrix products in updates: float32; tf32 (a GPU's mode for float32, with about three digits
    per factor); bfloat16 (about two and a half digits; weights, optimisers, outputs and losses stay float32); or auto,
    which takes bfloat16 where the processor or GPU has instructions for it and the update is compiled, else tf32 on
    such a GPU, else float32."""

    compile: bool | Literal["auto"] = "auto"
    """Whether to compile the update, which takes a minute before the first one: true, false, or auto (compile if there
    is a compiler and at least 5,000 updates follow)."""

    preset: str = "default"
    """Named set of values for all settings that are not given explicitly."""

    run_dir: Path | None = None
    """Folder for the run; null creates runs/RECIPE/ENV/TIME-sSEED. A folder that is not empty is refused."""

    resume: Path | None = None
    """Folder of a run to continue with all its settings; only --total_frames and --stop_at_return may be given with
    it."""

    eval_every: int = 10_000
    """Frames between evaluations. Lower gives a finer curve and costs time; training itself does not change."""

    eval_episodes: int = 5
    """Episodes per evaluation. More makes the mean less noisy and costs time; usual range 5 to 20."""

    eval_deterministic: bool = False
    """Whether each evaluation also runs eval_episodes episodes of the deterministic policy, logged separately as
    eval/deterministic/return_mean. They start from the same seed as those of the sampling policy and take as long
    again."""

    eval_video: bool = False
    """Whether to film the first episode of each evaluation, as videos/frames-N.mp4 in the run folder. Needs the video
    extra and a way to render, and takes seconds to minutes for an episode of 1,000 frames."""

    stop_at_return: float | None = None
    """Stop training after the first evaluation whose eval/return_mean is at least this value; null trains for
    total_frames. More eval_episodes make the stop depend less on luck."""

    checkpoint_every: int = 5_000
    """Frames between checkpoints. A crash loses at most this many frames; --resume continues from the last checkpoint,
    bit for bit like an uninterrupted run. Every checkpoint resets all environments, so keep this well above num_envs
    times the length of an episode."""

    log_every: int = 1_000
    """Frames between rows of metrics.csv and TensorBoard; each row averages over the frames since the previous one."""

    logger: dict[str, Any] | None = None
    """One more logger: a Lightning class such as WandbLogger, or the import path of any other, with its arguments as
    --logger.NAME VALUE; in YAML class_path and init_args. Its local files go to the run folder."""

    action_repeat: int = 1
    """Simulator steps for which each action is held, with their rewards summed. More shortens the horizon; the paper
    uses 1, and 2 is usual for dm_control."""

    normalize_observation: bool = False
    """Whether to shift and scale observations by their running mean and standard deviation. Helps where features differ
    by orders of magnitude; most MuJoCo tasks do not need it."""

    num_envs: int = 1
    """Environments stepped together. More gives more varied data and faster collection, but fewer versions of the
    policy are tried in all."""

    frames_per_batch: int = 10
    """Frames collected between two rounds of updates, rounded up to a multiple of num_envs. More is faster but acts
    with older weights; the paper uses 1 with one environment; usual range 1 to 100."""

    num_workers: int = 0
    """Processes that collect frames while this one updates; num_envs is split over them, and their weights are one
    batch old. 0 collects in this process. Pays off where collection is slow; use with --frames_per_batch of at least 16
    times num_envs."""

    worker_backend: Literal["process", "ray"] = "process"
    """Where workers run: process (on this machine) or ray (actors on the Ray cluster that RAY_ADDRESS names or that is
    running on this machine, else on a new one; needs the ray extra)."""

    warmup_frames: int = 10_000
    """Frames of uniformly random actions before the first update, capped at a fifth of total_frames. More fills the
    replay buffer with more diverse data and delays learning; usual range 1,000 to 25,000."""

    updates_per_frame: float = 1.0
    """Updates per frame after the warm-up. More learns from fewer frames, costs time, and can overfit the critics;
    usual range 0.25 to 2."""

    replay_size: int = 1_000_000
    """Capacity of the replay buffer in transitions; the oldest are overwritten. Smaller forgets sooner; usual range
    100,000 to 1,000,000."""

    replay_storage: str = "memory"
    """Where to keep the transitions: memory, disk (memory-mapped files in the run folder, for more than fits into
    memory), or a folder for these files, such as /scratch/me on a fast local disk. The files are removed at the end of
    the run; its checkpoints also hold the transitions."""

    batch_size: int = 256
    """Transitions per update. Larger is steadier and slower; usual range 128 to 1,024."""

    actor_learning_rate: float = 3e-4
    """Adam's learning rate for the actor. Higher learns faster and is less stable; usual range 1e-4 to 1e-3."""

    critic_learning_rate: float = 3e-4
    """Adam's learning rate for the critics. Higher learns faster and is less stable; usual range 1e-4 to 1e-3."""

    actor_hidden_dims: tuple[int, ...] = (256, 256)
    """Widths of the actor's hidden layers. Wider fits more and is slower; usual range 256 to 512."""

    critic_hidden_dims: tuple[int, ...] = (256, 256)
    """Widths of the critics' hidden layers. Wider fits more and is slower; usual range 256 to 1,024."""

    gamma: float = 0.99
    """Discount factor per frame. Higher looks further ahead, with more variance; usual range 0.95 to 0.995."""

    tau: float = 0.005
    """Rate at which the target critics follow the critics: the fraction by which they move towards them at each update.
    Higher follows faster and is less stable; usual range 0.001 to 0.02."""

    n_step: int = 1
    """Number of rewards summed before bootstrapping from Q. More propagates rewards faster but relies more on old
    actions; usual range 1 to 5."""

    gradient_clipping: float | None = None
    """Maximum gradient norm, for the actor and the critics separately; null does not clip. Lower is steadier and
    slower; usual range 0.5 to 10."""

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
        self._check("replay_storage", named, "memory, disk, or a folder whose path contains a /")
        if os.sep in self.replay_storage:
            self.replay_storage = str(Path(self.replay_storage).absolute())  # --resume may be called from any folder
        if self.devices > 1:
            self._check("device", ":" not in self.device, f"given without an index for --devices {self.devices}")
            # Each rank would normalise by its own statistics.
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
        """Warm-up frames of the run: at most a fifth of its frames, so that a short run also learns something.

        Examples:
            >>> TrainingConfiguration(warmup_frames=10_000, total_frames=2_000).capped_warmup
            400
        """
        return min(self.warmup_frames, self.total_frames // 5)

    def _check_workers(self) -> None:
        workers = self.num_workers
        self._check("num_workers", workers >= 0, "0 or more")
        if workers == 0:
            self._check("worker_backend", self.worker_backend == "process", "process unless --num_workers is above 0")
            return
        self._check("num_envs", self.num_envs % workers == 0, f"a multiple of num_workers={workers}")
        # Each worker would normalise by its own statistics.
        self._check("normalize_observation", not self.normalize_observation, "false with workers")

    @classmethod
    def preset_values(cls, preset: str, env: str) -> dict[str, Any]:
        """The values that a preset fills in for an environment.

        Args:
            preset: a key of ``presets``; any other name fills in nothing and is refused by the checks.
            env: environment id, for presets that depend on it.

        Returns:
            Field names and their values.
        """
        return dict(cls.presets.get(preset, {}))

    def without_effect(self) -> dict[str, str]:
        """Settings that have no effect given the others, each with the flag that would give it one."""
        return {}

    def _check(self, name: str, valid: bool, expected: str) -> None:
        if not valid:
            raise UserError(f"--{name} must be {expected}, got {getattr(self, name)!r}.")
