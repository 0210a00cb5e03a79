from __future__ import annotations

import math

import pytest
import torch

from qsm_rl import functional as F


def test_action_gradient_is_per_sample_and_without_graph():
    weights = torch.nn.Parameter(torch.tensor([2.0, -1.0]))
    action = torch.tensor([[[0.5, 1.0], [0.0, -2.0]]], requires_grad=True)
    gradient = F.action_gradient(lambda a: (weights.detach() * a**2).sum(-1), action)
    torch.testing.assert_close(gradient, torch.tensor([[[2.0, -2.0], [0.0, 4.0]]]))
    assert not gradient.requires_grad
    assert action.grad is None
    with torch.no_grad():
        torch.testing.assert_close(F.action_gradient(lambda a: a.sum(-1), action), torch.ones(1, 2, 2))


def test_mean_absolute_can_be_divided_by():
    assert F.mean_absolute(torch.tensor([-1.0, 3.0])).item() == 2
    assert not (torch.zeros(5) / F.mean_absolute(torch.zeros(5))).any()
    assert F.mean_absolute(torch.zeros(0)) == 1
    assert F.mean_absolute(torch.zeros(5)).reciprocal().square().isfinite()  # so has a gradient through it a norm


def test_norms_are_clipped_over_the_action_alone():
    vectors = torch.tensor([[[3.0, 4.0]], [[0.3, 0.4]]])  # (2, 1, 2)
    torch.testing.assert_close(F.clip_norm(vectors, 1.0), torch.tensor([[[0.6, 0.8]], [[0.3, 0.4]]]))


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    # (1, 3, 8) has mean 4 and variance ((-3)^2 + (-1)^2 + 4^2) / 3 = 26 / 3; (2, 2, 2) has none.
    [
        ("min", [1.0, 2.0]),
        ("mean", [4.0, 2.0]),
        (0.5, [4 - 0.5 * (26 / 3) ** 0.5, 2.0]),
        (-1.0, [4 + (26 / 3) ** 0.5, 2.0]),
    ],
)
def test_aggregation_of_critics_by_hand(aggregation, expected):
    q_values = torch.tensor([[1.0, 2.0], [3.0, 2.0], [8.0, 2.0]])
    torch.testing.assert_close(F.aggregate_q_values(q_values, aggregation), torch.tensor(expected))


def test_the_minimum_of_two_critics_is_one_std_below_their_mean():
    q_values = torch.randn(2, 3, 5)
    torch.testing.assert_close(F.aggregate_q_values(q_values, 1.0), F.aggregate_q_values(q_values, "min"))
    torch.testing.assert_close(F.aggregate_q_values(q_values[:1], 1.0), q_values[0])  # one critic has no spread


def test_gaussian_log_prob_is_that_of_torch():
    torch.manual_seed(0)
    sample, mean, std = torch.randn(5, 3, 2), torch.randn(5, 3, 2), torch.rand(5, 3) + 0.1
    expected = torch.distributions.Normal(mean, std.unsqueeze(-1)).log_prob(sample).sum(-1)
    torch.testing.assert_close(F.gaussian_log_prob(sample, mean, std), expected)
    torch.testing.assert_close(
        F.gaussian_log_prob(sample, mean, 0.3), torch.distributions.Normal(mean, 0.3).log_prob(sample).sum(-1)
    )


def test_leave_one_out_advantage_is_against_the_other_samples():
    q_values = torch.tensor([[1.0, 5.0], [2.0, 5.0], [6.0, 5.0]])
    others = torch.stack([q_values[[1, 2]].mean(0), q_values[[0, 2]].mean(0), q_values[[0, 1]].mean(0)])
    torch.testing.assert_close(F.leave_one_out_advantage(q_values), q_values - others)


def test_normalized_q_value_has_no_gradient_to_the_other_critic():
    one, other = torch.tensor([1.0, -3.0], requires_grad=True), torch.tensor([-2.0, 6.0], requires_grad=True)
    value = F.normalized_q_value(one, other)
    torch.testing.assert_close(value, torch.tensor([0.25, -0.75]))
    value.sum().backward()
    torch.testing.assert_close(one.grad, torch.full((2,), 0.25))
    assert other.grad is None


def test_clamping_inward_keeps_the_gradient_that_leads_back():
    action = torch.tensor([-2.0, -2.0, -1.0, 0.3, 1.0, 2.0, 2.0], requires_grad=True)
    direction = torch.tensor([1.0, -1.0, 1.0, -1.0, -1.0, -1.0, 1.0])  # descent moves the action against it
    clamped = F.clamp_inward(action)
    clamped.backward(direction)
    assert torch.equal(clamped, action.clamp(-1, 1))
    assert action.grad.tolist() == [0.0, -1.0, 1.0, -1.0, -1.0, 0.0, 1.0]
    with torch.no_grad():
        assert torch.equal(F.clamp_inward(action), action.clamp(-1, 1))
    torch.testing.assert_close(torch.func.vmap(F.clamp_inward)(action.unsqueeze(-1)), clamped.unsqueeze(-1))


def test_clamping_inward_under_vmap_forward_mode_and_hessian():
    action = torch.tensor([[-3.0, 0.5, 3.0], [3.0, 0.5, -3.0]])
    inward = torch.tensor([[0.0, 1.0, 1.0], [1.0, 1.0, 0.0]])  # of what makes every action smaller
    leaf = action.clone().requires_grad_()
    torch.vmap(F.clamp_inward)(leaf).sum().backward()
    torch.testing.assert_close(leaf.grad, inward)
    gradient = torch.func.grad(lambda a: torch.vmap(F.clamp_inward)(a).sum())
    torch.testing.assert_close(gradient(action), inward)
    inside = torch.diag(torch.tensor([0.0, 1.0, 0.0]))
    torch.testing.assert_close(torch.func.jacfwd(F.clamp_inward)(action[0]), inside)
    hessian = torch.func.hessian(lambda a: F.clamp_inward(a).square().sum())
    torch.testing.assert_close(hessian(action[0]), 2 * inside)


def test_mixture_weights_in_two_dimensions_by_hand():
    """N(0, I) over half of itself, its mass in the box erf(1 / sqrt(2)) a dimension, and half of the uniform 1 / 4."""
    normal = torch.tensor([1.0, math.exp(-1.0)]) / (2 * math.pi)
    expected = normal / (0.5 / 4 + 0.5 * normal / math.erf(0.5**0.5) ** 2)
    particles = torch.tensor([[0.0, 0.0], [1.0, -1.0]])
    weights = F.log_mixture_weight(particles, torch.zeros(2), torch.ones(2), 0.5).exp()
    torch.testing.assert_close(weights, expected)


@pytest.mark.parametrize("side", [-1.0, 1.0])
def test_mixture_weights_of_a_box_in_the_far_tail(side):
    """The mean lies 20 standard deviations from the face; the mass in the box, 1e-89, is that of the tail."""
    particles, std = side * torch.tensor([[1.0], [0.9]]), torch.tensor([0.1])
    log_normal = -0.5 * torch.tensor([20.0, 21.0]) ** 2 - math.log(0.1 * (2 * math.pi) ** 0.5)
    log_tail = torch.special.log_ndtr(torch.tensor(-20.0))
    expected = -torch.logaddexp(math.log(0.5 / 2) - log_normal, math.log(0.5) - log_tail)
    torch.testing.assert_close(F.log_mixture_weight(particles, side * torch.tensor([3.0]), std, 0.5), expected)
    # At 490 the mass is no number any more; the particles still have weights.
    assert F.log_mixture_weight(particles, side * torch.tensor([50.0]), std, 0.5).isfinite().all()
