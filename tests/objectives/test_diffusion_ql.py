from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from tensordict.nn import TensorDictModule

from qsm_rl import DDPMSampler, DiffusionQLLoss
from tests.loss_contract import FLAT_KEYS, Keys, LossContract, make_actor, make_critics, make_transitions
from tests.objectives.hand import ONE_STEP, TWO_STEPS, Gain, Line, Peak, make, mean_action_after_training, transitions


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
    schedulable = ("eta", "bc_weight")
    independent: ClassVar = {"normalize_q": False}
    constructor_errors = (
        ({"eta": -1.0}, ValueError, "eta must be at least 0, got -1.0"),
        ({"bc_weight": float("nan")}, ValueError, "bc_weight must be at least 0, got nan"),
        ({"reduction": "avg"}, ValueError, "reduction must be one of .* got 'avg'"),
        ({"critics": []}, ValueError, "empty list; pass at least one critic"),
    )

    def make_loss(
        self, *, keys: Keys = FLAT_KEYS, critics: list[TensorDictModule] | None = None, **options: Any
    ) -> DiffusionQLLoss:
        options.setdefault("delay_actor", False)  # as the contract expects of the other losses
        return DiffusionQLLoss(make_actor(keys), make_critics(keys) if critics is None else critics, **options)


# --- numbers worked out by hand ---


@pytest.mark.parametrize(("low", "high", "half"), [(-1.0, 1.0, 1.0), (-3.0, 3.0, 3.0)])
def test_actor_loss_through_a_chain_of_one_step(low, high, half):
    """From x the one step goes to x (1 - sqrt(0.9936) gain) / 0.08; two samples, x = 0.04 and -0.02."""
    options = {"betas": ONE_STEP, "low": low, "high": high, "eta": 2.0, "bc_weight": 0.0}
    loss = make(DiffusionQLLoss, [Line(2.0, 5.0), Line(1.0, -3.0)], Gain(0.5), **options)
    batch = transitions([0.0, 0.0], observation=[1.0, 2.0])
    value, info = loss.actor_loss(batch, torch.tensor([[0.04], [-0.02]]), torch.zeros(1, 2, 1), critic=0)
    value.backward()
    keep = 1 - 0.5 * 0.9936**0.5
    actions = torch.tensor([0.5 * keep, -0.25 * keep])
    q_values = 2 * half * actions + 5 * torch.tensor([1.0, 2.0])
    scale = (half * actions - 3 * torch.tensor([1.0, 2.0])).abs().mean()  # of the other critic
    torch.testing.assert_close(info["policy_action"].squeeze(-1), actions)
    torch.testing.assert_close(info["policy_q_value"], q_values)
    torch.testing.assert_close(value, -2 * q_values.mean() / scale)
    slopes = -(0.9936**0.5) * torch.tensor([0.5, -0.25])  # of the actions in the gain; the scale has no gradient
    torch.testing.assert_close(loss.actor_network.score_network.gain.grad, -2 * (2 * half * slopes).mean() / scale)
    assert "bc_error" not in info and "bc_error" not in loss.out_keys


def test_actor_loss_through_a_chain_of_two_steps_beside_behaviour_cloning():
    """t = 1: (x - 0.99 / sqrt(0.9936) gain x) / 0.1 + sqrt(0.99) z; t = 0: (x - 0.6 gain x) / 0.8."""
    gain, x, z, eta, bc_weight = 0.25, 0.02, 0.3, 1.5, 0.5
    options = {"betas": TWO_STEPS, "eta": eta, "bc_weight": bc_weight, "normalize_q": False}
    loss = make(DiffusionQLLoss, [Peak(0.9), Peak(0.1)], Gain(gain), **options)
    # Behaviour cloning: the replayed 0.5 with noise 1 is 0.8 * 0.5 + 0.6 = 1, the predicted noise is the gain.
    draws = {"t": torch.tensor([0]), "noise": torch.tensor([[1.0]])}
    noise = torch.tensor([[[z]], [[7.0]]])  # the last step uses none
    value, info = loss.actor_loss(transitions([0.5]), torch.tensor([[x]]), noise, critic=1, **draws)
    value.backward()
    share = 0.99 / 0.9936**0.5
    first = (x - share * gain * x) / 0.1 + 0.99**0.5 * z
    action = (first - 0.6 * gain * first) / 0.8
    assert abs(first) < 1 and abs(action) < 1
    slope = ((1 - 0.6 * gain) * (-share * x / 0.1) - 0.6 * first) / 0.8  # d action / d gain, through both steps
    assert info["policy_action"].item() == pytest.approx(action, rel=1e-5)
    assert info["bc_error"].item() == pytest.approx((gain - 1) ** 2)
    assert info["policy_q_value"].item() == pytest.approx(-((action - 0.1) ** 2), rel=1e-5)
    assert value.item() == pytest.approx(eta * (action - 0.1) ** 2 + bc_weight * (gain - 1) ** 2, rel=1e-5)
    gradient = eta * 2 * (action - 0.1) * slope + bc_weight * 2 * (gain - 1)
    assert loss.actor_network.score_network.gain.grad.item() == pytest.approx(gradient, rel=1e-5)


@pytest.mark.parametrize(("best", "leads"), [(2.0, "out"), (0.5, "in")])
@pytest.mark.parametrize("clip", ["clean", "sample", None])
def test_a_clipped_action_has_the_gradient_that_leads_back(best, leads, clip):
    """From 0.4 the step goes to 0.4 (1 - 0.5 sqrt(0.9936)) / 0.08 = 2.5, which is clipped to 1; Q = -(a - best)^2."""
    options = {"betas": ONE_STEP, "bc_weight": 0.0, "normalize_q": False, "sampler": DDPMSampler(clip=clip)}
    loss = make(DiffusionQLLoss, [Peak(best)], Gain(0.5), **options)
    value, _ = loss.actor_loss(transitions([0.0]), torch.tensor([[0.4]]), torch.zeros(1, 1, 1))
    value.backward()
    assert value.item() == pytest.approx((1 - best) ** 2)
    slope = -(0.9936**0.5) * 0.4 / 0.08  # of the action in the gain
    expected = 2 * (1 - best) * slope if leads == "in" else 0
    assert loss.actor_network.score_network.gain.grad.item() == pytest.approx(expected, rel=1e-5)


def test_the_maximised_critic_is_drawn_and_the_next_one_scales_it():
    critics = [Line(0.0, 1.0), Line(0.0, 2.0), Line(0.0, 5.0)]
    loss = make(DiffusionQLLoss, critics, Gain(0.0), betas=ONE_STEP, bc_weight=0.0)
    batch = transitions([0.0, 0.0], observation=[1.0, -3.0])  # means -1, -2, -5 and mean sizes 2, 4, 10
    expected = {0: 1 / 4, 1: 2 / 10, 2: 5 / 2}
    for critic, value in expected.items():
        assert loss.actor_loss(batch, critic=critic)[0].item() == pytest.approx(value)
    torch.manual_seed(0)
    drawn = {round(loss.actor_loss(batch)[0].item(), 3) for _ in range(30)}
    assert drawn == {0.25, 0.2, 2.5}


def test_masked_samples_count_for_nothing():
    torch.manual_seed(0)
    loss = DiffusionQLLoss(make_actor(), make_critics(), delay_qvalue=False, delay_actor=False)
    data, mask = make_transitions((8,)), torch.arange(8) < 5
    chain = torch.randn(8, 2), torch.randn(5, 8, 2)
    t, noise = torch.arange(8) % 5, torch.randn(8, 2)
    live = data[mask]
    data["collector", "mask"] = mask
    actual = loss.actor_loss(data, *chain, 0, t, noise)
    expected = loss.actor_loss(live, chain[0][mask], chain[1][:, mask], 0, t[mask], noise[mask])
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    ("weights", "low", "high"),
    [
        ({"eta": 1.0, "bc_weight": 0.0}, -0.43, -0.37),  # Q peaks at -0.4
        ({"eta": 0.0, "bc_weight": 1.0}, 0.37, 0.43),  # the data lie at 0.4
        ({"eta": 1.0, "bc_weight": 1.0}, -0.35, 0.35),
    ],
    ids=["Q", "data", "both"],
)
def test_the_policy_goes_to_the_peak_of_q_to_the_data_or_between(weights, low, high):
    mean = mean_action_after_training(DiffusionQLLoss, 200, 5e-3, data=0.4, normalize_q=False, **weights)
    assert low < mean < high


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_compiled_actor_loss_equals_the_eager_one_and_is_one_graph():
    torch.manual_seed(0)
    loss = DiffusionQLLoss(make_actor(), make_critics(), delay_qvalue=False, delay_actor=False)
    results = []
    # The compiler's own generators draw other numbers than eager code; with this both draw the same.
    with torch._inductor.config.patch(fallback_random=True):
        for function in (loss.actor_loss, torch.compile(loss.actor_loss, fullgraph=True)):
            torch.manual_seed(3)
            loss.zero_grad()
            value, _ = function(make_transitions((8,)))
            value.backward()
            results.append((value.detach(), [parameter.grad for parameter in loss.actor_network_params.parameters()]))
    torch.testing.assert_close(results[1], results[0])
