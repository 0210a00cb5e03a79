from __future__ import annotations

import pytest

from qsm_rl.training import DiffusionPGConfiguration, DiffusionQLConfiguration, UserError


@pytest.mark.parametrize(
    "options",
    [
        *({"num_steps": 0}, {"num_critics": 0}, {"policy_delay": 0}, {"critic_adam_beta1": 1.0}),
        *({"critic_adam_beta1": -0.1}, {"sampler_temperature": -0.1}, {"exploration_noise_std": -0.1}),
        *({"target_action_noise_std": -0.1}, {"actor_ema": 0.0}, {"actor_ema": 1.0}, {"batch_size": 0}),
        *({"eta": -1.0, "bc_weight": 1.0}, {"bc_weight": -1.0}, {"eta": 0.0}),
    ],
    ids=str,
)
def test_what_is_just_beyond_a_range_is_refused(options):
    with pytest.raises(UserError, match=rf"^--{next(iter(options))} must be "):
        DiffusionQLConfiguration(**options)


def test_the_ends_of_the_ranges_are_taken():
    zeros = ("sampler_temperature", "exploration_noise_std", "target_action_noise_std", "critic_adam_beta1", "eta")
    ones = ("num_steps", "num_critics", "policy_delay")
    config = DiffusionQLConfiguration(**dict.fromkeys(zeros, 0.0), **dict.fromkeys(ones, 1), bc_weight=0.5)
    assert all(getattr(config, name) == 0 for name in zeros) and all(getattr(config, name) == 1 for name in ones)
    assert DiffusionPGConfiguration(num_samples=2).num_samples == 2


@pytest.mark.parametrize("options", [{"num_samples": 1}, {"min_std": 0.0}], ids=str)
def test_a_policy_gradient_needs_chains_to_compare_and_noise(options):
    with pytest.raises(UserError, match=rf"^--{next(iter(options))} must be "):
        DiffusionPGConfiguration(**options)
