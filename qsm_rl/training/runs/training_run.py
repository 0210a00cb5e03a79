"""The part of a recipe around its algorithm: everything before the networks are built, and everything after."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.data import Bounded, TensorDictReplayBuffer
from torchrl.envs import EnvBase

from qsm_rl.training.configuration.hardware import choose_arithmetic, choose_device, limit_threads, set_products
from qsm_rl.training.configuration.training_configuration import TrainingConfiguration
from qsm_rl.training.data.checkpoints import CheckpointFolder
from qsm_rl.training.data.collection import check_workers, make_collector
from qsm_rl.training.data.frames import FramesDataset
from qsm_rl.training.data.offline_data import DatasetCollector, OfflineWriter
from qsm_rl.training.data.replay import ReplayArchive, TransitionWriter, row_bytes
from qsm_rl.training.data.replay_storage import (
    AgentsReplayBuffer,
    ReservedMemmapStorage,
    check_replay_space,
    make_storage,
)
from qsm_rl.training.environments.make_environment import check_registered, make_environment
from qsm_rl.training.errors import UserError, full_disk_errors, user_errors
from qsm_rl.training.evaluation.videos import check_filming
from qsm_rl.training.random_state import derived_seed, seed_everything
from qsm_rl.training.ranks import rank
from qsm_rl.training.runs.actor_files import publish_actor
from qsm_rl.training.runs.loggers import check_logger
from qsm_rl.training.runs.module import OffPolicyModule
from qsm_rl.training.runs.preflight import check_space
from qsm_rl.training.runs.resuming import (
    check_identity,
    check_never_stored,
    check_unfinished,
    restore_checkpoint,
    run_identity,
)
from qsm_rl.training.runs.run_folder import RunFolder
from qsm_rl.training.runs.running import (
    finish_run,
    make_callbacks,
    make_loggers,
    print_summary,
    quiet_libraries,
)
from qsm_rl.training.runs.stacked_run import split_seeds
from qsm_rl.training.updates.update import Update

__all__ = ["TrainingRun", "checked_environment"]

Configuration = TypeVar("Configuration", bound=TrainingConfiguration)


def checked_environment(config: TrainingConfiguration, num_envs: int) -> tuple[Callable[..., EnvBase], EnvBase]:
    """A function that makes a run's environments from ``seed`` and ``num_envs``, and the first that it made.

    Raises:
        UserError: if there is no such environment, or if the logger, workers or videos are not available.
    """
    make = partial(
        make_environment,
        config.env,
        action_repeat=config.action_repeat,
        normalize_observation=config.normalize_observation,
    )
    check_logger(config.logger)
    check_workers(config)
    with user_errors(ValueError, ImportError):
        if config.eval_video:
            check_filming(config.env, make)
        check_registered(config.env)
        return make, make(num_envs=num_envs, seed=config.seed)


@dataclass(frozen=True, kw_only=True)
class TrainingRun(Generic[Configuration]):
    """One run of an off-policy recipe: ``begin`` it, build policy, critics, loss and update, and ``train``.

    Attributes:
        config: the settings, with ``compile`` and ``precision`` resolved.
        device: device of the networks and the replay buffer.
        environment: the training environments, ``num_envs`` in one batch.
        make_environment: makes another environment, for evaluations; called with ``seed`` (and ``num_envs``).
        folder: the run's folder.
        checkpoint: the checkpoint at which the run continues; None for a new run.
    """

    config: Configuration
    device: torch.device
    environment: EnvBase
    make_environment: Callable[..., EnvBase]
    folder: RunFolder
    checkpoint: dict[str, Any] | None

    @classmethod
    def begin(cls, config: Configuration, recipe: Path | str) -> TrainingRun[Configuration]:
        """Chooses device and arithmetic, seeds everything, makes environments and folder, and prints a summary.

        Args:
            config: the settings as given; ``resume`` continues the run in that folder.
            recipe: the recipe's file, after which the folder is named.

        Raises:
            UserError: if device, environment or folder is not available; nothing has been written then.
        """
        quiet_libraries()
        device = choose_device(config.device)
        if device.type == "cuda" and config.devices > 1:
            device = choose_device(f"cuda:{rank()}")
        config = choose_arithmetic(config, device)
        set_products(config.precision, device)
        limit_threads(device, config.num_workers if config.worker_backend == "process" else 0)
        seed_everything(config.seed)
        make, environment = checked_environment(config, config.num_envs * config.seeds)
        check_replay_space(config, environment)
        folder = RunFolder.open(config, recipe=Path(recipe).stem)
        checkpoints, checkpoint = CheckpointFolder(folder.checkpoints), None
        if folder.resumed and checkpoints.frames():
            checkpoint = checkpoints.newest()
            check_identity(checkpoint, run_identity(config, environment), folder.path)
        run = cls(
            config=config,
            device=device,
            environment=environment,
            make_environment=make,
            folder=folder,
            checkpoint=checkpoint,
        )
        if rank() > 0:
            return run
        if folder.resumed:
            if checkpoint is None:
                check_never_stored(config, folder)
            check_unfinished(config, folder, run.first_frame)
        print_summary(config, folder, environment, device, first_frame=run.first_frame)
        return run

    @property
    def first_frame(self) -> int:
        """Frames that earlier processes have collected."""
        return self.checkpoint["frames"] if self.checkpoint else 0

    @property
    def action_spec(self) -> Bounded:
        """The actions of one environment, shape ``(A,)``."""
        return self.environment.action_spec_unbatched

    @property
    def action_dim(self) -> int:
        """A, the number of action dimensions."""
        return self.action_spec.shape[-1]

    @property
    def observation_dim(self) -> int:
        """O, the number of observation features."""
        return self.environment.observation_spec["observation"].shape[-1]

    def train(
        self,
        update: Update,
        acting: TensorDictModuleBase,
        *,
        dataset: TensorDictBase | None = None,
        offline_frames: int = 0,
    ) -> int:
        """Collects, updates, evaluates, logs and writes checkpoints until the run ends, and saves the actor.

        Args:
            update: the algorithm's update, on ``device``.
            acting: the policy that collects, including exploration; reads ``observation``, writes ``action``.
            dataset: transitions ``(N,)`` from [`read_dataset`][qsm_rl.training.read_dataset] with which the replay
                buffer starts.
            offline_frames: number of frames at the beginning for which nothing is collected: updates use the data set
                alone.

        Returns:
            The exit code: 0, or 128 plus the signal that ended the run.

        Raises:
            UserError: if the checkpoint does not fit the networks.
            TrainingError: if training cannot go on.
        """
        config, folder, ranks = self.config, self.folder, self.config.devices

        # Data: frames from the collector and transitions in the replay buffer, separate for each rank.
        storage = make_storage(config, folder.path, self.device)
        agents = config.seeds  # more than one agent in a run: stacked, see stacked_run.py
        if agents > 1:
            replay = AgentsReplayBuffer(agents, storage=storage, batch_size=config.batch_size)
        else:
            replay = TensorDictReplayBuffer(storage=storage, batch_size=config.batch_size)
        if storage.device != self.device:
            replay.append_transform(lambda batch: batch.to(self.device))
        archive = ReplayArchive.of_rank(folder.checkpoints, rank())
        collector = make_collector(
            replace(config, frames_per_batch=config.frames_per_batch * agents),
            self.environment,
            self.make_environment,
            acting,
            self.device,
            warmup_frames=max(0, -(-(config.capped_warmup - self.first_frame) // ranks)) * agents,
            cuda_graph=update.cuda_graph,
        )
        writer = TransitionWriter(replay, n_step=config.n_step, gamma=config.gamma, agents=agents > 1)
        if dataset is not None:
            collector = DatasetCollector(collector, dataset, offline_frames, self.first_frame)
            writer = OfflineWriter(replay, offline_frames=offline_frames, first_frame=self.first_frame)
            if not self.checkpoint:
                replay.extend(dataset)
        frames = FramesDataset(
            collector,
            seed=config.seed if rank() == 0 else derived_seed(config.seed, "rank", rank()),
            total_frames=config.total_frames,
            checkpoint_every=config.checkpoint_every,
            first_frame=self.first_frame,
            num_ranks=ranks,
            num_agents=agents,
        )

        try:
            # Training: one step per batch of frames.
            module = OffPolicyModule(
                update,
                writer,
                env=config.env,
                warmup_frames=config.capped_warmup,
                updates_per_frame=config.updates_per_frame,
                count=frames.count,
                faults=folder.faults if rank() == 0 else folder.faults / f"rank-{rank()}",
            )
            if rank() == 0:  # one machine: the needs of all processes together
                known = 0 if dataset is None else len(dataset)
                written = known + max(0, config.total_frames - offline_frames)
                stored = known + max(0, self.first_frame - offline_frames) if self.checkpoint else 0
                self._check_space(module, written, stored)
            if self.checkpoint:
                restore_checkpoint(self.checkpoint, module, frames, archive)
            devices: int | list[int] = ranks
            if self.device.type == "cuda" and ranks == 1:
                devices = [self.device.index]
            with full_disk_errors(folder.path):
                trainer = Trainer(
                    accelerator=self.device.type,
                    devices=devices,
                    strategy=DDPStrategy() if ranks > 1 else "auto",
                    plugins=LightningEnvironment(),  # starts the other processes here, even within a scheduler's job
                    max_epochs=1,
                    logger=make_loggers(config, folder, first_frame=self.first_frame) if rank() == 0 else [],
                    callbacks=make_callbacks(config, folder, frames, archive, self.make_environment),
                    enable_checkpointing=False,
                    enable_progress_bar=False,
                    enable_model_summary=False,
                    log_every_n_steps=0,  # the callbacks log, by frames
                )
                try:
                    trainer.fit(module, frames)
                except SystemExit as end:
                    if isinstance(end.__context__, KeyboardInterrupt):  # Lightning would exit silently with code 1
                        raise KeyboardInterrupt from None
                    raise
        except BaseException:
            frames.close()  # live workers would keep this process from ending
            folder.close()
            raise
        finally:
            if isinstance(storage, ReservedMemmapStorage):
                storage.remove()
        if rank() > 0:
            frames.close()
            return 0

        with full_disk_errors(folder.path):
            if update.agents:
                split_seeds(config, folder, update.agents)
            for name, actor in update.actors.items():
                path = folder.path / name / folder.actor.name
                publish_actor(
                    path, actor, environment=self.environment, env=config.env, action_repeat=config.action_repeat
                )
        return finish_run(trainer, module, frames, folder, usual_frames=type(config).total_frames)

    def _check_space(self, module: OffPolicyModule, written: int, stored: int) -> None:
        """Checks the space for the run's ``written`` transitions, ``stored`` of which are on disk already."""
        config = self.config
        capacity = module.writer.replay.storage.max_size  # of this rank
        rows = min(capacity * config.devices, written)
        try:
            check_space(
                self.folder.path,
                rows=rows,
                capacity=capacity,
                row=row_bytes(module.writer.entries(self.environment.fake_tensordict())),
                checkpoint_every=config.checkpoint_every,
                state={k: v for k, v in module.update.state_dict().items() if isinstance(v, torch.Tensor)},
                device=self.device if config.replay_storage == "memory" else None,
                stored=min(stored, rows),
            )
        except UserError:
            if not self.folder.resumed:
                self.folder.discard()
            raise
