"""The trained actor of a run, published with what is needed to use it."""

from __future__ import annotations

from pathlib import Path

from torchrl.data import Bounded
from torchrl.envs import EnvBase

from qsm_rl.actor import DiffusionActor
from qsm_rl.observation_norm import NormalizedObservations
from qsm_rl.training.environments import RunningObservationNorm
from qsm_rl.training.errors import user_errors

__all__ = ["load_actor", "publish_actor"]


def publish_actor(
    folder: Path, actor: DiffusionActor, *, environment: EnvBase, env: str, action_repeat: int = 1
) -> None:
    """Writes an actor with the statistics of its observations, see :meth:`qsm_rl.DiffusionActor.save_pretrained`.

    Args:
        folder: made when missing; files of an earlier call are replaced.
        actor: an actor with a :class:`~qsm_rl.ScoreMLP`.
        environment: what it was trained in; where it normalises observations, so does the published actor.
        env: name of that environment.
        action_repeat: simulator steps for each action.
    """
    for norm in environment.modules():
        if isinstance(norm, RunningObservationNorm):
            actor = DiffusionActor(
                NormalizedObservations(actor.score_network, norm.mean, norm.variance),
                action_spec=Bounded(actor.box.low, actor.box.high),
                noise_schedule=actor.noise_schedule,
                sampler=actor.sampler,
                in_keys=actor.in_keys,
                out_keys=actor.out_keys,
            )
    actor.save_pretrained(folder, {"env": env, "action_repeat": action_repeat})


def load_actor(folder: Path) -> DiffusionActor:
    """:meth:`qsm_rl.DiffusionActor.from_pretrained` for a program that ends with a line instead of a traceback.

    Args:
        folder: the folder ``actor`` of a run.

    Returns:
        The actor on the CPU; reads observations as the environment gives them and writes actions in its units.

    Raises:
        UserError: if a file is missing or malformed, or they do not fit each other.
    """
    with user_errors(ValueError):
        return DiffusionActor.from_pretrained(folder)
