"""Many seeds in one process on a GPU: independent agents in one run, with stacked networks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from tensordict.nn import TensorDictModuleBase, TensorDictSequential

from qsm_rl.training.configuration.command_line import CONFIGURATION_FILE, saved_text
from qsm_rl.training.configuration.hardware import choose_device
from qsm_rl.training.configuration.qsm_configuration import QSMConfiguration
from qsm_rl.training.configuration.training_configuration import TrainingConfiguration
from qsm_rl.training.errors import UserError
from qsm_rl.training.random_state import seed_everything
from qsm_rl.training.runs.loggers import MetricsTable, read_metrics
from qsm_rl.training.runs.run_folder import RunFolder
from qsm_rl.training.updates.diffusion_update import DiffusionUpdate
from qsm_rl.training.updates.stacked_update import StackedUpdate

__all__ = ["split_seeds", "stack_seeds", "stacks_seeds"]


def stacks_seeds(config: QSMConfiguration) -> bool:
    """Whether the seeds of a run are trained stacked in one process: on a GPU, or if such a run is resumed.

    Raises:
        UserError: if a setting is not compatible with stacking.
    """
    if config.seeds == 1 or (choose_device(config.device).type == "cpu" and config.resume is None):
        return False
    if config.compile is True or config.precision == "bfloat16":
        raise UserError(
            f"--seeds {config.seeds} on a GPU trains stacked networks, which are not compiled; use --compile false "
            "and --precision auto, tf32 or float32."
        )
    for name, single in (
        *(("devices", 1), ("num_envs", 1), ("num_workers", 0), ("best_of", 1), ("eval_best_of", 1)),
        *(("normalize_observation", False), ("eval_deterministic", False), ("eval_video", False)),
        *(("actor_ema", None), ("score_spread", None), ("replay_storage", "memory")),
    ):
        if getattr(config, name, single) != single:
            raise UserError(
                f"--{name} {getattr(config, name)} cannot be combined with --seeds {config.seeds} on a GPU, where all "
                "agents share one process; use --device cpu for one process per seed, or start the seeds one by one."
            )
    if config.critic_bins is not None and config.critic_support is None:
        raise UserError(
            f'--critic_bins with --seeds {config.seeds} on a GPU needs --critic_support "[LOW, HIGH]"; a '
            "support chosen from the rewards would be shared by all agents."
        )
    return True


def stack_seeds(
    config: TrainingConfiguration, build: Callable[[], tuple[DiffusionUpdate, TensorDictSequential]]
) -> tuple[StackedUpdate, TensorDictModuleBase]:
    """Builds one update and one acting policy for the agents of all seeds.

    Args:
        config: the run's settings; ``seed`` is that of the first agent.
        build: builds the recipe's parts for one agent: the update, and the policy followed by exploration.

    Returns:
        The update, and the policy that collects: agent n acts in environment n.
    """
    updates, seeds = [], range(config.seed, config.seed + config.seeds)
    for seed in seeds:
        seed_everything(seed)
        update, acting = build()
        updates.append(update)
    stacked = StackedUpdate(updates, seeds, cuda_graph=update.cuda_graph)
    return stacked, TensorDictSequential(stacked.actor, *acting.module[1:])


def split_seeds(config: TrainingConfiguration, folder: RunFolder, agents: Sequence[str]) -> None:
    """Writes a run folder ``seed_N`` for each agent, with its settings and evaluations.

    Args:
        config: the run's settings.
        folder: the run's folder.
        agents: names of the agents, ``seed_N``.
    """
    columns = read_metrics(folder.metrics)
    for name in agents:
        path = folder.path / name
        path.mkdir(exist_ok=True)
        own = replace(config, seed=int(name.removeprefix("seed_")), seeds=1)
        (path / CONFIGURATION_FILE).write_text(saved_text(own), encoding="utf-8")
        prefix = f"eval/{name}/"
        table = MetricsTable(path / folder.metrics.name, last_frame=0)
        own_columns = [key for key in columns if key.startswith(prefix)]
        for index, frame in enumerate(columns["frames"]):
            row = {f"eval/{key.removeprefix(prefix)}": columns[key][index] for key in own_columns}
            if row and not any(math.isnan(value) for value in row.values()):
                table.log_metrics(row, step=int(frame))
