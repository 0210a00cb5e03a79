from __future__ import annotations

import itertools
from typing import Any, ClassVar

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.data import Bounded, Unbounded
from torchrl.objectives import SoftUpdate, ValueEstimators

from qsm_rl import (
    BoltzmannQScore,
    DDPMSampler,
    DiffusionActor,
    NoiseSchedule,
    NormalizedQScore,
    PosteriorQScore,
    QScoreMatchingLoss,
    QValueMLP,
    ScaledQScore,
    ScoreMLP,
    ScoreTarget,
)
from tests.loss_contract import (
    ACTION_DIM,
    FLAT_KEYS,
    OBSERVATION_DIM,
    Keys,
    LossContract,
    evaluate,
    make_actor,
    make_critics,
    make_transitions,
)
from tests.objectives.hand import TWO_STEPS, Gain, Line


class TestContract(LossContract):
    owners: ClassVar = {"loss_actor": "actor_network", "loss_qvalue": "qvalue_network"}
    tensor_keys: ClassVar = {
        "action": "action",
        "value": "state_value",
        "state_action_value": "state_action_value",
        "priority": "td_error",
        "reward": "reward",
        "done": "done",
        "terminated": "terminated",
        "priority_weight": "priority_weight",
    }
    schedulable = ("score_target.scale",)
    noiseless: ClassVar = {"target_action_noise_std": 0.0}
    constructor_errors = (
        ({"score_critics": "both"}, ValueError, "score_critics must be one of .* got 'both'"),
        ({"score_aggregation": "max"}, ValueError, "score_aggregation must be one of .* got 'max'"),
        ({"loss_function": "huber"}, ValueError, "loss_function must be one of .* got 'huber'"),
        ({"target_aggregation": "max"}, ValueError, "'min', 'mean' or a finite number rho, got 'max'"),
        ({"bc_weight": -1.0}, ValueError, "bc_weight must be at least 0, got -1.0"),
        ({"reduction": "avg"}, ValueError, "reduction must be one of .* got 'avg'"),
        ({"target_action_noise_std": -0.1}, ValueError, "at least 0, got -0.1"),
        ({"target_action_noise_std": float("nan")}, ValueError, "at least 0, got nan"),
        ({"num_qvalue_nets": 3}, ValueError, "num_qvalue_nets is 3, but 2 critics were given"),
        ({"critics": []}, ValueError, "empty list; pass at least one critic"),
        (
            {"critics": [nn.Linear(5, 1)]},
            TypeError,
            r"a critic is a Linear, expected a TensorDictModule: write .*critic, ",
        ),
        ({"critics": make_critics()[0], "num_qvalue_nets": 0}, ValueError, "num_qvalue_nets must be at least 1, got 0"),
        ({"num_qvalue_nets": 2.0}, TypeError, "num_qvalue_nets must be an integer or None, got 2.0"),
        ({"target_aggregation": float("nan")}, ValueError, "a finite number rho, got nan"),
        ({"use_prioritized_weights": "yes"}, ValueError, "use_prioritized_weights must be one of .* got 'yes'"),
        ({"entropy_bonus": 0.1}, TypeError, "entropy_bonus must be an EntropyBonus or None, got 0.1"),
    )

    def make_loss(
        self, *, keys: Keys = FLAT_KEYS, critics: list[TensorDictModule] | None = None, **options: Any
    ) -> QScoreMatchingLoss:
        return QScoreMatchingLoss(make_actor(keys), make_critics(keys) if critics is None else critics, **options)


# --- numbers worked out by hand ---
#
# One action dimension. Two diffusion steps with alphas (0.64, 0.01): at t = 0 a noised action is 0.8 a + 0.6 e. The
# score network predicts gain * noisy action; the critics are linear, q = slope * a + value * s, or q = -a^2.


class QuadraticCritic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.curvature = nn.Parameter(torch.tensor(1.0))

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        return -self.curvature * action**2


def hand_loss(
    *critics: nn.Module, gain: float = 0.0, low: float = -1.0, high: float = 1.0, **options: Any
) -> QScoreMatchingLoss:
    actor = DiffusionActor(Gain(gain), action_spec=Bounded(low, high, (1,)), noise_schedule=NoiseSchedule(TWO_STEPS))
    modules = [TensorDictModule(c, in_keys=["observation", "action"], out_keys=["state_action_value"]) for c in critics]
    loss = QScoreMatchingLoss(actor, modules, **options)
    if options.get("delay_qvalue", True) or options.get("delay_actor", False):
        SoftUpdate(loss, tau=0.5)
    return loss


def hand_batch(
    action: list[float],
    observation: list[float] | None = None,
    next_observation: list[float] | None = None,
    reward: float = 1.0,
    terminated: list[bool] | None = None,
    done: list[bool] | None = None,
) -> TensorDict:
    count = len(action)
    terminated = [False] * count if terminated is None else terminated
    column = {
        "observation": observation or [0.0] * count,
        "action": action,
        "next_observation": next_observation or [0.0] * count,
        "reward": [reward] * count,
        "terminated": terminated,
        "done": terminated if done is None else done,
    }
    tensors = {name: torch.tensor(values).unsqueeze(-1) for name, values in column.items()}
    current = {name: tensors.pop(name) for name in ("observation", "action")}
    following = {name.removeprefix("next_"): tensor for name, tensor in tensors.items()}
    return TensorDict({**current, "next": following}, [count])


@pytest.mark.parametrize(
    ("low", "high", "action", "q_score"),
    [
        # box action 0.5, noise 1, so the noised action is 0.8 * 0.5 + 0.6 = 1 in the box
        (-1.0, 1.0, 0.5, -2.0),  # 1 in environment units: dQ/da = -2 * 1
        (-3.0, 3.0, 1.5, -18.0),  # 3 in environment units: dQ/da = -2 * 3, times the half range 3
        (0.0, 4.0, 3.0, -16.0),  # 4 in environment units: dQ/da = -2 * 4, times the half range 2
    ],
)
def test_actor_loss_of_a_quadratic_critic(low, high, action, q_score):
    loss = hand_loss(QuadraticCritic(), gain=3.0, low=low, high=high)
    value, info = loss.actor_loss(hand_batch([action]), t=torch.tensor([0]), noise=torch.tensor([[1.0]]))
    value.backward()
    target = -50 * q_score
    torch.testing.assert_close(info["noisy_action"], torch.tensor([[1.0]]))
    torch.testing.assert_close(info["q_score"], torch.tensor([[q_score]]))
    torch.testing.assert_close(info["score_target"], torch.tensor([[target]]))
    torch.testing.assert_close(info["predicted_noise"], torch.tensor([[3.0]]))
    torch.testing.assert_close(value.item(), (3 - target) ** 2)
    torch.testing.assert_close(loss.actor_network.score_network.gain.grad.item(), 2 * (3 - target) * 1.0)


@pytest.mark.parametrize(
    ("low", "high", "q_score"),
    [(-1.0, 1.0, 1.5), (-3.0, 3.0, 4.5), (0.0, 4.0, 3.0)],  # the mean slope 1.5 times the half range 1, 3, 2
)
def test_actor_loss_of_linear_critics(low, high, q_score):
    loss = hand_loss(Line(2.0, 5.0), Line(1.0, -3.0), gain=3.0, low=low, high=high)
    box_actions = torch.tensor([[0.5], [0.0]])
    batch = hand_batch(loss.actor_network.box.from_box(box_actions).squeeze(-1).tolist())
    value, info = loss.actor_loss(batch, t=torch.tensor([0, 1]), noise=torch.tensor([[1.0], [0.0]]))
    value.backward()
    torch.testing.assert_close(info["noisy_action"], torch.tensor([[1.0], [0.0]]))
    torch.testing.assert_close(info["q_score"], torch.full((2, 1), q_score))
    target = -50 * q_score
    torch.testing.assert_close(value.item(), ((3 - target) ** 2 + (0 - target) ** 2) / 2)
    torch.testing.assert_close(loss.actor_network.score_network.gain.grad.item(), 3 - target)  # 2 (3 - target) / 2


def test_behaviour_cloning_beside_the_score_target_by_hand():
    # Noised actions 1 and 0.8 * -0.5 + 0.6 * 2 = 0.8, predicted noises 3 and 2.4 against the noises 1 and 2 and the
    # targets -0.5 * dQ/da = -0.5 * 2.
    loss = hand_loss(Line(2.0, 0.0), gain=3.0, score_target=ScaledQScore(0.5), bc_weight=0.25)
    draws = {"t": torch.tensor([0, 0]), "noise": torch.tensor([[1.0], [2.0]])}
    value, info = loss.actor_loss(hand_batch([0.5, -0.5]), **draws)
    value.backward()
    torch.testing.assert_close(info["bc_error"], torch.tensor([2.0**2, 0.4**2]))
    torch.testing.assert_close(value.item(), (4.0**2 + 3.4**2) / 2 + 0.25 * (2.0**2 + 0.4**2) / 2)
    gradient = (4.0 * 1.0 + 3.4 * 0.8) + 0.25 * (
        2.0 * 1.0 + 0.4 * 0.8
    )  # twice the error times the noised action, halved
    torch.testing.assert_close(loss.actor_network.score_network.gain.grad.item(), gradient)
    # It can be scheduled down to nothing.
    loss.bc_weight.zero_()
    torch.testing.assert_close(loss.actor_loss(hand_batch([0.5, -0.5]), **draws)[0].item(), (4.0**2 + 3.4**2) / 2)


def test_behaviour_cloning_is_reported_where_it_is_on_and_costs_nothing_where_it_is_off():
    on, off = (QScoreMatchingLoss(make_actor(), make_critics(), delay_qvalue=False, bc_weight=w) for w in (2.0, 0.0))
    data = make_transitions((2, 4))
    data["collector", "mask"] = torch.arange(4).expand(2, 4) < 3
    out = evaluate(on, data)
    assert list(out.keys()) == on.out_keys and "bc_error" in on.out_keys
    assert out["bc_error"].shape == () and not out["bc_error"].requires_grad
    assert "bc_error" not in off.out_keys and not any("bc" in name for name in off.state_dict())
    assert off.actor_loss(data)[1].keys() == on.actor_loss(data)[1].keys() - {"bc_error"}
    assert on.actor_loss(data)[1]["bc_error"].shape == (6,)
    assert on.actor_loss(data.exclude("collector"))[1]["bc_error"].shape == (2, 4)


@pytest.mark.parametrize(("weight", "mean"), [(0.5, 0.1), (2.0, 0.2)])
def test_what_is_learned_is_the_weighted_mean_of_target_and_noise(weight, mean):
    """The data's noise is 0.3 and the critic is flat: (0 + weight * 0.3) / (1 + weight)."""
    loss = hand_loss(Line(0.0, 0.0), bc_weight=weight)
    predicted = nn.Parameter(torch.zeros(1))
    loss.actor_network.score_network.forward = lambda noisy_action, observation, t: predicted.expand_as(noisy_action)
    optimizer = torch.optim.SGD([predicted], 0.2)
    draws = {"t": torch.zeros(8, dtype=torch.long), "noise": torch.full((8, 1), 0.3)}
    for _ in range(60):
        optimizer.zero_grad()
        loss.actor_loss(hand_batch([0.3] * 8), **draws)[0].backward()
        optimizer.step()
    assert predicted.item() == pytest.approx(mean, rel=1e-3)


@pytest.mark.parametrize(
    ("score_target", "target"),
    # dQ/da in the box is 6 and 6; sigma_0 is 0.6
    [
        (ScaledQScore(2.0), -12.0),
        (BoltzmannQScore(0.5), -0.6 * 6 / 0.5),
        (NormalizedQScore(0.5), -0.6 * 1 / 0.5),
    ],
)
def test_score_targets_in_the_loss(score_target, target):
    loss = hand_loss(Line(2.0, 0.0), low=-3.0, high=3.0, score_target=score_target)
    value, info = loss.actor_loss(hand_batch([0.0, 1.0]), t=torch.tensor([0, 0]))
    torch.testing.assert_close(info["score_target"], torch.full((2, 1), target))
    torch.testing.assert_close(value.item(), target**2)


def test_a_score_target_of_one_s_own_gets_no_gradient_and_is_reported_by_its_kind():
    class Own(ScoreTarget):
        info_keys = ("my_score", "my_size")

        def __init__(self):
            super().__init__()
            self.slope = nn.Parameter(torch.tensor(1.0))

        def forward(self, q_value, noisy_action, t, noise_schedule):
            info = {"my_score": torch.tensor([[3.0], [-5.0]]), "my_size": torch.tensor([1.0, -2.0])}
            return self.slope * noisy_action, info

    loss = hand_loss(Line(2.0, 0.0), gain=3.0, score_target=Own())
    value, info = loss.actor_loss(hand_batch([0.0, 1.0]))
    value.backward()
    assert loss.score_target.slope.grad is None
    out = loss.diagnostics(loss.qvalue_loss(hand_batch([0.0, 1.0]))[1], info)
    assert (out["my_score_norm"].item(), out["my_size"].item()) == (4.0, -0.5)  # a score's norm, else the mean


def test_score_aggregation_and_score_critics():
    batch, draws = hand_batch([0.5]), {"t": torch.tensor([0]), "noise": torch.tensor([[1.0]])}
    critics = Line(2.0, 0.0), Line(-1.0, 2.5)  # 2 and 1.5 at the noised action 1 and observation 1
    batch["observation"] += 1.0
    for aggregation, q_score in (("mean", 0.5), ("min", -1.0)):
        loss = hand_loss(*critics, score_aggregation=aggregation)
        torch.testing.assert_close(loss.actor_loss(batch, **draws)[1]["q_score"].item(), q_score)
    for critics_of_target, q_score in (("online", 10.0), ("target", 0.5)):
        loss = hand_loss(*critics, score_critics=critics_of_target)
        loss.qvalue_network_params["module", "slope"].data.fill_(10.0)
        torch.testing.assert_close(loss.actor_loss(batch, **draws)[1]["q_score"].item(), q_score)


@pytest.mark.parametrize(
    ("low", "high", "action", "target_value", "q_values"),
    [
        # The chain from 0.04 without fresh noise: 0.04 / 0.1 = 0.4, 0.4 / 0.8 = 0.5; plus the target's noise 0.1: 0.6.
        # min(2 * 0.6 + 1, 1 * 0.6 + 3) = 2.2, 1 + 0.9 * 2.2 = 2.98; Q = 2 * 0.5 + 2 and 0.5 + 6
        (-1.0, 1.0, 0.5, 2.98, [3.0, 6.5]),
        # 1.8 in environment units: min(3.6 + 1, 1.8 + 3) = 4.6, 1 + 0.9 * 4.6 = 5.14; Q = 2 * 1.5 + 2 and 1.5 + 6
        (-3.0, 3.0, 1.5, 5.14, [5.0, 7.5]),
        # 2 + 2 * 0.6 = 3.2: min(6.4 + 1, 3.2 + 3) = 6.2, 1 + 0.9 * 6.2 = 6.58; Q = 2 * 3 + 2 and 3 + 6
        (0.0, 4.0, 3.0, 6.58, [8.0, 9.0]),
    ],
)
def test_qvalue_loss_of_linear_critics(low, high, action, target_value, q_values):
    loss = hand_loss(Line(2.0, 1.0), Line(1.0, 3.0), low=low, high=high)
    loss.make_value_estimator(gamma=0.9)
    batch = hand_batch([action], observation=[2.0], next_observation=[1.0])
    value, info = loss.qvalue_loss(batch, torch.tensor([[0.04]]), torch.zeros(2, 1, 1), torch.tensor([[0.1]]))
    value.backward()
    errors = torch.tensor(q_values) - target_value
    torch.testing.assert_close(info["next_action"], torch.tensor([[0.5]]))
    torch.testing.assert_close(info["target_value"], torch.tensor([target_value]))
    torch.testing.assert_close(info["q_value"], torch.tensor(q_values).unsqueeze(-1))
    torch.testing.assert_close(info["critic_losses"], errors**2)
    torch.testing.assert_close(value, (errors**2).sum())
    torch.testing.assert_close(batch["td_error"], errors.abs().amax().unsqueeze(0))
    params = loss.qvalue_network_params["module"]
    torch.testing.assert_close(params["slope"].grad, 2 * errors * action)
    torch.testing.assert_close(params["value"].grad, 2 * errors * 2.0)


@pytest.mark.parametrize(
    ("target_aggregation", "next_value"),
    # The target critics say 1, 3 and 8 at the next observation 1: mean 4, variance 26 / 3.
    [("min", 1.0), ("mean", 4.0), (0.5, 4 - 0.5 * (26 / 3) ** 0.5)],
)
def test_target_aggregation_over_three_critics(target_aggregation, next_value):
    critics = [Line(0.0, value) for value in (1.0, 3.0, 8.0)]
    loss = hand_loss(*critics, target_aggregation=target_aggregation).make_value_estimator(gamma=0.5)
    loss.qvalue_network_params["module", "value"].data.zero_()  # the online critics say nothing about the target
    _, info = loss.qvalue_loss(hand_batch([0.0], next_observation=[1.0]))
    torch.testing.assert_close(info["target_value"].item(), 1 + 0.5 * next_value)
    assert info["q_value"].shape == (3, 1)


def test_next_action_is_clipped_to_the_box_after_the_noise():
    loss = hand_loss(Line(1.0, 0.0)).make_value_estimator(gamma=1.0)
    _, info = loss.qvalue_loss(hand_batch([0.0]), torch.tensor([[0.04]]), torch.zeros(2, 1, 1), torch.tensor([[9.0]]))
    torch.testing.assert_close(info["target_value"].item(), 1.0 + 1.0)


@pytest.mark.parametrize(
    ("loss_function", "expected"),
    [("l2", 0.5**2 + 3.0**2), ("l1", 0.5 + 3.0), ("smooth_l1", 0.5 * 0.5**2 + 3.0 - 0.5)],
)
def test_loss_functions(loss_function, expected):
    # The transition ends: its target is the reward 1, the critics say 1.5 and 4.
    loss = hand_loss(Line(0.0, 1.5), Line(0.0, 4.0), loss_function=loss_function)
    batch = hand_batch([0.0], observation=[1.0], next_observation=[9.0], terminated=[True])
    torch.testing.assert_close(loss.qvalue_loss(batch)[0].item(), expected)
    # A predicted noise of 0 against a target of -0.5 * dQ/da = -0.5 * mean(0, 0) has no loss; with slopes it has.
    loss = hand_loss(Line(1.0, 0.0), Line(3.0, 0.0), loss_function=loss_function, score_target=ScaledQScore(1.0))
    expected = {"l2": 4.0, "l1": 2.0, "smooth_l1": 1.5}[loss_function]
    torch.testing.assert_close(loss.actor_loss(batch)[0].item(), expected)


# Rewards 1, values of the next states 1, 2, 3, gamma 1/2, lambda 1/2, worked out from the back.
RETURNS = {
    "whole": {"TD0": [1.5, 2.0, 2.5], "TD1": [2.125, 2.25, 2.5], "TDLambda": [1.78125, 2.125, 2.5]},
    "terminated after the second step": {
        "TD0": [1.5, 1.0, 2.5],
        "TD1": [1.5, 1.0, 2.5],
        "TDLambda": [1.5, 1.0, 2.5],
    },
    "truncated after the second step": {
        "TD0": [1.5, 2.0, 2.5],
        "TD1": [2.0, 2.0, 2.5],
        "TDLambda": [1.75, 2.0, 2.5],
    },
    "masked after the second step": {"TD0": [1.5, 2.0], "TD1": [2.0, 2.0], "TDLambda": [1.75, 2.0]},
}


@pytest.mark.parametrize(("ending", "name"), list(itertools.product(RETURNS, ("TD0", "TD1", "TDLambda"))))
def test_returns_by_hand(ending, name):
    loss = hand_loss(Line(0.0, 1.0))
    options = {"lmbda": 0.5} if name == "TDLambda" else {}
    loss.make_value_estimator(ValueEstimators[name], gamma=0.5, **options)
    end = [False, True, False]
    batch = hand_batch(
        [0.0, 0.0, 0.0],
        next_observation=[1.0, 2.0, 3.0],
        terminated=end if ending.startswith("terminated") else None,
        done=end if ending.startswith(("terminated", "truncated")) else None,
    )
    if ending.startswith("masked"):
        batch["collector", "mask"] = torch.tensor([True, True, False])
        batch["next", "observation"][2] = torch.nan
        batch["next", "reward"][2] = torch.nan
    _, info = loss.qvalue_loss(batch)
    torch.testing.assert_close(info["target_value"], torch.tensor(RETURNS[ending][name]))


@pytest.mark.parametrize("name", ["TD1", "TDLambda"])
def test_compiled_returns_end_with_their_episodes(name):
    loss = hand_loss(Line(0.0, 1.0)).make_value_estimator(ValueEstimators[name], gamma=0.5)
    batch = make_transitions((2, 4))
    batch["next", "done"][0, 1] = batch["next", "terminated"][0, 1] = True
    estimate, values = loss.value_estimator.value_estimate, torch.rand(2, 4, 1)
    compiled = torch.compile(estimate, backend="eager")(batch.copy(), next_value=values)
    torch.testing.assert_close(compiled, estimate(batch.copy(), next_value=values))


# --- the next action ---


def test_next_actions_follow_the_policy_under_any_exploration_type():
    # The score network predicts no noise, so the chain from x_T is clip(clip(10 x_T + sqrt(0.99) z) / 0.8): almost
    # always at a face, either face half of the time. A deterministic chain would stay at 0.
    loss = hand_loss(Line(1.0, 0.0), target_action_noise_std=0.0)
    torch.manual_seed(0)
    _, info = loss.qvalue_loss(hand_batch([0.0] * 4000))
    next_action = info["next_action"]
    assert (next_action.abs() == 1).float().mean() > 0.9
    assert abs(next_action.mean()) < 0.05
    # The smoothing noise has the asked size in box units, whatever the bounds, here seen through Q = a.
    loss = hand_loss(Line(1.0, 0.0), low=-3.0, high=3.0, target_action_noise_std=0.1)
    loss.make_value_estimator(gamma=1.0)
    start = torch.zeros(4000, 1)
    _, info = loss.qvalue_loss(hand_batch([0.0] * 4000, reward=0.0), start, torch.zeros(2, 4000, 1))
    assert 0.29 < info["target_value"].std() < 0.31


# --- masks, when the target depends on the whole batch ---


@pytest.mark.parametrize(
    "score_target",
    [ScaledQScore(2.0), NormalizedQScore(0.5), PosteriorQScore(1.0, num_particles=4, normalize=True)],
    ids=lambda target: type(target).__name__,
)
def test_masked_samples_count_for_nothing(score_target):
    torch.manual_seed(0)
    loss = QScoreMatchingLoss(make_actor(), make_critics(), score_target=score_target, delay_qvalue=False)
    data, mask = make_transitions((8,)), torch.arange(8) < 5
    t, noise = torch.arange(8) % 5, torch.randn(8, ACTION_DIM)
    chain = torch.randn(8, ACTION_DIM), torch.randn(5, 8, ACTION_DIM), torch.randn(8, ACTION_DIM)
    live = data[mask]
    data["collector", "mask"] = mask
    for actual, expected in (
        (loss.qvalue_loss(data, *chain), loss.qvalue_loss(live, chain[0][mask], chain[1][:, mask], chain[2][mask])),
        (seeded(loss.actor_loss, data, t, noise), seeded(loss.actor_loss, live, t[mask], noise[mask])),
    ):
        torch.testing.assert_close(actual, expected)


def seeded(function, *args):
    torch.manual_seed(0)
    return function(*args)


# --- networks ---


def test_a_single_critic_is_the_first_and_the_others_are_drawn_anew():
    critic = make_critics(count=1)[0]
    given = critic.module.mlp[0].weight.detach().clone()
    loss = QScoreMatchingLoss(make_actor(), critic, num_qvalue_nets=3)
    weights = loss.qvalue_network_params["module", "mlp", "0", "weight"]
    assert weights.shape[0] == 3
    torch.testing.assert_close(weights[0].data, given)
    assert not torch.equal(weights[1], weights[0]) and not torch.equal(weights[1], weights[2])
    bound = (6 / sum(given.shape)) ** 0.5  # Xavier's, which torch would miss for stacked weights
    assert 0.9 * bound < weights.abs().amax() <= bound


def test_actor_and_critics_may_read_different_entries():
    actor = DiffusionActor(
        ScoreMLP(5, 2, (8,)),
        action_spec=Bounded(-1.0, 1.0, (2,)),
        noise_schedule=NoiseSchedule.vp(5),
        in_keys=["position", ("sensors", "velocity")],
    )
    critic = TensorDictModule(
        QValueMLP(6, 2, (8,)), in_keys=["privileged", "position", "action"], out_keys=["state_action_value"]
    )
    loss = QScoreMatchingLoss(actor, critic, delay_qvalue=False)
    assert loss.in_keys == [
        *("position", ("sensors", "velocity"), "privileged", "action"),
        *(("next", "position"), ("next", "sensors", "velocity"), ("next", "privileged")),
        *(("next", "reward"), ("next", "done"), ("next", "terminated")),
    ]
    flags = {key: torch.zeros(4, 1, dtype=torch.bool) for key in ("done", "terminated")}
    state = TensorDict(
        {"position": torch.randn(4, 3), "sensors": {"velocity": torch.randn(4, 2)}, "privileged": torch.randn(4, 3)},
        [4],
    )
    batch = state.clone().update({"action": torch.zeros(4, 2), "next": state.clone().update(flags)})
    batch["next", "reward"] = torch.zeros(4, 1)
    before = evaluate(loss, batch)
    batch["next", "privileged"] += 1.0
    assert not torch.allclose(evaluate(loss, batch)["loss_qvalue"], before["loss_qvalue"])
    torch.testing.assert_close(evaluate(loss, batch)["loss_actor"], before["loss_actor"])


def test_the_users_actor_is_the_trained_one():
    actor = make_actor()
    loss = QScoreMatchingLoss(actor, make_critics())
    assert loss.actor_network is actor
    loss.to(torch.bfloat16)
    assert actor.score_network.mlp[0].weight.dtype == torch.bfloat16
    for buffer in (*actor.box.buffers(), *actor.noise_schedule.buffers()):
        assert buffer.dtype == torch.float32
    torch.testing.assert_close(actor.noise_schedule.betas, NoiseSchedule.vp(5).betas, rtol=0, atol=0)
    for name, buffer in loss.actor_network_params.named_buffers():
        assert buffer.dtype == torch.float32, name


# --- bad input ---


@pytest.mark.parametrize("which", ["actor", "critic"])
def test_lazy_networks_are_refused_until_they_ran(which):
    actor, critics = make_actor(), make_critics()
    if which == "actor":
        actor.module.score_network.network = ScoreMLP(None, ACTION_DIM, (8,))
    else:
        critics[1].module = QValueMLP(None, ACTION_DIM, (8,))
    with pytest.raises(ValueError, match=f"{which} has uninitialised lazy parameters; call it once on a batch"):
        QScoreMatchingLoss(actor, critics)
    data = make_transitions((2,))
    critics[1](actor(data.clone()))
    if which == "actor":
        QScoreMatchingLoss(actor, critics, delay_qvalue=False)(data)


def test_a_batch_that_does_not_fit_is_refused():
    loss = QScoreMatchingLoss(make_actor(), make_critics(), delay_qvalue=False)
    data = make_transitions((4,))
    for key, value, message in (
        (("next", "reward"), torch.zeros(4), r"reward.* has shape \(4,\), expected \(4, 1\)"),
        (("next", "done"), torch.zeros(4, dtype=torch.bool), r"done.* has shape \(4,\), expected \(4, 1\)"),
        (("next", "terminated"), torch.zeros(4, dtype=torch.bool), r"terminated.* shape \(4,\), expected \(4, 1\)"),
        ("action", torch.zeros(4, 3), r"'action' has shape \(4, 3\), expected \(4, 2\)"),
    ):
        with pytest.raises(ValueError, match=message):
            loss(data.clone().set(key, value))
    for name in ("action", "next.reward", "next.terminated"):
        with pytest.raises(KeyError, match=f"the batch lacks {name}; it has .*next.observation.* set_keys"):
            loss(data.exclude(tuple(name.split("."))))
    for key in ("done", "terminated"):
        with pytest.raises(ValueError, match=f"'{key}'.* has dtype torch.float32, expected bool"):
            loss(data.clone().set(("next", key), torch.zeros(4, 1)))
    with pytest.raises(ValueError, match=r"For several agents, the batch size must be \(4, 3\)"):
        loss(data.clone().set("action", torch.zeros(4, 3, 2)))
    with pytest.raises(KeyError, match="the batch lacks next; it has action, observation"):
        loss(data.exclude("next"))


def test_a_score_target_that_is_a_function_is_refused():
    with pytest.raises(TypeError, match=r"score_target is <function .* expected an instance of qsm_rl\.ScoreTarget"):
        QScoreMatchingLoss(make_actor(), make_critics(), score_target=lambda *args: (args[1], {}))
    with pytest.raises(TypeError, match="expected an instance"):
        QScoreMatchingLoss(make_actor(), make_critics(), score_target=NormalizedQScore)


def test_weights_that_are_asked_for_must_be_there():
    loss = QScoreMatchingLoss(make_actor(), make_critics(), use_prioritized_weights=True)
    with pytest.raises(KeyError, match="the batch lacks priority_weight"):
        loss(make_transitions((4,)))


def test_critics_of_another_key_are_told_which():
    critics = [TensorDictModule(QValueMLP(OBSERVATION_DIM, ACTION_DIM, (8,)), ["observation", "action"], ["q"])]
    with pytest.raises(KeyError, match=r"a critic writes \['q'\], not 'state_action_value'; .*set_keys"):
        QScoreMatchingLoss(make_actor(), critics)(make_transitions((4,)))


def test_discount_and_temperature_keep_their_precision_in_half():
    loss = QScoreMatchingLoss(make_actor(), make_critics(), score_target=NormalizedQScore(0.1), bc_weight=0.3)
    loss.make_value_estimator(gamma=0.999).to(torch.bfloat16)
    assert loss.value_estimator.gamma.item() == pytest.approx(0.999, rel=1e-6)  # 1 in bfloat16
    assert loss.bc_weight.item() == pytest.approx(0.3, rel=1e-6)
    loss.score_target.temperature.mul_(0.999)  # a schedule's step, too small for three digits
    assert loss.score_target.temperature.item() == pytest.approx(0.0999, rel=1e-6)
    assert loss.to(torch.float32).value_estimator.gamma.item() == pytest.approx(0.999, rel=1e-6)


def test_weights_of_other_action_bounds_are_refused():
    loss, other = (QScoreMatchingLoss(make_actor(low=low), make_critics()) for low in (-2.0, -1.0))
    for own, state_dict in ((loss, other.state_dict()), (loss.actor_network, other.actor_network.state_dict())):
        with pytest.raises(
            RuntimeError, match=r"box\.low: .* different action bounds \(\[-1\.0.* from these \(\[-2\.0"
        ):
            own.load_state_dict(state_dict)


def test_critics_that_do_not_read_the_action_are_refused():
    critic = TensorDictModule(nn.Linear(OBSERVATION_DIM, 1), in_keys=["observation"], out_keys=["state_action_value"])
    with pytest.raises(ValueError, match=r"read \['observation'\] but not the action 'action'.*set_keys"):
        QScoreMatchingLoss(make_actor(), [critic], delay_qvalue=False)(make_transitions((4,)))


def test_copies_that_would_stay_one_critic_are_refused():
    """Bare parameters, which no initialiser draws anew, as TensorDict warns."""
    critic = TensorDictModule(QuadraticCritic(), in_keys=["observation", "action"], out_keys=["state_action_value"])
    with (
        pytest.warns(match="did not find any parameters"),
        pytest.raises(ValueError, match=r"start with the same weights.*pass a list of critics"),
    ):
        QScoreMatchingLoss(make_actor(), critic, num_qvalue_nets=2)
    QScoreMatchingLoss(make_actor(), critic, num_qvalue_nets=1, delay_qvalue=False)


def test_weights_drawn_anew_are_as_large_as_those_of_one_critic():
    """torch's own layer draws from U(-b, b) with b = 1 / sqrt(inputs), and counts a stack of them as more inputs."""

    def critic() -> TensorDictModule:
        critic = make_critics(count=1)[0]
        critic.module.mlp[0] = nn.Linear(OBSERVATION_DIM + ACTION_DIM, critic.module.mlp[0].out_features)
        return critic

    loss = QScoreMatchingLoss(make_actor(), [critic(), critic()], delay_qvalue=False)
    loss.reset_parameters_recursive()
    weights, bound = loss.qvalue_network_params["module", "mlp", "0", "weight"], (OBSERVATION_DIM + ACTION_DIM) ** -0.5
    for one in weights:
        assert 0.8 * bound < one.abs().amax() <= bound
    assert not torch.equal(weights[0], weights[1])


def test_networks_of_the_wrong_size_are_refused():
    data = make_transitions((4,))
    wide = TensorDictModule(
        nn.Bilinear(OBSERVATION_DIM, ACTION_DIM, 2), in_keys=["observation", "action"], out_keys=["state_action_value"]
    )
    with pytest.raises(ValueError, match=r"critic returned shape \(4, 2\) for batch size \(4,\), expected \(4, 1\)"):
        QScoreMatchingLoss(make_actor(), [wide], delay_qvalue=False)(data)
    score_network = Gain(1.0)
    score_network.forward = lambda noisy_action, observation, t: noisy_action[..., :1]
    actor = DiffusionActor(score_network, action_spec=Bounded(-1.0, 1.0, (2,)), noise_schedule=NoiseSchedule.vp(5))
    loss = QScoreMatchingLoss(actor, make_critics(), delay_qvalue=False)
    for call in (loss.qvalue_loss, loss.actor_loss, actor):  # (4, 1) would broadcast
        with pytest.raises((ValueError, RuntimeError), match=r"score network returned shape \(4, 1\) .* \(4, 2\)"):
            call(data.clone())


def test_critics_that_share_weights_are_refused():
    critic, other = make_critics()
    with pytest.raises(ValueError, match="the critics share parameters"):
        QScoreMatchingLoss(make_actor(), [critic, critic])
    other.module.mlp[0] = critic.module.mlp[0]
    with pytest.raises(ValueError, match="the critics share parameters"):
        QScoreMatchingLoss(make_actor(), [critic, other])


def test_a_discount_outside_its_range_is_refused():
    loss = QScoreMatchingLoss(make_actor(), make_critics())
    with pytest.raises(ValueError, match=r"gamma must lie in \[0, 1\], got 1.5"):
        loss.make_value_estimator(gamma=1.5)
    with pytest.raises(ValueError, match=r"lmbda must lie in \[0, 1\], got -0.1"):
        loss.make_value_estimator(ValueEstimators.TDLambda, lmbda=-0.1)
    for kind, numbers in (
        (ValueEstimators.TD1, {"gamma": 0.0}),
        (ValueEstimators.TDLambda, {"gamma": 0.0}),
        (ValueEstimators.TDLambda, {"lmbda": 0.0}),
    ):  # TorchRL's convolution over time would fail at the first batch
        with pytest.raises(ValueError, match="of 0 is TD0; use ValueEstimators"):
            loss.make_value_estimator(kind, **numbers)
    assert loss.make_value_estimator(gamma=0.0) is loss


def test_an_unbounded_actor_and_a_foreign_one_are_refused():
    with pytest.raises(ValueError, match="bounded continuous action space, got Unbounded"):
        DiffusionActor(ScoreMLP(3, 2), action_spec=Unbounded((2,)), noise_schedule=NoiseSchedule.vp(5))
    policy = TensorDictModule(nn.Linear(3, 2), in_keys=["observation"], out_keys=["action"])
    with pytest.raises(TypeError, match=r"TensorDictModule without observation, sample, .*; pass a qsm_rl\.Diffusion"):
        QScoreMatchingLoss(policy, make_critics())


def test_a_state_dict_of_another_schedule_is_refused_before_anything_is_loaded():
    def build(schedule: NoiseSchedule) -> QScoreMatchingLoss:
        actor = DiffusionActor(ScoreMLP(3, 2, (8,)), action_spec=Bounded(-1.0, 1.0, (2,)), noise_schedule=schedule)
        return QScoreMatchingLoss(actor, make_critics(), delay_qvalue=False)

    loss = build(NoiseSchedule.vp(5))
    before = {name: value.clone() for name, value in loss.state_dict().items()}
    for other in (NoiseSchedule.cosine(5), NoiseSchedule.vp(6)):
        with pytest.raises(RuntimeError, match="different noise schedule"):
            loss.load_state_dict(build(other).state_dict())
    for name, value in loss.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


@pytest.mark.parametrize("delay_qvalue", [True, False])
@pytest.mark.parametrize("given", ["list", "module"])
def test_a_single_critic_keeps_its_weights_and_trains(given, delay_qvalue):
    """TorchRL would expand a list of one and leave nothing to train."""
    critic = make_critics(count=1)[0]
    weights = [parameter.detach().clone() for parameter in critic.parameters()]
    options = {"num_qvalue_nets": 1} if given == "module" else {}
    loss = QScoreMatchingLoss(
        make_actor(), critic if given == "module" else [critic], delay_qvalue=delay_qvalue, **options
    )
    parameters = list(loss.qvalue_network_params.parameters())
    assert len(parameters) == len(weights)
    for mine, theirs in zip(loss.trained_critics()[0].parameters(), weights, strict=True):
        assert torch.equal(mine, theirs)
    if delay_qvalue:
        for key, value in loss.target_qvalue_network_params.items(True, True):
            assert torch.equal(value, loss.qvalue_network_params.data.get(key))
    optimizer = torch.optim.Adam(parameters)
    loss.qvalue_loss(make_transitions([8]))[0].backward()
    optimizer.step()
    moved = list(loss.trained_critics()[0].parameters())
    assert not any(torch.equal(mine, theirs) for mine, theirs in zip(moved, weights, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("bc_weight", [0.0, 3.0])
def test_offline_the_policy_stays_at_the_better_half_of_the_data_with_behaviour_cloning(bc_weight):
    """Data at -0.5 and 0.5 with rewards 0 and 1: without cloning the policy follows the critics to the bound."""
    torch.manual_seed(0)
    actor = DiffusionActor(
        ScoreMLP(1, 1, (64, 64), time_features=16, time_dim=16),
        action_spec=Bounded(-1.0, 1.0, (1,)),
        noise_schedule=NoiseSchedule.cosine(8),
        sampler=DDPMSampler(clip="clean"),
    )
    critics = [
        TensorDictModule(QValueMLP(1, 1, (64, 64)), ["observation", "action"], ["state_action_value"]) for _ in range(2)
    ]
    loss = QScoreMatchingLoss(
        actor, critics, score_target=NormalizedQScore(0.3), bc_weight=bc_weight, delay_qvalue=False
    )
    side = torch.randint(2, (512,)) - 0.5
    data = hand_batch((side + 0.05 * torch.randn(512)).tolist(), terminated=[True] * 512)
    data["next", "reward"] = side.unsqueeze(-1) + 0.5
    optimizer = torch.optim.Adam(loss.parameters(), 3e-3)
    for _ in range(600):
        optimizer.zero_grad()
        output = loss(data[torch.randint(512, (128,))])
        (output["loss_actor"] + output["loss_qvalue"]).backward()
        optimizer.step()
    with torch.no_grad():
        action = actor.sample(torch.zeros(2000, 1))
    better, worse = (((action - center).abs() < 0.2).float().mean() for center in (0.5, -0.5))
    at_the_bound = (action > 0.9).float().mean()
    if bc_weight > 0:
        assert better > 0.4 and worse < 0.15 and at_the_bound < 0.2
    else:
        assert better < 0.25 and at_the_bound > 0.4


def test_critics_that_differ_in_more_than_their_weights_are_refused():
    first, other = make_critics()
    other.module.mlp[1] = nn.Tanh()
    with pytest.raises(ValueError, match="identical except for their weights"):
        QScoreMatchingLoss(make_actor(), [first, other], delay_qvalue=False)
    other = TensorDictModule(make_critics()[0].module, ["observation", "other"], ["state_action_value"])
    with pytest.raises(ValueError, match="identical except for their weights"):
        QScoreMatchingLoss(make_actor(), [first, other], delay_qvalue=False)
