"""The summary, loggers and callbacks of a run, and its closing report."""

from __future__ import annotations

import logging
import math
import shlex
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
import yaml
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from torchrl.envs import EnvBase

from qsm_rl.training.configuration.command_line import saved_text
from qsm_rl.training.configuration.training_configuration import TrainingConfiguration
from qsm_rl.training.data.frames import FramesDataset
from qsm_rl.training.data.replay import ReplayArchive
from qsm_rl.training.ranks import rank
from qsm_rl.training.runs.callbacks import (
    CheckpointWriter,
    Evaluation,
    LearningCurve,
    MetricRows,
    StopAtReturn,
    StopSignals,
)
from qsm_rl.training.runs.loggers import MetricsTable, chosen_logger
from qsm_rl.training.runs.module import OffPolicyModule
from qsm_rl.training.runs.progress import Progress
from qsm_rl.training.runs.resuming import run_identity
from qsm_rl.training.runs.run_folder import RunFolder

__all__ = [
    "finish_run",
    "make_callbacks",
    "make_loggers",
    "print_summary",
    "quiet_libraries",
]

CallbackType = TypeVar("CallbackType", bound=Callback)


def quiet_libraries() -> None:
    """Silences library warnings that users cannot act on."""
    logging.getLogger("torchrl").setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*init_random_frames.*is not exactly a multiple")
    warnings.filterwarnings("ignore", message="Got conflicting batch_sizes")  # several batches drawn at once
    warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated")
    warnings.filterwarnings("ignore", message=".*inline_inbuilt_nn_modules is deprecated")
    warnings.filterwarnings("ignore", message="Using lock_.. inside a compiled graph")


def print_summary(
    config: TrainingConfiguration,
    folder: RunFolder,
    environment: EnvBase,
    device: torch.device,
    *,
    first_frame: int = 0,
) -> None:
    """Prints what is about to run.

    Args:
        config: the run's settings.
        folder: its folder.
        environment: the training environments.
        device: device of the networks.
        first_frame: frame at which the run continues.
    """
    observation_dim = environment.observation_spec["observation"].shape[-1]
    action_dim = environment.action_spec.shape[-1]
    threads = torch.get_num_threads()
    print(
        f"{config.env}: observation {observation_dim}, action {action_dim}; preset {config.preset}, seed {config.seed}"
    )
    compiled = ", compiled (the first one takes about a minute)" if config.compile else ""
    ranks = f", {config.devices} processes" if config.devices > 1 else ""
    plural = "s" if threads > 1 else ""
    print(f"device: {device}{ranks}, {threads} thread{plural}; updates in {config.precision}{compiled}")
    print(f"run folder: {folder.path}")
    warmup, asked = config.capped_warmup, config.warmup_frames
    capped = f", a fifth of total_frames instead of {asked:,}" if warmup < asked else ""
    batch = config.frames_per_batch * config.devices
    last = first_frame + batch * math.ceil((config.total_frames - first_frame) / batch)
    rounded = f", rounded up to {last:,} (batches of {batch:,})" if last > config.total_frames else ""
    print(f"frames: {config.total_frames:,}{rounded}; warm-up: {warmup:,} frames of random actions{capped}")
    if config.num_envs > 1:
        cut = config.checkpoint_every // config.num_envs
        print(
            f"every checkpoint truncates the episodes, here after {cut:,} frames each; if that is too short, raise "
            "--checkpoint_every"
        )
    if folder.resumed:
        begun = f"resumed from the checkpoint at frame {first_frame:,}"
        print(begun if first_frame else "there is no checkpoint yet, so the run starts from the beginning", flush=True)
    else:
        print("stop with Ctrl-C at any time; the run can be resumed", flush=True)


def make_loggers(config: TrainingConfiguration, folder: RunFolder, *, first_frame: int = 0) -> list[Logger]:
    """Makes the loggers: metrics.csv, TensorBoard events, and the logger that the settings choose.

    Args:
        config: the run's settings.
        folder: its folder.
        first_frame: frame at which the run continues; later rows of an earlier process are dropped.

    Raises:
        UserError: if the chosen logger cannot be started.
    """
    chosen = []
    if config.logger is not None:
        chosen.append(chosen_logger(config.logger, folder.path, yaml.safe_load(saved_text(config))))
    tensorboard = TensorBoardLogger(folder.path, name="tensorboard", version="", purge_step=first_frame + 1)
    return [MetricsTable(folder.metrics, last_frame=first_frame), tensorboard, *chosen]


def make_callbacks(
    config: TrainingConfiguration,
    folder: RunFolder,
    frames: FramesDataset,
    archive: ReplayArchive,
    make_environment: Callable[..., EnvBase],
) -> list[Callback]:
    """Makes the callbacks: evaluation, rows of the log, learning curve, checkpoints, progress and stopping.

    Ranks above 0 only store their replay buffers and handle stop signals.

    Args:
        config: the run's settings.
        folder: its folder.
        frames: its data set.
        archive: its replay buffer's files.
        make_environment: makes an environment from a seed, for evaluations.
    """
    stop, identity = StopSignals(), run_identity(config, frames.collector.env)
    if rank() > 0:
        return [CheckpointWriter(frames, folder, archive, identity, stop), stop]
    evaluation = Evaluation(
        frames,
        config.eval_every,
        make_environment,
        config.eval_episodes,
        stop,
        deterministic=config.eval_deterministic,
        videos=folder.videos if config.eval_video else None,
    )
    title = f"{folder.recipe} on {config.env}, preset {config.preset}, seed {config.seed}"
    return [
        evaluation,
        StopAtReturn(evaluation, config.stop_at_return),
        MetricRows(frames, config.log_every, config.eval_every),
        LearningCurve(frames, config.eval_every, folder, title),
        CheckpointWriter(frames, folder, archive, identity, stop),
        Progress(frames, evaluation),
        stop,
    ]


def finish_run(
    trainer: Trainer, module: OffPolicyModule, frames: FramesDataset, folder: RunFolder, *, usual_frames: int
) -> int:
    """Closes the environments, and prints how the run went and how to continue it.

    Args:
        trainer: the trainer, after ``fit``.
        module: the trained module.
        frames: the data set.
        folder: the run's folder, with the saved actor.
        usual_frames: default frames of the recipe; a shorter run prints the command of a full one.

    Returns:
        The exit code: 0, or 128 plus the signal that ended the run.
    """
    frames.close()
    folder.close()
    for logger in trainer.loggers:
        logger.finalize("success")
    stop, evaluation = _callback(trainer, StopSignals), _callback(trainer, Evaluation)
    last_checkpoint = _callback(trainer, CheckpointWriter).last_frame
    called = Path(sys.argv[0])  # a copy of a recipe may be anywhere
    script = f"python {called if called.stem == folder.recipe else f'recipes/{folder.recipe}.py'}"
    target = _callback(trainer, StopAtReturn)
    resume = f"{script} --resume {shlex.quote(str(folder.path))}"
    # Changes made on resuming, which config.yaml does not contain.
    saved = folder.settings
    longer = f" --total_frames {frames.total_frames}" if frames.total_frames > saved["total_frames"] else ""
    if target.target != (math.inf if saved["stop_at_return"] is None else saved["stop_at_return"]):
        resume += f" --stop_at_return {'null' if target.target == math.inf else target.target}"
    alone = folder.actor in folder.published
    published = folder.actor if alone else folder.path / "seed_N" / folder.actor.name
    if stop.signal is not None:
        print(f"stopped by {stop.signal.name} at frame {module.env_frames:,}; actor: {published}")
        if last_checkpoint is None:
            print(f"no checkpoint had been written yet; to start again: {resume}{longer}")
        elif last_checkpoint >= frames.total_frames:
            print(f"the run is finished; to train longer: {resume} --total_frames {2 * module.env_frames}")
        else:
            print(f"to continue from the checkpoint at frame {last_checkpoint:,}: {resume}{longer}")
        return stop.exit_code
    for way, result in evaluation.results.items():
        metrics = result.metrics()
        print(
            f"evaluation at frame {module.env_frames:,}{way and ', ' + way}: return {metrics['eval/return_mean']:.1f} "
            f"± {metrics['eval/return_std']:.1f} over {len(result.returns)} episode{'s' * (len(result.returns) > 1)}"
        )
    print(f"learning curve: {folder.learning_curve}")
    if evaluation.videos is not None:
        print(f"videos: {evaluation.videos}")
    print(f"actor: {published}")
    if target.reached is not None:
        print(
            f"stopped at frame {module.env_frames:,}: the evaluation's return of {target.reached:.1f} is at least "
            f"--stop_at_return {target.target:g}"
        )
        where = (
            "to start again"
            if last_checkpoint is None
            else f"to continue from the checkpoint at frame {last_checkpoint:,}"
        )
        print(f"{where}: {resume}{longer} --stop_at_return null", flush=True)
        return 0
    if module.env_frames < usual_frames:
        preset = f" --preset {saved['preset']}" if saved["preset"] != "default" else ""
        print(f"the full run, {usual_frames:,} frames with the preset's settings: {script} --env {module.env}{preset}")
    print(f"to train longer: {resume} --total_frames {2 * module.env_frames}", flush=True)
    return 0


def _callback(trainer: Trainer, kind: type[CallbackType]) -> CallbackType:
    return next(callback for callback in trainer.callbacks if isinstance(callback, kind))  # type: ignore[attr-defined]
