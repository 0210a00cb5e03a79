"""Off-policy training as a LightningModule: one training step is one batch of frames with all its updates."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from tensordict import TensorDictBase
from torch.optim import Optimizer

from qsm_rl.training.data.replay import TransitionWriter
from qsm_rl.training.errors import TrainingError
from qsm_rl.training.ranks import from_rank_zero
from qsm_rl.training.runs.faults import write_fault
from qsm_rl.training.runs.metrics import MetricWindow
from qsm_rl.training.updates.update import NonFiniteLossError, Update

__all__ = ["NonFiniteDataError", "OffPolicyModule"]

MOST_DRAWN_TOGETHER = 16
CHECKED_ENTRIES = ("observation", "action", ("next", "reward"), ("next", "observation"))


class NonFiniteDataError(TrainingError):
    """An environment or policy returned NaN or infinity. Raised before the frame reaches the replay buffer."""


class OffPolicyModule(LightningModule):
    """Writes each collected batch to the replay buffer, then performs all updates that are due.

    The first update comes with the last frame of the warm-up; from then on there are ``updates_per_frame`` updates per
    frame. The module is independent of the algorithm, which ``update`` implements.

    Args:
        update: the algorithm's update.
        writer: writes to the replay buffer that updates sample from.
        env: name of the environment, for messages.
        warmup_frames: frames before the first update.
        updates_per_frame: updates per frame after that.
        count: maps a batch's number of entries to the number of frames that it counts for, see ``FramesDataset.count``.
        faults: folder for dumps of non-finite values, see [`read_fault`][qsm_rl.training.read_fault]; None writes no
            dumps.

    Attributes:
        env_frames: frames collected since the run began.
        grad_steps: updates done since the run began.
        window: metrics since the last row of the log.
    """

    def __init__(
        self,
        update: Update,
        writer: TransitionWriter,
        *,
        env: str,
        warmup_frames: int,
        updates_per_frame: float,
        count: Callable[[int], int] = int,
        faults: Path | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.update = update
        self.writer = writer
        self.env = env
        self.warmup_frames = max(1, warmup_frames)
        self.updates_per_frame = updates_per_frame
        self.count = count
        self.faults = faults
        # Plain integers: buffers would live on the GPU, and reading them would wait for it at every frame.
        self.env_frames = 0
        self.elapsed_seconds = 0.0  # of training, up to the last row of the log; set by MetricRows
        self.grad_steps = 0
        self.window = MetricWindow()

    def configure_optimizers(self) -> list[Optimizer]:
        """The update's optimisers; the update steps them itself."""
        return list(self.update.optimizers.values())

    def transfer_batch_to_device(
        self, batch: TensorDictBase, device: torch.device, dataloader_idx: int
    ) -> TensorDictBase:
        """Leaves the collected frames where they are; the replay buffer moves them to its device."""
        return batch

    def training_step(self, batch: TensorDictBase, batch_idx: int) -> None:
        """Stores the frames ``(num_envs, T)`` and updates.

        Raises:
            NonFiniteDataError: naming the entry of the batch and the environment.
            NonFiniteLossError: naming the loss and the frame.
        """
        self._check_finite(batch)
        self.env_frames += self.count(batch.numel())
        self._log_episodes(batch)
        self.writer.write(batch)
        replay = self.writer.replay
        if len(replay) == 0:
            return
        if self.grad_steps == 0 and self.updates_due > 0:
            self.update.begin(from_rank_zero(replay[:]))
        for batches in self._draw(self.updates_due - self.grad_steps):
            self._update(batches)

    def _update(self, batches: Sequence[TensorDictBase]) -> None:
        """Updates on each batch, and checks that every loss was finite."""
        for index, batch in enumerate(batches):
            random_state = torch.get_rng_state()
            try:
                losses = self.update(batch)
                if index + 1 == len(batches):
                    self.update.check()
            except NonFiniteLossError as error:
                bad = batches[index - error.updates_since]
                dump = self._dump(bad, error, weights=self.update.state_dict(), random_state=random_state)
                raise NonFiniteLossError(
                    f"{error} at frame {self.env_frames:,}, update {self.grad_steps - error.updates_since:,}; "
                    f"lower the learning rates, or set --gradient_clipping 1.{dump}"
                ) from error
            self.window.add({f"loss/{name}": value for name, value in losses.items()})
            self.grad_steps += 1

    @property
    def updates_due(self) -> int:
        """Number of updates that should have been done by now."""
        if self.env_frames < self.warmup_frames:
            return 0
        return math.floor((self.env_frames - self.warmup_frames + 1) * self.updates_per_frame)

    def metrics(self) -> dict[str, float]:
        """A row of the log: averages of losses and episodes since the last one, diagnostics of the last update."""
        row = self.window.pop()
        if self.grad_steps > 0:
            row.update({f"train/{name}": float(value) for name, value in self.update.diagnostics().items()})
        return row

    def checkpoint_state(self) -> dict[str, Any]:
        """The state of training as plain data, without replay buffer and environments."""
        return {"env_frames": self.env_frames, "grad_steps": self.grad_steps, "update": self.update.checkpoint_state()}

    def restore_state(self, state: dict[str, Any]) -> None:
        """Restores what [`checkpoint_state`][qsm_rl.training.OffPolicyModule.checkpoint_state] returned."""
        self.env_frames, self.grad_steps = state["env_frames"], state["grad_steps"]
        self.update.restore_state(state["update"])

    def _draw(self, count: int) -> Iterator[Sequence[TensorDictBase]]:
        """Batches from the replay buffer, up to sixteen drawn together, which halves the cost of each."""
        replay = self.writer.replay
        while count > 0:
            together = min(count, MOST_DRAWN_TOGETHER)
            yield replay.sample(together * replay.batch_size).split(replay.batch_size)
            count -= together

    def _log_episodes(self, batch: TensorDictBase) -> None:
        ended = batch["next", "episode_end"]
        if ended.any():
            returns, lengths = batch["next", "episode_reward"][ended], batch["next", "step_count"][ended]
            for episode_return, length in zip(returns.tolist(), lengths.tolist(), strict=True):
                self.window.add({"train/return_mean": episode_return, "train/episode_length": float(length)})

    def _check_finite(self, batch: TensorDictBase) -> None:
        for key in CHECKED_ENTRIES:
            values = batch.get(key)
            if not torch.isfinite(values).all():
                name = key if isinstance(key, str) else "next " + key[1]
                bad = values[~torch.isfinite(values)][0].item()
                error = NonFiniteDataError(
                    f"{name} of {self.env} is {bad} between frames {self.env_frames:,} and "
                    f"{self.env_frames + batch.numel():,}; it was kept out of the replay buffer, and training stops."
                )
                raise NonFiniteDataError(f"{error}{self._dump(batch, error)}")

    def _dump(self, batch: TensorDictBase, error: Exception, **state: Any) -> str:
        """Writes a dump to reproduce the error; returns a sentence for the message that says where it is."""
        if self.faults is None:
            return ""
        folder = self.faults / f"frame-{self.env_frames:012d}"
        about = {"message": str(error), "env": self.env, "frame": self.env_frames, "update": self.grad_steps}
        try:
            write_fault(folder, batch, about=about, **state)
        except OSError as failure:
            return f" (No dump could be written: {failure.strerror or failure}.)"
        return f"\nA dump to reproduce it: {folder}"
