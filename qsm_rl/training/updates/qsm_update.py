"""One update of Q-score matching, in the authors' order."""

from __future__ import annotations

from typing import Any

from tensordict import TensorDictBase
from torch import Tensor

from qsm_rl.objectives import QScoreMatchingLoss
from qsm_rl.temperature import SpreadTuner
from qsm_rl.training.ranks import gather_rows
from qsm_rl.training.updates.diffusion_update import DiffusionUpdate

__all__ = ["QSMUpdate"]

TUNING_PERIOD = 10


class QSMUpdate(DiffusionUpdate):
    """A [`DiffusionUpdate`][qsm_rl.training.DiffusionUpdate] that can also tune the temperature automatically.

    Args:
        loss: the loss, with its value estimator made and on its device.
        spread_tuner: adjusts the score target's temperature; None leaves it fixed. It is called every ``TUNING_PERIOD``
            updates with 8 actions for each of the batch's first 32 observations.
        **options: options of [`DiffusionUpdate`][qsm_rl.training.DiffusionUpdate].
    """

    loss: QScoreMatchingLoss

    def __init__(self, loss: QScoreMatchingLoss, *, spread_tuner: SpreadTuner | None = None, **options: Any) -> None:
        super().__init__(loss, **options)
        self._spread_tuner = (spread_tuner,)  # it holds the loss's score target: in a tuple, like the actor

    def forward(self, batch: TensorDictBase) -> dict[str, Tensor]:
        """See ``DiffusionUpdate.forward``; then tunes the temperature if it is due."""
        losses = super().forward(batch)
        (tuner,) = self._spread_tuner
        if tuner is not None and self.num_updates % TUNING_PERIOD == 0:
            tuner(gather_rows(self._samples(), dim=1))
        return losses

    def diagnostics(self) -> dict[str, Tensor]:
        """The base's diagnostics, with sizes of dQ/da, score target and predicted noise, and the temperature."""
        out = super().diagnostics()
        buffers = dict(self.loss.score_target.named_buffers())
        if out and "temperature" in buffers:
            out["temperature"] = buffers["temperature"].clone()
        return out
