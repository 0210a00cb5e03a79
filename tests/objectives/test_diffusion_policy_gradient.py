from __future__ import annotations

import math
from typing import Any, ClassVar

import pytest
import torch
from tensordict.nn import TensorDictModule

from qsm_rl import DDPMSampler, DiffusionPolicyGradientLoss
from tests.loss_contract import FLAT_KEYS, Keys, LossContract, evaluate, make_actor, make_critics, make_transitions
from tests.objectives.hand import ONE_STEP, TWO_STEPS, Gain, Line, Peak, make, mean_action_after_training, transitions

LOG_ROOT_2_PI = 0.5 * math.log(2 * math.pi)


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
    noiseless: ClassVar = {"target_action_noise_std": 0.0}
    constructor_errors = (
        ({"num_samples": 1}, ValueError, "num_samples must be at least 2, .* got 1"),
        ({"min_std": 0.0}, ValueError, "min_std must be above 0 .* got 0.0"),
        ({"min_std": float("nan")}, ValueError, "min_std must be above 0 .* got nan"),
        ({"reduction": "avg"}, ValueError, "reduction must be one of .* got 'avg'"),
        ({"critics": []}, ValueError, "empty list; pass at least one critic"),
    )

    def make_loss(
        self, *, keys: Keys = FLAT_KEYS, critics: list[TensorDictModule] | None = None, **options: Any
    ) -> DiffusionPolicyGradientLoss:
        return DiffusionPolicyGradientLoss(
            make_actor(keys), make_critics(keys) if critics is None else critics, **options
        )


# --- numbers worked out by hand ---


def test_actor_loss_of_a_chain_of_one_step():
    """Two chains from x = 0.04 and -0.02; the step's mean is x (1 - sqrt(0.9936) gain) / 0.08, its noise 0.5."""
    options = {"betas": ONE_STEP, "low": -3.0, "high": 3.0, "num_samples": 2, "min_std": 0.5}
    loss = make(DiffusionPolicyGradientLoss, [Line(2.0, 5.0), Line(1.0, 0.0)], Gain(0.5), **options)
    z = torch.tensor([0.6, -1.0])
    start, noise = torch.tensor([0.04, -0.02]).view(2, 1, 1), z.view(1, 2, 1, 1)
    value, info = loss.actor_loss(transitions([0.0], observation=[1.0]), start, noise)
    value.backward()
    c = 0.9936**0.5
    actions = torch.tensor([0.5, -0.25]) * (1 - 0.5 * c) + 0.5 * z
    q_values = 1.5 * 3 * actions + 2.5  # the mean critic, at three times the box action
    advantage = torch.stack([q_values[0] - q_values[1], q_values[1] - q_values[0]])
    log_prob = -(z**2) / 2 - math.log(0.5) - LOG_ROOT_2_PI
    torch.testing.assert_close(info["policy_action"].flatten(), actions)
    torch.testing.assert_close(info["policy_q_value"].flatten(), q_values)
    torch.testing.assert_close(info["advantage"].flatten(), advantage)
    torch.testing.assert_close(info["log_prob"].flatten(), log_prob)
    torch.testing.assert_close(value, -(advantage * log_prob).mean())
    row = loss.diagnostics(loss.qvalue_loss(transitions([0.0]))[1], info)
    torch.testing.assert_close(row["advantage_size"], (q_values[0] - q_values[1]).abs())
    # d log p / d gain = z / std * d mean / d gain
    slopes = z / 0.5 * -c * torch.tensor([0.5, -0.25])
    torch.testing.assert_close(loss.actor_network.score_network.gain.grad, -(advantage * slopes).mean())


def test_actor_loss_of_a_chain_of_two_steps_clipped_on_the_way():
    """The first step of the second chain draws beyond the box: its likelihood is that of the draw, not of the face."""
    gain = 0.25
    options = {"betas": TWO_STEPS, "num_samples": 2, "min_std": 0.2}
    loss = make(DiffusionPolicyGradientLoss, [Peak(0.1)], Gain(gain), **options)
    x, z = torch.tensor([0.02, -0.03]), torch.tensor([[0.3, 2.0], [-0.5, 1.0]])
    value, info = loss.actor_loss(transitions([0.0]), x.view(2, 1, 1), z.view(2, 2, 1, 1))
    value.backward()
    share = 0.99 / 0.9936**0.5
    draw = x * (1 - share * gain) / 0.1 + 0.99**0.5 * z[0]
    assert abs(draw[0]) < 1 < draw[1]
    state = draw.clamp(-1, 1)
    actions = (state * (1 - 0.6 * gain) / 0.8 + 0.2 * z[1]).clamp(-1, 1)
    q_values = -((actions - 0.1) ** 2)
    advantage = q_values - q_values.flip(0)
    stds = torch.tensor([[0.99**0.5], [0.2]])
    log_prob = -(z**2) / 2 - stds.log() - LOG_ROOT_2_PI
    torch.testing.assert_close(info["log_prob"].squeeze(-1), log_prob)
    torch.testing.assert_close(info["advantage"].squeeze(-1), advantage)
    torch.testing.assert_close(value, -(advantage * log_prob.sum(0)).mean())
    slopes = z[0] / stds[0] * (-share * x / 0.1) + z[1] / stds[1] * (-0.6 * state / 0.8)
    torch.testing.assert_close(loss.actor_network.score_network.gain.grad, -(advantage * slopes).mean())


def test_the_gradient_is_that_of_the_expected_q_value():
    """Against the pathwise gradient of the same policy, floor included, which is exact for the draws at hand."""
    torch.manual_seed(0)
    loss = make(DiffusionPolicyGradientLoss, [Peak(0.4)], Gain(0.3), betas=TWO_STEPS, num_samples=16, min_std=0.3)
    gain = loss.actor_network.score_network.gain
    batch = transitions([0.0] * 20_000)
    loss.actor_loss(batch)[0].backward()
    likelihood_ratio = gain.grad.clone()
    gain.grad = None
    # Both steps by hand: the actor's own chain passes gradients at the faces that the expectation does not have.
    x, first_noise, second_noise = torch.randn(3, 300_000)
    state = (x * (1 - 0.99 / 0.9936**0.5 * gain) / 0.1 + 0.99**0.5 * first_noise).clamp(-1, 1)
    action = (state * (1 - 0.6 * gain) / 0.8 + 0.3 * second_noise).clamp(-1, 1)
    ((action - 0.4) ** 2).mean().backward()
    torch.testing.assert_close(likelihood_ratio, gain.grad, rtol=0.03, atol=0)
    assert abs(gain.grad) > 0.01


def test_the_gradient_where_the_predicted_clean_action_is_clipped_is_that_of_the_expected_q_value():
    """Against finite differences of the expected Q-value over the same draws."""
    torch.manual_seed(0)
    gain, options = 0.3, {"betas": TWO_STEPS, "sampler": DDPMSampler(clip="clean"), "min_std": 0.3}
    loss = make(DiffusionPolicyGradientLoss, [Peak(0.4)], Gain(gain), num_samples=16, **options)
    loss.actor_loss(transitions([0.0] * 20_000))[0].backward()
    actor = loss.actor_network
    start, noise, observation = torch.randn(200_000, 1), torch.randn(2, 200_000, 1), torch.zeros(200_000, 1)
    costs = []
    with torch.no_grad():
        for value in (gain + 0.02, gain - 0.02):
            actor.score_network.gain.fill_(value)
            costs.append(((actor.sample(observation, start, noise, min_std=0.3) - 0.4) ** 2).mean())
    slope = (costs[0] - costs[1]) / 0.04
    assert abs(slope) > 0.01
    torch.testing.assert_close(actor.score_network.gain.grad, slope, rtol=0.05, atol=0)


def test_masked_samples_count_for_nothing():
    torch.manual_seed(0)
    loss = DiffusionPolicyGradientLoss(make_actor(), make_critics(), delay_qvalue=False, num_samples=3)
    data, mask = make_transitions((8,)), torch.arange(8) < 5
    start, noise = torch.randn(3, 8, 2), torch.randn(5, 3, 8, 2)
    live = data[mask]
    data["collector", "mask"] = mask
    actual = loss.actor_loss(data, start, noise)
    torch.testing.assert_close(actual, loss.actor_loss(live, start[:, mask], noise[:, :, mask]))
    data["collector", "mask"] = torch.zeros(8, dtype=torch.bool)
    output = evaluate(loss, data)
    assert output["loss_actor"] == 0 and output["loss_qvalue"] == 0


def test_the_policy_finds_the_peak():
    mean = mean_action_after_training(DiffusionPolicyGradientLoss, 200, 2e-3, data=0.4)
    assert mean == pytest.approx(-0.4, abs=0.06)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_compiled_actor_loss_equals_the_eager_one_and_is_one_graph():
    torch.manual_seed(0)
    loss = DiffusionPolicyGradientLoss(make_actor(), make_critics(), delay_qvalue=False)
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
