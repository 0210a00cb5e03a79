"""The entropy bonus in the TD target, on a problem of two states solved by hand.

Either action leads from one state to the other; the reward is b_s a for actions in [-1, 1]. The soft-optimal policy is
exp(b_s a / lambda), and with v_s = lambda log(integral of exp(b_s a / lambda)) = lambda log(2 sinh(x_s) / x_s), x_s =
b_s / lambda, the soft values are V_0 = v_0 + gamma V_1 and V_1 = v_1 + gamma V_0.
"""

from __future__ import annotations

import math

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.data import Bounded
from torchrl.objectives import SoftUpdate

from qsm_rl import DiffusionActor, EntropyBonus, NoiseSchedule, QScoreMatchingLoss, ScoreMLP
from tests.loss_contract import assert_same, evaluate, make_actor, make_critics, make_transitions

SLOPES = (1.0, 2.0)
LAMBDA, GAMMA = 1.0, 0.5


class SoftOptimalActor(DiffusionActor):
    """Samples exp(b_s a / lambda) by inversion of its distribution function; the observation is the state."""

    def sample(
        self, observation: Tensor, initial_noise: Tensor | None = None, step_noise: Tensor | None = None
    ) -> Tensor:
        x = torch.tensor(SLOPES)[observation.long()] / LAMBDA
        return (torch.exp(-x) + torch.rand_like(x) * (x.exp() - torch.exp(-x))).log() / x


class TabularCritic(nn.Module):
    """Q(s, a) = b_s a + values[s]."""

    def __init__(self) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.zeros(2))

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        state = observation.long()
        return torch.tensor(SLOPES)[state] * action + self.values[state]


def two_state_loss(bonus: EntropyBonus | None) -> QScoreMatchingLoss:
    actor = SoftOptimalActor(
        ScoreMLP(1, 1, (4,)), action_spec=Bounded(-1.0, 1.0, (1,)), noise_schedule=NoiseSchedule.vp(2)
    )
    critic = TensorDictModule(TabularCritic(), ["observation", "action"], ["state_action_value"])
    loss = QScoreMatchingLoss(actor, [critic], target_action_noise_std=0.0, delay_qvalue=False, entropy_bonus=bonus)
    return loss.make_value_estimator(gamma=GAMMA)


def transitions(count: int) -> TensorDict:
    state = (torch.arange(count) % 2).unsqueeze(-1).float()
    action = torch.rand(count, 1) * 2 - 1
    flag = torch.zeros(count, 1, dtype=torch.bool)
    following = {"observation": 1 - state, "reward": torch.tensor(SLOPES)[state.long()] * action}
    return TensorDict(
        {"observation": state, "action": action, "next": {**following, "done": flag, "terminated": flag.clone()}},
        [count],
    )


def values_by_iteration(bonus: EntropyBonus | None) -> Tensor:
    """Fitted value iteration through the loss: what is left of the targets without the action's own reward."""
    loss, data = two_state_loss(bonus), transitions(4_000)
    values = loss.qvalue_network_params["module", "values"].data
    for _ in range(12):
        _, info = loss.qvalue_loss(data)
        rest = info["target_value"] - data["next", "reward"].squeeze(-1)
        values.copy_(torch.stack([rest[0::2].mean(), rest[1::2].mean()]).unsqueeze(0))
    return values[0]


def values_by_hand(bonus_temperature: float) -> Tensor:
    """gamma V(s') for V(s) = E[b_s a] + bonus_temperature H + gamma V(s'), the same policy throughout."""
    value = []
    for slope in SLOPES:
        x = slope / LAMBDA
        mean = 1 / math.tanh(x) - 1 / x
        entropy = math.log(2 * math.sinh(x) / x) - x * mean
        value.append(slope * mean + bonus_temperature * entropy)
    total = [(value[0] + GAMMA * value[1]) / (1 - GAMMA**2), (value[1] + GAMMA * value[0]) / (1 - GAMMA**2)]
    return GAMMA * torch.tensor([total[1], total[0]])


def test_the_bonus_at_the_same_temperature_gives_the_soft_optimal_values():
    torch.manual_seed(0)
    soft = [LAMBDA * math.log(2 * math.sinh(b / LAMBDA) / (b / LAMBDA)) for b in SLOPES]
    optimal = [(soft[0] + GAMMA * soft[1]) / (1 - GAMMA**2), (soft[1] + GAMMA * soft[0]) / (1 - GAMMA**2)]
    expected = GAMMA * torch.tensor([optimal[1], optimal[0]])
    torch.testing.assert_close(values_by_hand(LAMBDA), expected)  # E[Q] + lambda H is lambda log of the integral
    torch.testing.assert_close(values_by_iteration(EntropyBonus(LAMBDA)), expected, rtol=0, atol=0.04)


@pytest.mark.parametrize("temperature", [None, 0.5, 2.0])
def test_any_other_bonus_gives_other_values(temperature):
    torch.manual_seed(0)
    values = values_by_iteration(None if temperature is None else EntropyBonus(temperature))
    torch.testing.assert_close(values, values_by_hand(temperature or 0.0), rtol=0, atol=0.06)
    assert (values - values_by_hand(LAMBDA)).abs().amax() > 0.15


def test_the_bonus_is_reported_and_ends_with_the_episode():
    torch.manual_seed(0)
    loss = two_state_loss(EntropyBonus(LAMBDA))
    data = transitions(6)
    data["next", "terminated"][0] = data["next", "done"][0] = True
    _, info = loss.qvalue_loss(data)
    assert info["entropy_bonus"].shape == (6,) and info["entropy_bonus"][0] == 0 and info["entropy_bonus"][1:].all()
    torch.testing.assert_close(info["target_value"][0], data["next", "reward"][0, 0])
    assert "entropy_bonus" in loss.out_keys
    assert list(evaluate(loss, data).keys()) == loss.out_keys


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool])
def test_the_bonus_is_no_integer_where_observations_are(dtype):
    torch.manual_seed(0)
    loss = QScoreMatchingLoss(make_actor(), make_critics(), delay_qvalue=False, entropy_bonus=EntropyBonus(0.5))
    integers, floats = make_transitions((8,)), make_transitions((8,))
    for part in ((), ("next",)):
        states = torch.randint(2, (8, 3))
        integers[(*part, "observation")], floats[(*part, "observation")] = states.to(dtype), states.float()
    bonuses = []
    for data in (integers, floats):
        torch.manual_seed(1)
        bonuses.append(loss.qvalue_loss(data)[1]["entropy_bonus"])
    torch.testing.assert_close(*bonuses, rtol=1e-4, atol=1e-4)


def test_off_by_default_and_without_a_trace():
    loss, data = QScoreMatchingLoss(make_actor(), make_critics(), delay_qvalue=False), make_transitions((4,))
    assert loss.entropy_bonus is None and "entropy_bonus" not in loss.out_keys
    assert not any("entropy" in name for name in loss.state_dict())
    quiet = QScoreMatchingLoss(
        loss.actor_network, loss.trained_critics(), delay_qvalue=False, entropy_bonus=EntropyBonus(1e-20)
    )
    start = torch.randn(4, 2), torch.randn(5, 4, 2), torch.zeros(4, 2)
    torch.testing.assert_close(quiet.qvalue_loss(data, *start)[0], loss.qvalue_loss(data, *start)[0])


@pytest.mark.parametrize("batch_size", [(), (3,), (2, 3)])
def test_layouts_masks_and_the_state_dict(batch_size):
    def build():
        torch.manual_seed(0)
        loss = QScoreMatchingLoss(make_actor(), make_critics(), delay_actor=True, entropy_bonus=EntropyBonus(0.3, 4))
        SoftUpdate(loss, tau=0.5)
        return loss

    loss, data = build(), make_transitions(batch_size)
    out = evaluate(loss, data)
    assert all(value.isfinite().all() for value in out.values())
    assert out["loss_qvalue"].requires_grad and not out["entropy_bonus"].requires_grad
    fresh = build()
    fresh.entropy_bonus.temperature.fill_(9.0)
    fresh.load_state_dict(loss.state_dict())
    assert_same(evaluate(fresh, data), out)
    if batch_size:
        mask = torch.arange(batch_size[-1]).expand(batch_size) < 2
        data["collector", "mask"] = mask
        data["next", "observation"][~mask] = torch.nan
        out = evaluate(loss, data)
        assert all(value.isfinite().all() for value in out.values())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:Using lock_")  # TorchRL's own, while it is compiled
def test_compiles_as_one_graph():
    torch.manual_seed(0)
    loss, data = (
        QScoreMatchingLoss(make_actor(), make_critics(), entropy_bonus=EntropyBonus(0.3, 4)),
        make_transitions((8,)),
    )
    SoftUpdate(loss, tau=0.5)
    values = []
    # The compiler's own generators draw other numbers than eager code; with this both draw the same.
    with torch._inductor.config.patch(fallback_random=True):
        for function in (loss.qvalue_loss, torch.compile(loss.qvalue_loss, fullgraph=True)):
            torch.manual_seed(1)
            values.append(function(data.clone())[0].detach())
    torch.testing.assert_close(values[1], values[0], rtol=1e-4, atol=1e-5)
