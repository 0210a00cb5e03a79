"""The progress bar: frames, speed, time left, and the latest returns."""

from __future__ import annotations

import math
import shutil
import sys
import time
from typing import Any, TextIO

from lightning.pytorch import Callback, Trainer
from tqdm import tqdm

from qsm_rl.training.data.frames import FramesDataset
from qsm_rl.training.runs.callbacks import Evaluation
from qsm_rl.training.runs.module import OffPolicyModule

__all__ = ["Progress"]

BAR_INTERVAL = 0.5
LINE_INTERVAL = 15.0
WIDE = 110  # columns needed for a bar and whole words
MEMORY = 20.0  # seconds over which speeds are averaged, since the warm-up is many times faster than training


class Speed:
    """Events per second, averaged over the last seconds."""

    def __init__(self, count: int, now: float) -> None:
        self.value = 0.0
        self._count, self._time, self._fresh = count, now, True

    def update(self, count: int, now: float) -> float:
        """The speed at time ``now``, by which ``count`` events have happened."""
        seconds = max(now - self._time, 1e-9)
        weight = 1.0 if self._fresh else 1 - math.exp(-seconds / MEMORY)
        self.value += weight * ((count - self._count) / seconds - self.value)
        self._count, self._time, self._fresh = count, now, False
        return self.value


class Progress(Callback):
    """A bar on a terminal; otherwise, for example in a log file, a line every fifteen seconds.

    Args:
        frames: the data set.
        evaluation: the evaluation callback, for its latest result.
        stream: where the bar is written; stderr if not given.
    """

    def __init__(self, frames: FramesDataset, evaluation: Evaluation, stream: TextIO | None = None) -> None:
        self.frames = frames
        self.evaluation = evaluation
        self.stream = sys.stderr if stream is None else stream
        self._terminal = self.stream.isatty()
        self._training_return: float | None = None
        self._next = 0.0
        self._shown = -1

    def on_train_start(self, trainer: Trainer, module: OffPolicyModule) -> None:
        """Opens the bar."""
        now = time.perf_counter()
        self._frame_speed, self._update_speed = Speed(module.env_frames, now), Speed(module.grad_steps, now)
        self._next = now + (0.0 if self._terminal else LINE_INTERVAL)
        columns, lines = shutil.get_terminal_size()  # 80 and 24 if a terminal reports no size
        self._wide = columns >= WIDE or not self._terminal
        self._bar = tqdm(
            total=self.frames.total_frames,
            bar_format="{percentage:3.0f}% "
            + ("{bar} {n_fmt}/{total_fmt} frames" if self._wide else "{n_fmt}/{total_fmt}")
            + "{postfix}",
            unit_scale=not self._wide,
            ncols=columns,
            nrows=lines,
            mininterval=0,
            file=self.stream,
            disable=not self._terminal,
        )

    def on_train_batch_end(
        self, trainer: Trainer, module: OffPolicyModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Shows the state of the run, no more often than can be read."""
        ended = batch["next", "episode_end"]
        if ended.any():
            self._training_return = batch["next", "episode_reward"][ended][-1].item()
        now = time.perf_counter()
        if now >= self._next:
            self._show(module, now)
            self._next = now + (BAR_INTERVAL if self._terminal else LINE_INTERVAL)

    def on_train_end(self, trainer: Trainer, module: OffPolicyModule) -> None:
        """Shows the final state and closes the bar."""
        if module.env_frames > self._shown:
            self._show(module, time.perf_counter())
        self._bar.close()

    def _show(self, module: OffPolicyModule, now: float) -> None:
        self._shown, total = module.env_frames, self.frames.total_frames
        frame_speed = self._frame_speed.update(module.env_frames, now)
        update_speed = self._update_speed.update(module.grad_steps, now)
        # The last batch of frames may exceed the total.
        left = tqdm.format_interval(max(0, total - module.env_frames) / max(frame_speed, 1e-9))
        result = self.evaluation.last
        evaluated = None if result is None else result.metrics()["eval/return_mean"]
        left += " left; return:" if self._wide else ","
        returns = f"train {_number(self._training_return)}, eval {_number(evaluated)}"
        status = f"{frame_speed:.0f} frames/s, {update_speed:.0f} updates/s, {left} {returns}"
        if self._terminal:
            self._bar.set_postfix_str(status, refresh=False)
            self._bar.update(module.env_frames - self._bar.n)
        else:
            share = min(1.0, module.env_frames / total)
            print(f"{module.env_frames:,}/{total:,} frames ({share:.0%}), {status}", file=self.stream, flush=True)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}" if abs(value) < 1000 else f"{value:.0f}"
