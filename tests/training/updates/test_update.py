from __future__ import annotations

import pytest

from qsm_rl.training.updates.update import cosine_decay
from tests.training.small_trainer import build, run


def test_actor_rate_decays_by_updates_and_the_critics_stays():
    assert cosine_decay(0, 4) == 1
    assert cosine_decay(1, 4) == pytest.approx(0.8535534)  # (1 + cos(45 degrees)) / 2
    assert cosine_decay(4, 4) == cosine_decay(9, 4) == 0
    frames, module = build("Slide", actor_learning_rate_decay=4)
    run(frames, module)
    rates = {name: optimizer.param_groups[0]["lr"] for name, optimizer in module.update.optimizers.items()}
    assert rates == {"actor": 0.0, "critic": 1e-3}
