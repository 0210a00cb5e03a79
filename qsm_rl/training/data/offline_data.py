"""Data sets of transitions: read, checked against an environment, and fed to the trainer in place of frames."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.data import ReplayBuffer
from torchrl.envs import EnvBase

from qsm_rl.training.data.checkpoints import CheckpointFolder
from qsm_rl.training.data.public_data import read_d4rl, read_minari
from qsm_rl.training.data.replay import ENTRIES, ReplayArchive, TransitionWriter, manifests_of_ranks
from qsm_rl.training.errors import UserError

__all__ = ["DatasetCollector", "OfflineWriter", "read_dataset"]

READERS = {"minari": read_minari, "d4rl": read_d4rl}
TOLERANCE = 1e-3  # in units of half the action range


def read_dataset(
    name: str, environment: EnvBase, *, env: str | None = None, action_repeat: int | None = None
) -> TensorDict:
    """Reads transitions and checks that they fit an environment.

    Args:
        name: ``minari:ID`` or ``d4rl:ID``, which are downloaded unless they are on the disk already (extra
            ``offline``); or a folder, either of one of the kit's runs or of a TorchRL replay buffer's ``dumps``.
            Reading a folder runs no code in it.
        environment: the environment that the transitions should fit, from
            [`make_environment`][qsm_rl.training.make_environment].
        env: environment id that the run in a folder must have used; not compared if not given.
        action_repeat: number of simulator steps per action that this run must have used; not compared if not given.

    Returns:
        Transitions ``(N,)``: ``observation``, ``action``, and under ``next`` ``observation``, ``reward``, ``done`` and
        ``terminated``; numbers are float32.

    Raises:
        UserError: if the data set or an extra is missing, or the data do not fit; names what was found and what was
            expected.
    """
    kind, _, identity = name.partition(":")
    if kind in READERS and identity:
        return _checked(name, _downloaded(kind, identity), environment)
    wanted = {"env": env, "action_repeat": action_repeat, "normalize_observation": False}
    found = _from_folder(Path(name), {key: value for key, value in wanted.items() if value is not None})
    return _checked(name, found, environment)


class DatasetCollector:
    """Plays rows of a data set in place of an environment for a number of frames, then collects.

    Args:
        collector: collects after them.
        transitions: the data set, ``(N,)``; its rows come in order, starting again from the first after the last.
        offline_frames: rows to play.
        first_frame: number of rows that an earlier process has played.
    """

    def __init__(self, collector: Any, transitions: TensorDictBase, offline_frames: int, first_frame: int = 0) -> None:
        self.collector = collector
        self.transitions = transitions
        self.offline_frames = offline_frames
        self.position = first_frame

    def __getattr__(self, name: str) -> Any:  # env, reset, set_seed, shutdown, requested_frames_per_batch
        return getattr(self.collector, name)

    def __iter__(self) -> Iterator[TensorDictBase]:
        """Batches ``(num_envs, T)``, as from the collector."""
        count = self.collector.requested_frames_per_batch
        num_envs = self.collector.env.batch_size[0]
        while self.position < self.offline_frames:
            rows = torch.arange(self.position, self.position + count) % len(self.transitions)
            batch = self.transitions[rows].clone()
            for key in ("done", "truncated"):  # no episode is collected here, so none ends
                batch["next", key] = torch.zeros_like(batch["next", "done"])
            self.position += count
            yield batch.reshape(num_envs, -1)
        yield from self.collector


class OfflineWriter(TransitionWriter):
    """Skips the frames of a data set, which are in the replay buffer already.

    Args:
        replay: replay buffer of single transitions.
        offline_frames: frames to skip.
        first_frame: frames that an earlier process has skipped.
    """

    def __init__(self, replay: ReplayBuffer, *, offline_frames: int, first_frame: int = 0) -> None:
        super().__init__(replay)
        self.left = offline_frames - first_frame

    def write(self, batch: TensorDictBase) -> None:
        """Adds a batch ``(num_envs, T)``, unless it comes from the data set."""
        if self.left > 0:
            self.left -= batch.numel()
        else:
            super().write(batch)


def _downloaded(kind: str, identity: str) -> TensorDictBase:
    try:
        return READERS[kind](identity)
    except ImportError as error:
        raise UserError(
            f"--dataset {kind}:{identity} needs a package that is missing ({error}): pip install 'qsm_rl[offline]'."
        ) from error
    except UserError:
        raise
    except Exception as error:  # the readers pass on whatever their download or file raises
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(
            f"--dataset {kind}:{identity} could not be loaded ({reason}); check its name and the network connection."
        ) from error


def _from_folder(folder: Path, wanted: dict[str, Any]) -> TensorDictBase:
    if (folder / "checkpoints" / "replay").is_dir():
        state = CheckpointFolder(folder / "checkpoints").newest()
        settings = state.get("run", {}).get("settings", {})  # missing in the checkpoints of an early version
        for name, value in wanted.items():
            if settings.get(name, value) != value:
                raise UserError(
                    f"--dataset {folder} comes from a run with {name} {settings[name]}, expected {value}: its "
                    "transitions belong to a different problem."
                )
        rows: list[TensorDict] = []
        # Processes that train together each have a replay buffer.
        for number, manifest in enumerate(manifests_of_ranks(state)):
            rows += ReplayArchive.of_rank(folder / "checkpoints", number).rows(manifest)
        return torch.cat(rows)
    storage = folder / "storage" if (folder / "storage").is_dir() else folder
    if not (storage / "meta.json").is_file():
        raise UserError(
            f"--dataset {folder} is not a data set; expected minari:ID, d4rl:ID, the folder of a run, or one written "
            "by the dumps method of a TorchRL replay buffer."
        )
    if pickles := sorted(path.name for path in storage.rglob("*") if path.suffix in (".pkl", ".pickle", ".pt")):
        raise UserError(
            f"--dataset {folder} contains {pickles[0]}, which would have to be unpickled; keep tensors only."
        )
    try:
        count = json.loads((storage / "storage_metadata.json").read_text(encoding="utf-8"))["len"]  # of its capacity
        return TensorDict.load_memmap(storage)[: int(count)]
    except Exception as error:  # the reader can raise anything for a broken file
        raise UserError(f"--dataset {folder} cannot be read: {' '.join(str(error).split())[:300]}") from error


def _checked(name: str, found: TensorDictBase, environment: EnvBase) -> TensorDict:
    if found.get("steps_to_next_obs", None) is not None:
        raise UserError(f"--dataset {name} contains rewards summed over several frames; use a run with --n_step 1.")
    observation_dim = environment.observation_spec["observation"].shape[-1]
    spec = environment.action_spec_unbatched
    sizes = {"observation": observation_dim, "action": spec.shape[-1], ("next", "observation"): observation_dim}
    entries: dict[Any, torch.Tensor] = {}
    for key in ENTRIES:
        label = key if isinstance(key, str) else "next " + key[1]
        value = found.get(key, None)
        if value is None:
            raise UserError(f"--dataset {name} lacks {label}; it has {sorted(map(str, found.keys(True, True)))}.")
        size = sizes.get(key, 1)
        if value.ndim == 1 and size == 1:
            value = value.unsqueeze(-1)
        if value.ndim != 2 or value.shape[-1] != size:
            raise UserError(
                f"--dataset {name} does not fit the environment: {label} has shape {tuple(value.shape)}, "
                f"expected (N, {size})."
            )
        entries[key] = value.bool() if key[-1] in ("done", "terminated") else value.float()
        if not bool(torch.isfinite(entries[key]).all()):
            raise UserError(f"--dataset {name} contains NaN or infinity in {label}.")
    low, high = spec.space.low, spec.space.high
    beyond = ((entries["action"] - (high + low) / 2).abs() / ((high - low) / 2)).max().item()
    if beyond > 1 + TOLERANCE:
        raise UserError(
            f"--dataset {name} does not fit the environment: its largest action is {beyond:.3g} times the bound."
        )
    entries["action"] = entries["action"].clamp(low, high)
    return TensorDict(entries, [len(entries["action"])])
