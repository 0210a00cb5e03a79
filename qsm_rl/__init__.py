"""qsm_rl: a modular TorchRL component kit for Q-score matching (Psenka et al. 2024, arXiv 2312.11752)."""

from qsm_rl import functional
from qsm_rl.action_box import ActionBox
from qsm_rl.action_selection import BestOfN, GaussianExploration
from qsm_rl.actor import DiffusionActor
from qsm_rl.batch_renorm import BatchRenorm
from qsm_rl.critics import QValueCrossQ, QValueMLP, QValueSimBa
from qsm_rl.entropy import EntropyBonus
from qsm_rl.networks import ScoreMLP
from qsm_rl.noise_schedule import NoiseSchedule
from qsm_rl.objectives import DiffusionPolicyGradientLoss, DiffusionQLLoss, QScoreMatchingLoss
from qsm_rl.samplers import DDIMSampler, DDPMSampler, ReverseChain
from qsm_rl.score_targets import (
    BoltzmannQScore,
    NormalizedQScore,
    PosteriorGradientQScore,
    PosteriorQScore,
    ScaledQScore,
    ScoreTarget,
)
from qsm_rl.temperature import SpreadTuner
from qsm_rl.value_heads import ScalarHead, TwoHotHead, ValueHead
from qsm_rl.version import __version__ as __version__

__all__ = [
    "ActionBox",
    "BatchRenorm",
    "BestOfN",
    "BoltzmannQScore",
    "DDIMSampler",
    "DDPMSampler",
    "DiffusionActor",
    "DiffusionPolicyGradientLoss",
    "DiffusionQLLoss",
    "EntropyBonus",
    "GaussianExploration",
    "NoiseSchedule",
    "NormalizedQScore",
    "PosteriorGradientQScore",
    "PosteriorQScore",
    "QScoreMatchingLoss",
    "QValueCrossQ",
    "QValueMLP",
    "QValueSimBa",
    "ReverseChain",
    "ScalarHead",
    "ScaledQScore",
    "ScoreMLP",
    "ScoreTarget",
    "SpreadTuner",
    "TwoHotHead",
    "ValueHead",
    "functional",
]
