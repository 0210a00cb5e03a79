from __future__ import annotations

import pytest
import torch

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


def test_a_state_from_before_the_first_update_is_taken_over_and_another_is_named():
    one, other = (build("Slide")[1].update for _ in range(2))
    with torch.no_grad():
        one.actor_parameters[0].add_(1)
    state = one.checkpoint_state()
    other.restore_state(state)
    assert torch.equal(other.actor_parameters[0], one.actor_parameters[0])
    state["optimizers"]["critic"]["param_groups"][0]["eps"] = 1e-5
    with pytest.raises(ValueError, match=r"the critic optimiser's.*eps is 1e-05, expected 1e-08"):
        other.restore_state(state)
