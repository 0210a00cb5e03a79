"""The Lightning training code that all recipes share. Importing ``qsm_rl`` alone does not import it."""

from qsm_rl.training.configuration.baseline_configuration import SACConfiguration, TD3Configuration
from qsm_rl.training.configuration.command_line import parse_configuration
from qsm_rl.training.configuration.diffusion_configuration import (
    DiffusionConfiguration,
    DiffusionPGConfiguration,
    DiffusionQLConfiguration,
    PlainCriticsConfiguration,
)
from qsm_rl.training.configuration.hardware import choose_arithmetic, choose_device, limit_threads, set_products
from qsm_rl.training.configuration.offline_configuration import OfflineQSMConfiguration
from qsm_rl.training.configuration.qsm_configuration import PRESETS, QSMConfiguration
from qsm_rl.training.configuration.training_configuration import TrainingConfiguration
from qsm_rl.training.data.checkpoints import CheckpointFolder
from qsm_rl.training.data.collection import make_collector
from qsm_rl.training.data.frames import FramesDataset
from qsm_rl.training.data.offline_data import DatasetCollector, OfflineWriter, read_dataset
from qsm_rl.training.data.replay import ReplayArchive, TransitionWriter
from qsm_rl.training.data.worker_collector import WorkerCollector
from qsm_rl.training.environments.make_environment import check_registered, make_environment
from qsm_rl.training.environments.observation_statistics import copy_observation_statistics
from qsm_rl.training.errors import TrainingError, UserError, exit_on_error, user_errors
from qsm_rl.training.evaluation.evaluate import EvaluationResult, evaluate_agents, evaluate_policy
from qsm_rl.training.evaluation.videos import Film, check_filming
from qsm_rl.training.folders import exclusive, make_folder
from qsm_rl.training.grids.algorithms import ALGORITHMS, Algorithm, check_cells
from qsm_rl.training.grids.cell_tables import final_rows, markdown_table
from qsm_rl.training.grids.curves import common_frames, curves_of, plot_curves, read_reference
from qsm_rl.training.grids.grid import Cell, CellTable, make_cells, read_grid, run_cells
from qsm_rl.training.grids.grid_command import add_grid_arguments, run_grid
from qsm_rl.training.grids.many_seeds import run_seeds
from qsm_rl.training.grids.statistics import (
    curve_intervals,
    interval_estimates,
    mean_interval,
    performance_profiles,
    require_rliable,
)
from qsm_rl.training.random_state import derived_seed, seed_everything
from qsm_rl.training.runs.actor_files import load_actor, publish_actor
from qsm_rl.training.runs.faults import Fault, read_fault, write_fault
from qsm_rl.training.runs.loggers import read_metrics
from qsm_rl.training.runs.module import OffPolicyModule
from qsm_rl.training.runs.plotting import plot_learning_curve
from qsm_rl.training.runs.resuming import restore_checkpoint
from qsm_rl.training.runs.run_folder import RunFolder
from qsm_rl.training.runs.running import finish_run, make_callbacks, make_loggers, print_summary
from qsm_rl.training.runs.stacked_run import stack_seeds, stacks_seeds
from qsm_rl.training.runs.training_run import TrainingRun
from qsm_rl.training.updates.critic_networks import make_critics
from qsm_rl.training.updates.diffusion_update import DiffusionUpdate
from qsm_rl.training.updates.mlp_actors import DeterministicPolicy, TanhActor, TanhGaussianActor
from qsm_rl.training.updates.qsm_update import QSMUpdate
from qsm_rl.training.updates.sac_update import SACUpdate
from qsm_rl.training.updates.stacked_update import StackedActor, StackedUpdate
from qsm_rl.training.updates.td3_update import TD3Update
from qsm_rl.training.updates.update import Update, accelerated

__all__ = [
    "ALGORITHMS",
    "PRESETS",
    "Algorithm",
    "Cell",
    "CellTable",
    "CheckpointFolder",
    "DatasetCollector",
    "DeterministicPolicy",
    "DiffusionConfiguration",
    "DiffusionPGConfiguration",
    "DiffusionQLConfiguration",
    "DiffusionUpdate",
    "EvaluationResult",
    "Fault",
    "Film",
    "FramesDataset",
    "OffPolicyModule",
    "OfflineQSMConfiguration",
    "OfflineWriter",
    "PlainCriticsConfiguration",
    "QSMConfiguration",
    "QSMUpdate",
    "ReplayArchive",
    "RunFolder",
    "SACConfiguration",
    "SACUpdate",
    "StackedActor",
    "StackedUpdate",
    "TD3Configuration",
    "TD3Update",
    "TanhActor",
    "TanhGaussianActor",
    "TrainingConfiguration",
    "TrainingError",
    "TrainingRun",
    "TransitionWriter",
    "Update",
    "UserError",
    "WorkerCollector",
    "accelerated",
    "add_grid_arguments",
    "check_cells",
    "check_filming",
    "check_registered",
    "choose_arithmetic",
    "choose_device",
    "common_frames",
    "copy_observation_statistics",
    "curve_intervals",
    "curves_of",
    "derived_seed",
    "evaluate_agents",
    "evaluate_policy",
    "exclusive",
    "exit_on_error",
    "final_rows",
    "finish_run",
    "interval_estimates",
    "limit_threads",
    "load_actor",
    "make_callbacks",
    "make_cells",
    "make_collector",
    "make_critics",
    "make_environment",
    "make_folder",
    "make_loggers",
    "markdown_table",
    "mean_interval",
    "parse_configuration",
    "performance_profiles",
    "plot_curves",
    "plot_learning_curve",
    "print_summary",
    "publish_actor",
    "read_dataset",
    "read_fault",
    "read_grid",
    "read_metrics",
    "read_reference",
    "require_rliable",
    "restore_checkpoint",
    "run_cells",
    "run_grid",
    "run_seeds",
    "seed_everything",
    "set_products",
    "stack_seeds",
    "stacks_seeds",
    "user_errors",
    "write_fault",
]
