from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.training.small_trainer import WIDE, build, run


def test_same_seed_gives_the_same_losses_and_bounds_change_nothing():
    """The same problem under bounds [-1, 1] and [-3, 3]: dynamics and critics see the action's share of its bound."""
    narrow, again = run(*build("Slide")), run(*build("Slide"))
    assert narrow == again
    wide = run(*build("WideSlide", bound=WIDE))
    assert sum("loss/actor" in row for row in narrow) == 41
    for one, other in zip(narrow, wide, strict=True):
        assert one == pytest.approx(other, rel=1e-3)


def test_the_actor_learns_from_the_critics_just_updated():
    """The update against the same steps written out, critics first."""
    _, module = build("Slide", gradient_clipping=0.5)
    frames, _ = build("Slide", total=40)
    for batch in frames:
        module.writer.write(batch)
    batch = module.writer.replay.sample()

    _, other = build("Slide")
    loss = other.update.loss
    optimizers = {
        name: torch.optim.Adam(getattr(loss, f"{network}_params").parameters(), lr=1e-3)
        for name, network in (("critic", "qvalue_network"), ("actor", "actor_network"))
    }
    torch.manual_seed(7)
    for name, half in (("critic", loss.qvalue_loss), ("actor", loss.actor_loss)):
        value, _ = half(batch)
        optimizers[name].zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(optimizers[name].param_groups[0]["params"], 0.5)
        optimizers[name].step()
        if name == "critic":
            online, target = loss.qvalue_network_params.data, loss.target_qvalue_network_params.data
            for key, value in online.items(True, True):
                target.set_(key, 0.95 * target.get(key) + 0.05 * value)

    torch.manual_seed(7)
    module.update(batch)
    for (name, mine), theirs in zip(module.update.loss.state_dict().items(), loss.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6, msg=name)


def test_averaged_actor_is_what_is_evaluated_and_does_not_train():
    _, module = build("Slide", actor_ema=0.75)
    live = [parameter.detach().clone() for parameter in module.update.actor_parameters]
    average = [parameter.clone() for parameter in live]
    batches = list(build("Slide", total=40)[0])
    for batch in batches:
        module.writer.write(batch)
    for step in range(3):
        module.update(module.writer.replay.sample())
        live = [parameter.detach().clone() for parameter in module.update.actor_parameters]
        # the first call takes the actor over, as torch's AveragedModel does
        average = live if step == 0 else [0.75 * a + 0.25 * b for a, b in zip(average, live, strict=True)]
    mine = list(module.update.policy.parameters())
    assert len(mine) == len(average)
    for a, b in zip(mine, average, strict=True):
        torch.testing.assert_close(a.detach(), b)
    assert not torch.equal(mine[0], live[0])
