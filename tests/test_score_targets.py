from __future__ import annotations

import pytest
import torch

from qsm_rl import BoltzmannQScore, NoiseSchedule, NormalizedQScore, ScaledQScore

SCHEDULE = NoiseSchedule([0.36, 0.99])  # sigmas 0.6 and sqrt(0.9936)
NOISY = torch.tensor([[0.5, -1.0], [2.0, 0.0]])
T = torch.tensor([0, 1])


def q_value(action):
    """Q = -|a|^2 for actions (K, B, A), so dQ/da = -2 a."""
    return -(action**2).sum(-1)


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (ScaledQScore(50.0), 100 * NOISY),
        (BoltzmannQScore(0.5), torch.tensor([[0.6], [0.9936**0.5]]) * 4 * NOISY),
        # mean |dQ/da| = (1 + 2 + 4 + 0) / 4
        (NormalizedQScore(0.1), torch.tensor([[0.6], [0.9936**0.5]]) * 20 * NOISY / 1.75),
    ],
    ids=["scaled", "boltzmann", "normalized"],
)
def test_targets_equal_their_formulas(target, expected):
    value, info = target(q_value, NOISY, T, SCHEDULE)
    torch.testing.assert_close(value, expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(info["q_score"], -2 * NOISY)
    assert set(info) == set(target.info_keys)
    assert not value.requires_grad


def test_scale_and_temperature_are_buffers_that_can_be_scheduled():
    scaled, boltzmann = ScaledQScore(50.0), BoltzmannQScore(1.0)
    scaled.scale.fill_(10.0)
    boltzmann.temperature.mul_(0.25)
    torch.testing.assert_close(scaled(q_value, NOISY, T, SCHEDULE)[0], 20 * NOISY)
    torch.testing.assert_close(boltzmann(q_value, NOISY, T, SCHEDULE)[0][0], 0.6 * 8 * NOISY[0])
    assert scaled.state_dict()["scale"].item() == 10.0


@pytest.mark.parametrize(
    "make", [lambda: ScaledQScore(0.0), lambda: BoltzmannQScore(-1.0), lambda: NormalizedQScore(float("nan"))]
)
def test_bad_scales_are_refused(make):
    with pytest.raises(ValueError, match="must be positive"):
        make()
