"""The algorithms that can be compared by name, and the checks before any of their runs begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from qsm_rl.training.configuration.baseline_configuration import SACConfiguration, TD3Configuration
from qsm_rl.training.configuration.command_line import parse_configuration
from qsm_rl.training.configuration.diffusion_configuration import DiffusionPGConfiguration, DiffusionQLConfiguration
from qsm_rl.training.configuration.qsm_configuration import QSMConfiguration
from qsm_rl.training.configuration.training_configuration import TrainingConfiguration
from qsm_rl.training.environments.make_environment import make_environment
from qsm_rl.training.errors import UserError, user_errors
from qsm_rl.training.grids.grid import Cell

__all__ = ["ALGORITHMS", "Algorithm", "check_cells"]


@dataclass(frozen=True)
class Algorithm:
    """A recipe with settings, known by a name.

    Attributes:
        recipe: name of the recipe's file, without its extension.
        configuration: class of the recipe's settings.
        flags: settings that define the algorithm.
    """

    recipe: str
    configuration: type[TrainingConfiguration]
    flags: dict[str, Any] = field(default_factory=dict)


ALGORITHMS = {
    "qsm": Algorithm("mujoco_qsm", QSMConfiguration, {"preset": "default"}),
    "qsm-paper": Algorithm("mujoco_qsm", QSMConfiguration, {"preset": "paper"}),
    "sac": Algorithm("mujoco_sac", SACConfiguration),
    "td3": Algorithm("mujoco_td3", TD3Configuration),
    "diffusion-ql": Algorithm("mujoco_diffusion_ql", DiffusionQLConfiguration),
    "diffusion-pg": Algorithm("mujoco_diffusion_pg", DiffusionPGConfiguration),
}


def check_cells(cells: Sequence[Cell]) -> None:
    """Checks every setting and every environment of a grid before anything runs.

    Args:
        cells: the grid.

    Raises:
        UserError: naming the recipe, setting or environment that does not exist, or the extra that it needs.
    """
    configurations = {algorithm.recipe: algorithm.configuration for algorithm in ALGORITHMS.values()}
    for cell in cells:
        if cell.recipe not in configurations:
            raise UserError(f"unknown recipe {cell.recipe!r}, expected one of {', '.join(configurations)}.")
        try:
            parse_configuration(configurations[cell.recipe], cell.flags)
        except UserError as error:
            raise UserError(f"{cell.variant} on {cell.env}: {error}") from error
    with user_errors(ValueError, ImportError):
        for env in sorted({cell.env for cell in cells}):
            make_environment(env).close()
