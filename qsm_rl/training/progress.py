"""The progress bar: frames, speed, time left, and the last returns."""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO

from lightning.pytorch import Callback, Trainer
from tqdm import tqdm

from qsm_rl.training.callbacks import Evaluation
from qsm_rl.training.frames import FramesDataset
from qsm_rl.training.module import OffPolicyModule

__all__ = ["Progress"]

BAR_INTERVAL = 0.5
LINE_INTERVAL = 15.0


class Progress(Callback):
    """A bar on a terminal; elsewhere, as in a log file, a line every fifteen seconds.

    Args:
        frames: the data set.
        evaluation: the evaluation callback, for the last result.
        stream: where it is written; stderr when not given.
    """

    def __init__(self, frames: FramesDataset, evaluation: Evaluation, stream: TextIO | None = None) -> None:
        self.frames = frames
        self.evaluation = evaluation
        self.stream = sys.stderr if stream is None else stream
        self._terminal = self.stream.isatty()
        self._bar: tqdm | None = None
        self._training_return: float | None = None
        self._next = self._begin = 0.0
        self._begin_steps = self._shown = 0

    def on_train_start(self, trainer: Trainer, module: OffPolicyModule) -> None:
        """Opens the bar."""
        self._begin, self._begin_steps = time.perf_counter(), module.grad_steps
        self._next = 0.0 if self._terminal else self._begin + LINE_INTERVAL
        self._bar = tqdm(
            total=self.frames.total_frames,
            initial=self.frames.first_frame,
            unit="frame",
            dynamic_ncols=True,
            smoothing=0.05,
            file=self.stream,
            disable=not self._terminal,
        )

    def on_train_batch_end(
        self, trainer: Trainer, module: OffPolicyModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Shows where the run is, not more often than can be read."""
        ended = batch["next", "episode_end"]
        if ended.any():
            self._training_return = batch["next", "episode_reward"][ended][-1].item()
        now = time.perf_counter()
        if now >= self._next:
            self._show(module, now)
            self._next = now + (BAR_INTERVAL if self._terminal else LINE_INTERVAL)

    def on_train_end(self, trainer: Trainer, module: OffPolicyModule) -> None:
        """Shows the end and closes the bar."""
        if module.env_frames > self._shown:
            self._show(module, time.perf_counter())
        if self._bar is not None:
            self._bar.close()

    def _show(self, module: OffPolicyModule, now: float) -> None:
        self._shown = module.env_frames
        seconds = max(now - self._begin, 1e-9)
        updates = (module.grad_steps - self._begin_steps) / seconds
        returns = f"train {_number(self._training_return)}, eval {_number(self._evaluation_return())}"
        assert self._bar is not None
        if self._terminal:
            self._bar.set_postfix_str(f"{updates:.0f} updates/s, {returns}", refresh=False)
            self._bar.update(module.env_frames - self._bar.n)
            self._bar.refresh()
            return
        total = self.frames.total_frames
        speed = (module.env_frames - self.frames.first_frame) / seconds
        left = tqdm.format_interval((total - module.env_frames) / max(speed, 1e-9))
        print(
            f"{module.env_frames:,}/{total:,} frames ({module.env_frames / total:.0%}), {speed:.0f} frames/s, "
            f"{updates:.0f} updates/s, {left} left, return: {returns}",
            file=self.stream,
            flush=True,
        )

    def _evaluation_return(self) -> float | None:
        last = self.evaluation.last
        return None if last is None else last.metrics()["eval/return_mean"]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
