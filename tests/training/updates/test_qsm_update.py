from __future__ import annotations

import pytest
import torch
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.data import Bounded

from qsm_rl import (
    BestOfN,
    BoltzmannQScore,
    DiffusionActor,
    NoiseSchedule,
    NormalizedQScore,
    QScoreMatchingLoss,
    QValueMLP,
    ScoreMLP,
    SpreadTuner,
)
from qsm_rl.training import QSMUpdate
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


def test_the_actor_waits_for_its_turn():
    """Of seven updates with a delay of 3 the third and the sixth move the actor, at the decay's steps 0 and 1."""
    _, module = build("Slide", policy_delay=3, actor_learning_rate_decay=4, critic_adam_beta1=0.5)
    batch = replayed(module)
    assert module.update.optimizers["critic"].param_groups[0]["betas"] == (0.5, 0.999)
    moved, rates = [], []
    for _ in range(7):
        before = [parameter.detach().clone() for parameter in module.update.actor_parameters]
        losses = module.update(batch.clone())
        moved.append(not torch.equal(before[0], module.update.actor_parameters[0]))
        assert ("actor" in losses) == moved[-1] and "qvalue" in losses
        assert bool(module.update.diagnostics()) == any(moved)
        rates.append(module.update.optimizers["actor"].param_groups[0]["lr"])
    assert moved == [False, False, True, False, False, True, False]
    assert rates[2] == pytest.approx(1e-3) and rates[5] == pytest.approx(1e-3 * (1 + 0.5**0.5) / 2)


def test_a_target_actor_follows_without_target_critics(batch):
    actor = DiffusionActor(
        ScoreMLP(2, 2, (8,)), action_spec=Bounded(-1.0, 1.0, (2,)), noise_schedule=NoiseSchedule.vp(3)
    )
    critic = TensorDictModule(QValueMLP(2, 2, (8,)), ["observation", "action"], ["state_action_value"])
    loss = QScoreMatchingLoss(actor, [critic], delay_actor=True, delay_qvalue=False)
    update = QSMUpdate(loss, actor_learning_rate=0.1, critic_learning_rate=0.1, tau=0.25)
    keys = [key for key, value in loss.actor_network_params.items(True, True) if value.requires_grad]
    update(batch)
    start, online = (loss.target_actor_network_params.clone(), loss.actor_network_params.clone())
    update(batch)  # whose targets follow before the actor moves
    for key in keys:
        torch.testing.assert_close(loss.target_actor_network_params[key], start[key].lerp(online[key], 0.25))


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
    mine = list(module.update.policies[""].parameters())
    assert len(mine) == len(average)
    for a, b in zip(mine, average, strict=True):
        torch.testing.assert_close(a.detach(), b)
    assert not torch.equal(mine[0], live[0])


def test_the_best_of_several_is_evaluated_beside_the_actor(batch):
    _, module = build("Slide", eval_best_of=3, actor_ema=0.9)
    module.update(batch)
    assert module.update.policies.keys() == {"", "best_of_3"}
    assert module.update.policies[""] is module.update.actor
    policy = module.update.policies["best_of_3"]
    assert isinstance(policy, BestOfN) and policy.num_samples == 3
    assert policy.actor is module.update.actor is module.update.ema.module
    for mine, trained in zip(policy.critics, module.update.loss.trained_critics(), strict=True):
        torch.testing.assert_close(list(mine.parameters()), list(trained.parameters()))
    assert not any("critics" in name for name in module.update.state_dict())


def trained_for(updates: int, batch, **options):
    """Losses and weights after some updates on one batch, from the same weights and seed."""
    _, module = build("Slide", **options)
    torch.manual_seed(3)
    losses = [module.update(batch.clone()) for _ in range(updates)]
    return losses, module.update.loss.state_dict()


def replayed(module):
    """A batch from the replay buffer of a module."""
    for part in build("Slide", total=40)[0]:
        module.writer.write(part)
    return module.writer.replay.sample()


@pytest.fixture
def batch():
    return replayed(build("Slide")[1])


def test_bfloat16_updates_differ_by_rounding_only(batch):
    """bfloat16 keeps 8 binary digits, so each product is off by up to 0.4 %; what is stored stays float32."""
    expected, _ = trained_for(3, batch)
    losses, state = trained_for(3, batch, precision="bfloat16")
    for mine, theirs in zip(losses, expected, strict=True):
        assert mine["qvalue"].dtype == mine["actor"].dtype == torch.float32
        for name in mine:
            assert mine[name] != theirs[name]
            torch.testing.assert_close(mine[name], theirs[name], rtol=0.03, atol=0)
    assert all(value.dtype == torch.float32 for value in state.values() if value.is_floating_point())


def test_the_temperature_follows_the_spread_of_the_policy(batch):
    """Every tenth update multiplies it by (target / spread)^rate, with the spread that the log reports."""
    target = NormalizedQScore(0.1)
    _, module = build("Slide", score_target=target, spread_tuner=SpreadTuner(target, 0.2, rate=0.5))
    temperatures, spreads = [], []
    for _ in range(20):
        torch.manual_seed(5)
        module.update(batch.clone())
        before = torch.get_rng_state()
        row = module.update.diagnostics()
        assert torch.equal(torch.get_rng_state(), before), "a row of the log drew random numbers"
        temperatures.append(row["temperature"].item())
        spreads.append(row["policy_spread"].item())
    assert temperatures[:9] == pytest.approx([0.1] * 9)
    for at, previous in ((9, 0.1), (19, temperatures[9])):
        # the tuner sees other samples than the log: 8 x 16 x 2 of them know the spread to some percent
        ratio = min(10, 0.2 / max(spreads[at], 1e-3))
        assert temperatures[at] == pytest.approx(previous * ratio**0.5, rel=0.1)
        assert abs(temperatures[at] - previous) > 0.1 * previous
    assert temperatures[10:19] == pytest.approx([temperatures[9]] * 9)


@pytest.mark.slow
def test_compiled_updates_equal_eager_ones(batch):
    expected_losses, expected = trained_for(3, batch)
    # The compiler's own generators draw other numbers than eager code; with this both draw the same.
    with torch._inductor.config.patch(fallback_random=True):
        losses, state = trained_for(3, batch, compile=True)
    for mine, theirs in zip(losses, expected_losses, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=0)
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_statistics_of_the_critics_are_those_worked_out_by_hand(batch):
    _, module = build("Slide")
    module.update(batch)
    module.update._qvalue_info |= {
        "q_value": torch.tensor([[1.0, 2.0, 6.0], [3.0, 4.0, 8.0]]),
        "target_value": torch.tensor([0.0, 2.0, 4.0]),
        "next_action": torch.tensor([[-1.0, 0.5], [0.9, 1.0], [0.0, -0.9]]),
    }
    row = module.update.diagnostics()
    assert row["q_value"].item() == pytest.approx(4.0)
    assert row["q_value_spread"].item() == pytest.approx((14 / 3) ** 0.5)  # of the means 2, 3, 7
    assert row["target_value_spread"].item() == pytest.approx((8 / 3) ** 0.5)
    assert row["critic_disagreement"].item() == pytest.approx(1.0)
    assert row["action_saturation"].item() == pytest.approx(2 / 6)


def test_a_temperature_that_is_no_buffer_is_not_logged(batch):
    """A score target of one's own may keep it as a number, and then says itself what it reports."""

    class OwnTarget(BoltzmannQScore):
        def __init__(self):
            super().__init__(1.0)
            del self.temperature
            self.temperature = 1.0

    _, module = build("Slide", score_target=OwnTarget())
    module.update(batch)
    assert "temperature" not in module.update.diagnostics()
