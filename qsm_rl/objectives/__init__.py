"""The losses of the kit, one file each, built on ``diffusion_actor_critic``; the other files are its parts."""

from qsm_rl.objectives.diffusion_policy_gradient import DiffusionPolicyGradientLoss
from qsm_rl.objectives.diffusion_ql import DiffusionQLLoss
from qsm_rl.objectives.q_score_matching import QScoreMatchingLoss

__all__ = ["DiffusionPolicyGradientLoss", "DiffusionQLLoss", "QScoreMatchingLoss"]
