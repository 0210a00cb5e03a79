"""Resuming a run: its identity, whether there is anything to continue, and the restoring of its checkpoint."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import Any

from torchrl.envs import EnvBase

from qsm_rl.comparison import first_difference, first_non_finite
from qsm_rl.training.configuration.command_line import CONFIGURATION_FILE, NOT_SAVED
from qsm_rl.training.configuration.training_configuration import TrainingConfiguration
from qsm_rl.training.data.frames import FramesDataset
from qsm_rl.training.data.replay import ReplayArchive, manifests_of_ranks
from qsm_rl.training.errors import UserError
from qsm_rl.training.ranks import rank
from qsm_rl.training.runs.loggers import read_metrics
from qsm_rl.training.runs.module import OffPolicyModule
from qsm_rl.training.runs.run_folder import RunFolder

__all__ = ["check_identity", "check_never_stored", "check_unfinished", "restore_checkpoint", "run_identity"]

# Settings that may be edited in the config.yaml of a run: they do not change what it learns.
FREE = (
    "total_frames",
    "stop_at_return",
    "device",
    "precision",
    "compile",
    "logger",
    "log_every",
    "replay_storage",
    "worker_backend",
)
FREE_PREFIXES = ("eval_", "video")


def run_identity(config: TrainingConfiguration, environment: EnvBase) -> dict[str, Any]:
    """Identifies the run of a checkpoint by plain data: settings that affect learning, and the environment's specs.

    Args:
        config: the run's settings.
        environment: its environments.
    """
    settings = {name: value for name, value in asdict(config).items() if name not in (*NOT_SAVED, *FREE)}
    settings["warmup_frames"] = config.capped_warmup  # as stored in config.yaml
    spec = environment.action_spec_unbatched
    return {
        "settings": json.loads(
            json.dumps({name: value for name, value in settings.items() if not name.startswith(FREE_PREFIXES)})
        ),
        "environment": {
            "observation_size": environment.observation_spec["observation"].shape[-1],
            "action_low": spec.space.low.tolist(),
            "action_high": spec.space.high.tolist(),
        },
    }


def check_identity(state: dict[str, Any], identity: dict[str, Any], folder: object) -> None:
    """Refuses to continue from a checkpoint of another run.

    Args:
        state: the checkpoint; one written by an early version has no identity and passes.
        identity: result of ``run_identity`` for the run that would continue.
        folder: the run's folder, for the message.

    Raises:
        UserError: naming the first difference.
    """
    saved = state.get("run")
    if saved is not None and (difference := first_difference(identity, saved, "run")):
        what, _, rest = difference.removeprefix("run.").partition(".")
        cause = f"{folder}/config.yaml was changed" if what == "settings" else "the environment has changed"
        raise UserError(
            f"the checkpoint at frame {state['frames']:,} does not match this run: {cause}. Compared with the "
            f"checkpoint, {rest}. Undo that change, or start a new run."
        )


def check_never_stored(config: TrainingConfiguration, folder: RunFolder) -> None:
    """Refuses to restart a run that has had checkpoints: its log and its actor would be lost.

    Args:
        config: the run's settings.
        folder: its folder, without any checkpoint.

    Raises:
        UserError: naming the last frame of its log.
    """
    columns = read_metrics(folder.metrics) if folder.metrics.exists() else {}
    last = max(columns.get("frames", []), default=0)
    evaluated = not math.isnan((columns.get("eval/return_mean") or [math.nan])[-1])
    # The original total counts: the current one may have been raised to continue, and a checkpoint came with the last
    # frame of the original total.
    ended = bool(folder.published) and last >= folder.settings["total_frames"] and evaluated
    # Rows for the frame of the first checkpoint are written before it, so a killed process may leave them. That
    # checkpoint comes at the end of a batch.
    batch = config.frames_per_batch * config.devices
    if ended or last > batch * math.ceil(config.checkpoint_every / batch):
        raise UserError(
            f"{folder.path} has a log up to frame {last:,.0f} but no checkpoint to continue from; restore its "
            f"checkpoints, or start a new run with --config {folder.path / CONFIGURATION_FILE} and another --run_dir."
        )


def check_unfinished(config: TrainingConfiguration, folder: RunFolder, first_frame: int) -> None:
    """Refuses to continue a run that has all its frames and its actor, or has reached its return.

    A run that was killed before it saved its actor may continue, to do so. Anything after the last checkpoint is
    ignored.

    Args:
        config: the run's settings.
        folder: its folder.
        first_frame: where it would continue.

    Raises:
        UserError: naming the frame or the evaluation.
    """
    if first_frame >= config.total_frames and folder.published:
        raise UserError(f"the run finished at frame {first_frame:,}; raise --total_frames to continue.")
    columns = read_metrics(folder.metrics) if folder.metrics.exists() else {}
    target = math.inf if config.stop_at_return is None else config.stop_at_return
    for frame, value in zip(columns.get("frames", []), columns.get("eval/return_mean", []), strict=False):
        if frame <= first_frame and value >= target:
            raise UserError(
                f"the run is finished: its evaluation at frame {frame:,.0f} gave a return of {value:.1f}, at least "
                f"--stop_at_return {target:g}; raise --stop_at_return or set it to null to continue."
            )


def restore_checkpoint(
    state: dict[str, Any], module: OffPolicyModule, frames: FramesDataset, archive: ReplayArchive
) -> None:
    """Restores the state in which a checkpoint was written.

    Args:
        state: what [`CheckpointFolder.newest`][qsm_rl.training.CheckpointFolder.newest] returned.
        module: the module of a run with the same settings.
        frames: its data set, before any iteration.
        archive: the replay buffer's files.

    Raises:
        UserError: if the checkpoint does not fit the networks or holds NaN, naming the first difference, or if the
            replay files do not fit the checkpoint.
    """
    manifests, env = manifests_of_ranks(state), frames.collector.env
    if len(manifests) != frames.num_ranks:
        raise UserError(
            f"the run was trained with devices: {len(manifests)}, each with its own replay buffer, but config.yaml in "
            f"the run's folder now has devices: {frames.num_ranks}; set it back to {len(manifests)}."
        )
    try:
        if state["training"]["env_frames"] != state["frames"]:
            raise ValueError("its frame count does not match its name")
        if difference := first_difference(dict(state["environment"]), dict(env.state_dict()), "environment"):
            raise ValueError(difference)
        module.restore_state(state["training"])
        update = state["training"]["update"]
        # In a module's extra state NaN may stand for "not known yet", as in a value support.
        weights = {name: value for name, value in update["modules"].items() if not name.endswith("_extra_state")}
        if bad := first_non_finite([weights, update["optimizers"], state["environment"]], "state"):
            raise ValueError(f"{bad}, which a run never stores")
        env.load_state_dict(state["environment"])
        archive.restore(module.writer.replay, manifests[rank()], module.writer.entries(env.fake_tensordict()))
    except (RuntimeError, LookupError, ValueError, TypeError, AttributeError, OverflowError) as error:
        reason = " ".join(str(error).split())
        missing = f"{reason} is missing" if isinstance(error, KeyError) else reason[:300]
        raise UserError(f"the checkpoint at frame {state['frames']:,} does not match this run: {missing}.") from error
    frames.first_frame = state["frames"]
    module.elapsed_seconds = state.get("elapsed_seconds", 0.0)  # missing in early versions
