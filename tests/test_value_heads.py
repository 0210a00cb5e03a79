from __future__ import annotations

import math

import pytest
import torch

from qsm_rl import ScalarHead, TwoHotHead
from qsm_rl.value_heads import return_bound, symexp, two_hot


def test_symexp_grows_for_both_signs_and_is_the_identity_near_zero():
    values = symexp(torch.tensor([2.0, -2.0, 0.0, -1e-4]))
    torch.testing.assert_close(values, torch.tensor([math.e**2 - 1, 1 - math.e**2, 0.0, -1e-4]), rtol=1e-3, atol=0)


def test_two_hot_by_hand():
    support = torch.tensor([-2.0, 0.0, 1.0, 5.0])
    weights = two_hot(torch.tensor([-2.0, -0.5, 0.0, 2.0, 5.0, 7.0, -9.0]), support)
    expected = torch.tensor(
        [
            [1.0, 0.0, 0.0, 0.0],
            [0.25, 0.75, 0.0, 0.0],
            [0.0, 1.0, 0.0, 0.0],
            [0.0, 0.0, 0.75, 0.25],
            [0.0, 0.0, 0.0, 1.0],
            [0.0, 0.0, 0.0, 1.0],
            [1.0, 0.0, 0.0, 0.0],
        ]
    )
    torch.testing.assert_close(weights, expected)


@pytest.mark.parametrize("head", [TwoHotHead(-3.0, 10.0, 14), TwoHotHead(-500.0, 1000.0, 41, symlog=True)])
def test_two_hot_keeps_the_mean_and_sums_to_one(head):
    support = head.support()
    assert (support.diff() > 0).all() and support.shape == (head.num_bins,)
    torch.testing.assert_close(support[[0, -1]], torch.tensor([head.low, head.high]), rtol=1e-4, atol=0)
    values = torch.empty(3, 50).uniform_(head.low, head.high)
    weights = two_hot(values, support)
    assert weights.shape == (3, 50, head.num_bins) and (weights >= 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 50))
    torch.testing.assert_close((weights * support).sum(-1), values, rtol=1e-4, atol=1e-3)


def test_value_loss_and_gradient_by_hand():
    """Support (0, 1, 2), probabilities (1/2, 1/4, 1/4): the mean is 3/4."""
    head = TwoHotHead(0.0, 2.0, 3)
    probabilities = torch.tensor([0.5, 0.25, 0.25])
    outputs = (probabilities.log() + 7.0).requires_grad_()
    torch.testing.assert_close(head.value(outputs).item(), 0.75)
    # The target 1.5 lies half way between 1 and 2: -(log(1/4) + log(1/4)) / 2
    loss = head.td_loss(outputs, torch.tensor(1.5))
    torch.testing.assert_close(loss.item(), math.log(4))
    (gradient,) = torch.autograd.grad(loss, outputs)
    torch.testing.assert_close(gradient, probabilities - torch.tensor([0.0, 0.5, 0.5]))
    # d mean / d output_i = p_i (z_i - mean)
    (gradient,) = torch.autograd.grad(head.value(outputs), outputs)
    torch.testing.assert_close(gradient, probabilities * (torch.tensor([0.0, 1.0, 2.0]) - 0.75))


@pytest.mark.parametrize("symlog", [False, True])
def test_the_least_loss_belongs_to_the_mean_of_random_targets(symlog):
    """Targets 0 and 60, the second in one of four draws: their mean is 15, where a median would be 0."""
    head = TwoHotHead(-100.0, 100.0, 41, symlog=symlog)
    outputs = head.initial_outputs().requires_grad_()
    optimizer = torch.optim.Adam([outputs], 0.05)
    targets = torch.tensor([0.0, 0.0, 0.0, 60.0])
    for _ in range(600):
        optimizer.zero_grad()
        head.td_loss(outputs.expand(4, -1), targets).mean().backward()
        optimizer.step()
    assert head.value(outputs).item() == pytest.approx(15, rel=0.02)


@pytest.mark.parametrize("head", [TwoHotHead(0.0, 100.0, 101), TwoHotHead(-1e3, 1e3, 101, symlog=True)])
def test_a_new_head_starts_near_zero(head):
    assert abs(head.value(head.initial_outputs()).item()) < 0.01 * head.high
    assert head.td_loss(head.initial_outputs(), torch.tensor(0.0)).item() < 0.02
    assert head.initial_outputs().isfinite().all()


def test_half_precision_outputs_lose_only_their_own_digits():
    head = TwoHotHead(0.0, 300.0, 101)
    outputs = torch.randn(20, 101)
    half = outputs.bfloat16()
    assert head.value(half).dtype == head.td_loss(half, torch.zeros(20).bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(head.value(half), head.value(half.float()).bfloat16())


@pytest.mark.parametrize(("name", "expected"), [("l2", [0.25, 9.0]), ("l1", [0.5, 3.0]), ("smooth_l1", [0.125, 2.5])])
def test_scalar_head_by_hand(name, expected):
    outputs = torch.tensor([[1.5], [-2.0]])
    head = ScalarHead(name)
    torch.testing.assert_close(head.value(outputs), torch.tensor([1.5, -2.0]))
    torch.testing.assert_close(head.td_loss(outputs, torch.ones(2)), torch.tensor(expected))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1.0, 2.0), r"must contain 0, .* got \[1.0, 2.0\]"),
        ((0.0, 0.0), r"got \[0.0, 0.0\]"),
        ((None, 5.0), r"got \[None, 5.0\]"),
        ((2.0, -2.0), r"got \[2.0, -2.0\]"),
        ((0.0, math.inf), r"got \[0.0, inf\]"),
        ((-1.0, 1.0, 1), "num_bins must be at least 2, got 1"),
    ],
)
def test_bad_supports_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        TwoHotHead(*arguments)


def test_bound_of_the_returns_by_hand():
    """A reward of -2 with 3/4 of the value behind it bounds returns by 8; three steps at 1/2 sum up to 3.5 / (7/8)."""
    assert return_bound(torch.tensor([[0.5], [-2.0]]), torch.tensor(0.75)) == pytest.approx(8)
    assert return_bound(torch.tensor([3.5, 1.0]), torch.tensor([0.125, 0.5])) == pytest.approx(4)
    assert return_bound(torch.zeros(3), torch.tensor(0.5)) == pytest.approx(2)  # nothing seen: as of rewards of 1
    with pytest.raises(ValueError, match="unbounded with a gamma of 1"):
        return_bound(torch.ones(3), torch.tensor(1.0))


def test_a_head_waits_for_its_support_and_keeps_it():
    head = TwoHotHead(num_bins=5)
    assert not head.has_support
    with pytest.raises(RuntimeError, match="no value support yet"):
        head.td_loss(torch.zeros(5), torch.tensor(0.0))
    before = head.initial_outputs()
    head.choose_support(torch.tensor([1.0]), torch.tensor(0.5))
    assert (head.low, head.high) == (-20, 20)  # ten times 1 / (1 - 0.5)
    torch.testing.assert_close(head.initial_outputs(), before)  # a new critic is the same on every symmetric support
    head.choose_support(torch.tensor([100.0]), torch.tensor(0.5))
    assert head.high == 20
    assert head.clipped(torch.tensor([-21.0, -20.0, 0.0, 20.5])).tolist() == [True, False, False, True]
    fresh = TwoHotHead(num_bins=5)
    fresh.load_state_dict(TwoHotHead(num_bins=5).state_dict())
    assert not fresh.has_support
    fresh.load_state_dict(head.state_dict())
    assert fresh.has_support and repr(fresh) == repr(head)
