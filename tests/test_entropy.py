from __future__ import annotations

import math

import pytest
import torch

from qsm_rl import EntropyBonus
from qsm_rl.entropy import nearest_neighbour_entropy

NUM_STATES = 4_000


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_three_points_by_hand():
    """-0.9 | 0.1 0.3: nearest at 1, 0.2, 0.2; the first cube is cut at -1. psi(3) - psi(1) = 3/2."""
    samples = torch.tensor([[-0.9], [0.1], [0.3]])
    lengths = (0.1 + 1.0, 0.4, 0.4)
    expected = 1.5 + sum(map(math.log, lengths)) / 3
    assert nearest_neighbour_entropy(samples).item() == pytest.approx(expected)
    # A second dimension in which all agree on a face: its sides are half of what they are inside.
    flat = torch.cat([samples, torch.ones(3, 1)], -1)
    expected += (math.log(1.0) + 2 * math.log(0.2)) / 3
    assert nearest_neighbour_entropy(flat).item() == pytest.approx(expected, rel=1e-5)


def test_equal_samples_count_as_the_least_distance():
    samples = torch.zeros(8, 3, 2)
    expected = sum(1 / n for n in range(1, 8)) + 2 * math.log(2e-3 / 8)
    torch.testing.assert_close(nearest_neighbour_entropy(samples), torch.full((3,), expected))


@pytest.mark.parametrize(("count", "dtype"), [(1024, torch.float32), (8, torch.bfloat16)])
def test_the_least_distance_is_not_rounded_away_beside_the_place(count, dtype):
    samples = torch.full((count, 1), 0.9, dtype=dtype)
    expected = sum(1 / n for n in range(1, count)) + math.log(2e-3 / count)
    assert nearest_neighbour_entropy(samples).item() == pytest.approx(expected, abs=1e-3 if count == 1024 else 0.05)


@pytest.mark.parametrize("shape", [(), (5,), (2, 3)])
def test_each_law_of_a_batch_is_estimated_alone(shape):
    samples = torch.rand(6, *shape, 2)
    entropy = nearest_neighbour_entropy(samples)
    assert entropy.shape == shape
    rows = zip(samples.reshape(6, -1, 2).unbind(1), entropy.reshape(-1), strict=True)
    for one, expected in rows:
        torch.testing.assert_close(nearest_neighbour_entropy(one), expected)


# --- the error on closed forms: what the docstring says ---


def uniform(count, action_dim):
    return 2 * torch.rand(count, NUM_STATES, action_dim) - 1, action_dim * math.log(2)


def mixture(count, action_dim):
    """Four modes far apart in two dimensions: the entropy is that of the weights and that of one mode."""
    weights, std = torch.tensor([0.4, 0.3, 0.2, 0.1]), 0.12
    corners = torch.tensor([[0.5, 0.5], [-0.5, 0.5], [-0.5, -0.5], [0.5, -0.5]])
    centers = torch.nn.functional.pad(corners, (0, action_dim - 2))
    modes = torch.multinomial(weights, count * NUM_STATES, replacement=True).reshape(count, NUM_STATES)
    samples = (centers[modes] + std * torch.randn(count, NUM_STATES, action_dim)).clamp(-1, 1)
    entropy = -(weights * weights.log()).sum().item() + action_dim * 0.5 * math.log(2 * math.pi * math.e * std**2)
    return samples, entropy


def exponential(count, slope):
    """Density proportional to exp(slope a): entropy log(2 sinh(slope) / slope) - slope E[a]."""
    u = torch.rand(count, NUM_STATES, 1)
    samples = (math.exp(-slope) + u * (math.exp(slope) - math.exp(-slope))).log() / slope
    mean = 1 / math.tanh(slope) - 1 / slope
    return samples, math.log(2 * math.sinh(slope) / slope) - slope * mean


@pytest.mark.parametrize(
    ("law", "count", "parameter", "bias", "spread"),
    [
        (uniform, 16, 1, 0.0, 0.36),
        (uniform, 64, 1, 0.0, 0.18),
        (uniform, 16, 2, 0.0, 0.38),
        (uniform, 16, 6, 0.0, 0.41),
        (uniform, 64, 6, 0.0, 0.21),
        (mixture, 16, 2, 0.01, 0.45),
        (mixture, 64, 2, -0.06, 0.23),
        (mixture, 16, 6, 0.71, 0.68),
        (mixture, 64, 6, 0.14, 0.31),
        (exponential, 16, 4.0, -0.01, 0.43),
    ],
)
def test_error_on_closed_forms(law, count, parameter, bias, spread):
    samples, truth = law(count, parameter)
    error = nearest_neighbour_entropy(samples) - truth
    assert error.mean().item() == pytest.approx(bias, abs=0.04)
    assert error.std().item() == pytest.approx(spread, abs=0.03)


@pytest.mark.parametrize("count", [8, 64, 256])
def test_more_samples_of_a_narrow_law_are_not_worse(count):
    samples, std = 0.02 * torch.randn(count, 1000, 1), 0.02
    error = nearest_neighbour_entropy(samples) - 0.5 * math.log(2 * math.pi * math.e * std**2)
    assert error.mean().abs().item() < 0.06


def test_bonus_is_the_entropy_times_a_temperature_that_can_be_scheduled():
    samples = torch.rand(4, 5, 2)
    bonus = EntropyBonus(0.5)
    torch.testing.assert_close(bonus(samples), 0.5 * nearest_neighbour_entropy(samples))
    bonus.temperature.mul_(0.0)
    assert not bonus(samples).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0.0,), "temperature must be positive, got 0.0"), ((1.0, 1), "num_samples must be at least 2, got 1")],
)
def test_bad_input_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        EntropyBonus(*arguments)
