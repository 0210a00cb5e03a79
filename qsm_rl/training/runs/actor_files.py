"""The trained actor of a run, saved with everything that is needed to use it."""

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
    """Saves an actor with its observation statistics, see ``qsm_rl.DiffusionActor.save_pretrained``.

    Some actors can only be built by their own code: a diffusion policy with a custom network or sampler, or an actor of
    another class. Of these only the weights are saved: model.safetensors then holds the ``state_dict``, and the
    statistics of normalised observations as ``observation_norm.mean`` and ``observation_norm.variance``.

    Args:
        folder: created if missing; files of an earlier call are replaced.
        actor: the actor; one with a [`ScoreMLP`][qsm_rl.ScoreMLP] and one of the kit's samplers can be loaded without
            its code.
        environment: its training environment; if it normalises observations, so does the saved actor.
        env: id of that environment.
        action_repeat: simulator steps per action.
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
        except ValueError as error:  # too late to refuse a network: a long run has ended
            reason = str(error)
    warnings.warn(f"{folder} contains only the weights: {reason}", stacklevel=2)
    weights = {name: value.clone() for name, value in actor.state_dict().items() if isinstance(value, Tensor)}
    statistics = {f"observation_norm.{name}": getattr(norm, name) for norm in norms for name in ("mean", "variance")}
    write_files(folder, weights | statistics, {**about, "weights_of": type(actor).__name__})


def load_actor(folder: Path) -> Actor:
    """Loads the actor of a run of any recipe, for programs that report errors without a traceback.

    Args:
        folder: folder ``actor`` of a run.

    Returns:
        The actor on the CPU; it reads the environment's unnormalised observations and writes actions in environment
        units.

    Raises:
        UserError: if a file is missing or malformed, or the files do not fit each other.
    """
    with user_errors(ValueError):
        return MLP_ACTORS.get(_kind(folder), DiffusionActor).from_pretrained(folder)


def _kind(folder: Path) -> str:
    try:
        return str(json.loads(read_bounded(folder / CONFIG, LARGEST_CONFIG, follow_links=True))["actor"])
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return DiffusionActor.__name__  # which reports what is wrong with the files


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
