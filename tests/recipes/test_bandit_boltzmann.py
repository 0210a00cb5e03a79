from __future__ import annotations

import math

import pytest
import torch

from recipes import bandit_boltzmann as bandit


def test_energy_distance_of_two_gaussians():
    """For N(0, 1) and N(m, 1): 2 E|X - Y| - E|X - X'| - E|Y - Y'| in closed form."""
    torch.manual_seed(0)
    mean = 1.0
    a, b = torch.randn(4000, 1), mean + torch.randn(4000, 1)
    # X - Y ~ N(-m, 2): E|.| = 2 / sqrt(pi) exp(-m^2 / 4) + m erf(m / 2); X - X' ~ N(0, 2): 2 / sqrt(pi).
    between = 2 / math.sqrt(math.pi) * math.exp(-(mean**2) / 4) + mean * math.erf(mean / 2)
    expected = 2 * between - 4 / math.sqrt(math.pi)
    assert bandit.energy_distance(a, b) == pytest.approx(expected, rel=0.1)
    assert bandit.energy_distance(a, torch.randn(4000, 1)) == pytest.approx(0, abs=0.003)


def test_true_draws_have_the_weights_and_the_density_of_the_critic():
    torch.manual_seed(0)
    critic = bandit.MixtureCritic(3)
    draws = critic.draw(20_000)
    torch.testing.assert_close(critic.mode_weights(draws), bandit.WEIGHTS, atol=0.015, rtol=0)
    # At a mode Q is log(weight), the other modes being 8 standard deviations away.
    q = critic(torch.zeros(4, 1), critic.centers).squeeze(-1)
    torch.testing.assert_close(q, bandit.WEIGHTS.log(), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_the_posterior_target_finds_the_weights_of_the_modes():
    torch.manual_seed(0)
    critic = bandit.MixtureCritic(2)
    schedule = bandit.NoiseSchedule.cosine(20)
    actor = bandit.make_actor(2, schedule)
    bandit.train(critic, bandit.TARGETS["posterior"](bandit.PARTICLES), actor, 4_000)
    with torch.no_grad():
        samples = actor.sample(torch.zeros(2_000, 1))
    torch.testing.assert_close(critic.mode_weights(samples), bandit.WEIGHTS, atol=0.06, rtol=0)
    assert bandit.energy_distance(samples, critic.draw(2_000)) < 0.01
