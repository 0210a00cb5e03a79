"""The losses of the kit, one file each."""

from qsm_rl.objectives.q_score_matching import QScoreMatchingLoss

__all__ = ["QScoreMatchingLoss"]
