"""The trained actor as two files that need no code to be read: weights as safetensors, the rest as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tensordict.nn import TensorDictModule, TensorDictModuleBase, TensorDictSequential
from torchrl.data import Bounded
from torchrl.envs import EnvBase

from qsm_rl.actor import DiffusionActor
from qsm_rl.networks import ScoreMLP
from qsm_rl.noise_schedule import NoiseSchedule
from qsm_rl.samplers import DDIMSampler, DDPMSampler
from qsm_rl.training.atomic_files import write_atomically
from qsm_rl.training.environments import RunningObservationNorm
from qsm_rl.training.errors import UserError

__all__ = ["load_actor", "publish_actor"]

FORMAT = 1
SAMPLERS = {sampler.__name__: sampler for sampler in (DDPMSampler, DDIMSampler)}
NORM = "observation_norm."


def publish_actor(
    folder: Path,
    actor: DiffusionActor,
    *,
    hidden_dims: Sequence[int],
    environment: EnvBase,
    env: str,
    action_repeat: int = 1,
) -> None:
    """Writes model.safetensors and config.json.

    Args:
        folder: made when missing; files of an earlier call are replaced.
        actor: an actor with a :class:`~qsm_rl.ScoreMLP` of default settings but for its sizes.
        hidden_dims: widths of its hidden layers.
        environment: what it was trained in; the statistics of its observations, if it normalises them, are kept.
        env: name of that environment.
        action_repeat: simulator steps for each action.
    """
    tensors = {name: value.detach().cpu().contiguous() for name, value in actor.state_dict().items()}
    norms = [module for module in environment.modules() if isinstance(module, RunningObservationNorm)]
    for norm in norms:
        tensors.update({NORM + name: value.contiguous() for name, value in norm.state_dict().items()})
    action_dim = actor.box.action_dim
    network: Any = actor.score_network  # a ScoreMLP, whose layers are known
    config = {
        "format": FORMAT,
        "env": env,
        "action_repeat": action_repeat,
        "observation_dim": network.mlp[0].in_features - action_dim - network.time_mlp[-1].out_features,
        "action_dim": action_dim,
        "hidden_dims": list(hidden_dims),
        "sampler": {"name": type(actor.sampler).__name__, **vars(actor.sampler)},
        "normalize_observation": bool(norms),
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "model.safetensors", lambda temporary: save_file(tensors, temporary))
    write_atomically(
        folder / "config.json", lambda temporary: temporary.write_text(json.dumps(config, indent=2) + "\n")
    )


def load_actor(folder: Path) -> TensorDictModuleBase:
    """The actor that :func:`publish_actor` wrote, on the CPU.

    Args:
        folder: the folder ``actor`` of a run.

    Returns:
        A module that reads ``observation`` ``(*B, O)`` as the environment gives it and writes ``action`` ``(*B, A)``.

    Raises:
        UserError: if a file is missing or malformed, or they do not fit each other.
    """
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / "model.safetensors")
        if config["format"] != FORMAT:
            raise ValueError(f"format {config['format']!r}, expected {FORMAT}")
        sampler = dict(config["sampler"])
        normalized = config["normalize_observation"]
        observation_dim = config["observation_dim"]
        actor = DiffusionActor(
            ScoreMLP(observation_dim, config["action_dim"], config["hidden_dims"]),
            action_spec=Bounded(tensors["module.box.low"], tensors["module.box.high"]),
            noise_schedule=NoiseSchedule(tensors["module.noise_schedule.betas"]),
            sampler=SAMPLERS[sampler.pop("name")](**sampler),
            in_keys=["normalized_observation" if normalized else "observation"],
        )
        actor.load_state_dict({name: value for name, value in tensors.items() if not name.startswith(NORM)})
        if not normalized:
            return actor
        norm = RunningObservationNorm(observation_dim).freeze()
        norm.load_state_dict(
            {name.removeprefix(NORM): value for name, value in tensors.items() if name.startswith(NORM)}
        )
    except (OSError, KeyError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder} holds no actor that can be read: {' '.join(str(error).split())[:300]}") from error
    normalize = TensorDictModule(norm.normalize, in_keys=["observation"], out_keys=["normalized_observation"])
    return TensorDictSequential(normalize, actor)
