"""Dumps of non-finite values: the batch in which they occurred, and everything that is needed to reproduce them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load, save_file
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from qsm_rl.atomic_files import read_bounded, write_atomically
from qsm_rl.version import __version__

__all__ = ["Fault", "read_fault", "write_fault"]

LARGEST = 4 << 30


class Fault(NamedTuple):
    """A dump of [`write_fault`][qsm_rl.training.write_fault].

    Attributes:
        about: message, frame, update, and versions.
        batch: the collected frames, or the replay batch of the update.
        weights: state of the update's modules when the error was raised; empty for collected frames.
        random_state: state of PyTorch's CPU generator before the update; None for collected frames.
    """

    about: dict[str, Any]
    batch: TensorDict
    weights: dict[str, Tensor]
    random_state: Tensor | None


def write_fault(
    folder: Path,
    batch: TensorDictBase,
    *,
    about: Mapping[str, Any],
    weights: Mapping[str, Tensor] | None = None,
    random_state: Tensor | None = None,
) -> None:
    """Writes ``batch.safetensors`` and ``about.json``, and ``weights.safetensors`` if an update failed.

    Args:
        folder: created if missing.
        batch: the batch that contained or led to non-finite values.
        about: plain values that describe the fault.
        weights: state of the update's modules.
        random_state: state of PyTorch's CPU generator before the update.

    Raises:
        OSError: if the disk is full or not writable.
    """
    folder.mkdir(parents=True, exist_ok=True)
    entries = {key: value for key, value in batch.flatten_keys(".").items() if isinstance(value, Tensor)}
    states = {"random_state": random_state} if random_state is not None else {}
    # Clones, since safetensors does not store shared memory, and stacked weights share theirs.
    files = {"batch": entries, "weights": {**(weights or {}), **states}}
    for name, tensors in files.items():
        if tensors:
            clones = {key: value.detach().cpu().clone().contiguous() for key, value in tensors.items()}
            write_atomically(folder / f"{name}.safetensors", partial(save_file, clones))
    text = json.dumps(
        {**about, "batch_size": list(batch.batch_size), "qsm_rl": __version__, "torch": torch.__version__}, indent=2
    )
    write_atomically(folder / "about.json", lambda path: path.write_text(text + "\n", encoding="utf-8"))


def read_fault(folder: Path) -> Fault:
    """Reads what [`write_fault`][qsm_rl.training.write_fault] wrote; runs no code from the files.

    Args:
        folder: a folder inside the folder ``faults`` of a run.

    Raises:
        OSError: if a file is missing.
        ValueError: if one is malformed.
    """
    about = json.loads(read_bounded(folder / "about.json", 1 << 20))
    entries = load(read_bounded(folder / "batch.safetensors", LARGEST))
    weights_file = folder / "weights.safetensors"
    weights = load(read_bounded(weights_file, LARGEST)) if weights_file.exists() else {}
    random_state = weights.pop("random_state", None)
    return Fault(about, TensorDict(entries, about["batch_size"]).unflatten_keys("."), weights, random_state)
