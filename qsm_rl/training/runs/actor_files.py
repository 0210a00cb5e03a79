"""The trained actor of a run, published with what is needed to use it."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.data import Bounded
from torchrl.envs import EnvBase

from qsm_rl.actor import DiffusionActor
from qsm_rl.atomic_files import read_bounded
from qsm_rl.observation_norm import NormalizedObservations
from qsm_rl.pretrained import CONFIG, LARGEST_CONFIG, write_files
from qsm_rl.training.environments.observation_statistics import RunningObservationNorm
from qsm_rl.training.errors import user_errors
from qsm_rl.training.updates.mlp_actors import TanhActor, TanhGaussianActor

__all__ = ["load_actor", "publish_actor"]

Actor = DiffusionActor | TanhActor | TanhGaussianActor
MLP_ACTORS = {actor.__name__: actor for actor in (TanhActor, TanhGaussianActor)}


def publish_actor(
    folder: Path, actor: TensorDictModuleBase, *, environment: EnvBase, env: str, action_repeat: int = 1
) -> None:
    """Writes an actor with the statistics of its observations, see ``qsm_rl.DiffusionActor.save_pretrained``.

    An actor that only its own code can build, a diffusion policy with a network or sampler of your own or an actor of
    another class, is written as weights alone: model.safetensors then holds its ``state_dict``, and the statistics of
    normalised observations as ``observation_norm.mean`` and ``observation_norm.variance``.

    Args:
        folder: made when missing; files of an earlier call are replaced.
        actor: the actor; a [`ScoreMLP`][qsm_rl.ScoreMLP] and a sampler of the kit in it are read without its code.
        environment: what it was trained in; where it normalises observations, so does the published actor.
        env: name of that environment.
        action_repeat: simulator steps for each action.
    """
    about = {"env": env, "action_repeat": action_repeat}
    norms = [norm for norm in environment.modules() if isinstance(norm, RunningObservationNorm)]
    reason = f"only its own code can build a {type(actor).__name__}."
    if isinstance(actor, Actor):
        published = actor
        for norm in norms:
            published = _normalized(published, norm)
        try:
            published.save_pretrained(folder, about)
            return
        except ValueError as error:  # at the end of a long run is no time to refuse a network
            reason = str(error)
    warnings.warn(f"{folder} holds the weights alone: {reason}", stacklevel=2)
    weights = {name: value.clone() for name, value in actor.state_dict().items() if isinstance(value, Tensor)}
    statistics = {f"observation_norm.{name}": getattr(norm, name) for norm in norms for name in ("mean", "variance")}
    write_files(folder, weights | statistics, {**about, "weights_of": type(actor).__name__})


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
