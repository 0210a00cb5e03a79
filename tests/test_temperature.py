from __future__ import annotations

import pytest
import torch

from qsm_rl import BoltzmannQScore, ScaledQScore, SpreadTuner


def test_one_step_by_hand():
    target = BoltzmannQScore(2.0)
    actions = torch.tensor([[[0.3, 0.0]], [[-0.3, 0.2]]], requires_grad=True)  # spreads 0.3 and 0.1 around their means
    spread = SpreadTuner(target, target_spread=0.4, rate=0.5)(actions)
    assert spread.item() == pytest.approx(0.2)
    assert target.temperature.item() == pytest.approx(2.0 * 2**0.5)
    assert not target.temperature.requires_grad


def test_finds_the_temperature_of_a_policy_whose_spread_follows_it():
    """Actions N(0, temperature): the wanted spread 0.3 belongs to temperature 0.09."""
    torch.manual_seed(0)
    target = BoltzmannQScore(5.0)
    tuner = SpreadTuner(target, target_spread=0.3, rate=0.1)
    for _ in range(400):
        tuner(target.temperature.sqrt() * torch.randn(64, 16, 2))
    assert target.temperature.item() == pytest.approx(0.09, rel=0.05)


@pytest.mark.parametrize(("spread", "factor"), [(0.0, 10.0), (1.0, 0.1)])
def test_a_policy_far_off_moves_the_temperature_by_a_bounded_step(spread, factor):
    target = BoltzmannQScore(1.0)
    SpreadTuner(target, target_spread=0.05, rate=0.1)(torch.tensor([-spread, spread]).expand(8, 2).T.unsqueeze(-1))
    assert target.temperature.item() == pytest.approx(factor**0.1, rel=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SpreadTuner(ScaledQScore(), 0.2), "no temperature"),
        (lambda: SpreadTuner(BoltzmannQScore(1.0), 0.0), "target_spread"),
        (lambda: SpreadTuner(BoltzmannQScore(1.0), 0.2, rate=2.0), "rate"),
        (lambda: SpreadTuner(BoltzmannQScore(1.0), 0.2)(torch.zeros(1, 64, 2)), r"2 samples .* got shape \(1, 64, 2\)"),
    ],
)
def test_bad_input_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
