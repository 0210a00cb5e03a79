"""The formulas of the kit as pure functions on tensors.

Notation, the same everywhere: ``T = num_steps``; ``t`` in ``0 .. T-1``, with ``t = 0`` the least noise;
``alphas = 1 - betas``; ``alphas_cumprod[t]`` is the product of ``alphas[0..t]``;
``sigma_t = sqrt(1 - alphas_cumprod[t])``. Actions are in box units: the box is ``[-1, 1]^A``. ``q_score`` is the action
gradient dQ/da.
"""

from qsm_rl.functional.diffusion import (
    add_noise,
    clamp_inward,
    cosine_betas,
    linear_betas,
    predict_clean,
    vp_betas,
)
from qsm_rl.functional.policy_gradients import gaussian_log_prob, leave_one_out_advantage, normalized_q_value
from qsm_rl.functional.posterior import log_mixture_weight, posterior_gradient_noise, posterior_noise, truncated_normal
from qsm_rl.functional.q_scores import (
    action_gradient,
    aggregate_q_values,
    boltzmann_q_score,
    clip_norm,
    mean_absolute,
    scaled_q_score,
)

__all__ = [
    "action_gradient",
    "add_noise",
    "aggregate_q_values",
    "boltzmann_q_score",
    "clamp_inward",
    "clip_norm",
    "cosine_betas",
    "gaussian_log_prob",
    "leave_one_out_advantage",
    "linear_betas",
    "log_mixture_weight",
    "mean_absolute",
    "normalized_q_value",
    "posterior_gradient_noise",
    "posterior_noise",
    "predict_clean",
    "scaled_q_score",
    "truncated_normal",
    "vp_betas",
]
