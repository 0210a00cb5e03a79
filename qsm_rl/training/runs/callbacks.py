"""Periodic callbacks, counted in frames: evaluation, rows of the log, learning curve, checkpoints and stopping."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, Trainer
from tensordict.nn import TensorDictModuleBase
from torchrl.envs import EnvBase

from qsm_rl.training.data.checkpoints import CheckpointFolder
from qsm_rl.training.data.frames import FramesDataset, period_ended
from qsm_rl.training.data.replay import ReplayArchive, manifests_of_ranks
from qsm_rl.training.data.worker_collector import WorkerCollector
from qsm_rl.training.environments.observation_statistics import copy_observation_statistics
from qsm_rl.training.errors import TrainingError
from qsm_rl.training.evaluation.evaluate import EvaluationResult, evaluate_agents, evaluate_policy
from qsm_rl.training.evaluation.videos import Film
from qsm_rl.training.random_state import derived_seed
from qsm_rl.training.ranks import any_rank, gather_objects, rank
from qsm_rl.training.runs.module import OffPolicyModule
from qsm_rl.training.runs.plotting import plot_learning_curve
from qsm_rl.training.runs.run_folder import RunFolder

__all__ = [
    "CheckpointWriter",
    "Evaluation",
    "LearningCurve",
    "MetricRows",
    "StopAtReturn",
    "StopSignals",
]


class PeriodicCallback(Callback):
    """Base class: ``run`` is called after each training step in which a period of frames ends, and after the last one.

    Args:
        frames: the data set, which determines the end of the run and the cuts.
        every: period in frames.
    """

    def __init__(self, frames: FramesDataset, every: int) -> None:
        self.frames = frames
        self.every = every

    def due(self, before: int, after: int) -> bool:
        """Whether to run after the step that took the frame count from ``before`` to ``after``."""
        return period_ended(before, after, self.every) or after >= self.frames.total_frames

    def run(self, trainer: Trainer, module: OffPolicyModule) -> None:
        """The action of the callback."""
        raise NotImplementedError

    def on_train_batch_end(
        self, trainer: Trainer, module: OffPolicyModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Lightning's hook."""
        if self.due(module.env_frames - self.frames.count(batch.numel()), module.env_frames):
            self.run(trainer, module)


class StopRequested(Exception):
    """Raised inside an evaluation when the process is asked to stop."""


class StopSignals(Callback):
    """Ends training after the current step on Ctrl-C (SIGINT) or SIGTERM; a second Ctrl-C ends the process at once.

    Attributes:
        signal: the signal that was received, or None.
        left: whether an evaluation was interrupted because of it; set by ``Evaluation``.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.left = False
        self._interruptible = False
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def exit_code(self) -> int:
        """The exit code that a shell expects after a signal, 128 plus its number; 0 without a signal."""
        return 0 if self.signal is None else 128 + self.signal

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """A block that a signal interrupts at once, by raising ``StopRequested``."""
        if self.signal is not None:
            raise StopRequested
        self._interruptible = True
        try:
            yield
        finally:
            self._interruptible = False

    def on_train_start(self, trainer: Trainer, module: OffPolicyModule) -> None:
        """Installs the signal handlers, replacing Lightning's."""

        def stop(number: int, frame: FrameType | None) -> None:
            if self.signal is not None and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.signal = signal.Signals(number)
            if self._interruptible:
                raise StopRequested

        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, stop)

    def on_train_batch_end(
        self, trainer: Trainer, module: OffPolicyModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Ends training on all ranks if any of them has a reason to stop."""
        trainer.should_stop = any_rank(self.signal is not None or trainer.should_stop, module.device)

    def on_train_end(self, trainer: Trainer, module: OffPolicyModule) -> None:
        """Restores the previous signal handlers."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def on_exception(self, trainer: Trainer, module: OffPolicyModule, exception: BaseException) -> None:
        """Restores the previous signal handlers."""
        self.on_train_end(trainer, module)


class Evaluation(PeriodicCallback):
    """Evaluates every policy of the update and adds the ``eval/...`` metrics to the next row of the log.

    Args:
        frames: the data set.
        every: frames between evaluations.
        make_environment: makes the environment of an evaluation, which receives a copy of the training environments'
            statistics.
        episodes: episodes per evaluation and way of acting.
        stop: callback that may interrupt evaluations.
        deterministic: whether the actor is also evaluated under deterministic exploration.
        videos: folder for videos of the sampling actor's first episode; None records no video.

    Attributes:
        results: the latest results by way of acting; ``""`` is the sampling actor.
    """

    def __init__(
        self,
        frames: FramesDataset,
        every: int,
        make_environment: Callable[..., EnvBase],
        episodes: int,
        stop: StopSignals,
        deterministic: bool = False,
        videos: Path | None = None,
    ) -> None:
        super().__init__(frames, every)
        self.make_environment = make_environment
        self.episodes = episodes
        self.stop = stop
        self.deterministic = deterministic
        self.videos = videos
        self.results: dict[str, EvaluationResult] = {}

    @property
    def last(self) -> EvaluationResult | None:
        """The latest result of the sampling actor."""
        return self.results.get("")

    def run(self, trainer: Trainer, module: OffPolicyModule) -> None:
        """Evaluates, unless the process has been asked to stop."""
        begin = time.perf_counter()
        try:
            with self.stop.interruptible():
                if module.update.agents:
                    results = self._evaluate_agents(module)
                else:
                    policies = module.update.policies
                    results = {way: self._evaluate(policy, module, filmed=not way) for way, policy in policies.items()}
                if self.deterministic:
                    results["deterministic"] = self._evaluate(module.update.actor, module, deterministic=True)
        except StopRequested:
            self.stop.left = True
            return
        self.results = results
        metrics = {name: value for way, result in results.items() for name, value in result.metrics(way).items()}
        module.window.add({**metrics, "time/evaluation_seconds": time.perf_counter() - begin})

    def _evaluate_agents(self, module: OffPolicyModule) -> dict[str, EvaluationResult]:
        """The result of each agent by its name, and under ``""`` the episodes of all agents."""
        agents, actor = module.update.agents, module.update.actor
        seed = derived_seed(self.frames.seed, "evaluation", module.env_frames)
        environment = self.make_environment(seed=seed, num_envs=len(agents) * self.episodes)
        results = evaluate_agents(environment, actor, agents=len(agents), seed=seed, device=module.device)
        pooled = EvaluationResult(
            tuple(value for result in results for value in result.returns),
            tuple(length for result in results for length in result.lengths),
        )
        return {"": pooled, **dict(zip(agents, results, strict=True))}

    def _evaluate(
        self, policy: TensorDictModuleBase, module: OffPolicyModule, deterministic: bool = False, filmed: bool = False
    ) -> EvaluationResult:
        # One seed for all ways of acting, so that additional evaluations do not change the actor's result.
        seed = derived_seed(self.frames.seed, "evaluation", module.env_frames)
        videos = self.videos if filmed else None
        environment = self.make_environment(seed=seed, filmed=videos is not None)
        copy_observation_statistics(self.frames.collector.env, environment)
        if module.device.type == "cuda":  # for one observation, launching the chain's kernels takes longer
            policy = deepcopy(policy).cpu()
        name = f"frames-{module.env_frames:012d}.mp4"
        with Film(videos / name, environment) if videos is not None else nullcontext() as film:
            return evaluate_policy(
                environment, policy, episodes=self.episodes, seed=seed, deterministic=deterministic, film=film
            )


class StopAtReturn(Callback):
    """Ends training after an evaluation that reaches a return; place it after the evaluation callback.

    Args:
        evaluation: the evaluation callback; the result of its sampling actor counts.
        target: mean return to reach; None never stops.

    Attributes:
        reached: the mean return that ended training, or None.
    """

    def __init__(self, evaluation: Evaluation, target: float | None) -> None:
        self.evaluation = evaluation
        self.target = math.inf if target is None else target
        self.reached: float | None = None

    def on_train_batch_end(
        self, trainer: Trainer, module: OffPolicyModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Lightning's hook."""
        result = self.evaluation.last
        if result is not None and result.metrics()["eval/return_mean"] >= self.target:
            self.reached = result.metrics()["eval/return_mean"]
            trainer.should_stop = True


class MetricRows(PeriodicCallback):
    """Writes a row to every logger each period, at evaluations, and at cuts, where no values may remain.

    Args:
        frames: the data set.
        every: frames between rows.
        evaluate_every: frames between evaluations.
    """

    def __init__(self, frames: FramesDataset, every: int, evaluate_every: int) -> None:
        super().__init__(frames, every)
        self.evaluate_every = evaluate_every
        self._begin = self._last_time = time.perf_counter()
        self._last_frames = self._last_steps = 0

    def on_train_start(self, trainer: Trainer, module: OffPolicyModule) -> None:
        """Starts the clock at the time that earlier processes have reached."""
        self._last_time = time.perf_counter()
        self._begin = self._last_time - module.elapsed_seconds
        self._last_frames, self._last_steps = module.env_frames, module.grad_steps

    def due(self, before: int, after: int) -> bool:
        """See ``MetricRows``."""
        return (
            super().due(before, after)
            or period_ended(before, after, self.evaluate_every)
            or self.frames.is_cut(before, after)
        )

    def run(self, trainer: Trainer, module: OffPolicyModule) -> None:
        """Writes the row."""
        row = module.metrics()
        now = time.perf_counter()
        training_seconds = now - self._last_time - row.get("time/evaluation_seconds", 0.0)
        seconds = max(training_seconds, 1e-9)
        row["time/frames_per_second"] = (module.env_frames - self._last_frames) / seconds
        row["time/updates_per_second"] = (module.grad_steps - self._last_steps) / seconds
        row["time/elapsed_seconds"] = module.elapsed_seconds = now - self._begin
        if isinstance(self.frames.collector, WorkerCollector):
            row["train/worker_replacements"] = self.frames.collector.replacements
        self._last_time, self._last_frames, self._last_steps = now, module.env_frames, module.grad_steps
        for logger in trainer.loggers:
            logger.log_metrics({name: row[name] for name in sorted(row)}, step=module.env_frames)


class LearningCurve(PeriodicCallback):
    """Redraws learning_curve.png after each evaluation.

    Args:
        frames: the data set.
        every: frames between evaluations.
        folder: the run's folder.
        title: title of the picture.
    """

    def __init__(self, frames: FramesDataset, every: int, folder: RunFolder, title: str) -> None:
        super().__init__(frames, every)
        self.folder = folder
        self.title = title

    def run(self, trainer: Trainer, module: OffPolicyModule) -> None:
        """Draws the curve."""
        plot_learning_curve(self.folder.metrics, self.folder.learning_curve, title=self.title)


class CheckpointWriter(PeriodicCallback):
    """Stores networks, optimisers, counters, observation statistics and replay buffer at every cut.

    Place it after the callbacks that write to the run's files, so that the files are older than the checkpoint. If a
    stop has interrupted the evaluation at the same frame, nothing is stored: the resumed run then starts earlier and
    still runs that evaluation.

    Args:
        frames: the data set, whose cuts are the period.
        folder: the run's folder.
        archive: the replay buffer's files.
        identity: identifies the run to which the checkpoints belong, see ``resuming.run_identity``.
        stop: callback that records interrupted evaluations.
    """

    def __init__(
        self,
        frames: FramesDataset,
        folder: RunFolder,
        archive: ReplayArchive,
        identity: dict[str, Any],
        stop: StopSignals,
    ) -> None:
        super().__init__(frames, frames.checkpoint_every)
        self.stop = stop
        self.checkpoints = CheckpointFolder(folder.checkpoints)
        self.archive = archive
        self.identity = identity
        self.last_frame: int | None = frames.first_frame or None
        # Removes what a killed process has left: checkpoints beyond the one to continue from, and rows that no
        # checkpoint needs.
        if rank() == 0:
            self.checkpoints.remove_after(frames.first_frame)
        self._manifests = [manifests_of_ranks(state)[rank()] for state in self.checkpoints.readable()]
        self.archive.prune(self._manifests)

    def run(self, trainer: Trainer, module: OffPolicyModule) -> None:
        """Writes the rows, then the checkpoint that names them, and then removes rows that no kept checkpoint needs.

        Raises:
            TrainingError: if the disk is full or not writable; the last good checkpoint is untouched.
        """
        if any_rank(self.stop.left, module.device):
            return
        try:
            manifest = self.archive.save(module.writer.replay)
            manifests = gather_objects(manifest)
            if rank() == 0:
                state = {
                    "training": module.checkpoint_state(),
                    "elapsed_seconds": module.elapsed_seconds,
                    "environment": dict(self.frames.collector.env.state_dict()),
                    "replay": manifest,
                    "replay_of_other_ranks": manifests[1:],
                    "run": self.identity,
                }
                self.checkpoints.save(module.env_frames, state)
        except OSError as error:
            folder, last = self.checkpoints.path, self.last_frame
            raise TrainingError(
                f"the checkpoint at frame {module.env_frames:,} could not be written to {folder}: "
                f"{error.strerror or error}; free some space.\n"
                + (
                    "There is no earlier checkpoint."
                    if last is None
                    else f"Then --resume {folder.parent} continues from frame {last:,}."
                )
            ) from error
        self.last_frame = module.env_frames
        self._manifests = [*self._manifests[-1:], manifest]
        self.archive.prune(self._manifests)
