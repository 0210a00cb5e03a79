"""The trained actor of a run, published with what is needed to use it."""

from __future__ import annotations

import json
from pathlib import Path

from torchrl.data import Bounded
from torchrl.envs import EnvBase

from qsm_rl.actor import DiffusionActor
from qsm_rl.atomic_files import read_bounded
from qsm_rl.observation_norm import NormalizedObservations
from qsm_rl.pretrained import CONFIG, LARGEST_CONFIG
from qsm_rl.training.environments.observation_statistics import RunningObservationNorm
from qsm_rl.training.errors import user_errors
from qsm_rl.training.updates.mlp_actors import TanhActor, TanhGaussianActor

__all__ = ["load_actor", "publish_actor"]

Actor = DiffusionActor | TanhActor | TanhGaussianActor
MLP_ACTORS = {actor.__name__: actor for actor in (TanhActor, TanhGaussianActor)}


def publish_actor(folder: Path, actor: Actor, *, environment: EnvBase, env: str, action_repeat: int = 1) -> None:
    """Writes an actor with the statistics of its observations, see ``qsm_rl.DiffusionActor.save_pretrained``.

    Args:
        folder: made when missing; files of an earlier call are replaced.
        actor: an actor of a recipe; a diffusion policy with a [`ScoreMLP`][qsm_rl.ScoreMLP].
        environment: what it was trained in; where it normalises observations, so does the published actor.
        env: name of that environment.
        action_repeat: simulator steps for each action.
    """
    for norm in environment.modules():
        if isinstance(norm, RunningObservationNorm):
            actor = _normalized(actor, norm)
    actor.save_pretrained(folder, {"env": env, "action_repeat": action_repeat})


def load_actor(folder: Path) -> Actor:
    """The actor of a run, whatever its recipe, for a program that ends with a line instead of a traceback.

    Args:
        folder: the folder ``actor`` of a run.

    Returns:
        The actor on the CPU; reads observations as the environment gives them and writes actions in its units.

    Raises:
        UserError: if a file is missing or malformed, or they do not fit each other.
    """
    with user_errors(ValueError):
        return MLP_ACTORS.get(_kind(folder), DiffusionActor).from_pretrained(folder)


def _kind(folder: Path) -> str:
    try:
        return str(json.loads(read_bounded(folder / CONFIG, LARGEST_CONFIG, follow_links=True))["actor"])
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return DiffusionActor.__name__  # which says what is wrong with the files


def _normalized(actor: Actor, norm: RunningObservationNorm) -> Actor:
    if not isinstance(actor, DiffusionActor):
        return actor.normalized(norm.mean, norm.variance)
    return DiffusionActor(
        NormalizedObservations(actor.score_network, norm.mean, norm.variance),
        action_spec=Bounded(actor.box.low, actor.box.high),
        noise_schedule=actor.noise_schedule,
        sampler=actor.sampler,
        in_keys=actor.in_keys,
        out_keys=actor.out_keys,
    )
