"""The files of a trained actor, which can be read without running code: model.safetensors and config.json."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save_file
from torch import Tensor, nn

from qsm_rl.atomic_files import read_bounded, sweep_temporaries, write_atomically
from qsm_rl.comparison import first_difference, first_non_finite
from qsm_rl.networks import FourierTimeEmbedding, ScoreMLP
from qsm_rl.samplers import DDIMSampler, DDPMSampler, Sampler
from qsm_rl.version import __version__

__all__ = ["build_network", "build_sampler", "network_settings", "read_files", "sampler_settings", "write_files"]

FORMAT = 1
WEIGHTS, CONFIG = "model.safetensors", "config.json"
SAMPLERS = {sampler.__name__: sampler for sampler in (DDPMSampler, DDIMSampler)}
NETWORK = ("hidden_dims", "layer_norm", "time_embedding", "time_features", "time_dim")
LARGEST_WEIGHTS, LARGEST_CONFIG = 4 << 30, 1 << 20  # bytes, far more than any actor needs


def write_files(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Writes weights and configuration, each whole or not at all.

    Args:
        folder: created if missing; files of an earlier call are replaced.
        tensors: weights and buffers by name.
        config: plain values.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sweep_temporaries(folder)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps({**config, "format": FORMAT, "qsm_rl": __version__}, indent=2) + "\n"
    write_atomically(folder / WEIGHTS, lambda temporary: save_file(tensors, temporary))
    write_atomically(folder / CONFIG, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_files(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Reads what ``write_files`` wrote, without running any code.

    Returns:
        The configuration and the tensors, on the CPU, all finite.

    Raises:
        ValueError: if a file is malformed, too large or from another version, or a tensor holds NaN or infinity.
        OSError: if a file is missing or cannot be read.
        safetensors.SafetensorError: if the weights are malformed.
    """
    try:
        config = json.loads(_content(folder / CONFIG, LARGEST_CONFIG).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{CONFIG}: {error}") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        found = config.get("format") if isinstance(config, dict) else config
        written = f", written by qsm_rl {config['qsm_rl']}" if isinstance(config, dict) and "qsm_rl" in config else ""
        raise ValueError(
            f"{CONFIG} has format {str(found)[:40]!r}{written}; qsm_rl {__version__} reads format {FORMAT}"
        )
    tensors = load(_content(folder / WEIGHTS, LARGEST_WEIGHTS))
    if bad := first_non_finite(tensors):
        raise ValueError(f"{WEIGHTS}: {bad}")
    return config, tensors


def network_settings(network: nn.Module) -> dict[str, Any]:
    """What ``build_network`` needs to rebuild the network.

    Raises:
        ValueError: if it is not exactly a ``ScoreMLP``, is lazy, or its layers were changed.
    """
    if type(network) is not ScoreMLP:
        raise ValueError(
            f"the score network is a {type(network).__name__}; only a qsm_rl.ScoreMLP can be rebuilt from a "
            "configuration. Save the state_dict() of your network and build the network in code."
        )
    if any(nn.parameter.is_lazy(parameter) for parameter in network.parameters()):
        raise ValueError("the score network has uninitialised lazy parameters; call the actor once on a batch first.")
    settings = _settings(network)
    with torch.device("meta"):
        again = ScoreMLP(**settings)
    if repr(again) != repr(network):
        raise ValueError(
            f"the score network's layers were changed after it was built: one rebuilt from {settings} has different "
            "layers. Save the state_dict() of your network and build the network in code."
        )
    return settings


def _settings(network: ScoreMLP) -> dict[str, Any]:
    layers, of_time = ([m for m in part if isinstance(m, nn.Linear)] for part in (network.mlp, network.time_mlp))
    return {
        "observation_dim": layers[0].in_features - network.action_dim - of_time[-1].out_features,
        "action_dim": network.action_dim,
        "hidden_dims": [layer.out_features for layer in layers[:-1]],
        "layer_norm": any(isinstance(layer, nn.LayerNorm) for layer in network.mlp),
        "time_embedding": "fourier" if isinstance(network.time_mlp[0], FourierTimeEmbedding) else "sinusoidal",
        "time_features": of_time[0].in_features,
        "time_dim": of_time[-1].out_features,
    }


def build_network(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> ScoreMLP:
    """Builds the network that a configuration describes, with its weights.

    Args:
        config: holds the entries of ``network_settings``.
        weights: the network's state_dict.

    Raises:
        ValueError: if a weight does not fit; the message names the first such weight.
    """
    if "weights_of" in config:
        raise ValueError(
            f"{WEIGHTS} contains only the weights of a {str(config['weights_of'])[:40]} with parts that only their own "
            "code can build; build it, and call load_state_dict(safetensors.torch.load_file(...))"
        )
    if "actor" in config and "action_dim" not in config:
        raise ValueError(
            f"it is a {str(config['actor'])[:40]}, not a diffusion policy; qsm_rl.training.load_actor reads the "
            "actors of all recipes"
        )
    sizes = (config["observation_dim"], config["action_dim"])
    settings = {name: config[name] for name in NETWORK if name in config}
    if not all(isinstance(size, int) for size in sizes) or len(settings["hidden_dims"]) > len(weights):
        raise ValueError(f"{CONFIG} and {WEIGHTS} describe different networks")
    with torch.device("meta"):  # sizes are compared before memory is taken
        expected = ScoreMLP(*sizes, **settings).state_dict()
    if difference := first_difference(weights, expected, "the score network's"):
        raise ValueError(difference)
    network = ScoreMLP(*sizes, **settings)
    network.load_state_dict(dict(weights))
    return network


def sampler_settings(sampler: Sampler) -> dict[str, Any]:
    """What ``build_sampler`` needs to rebuild the sampler.

    Raises:
        ValueError: if it is not one of the kit's samplers.
    """
    if SAMPLERS.get(type(sampler).__name__) is not type(sampler):
        raise ValueError(f"the sampler is a {type(sampler).__name__}; only {' and '.join(SAMPLERS)} can be saved.")
    return {"name": type(sampler).__name__, **vars(sampler)}


def build_sampler(settings: Mapping[str, Any]) -> Sampler:
    """Builds the sampler that ``sampler_settings`` describes.

    Raises:
        ValueError: if the name is unknown.
    """
    arguments = dict(settings)
    name = arguments.pop("name")
    if name not in SAMPLERS:
        raise ValueError(f"unknown sampler {str(name)[:40]!r}, expected one of {', '.join(SAMPLERS)}")
    if not all(math.isfinite(value) for value in arguments.values() if isinstance(value, float)):
        raise ValueError(f"the sampler's settings {arguments} contain a number that is not finite")
    return SAMPLERS[name](**arguments)


def _content(path: Path, largest: int) -> bytes:
    try:
        return read_bounded(path, largest, follow_links=True)  # caches of downloaded models are full of links
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from error
