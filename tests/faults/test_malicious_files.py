"""Files from somebody else: whatever is planted in a run or an actor, nothing runs and a clear error names the file.

One tiny run is made for all cases. Each case spoils a copy of it and opens the copy as `--resume` does, up to the first
frame, or as `DiffusionActor.from_pretrained` does.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer

from qsm_rl import DiffusionActor
from qsm_rl import training as rl
from qsm_rl.training.runs.callbacks import CheckpointWriter, StopSignals
from qsm_rl.training.runs.resuming import check_identity, run_identity
from tests.training.small_trainer import build, env_id

FRAMES = 50


class Planted:
    """Unpickling it makes a file: what must never happen."""

    def __init__(self, canary: Path) -> None:
        self.canary = str(canary)

    def __reduce__(self):
        return (open, (self.canary, "w"))


def settings(run_dir: Path) -> rl.QSMConfiguration:
    return rl.QSMConfiguration(
        env=env_id("Slide"), total_frames=75, checkpoint_every=25, num_steps=3, actor_hidden_dims=(16,), run_dir=run_dir
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of 50 frames with checkpoints at 25 and 50, stopped there, its actor published."""
    path = tmp_path_factory.mktemp("faults") / "run"
    config = settings(path)
    folder = rl.RunFolder.open(config, "mujoco_qsm")
    frames, module = build("Slide", total=FRAMES)
    identity = run_identity(config, frames.collector.env)
    archive = rl.ReplayArchive(folder.checkpoints / "replay")
    writer = CheckpointWriter(frames, folder, archive, identity, StopSignals())
    for index, batch in enumerate(frames):
        module.training_step(batch, index)
        writer.on_train_batch_end(None, module, None, batch, index)
    rl.publish_actor(folder.actor, module.update.actor, environment=frames.collector.env, env=config.env)
    folder.close()
    frames.close()
    return path


@pytest.fixture(scope="module")
def opened():
    """What opening needs that is the same for all cases: a collector, an update, and their untouched weights."""
    frames, module = build("Slide", total=75)
    return frames, module, {name: value.clone() for name, value in module.update.state_dict().items()}


def resume(path: Path, opened) -> None:
    """What `--resume PATH` does before it trains."""
    frames, module, _ = opened
    config = rl.parse_configuration(rl.QSMConfiguration, ["--resume", str(path)])
    folder = rl.RunFolder.open(config, "mujoco_qsm")
    try:
        state = rl.CheckpointFolder(folder.checkpoints).newest()
        check_identity(state, run_identity(config, frames.collector.env), path)
        module.writer.replay = TensorDictReplayBuffer(storage=LazyTensorStorage(1000), batch_size=16)
        rl.restore_checkpoint(state, module, frames, rl.ReplayArchive(folder.checkpoints / "replay"))
    finally:
        folder.close()


def newest(run: Path) -> Path:
    return run / "checkpoints" / f"frames-{FRAMES:012d}.pt"


def segment(run: Path) -> Path:
    return run / "checkpoints" / "replay" / "rows-000000000025-000000000050.safetensors"


def only(run: Path) -> Path:
    """The newest checkpoint, with none before it to fall back on."""
    (run / "checkpoints" / "frames-000000000025.pt").unlink()
    return newest(run)


# --- what is planted --------------------------------------------------------------------------------------------------

CASES: dict[str, Callable[[Path, Path], Path]] = {}


def case(spoil: Callable[[Path, Path], Path]) -> Callable[[Path, Path], Path]:
    """Registers a case: spoils a run in place, given a file that must never appear; returns what the error names."""
    CASES[spoil.__name__] = spoil
    return spoil


def cases(name: str, values: dict[str, object], spoil: Callable[[Path, Path, object], Path]) -> None:
    for suffix, value in values.items():
        CASES[f"{name}_{suffix}"] = lambda run, canary, value=value: spoil(run, canary, value)


def rewritten(path: Path, change: Callable[[dict], object]) -> Path:
    """The checkpoint, changed and written as PyTorch writes it."""
    state = torch.load(path, weights_only=True)
    replaced = change(state)
    torch.save(state if replaced is None else replaced, path)
    return path


# Checkpoints: pickles in every disguise.
@case
def checkpoint_is_a_bare_pickle(run, canary):
    only(run).write_bytes(pickle.dumps({"format": 1, "frames": FRAMES, "x": Planted(canary)}))
    return newest(run)


@case
def checkpoint_is_a_pickle_in_the_old_format_of_torch(run, canary):
    torch.save({"format": 1, "frames": FRAMES, "x": Planted(canary)}, only(run), _use_new_zipfile_serialization=False)
    return newest(run)


@case
def checkpoint_holds_an_object(run, canary):
    return rewritten(only(run), lambda state: state.update(x=Planted(canary)))


@case
def checkpoint_holds_an_object_deep_inside(run, canary):
    return rewritten(only(run), lambda state: state["training"]["update"]["optimizers"].update(x=[Planted(canary)]))


@case
def checkpoint_is_an_object(run, canary):
    return rewritten(only(run), lambda state: Planted(canary))


def with_pickle(run: Path, content: bytes) -> Path:
    """The newest checkpoint with another pickle in it."""
    path = only(run)
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    (name,) = (name for name in parts if name.endswith("data.pkl"))
    with zipfile.ZipFile(path, "w") as archive:
        for part, data in {**parts, name: content}.items():
            archive.writestr(part, data)
    return path


@case
def checkpoint_calls_a_function_by_an_opcode(run, canary):
    return with_pickle(run, f"cbuiltins\nopen\n(V{canary}\nVw\ntR.".encode())


@case
def checkpoint_calls_os_system(run, canary):
    return with_pickle(run, f"cposix\nsystem\n(Vtouch {canary}\ntR.".encode())


@case
def checkpoint_pickle_has_no_end(run, canary):
    return with_pickle(run, b"\x80\x02}q\x00(")


@case
def checkpoint_pickle_is_empty(run, canary):
    return with_pickle(run, b"")


@case
def checkpoint_holds_a_whole_module(run, canary):
    return rewritten(only(run), lambda state: state.update(model=torch.nn.Linear(1, 1)))


# Checkpoints: broken and oversized archives.
def cut(path: Path, share: float) -> Path:
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    return path


cases("checkpoint_cut_to", {"0": 0.0, "1_percent": 0.01, "half": 0.5, "99_percent": 0.99},
      lambda run, canary, share: cut(only(run), share))  # fmt: skip


def flipped(path: Path, position: float) -> Path:
    content = bytearray(path.read_bytes())
    content[int(position * len(content))] ^= 16
    path.write_bytes(content)
    return path


cases("checkpoint_bit_changed_at", {"a_tenth": 0.1, "half": 0.5},
      lambda run, canary, position: flipped(only(run), position))  # fmt: skip


@case
def checkpoint_is_a_zip_bomb(run, canary):
    path = only(run)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("archive/data.pkl", "w") as part:
        for _ in range(64):
            part.write(bytes(1 << 20))
    return path


@case
def checkpoint_has_two_parts_of_one_name(run, canary):
    path = only(run)
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr(archive.namelist()[0], b"another")
    return path


@case
def checkpoint_is_a_zip_of_something_else(run, canary):
    path = only(run)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("../../evil.py", f"open({str(canary)!r}, 'w')")
    return path


@case
def checkpoint_is_a_link(run, canary):
    path = only(run)
    path.rename(run.parent / "elsewhere.pt")
    path.symlink_to(run.parent / "elsewhere.pt")
    return path


@case
def checkpoint_is_a_pipe(run, canary):
    path = only(run)
    path.unlink()
    os.mkfifo(path)
    return path


@case
def checkpoint_is_a_folder(run, canary):
    path = only(run)
    path.unlink()
    path.mkdir()
    return path


@case
def checkpoint_is_huge(run, canary):
    with only(run).open("r+b") as file:
        file.truncate(1 << 40)  # sparse: takes no space
    return newest(run)


# Checkpoints: readable, but not this run's.
def nested(*keys):
    def change(state: dict, value: object) -> None:
        for key in keys[:-1]:
            state = state[key]
        state[keys[-1]] = value

    return change


WEIGHT = ("training", "update", "modules", "loss.actor_network_params.module.box.low")
cases(
    "checkpoint_with",
    {
        "another_format": (("format",), 7),
        "no_format": (("format",), None),
        "another_frame": (("frames",), 51),
        "a_fraction_of_a_frame": (("training", "env_frames"), 50.5),
        "no_weights": (("training", "update", "modules"), {}),
        "a_weight_of_another_shape": (WEIGHT, torch.zeros(3)),
        "a_weight_of_another_type": (WEIGHT, torch.zeros(2, dtype=torch.float64)),
        "a_weight_that_is_nan": (WEIGHT, torch.tensor([float("nan"), 0.0])),
        "a_sparse_weight": (WEIGHT, torch.zeros(2).to_sparse()),
        "a_weight_that_repeats_one_number": (WEIGHT, torch.zeros(1).expand(1 << 40)),
        "a_text_for_a_weight": (WEIGHT, "low"),
        "an_optimiser_of_another_network": (("training", "update", "optimizers", "actor", "state"), {99: {}}),
        "an_average_of_another_shape": (
            ("training", "update", "optimizers", "actor", "state", 0, "exp_avg"),
            torch.zeros(1, 2, 3),
        ),
        "another_setting": (("run", "settings", "gamma"), 0.5),
        "another_environment": (("run", "environment", "observation_size"), 17),
        "statistics_that_nobody_keeps": (("environment",), {"mean": torch.zeros(2)}),
    },
    lambda run, canary, change: rewritten(only(run), lambda state: nested(*change[0])(state, change[1])),
)


# The manifest of the replay buffer.
cases(
    "manifest_with",
    {
        "a_path_upwards": ("segments", [("../../../etc/passwd", 50, 0)]),
        "a_whole_path": ("segments", [("/etc/passwd", "/etc/shadow", 0)]),
        "negative_rows": ("segments", [(-50, 0, 0)]),
        "rows_backwards": ("segments", [(50, 0, 0)]),
        "rows_without_end": ("segments", [(0, 1 << 62, 0)]),
        "no_segments": ("segments", []),
        "another_capacity": ("capacity", 10),
        "too_many_rows": ("written", 1 << 62),
        "an_attribute_of_torch": ("entries", {"observation": ["torch.load", [2]]}),
        "an_entry_too_many": ("entries", {"secret": ["torch.float32", [2]]}),
        "text": ("segments", "rows"),
    },
    lambda run, canary, change: rewritten(
        only(run), lambda state: nested("replay", change[0])(state, change[1])
    ).with_name("replay"),
)


# The replay folder.
def planted_file(run: Path, folder: str, name: str, canary: Path) -> Path:
    path = run / folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(pickle.dumps(Planted(canary)))
    return path


cases(
    "planted",
    {
        "prefetch.pkl": ("checkpoints/replay", "prefetch.pkl"),
        "storage.memmap": ("checkpoints/replay", "0.memmap"),
        "metadata": ("checkpoints/replay", "storage_metadata.json"),
        "rows_as_a_pickle": ("checkpoints/replay", "rows-000000000000-000000000025.pkl"),
        "rows_with_a_path": ("checkpoints/replay/..", "rows-000000000000-000000000025.safetensors"),
        "folder": ("checkpoints/replay/deeper", "x.pkl"),
        "beside_the_checkpoints": ("checkpoints", "last.ckpt"),
        "checkpoint_of_a_frame_like_no_other": ("checkpoints", "frames-9.pt"),
    },
    lambda run, canary, where: (
        planted_file(run, *where, canary).parent / where[1]
        if where[1] != "x.pkl"
        else planted_file(run, *where, canary).parent
    ),
)


def with_content(run: Path, content: bytes, *, checksum: bool = True) -> Path:
    """The last segment replaced, and the manifest's checksum with it: as somebody would who knows the format."""
    segment(run).write_bytes(content)

    def change(state: dict) -> None:
        first, last, _ = state["replay"]["segments"][-1]
        state["replay"]["segments"][-1] = (first, last, zlib.crc32(content))

    if checksum:
        rewritten(only(run), change)
    return segment(run)


@case
def rows_changed(run, canary):
    return with_content(run, segment(run).read_bytes()[:-1] + b"\1", checksum=False)


@case
def rows_missing(run, canary):
    segment(run).unlink()
    return segment(run)


@case
def rows_are_a_link(run, canary):
    path = segment(run)
    path.rename(run.parent / "elsewhere")
    path.symlink_to(run.parent / "elsewhere")
    return path


@case
def rows_are_a_device(run, canary):
    segment(run).unlink()
    segment(run).symlink_to("/dev/zero")
    return segment(run)


cases(
    "rows_are",
    {
        "empty": b"",
        "zeros": bytes(1000),
        "a_pickle": pickle.dumps({"observation": 1}),
        "a_header_of_exabytes": struct.pack("<Q", 1 << 62) + b"{}",
        "a_header_that_is_no_json": struct.pack("<Q", 8) + b"nonsense",
        "a_header_of_brackets": struct.pack("<Q", 20_000) + b"[" * 20_000,
        "offsets_beyond_the_end": struct.pack("<Q", 64)
        + b'{"observation":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'.ljust(64),
        "offsets_that_overflow": struct.pack("<Q", 96)
        + b'{"x":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,8]}}'.ljust(96)
        + bytes(8),
    },
    lambda run, canary, content: with_content(run, content),
)


def with_tensors(run: Path, change: Callable[[dict], None]) -> Path:
    tensors = load_file(segment(run))
    change(tensors)
    save_file(tensors, segment(run))
    return with_content(run, segment(run).read_bytes())


cases(
    "rows_with",
    {
        "another_shape": lambda tensors: tensors.update(observation=torch.zeros(25, 3)),
        "another_type": lambda tensors: tensors.update(action=torch.zeros(25, 2, dtype=torch.float64)),
        "nan": lambda tensors: tensors["next.reward"][3].fill_(float("nan")),
        "infinity": lambda tensors: tensors["next.observation"][0].fill_(float("inf")),
        "an_entry_less": lambda tensors: tensors.pop("next.done"),
        "an_entry_more": lambda tensors: tensors.update({"../../evil": torch.zeros(25, 1)}),
    },
    lambda run, canary, change: with_tensors(run, change),
)


# config.yaml.
def appended(run: Path, text: str) -> Path:
    path = run / "config.yaml"
    path.write_text(path.read_text() + text)
    return path


def replaced(run: Path, name: str, value: str) -> Path:
    path = run / "config.yaml"
    lines = [f"{name}: {value}" if line.startswith(f"{name}:") else line for line in path.read_text().splitlines()]
    path.write_text("\n".join(lines) + "\n")
    return path


cases(
    "config_with",
    {
        "a_call": "x: !!python/object/apply:os.system ['touch {canary}']\n",
        "an_object": "x: !!python/object/new:subprocess.Popen [['touch', '{canary}']]\n",
        "a_module": "x: !!python/module:antigravity\n",
        "a_tag_of_its_own": "x: !evil 1\n",
        "aliases_that_multiply": "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n",
        "deep_nesting": "x: " + "[" * 5000 + "]" * 5000 + "\n",
        "an_unknown_name": "surprise: 1\n",
        "another_run_to_resume": "resume: /etc\n",
        "another_folder": "run_dir: /etc\n",
        "bytes_that_are_no_text": "x: \0\n",
    },
    lambda run, canary, text: appended(run, text.replace("{canary}", str(canary))),
)
cases(
    "config_where",
    {
        "frames_are_negative": ("total_frames", "-1"),
        "gamma_is_nan": ("gamma", ".nan"),
        "widths_are_text": ("actor_hidden_dims", "[a]"),
        "the_environment_is_unknown": ("n_step", "'three'"),
    },
    lambda run, canary, change: replaced(run, *change),
)


@case
def config_is_huge(run, canary):
    with (run / "config.yaml").open("r+b") as file:
        file.truncate(1 << 40)
    return run / "config.yaml"


@case
def config_is_a_link(run, canary):
    path = run / "config.yaml"
    path.rename(run.parent / "config.yaml")
    path.symlink_to(run.parent / "config.yaml")
    return path


@case
def metrics_are_a_link(run, canary):
    (run / "metrics.csv").symlink_to(run.parent / "thesis.csv")
    return run / "metrics.csv"


@case
def the_replay_folder_is_a_link(run, canary):
    path = run / "checkpoints" / "replay"
    path.rename(run.parent / "replay")
    path.symlink_to(run.parent / "replay", target_is_directory=True)
    return path


def own_module(run: Path, canary: Path) -> str:
    (run / "evil_module.py").write_text(f"open({str(canary)!r}, 'w')\n")
    return "evil_module"


@case
def environment_comes_with_the_run(run, canary):
    replaced(run, "env", f"{own_module(run, canary)}:Evil-v0")
    return run


@case
def logger_comes_with_the_run(run, canary):
    replaced(run, "logger", json.dumps({"class_path": f"{own_module(run, canary)}.Evil", "init_args": {}}))
    return run


@pytest.mark.parametrize("name", CASES)
def test_a_spoiled_run_runs_nothing_and_is_named(name, run, opened, tmp_path, monkeypatch, capsys):
    copy, canary = tmp_path / "run", tmp_path / "canary"
    shutil.copytree(run, copy)
    named = CASES[name](copy, canary)
    monkeypatch.chdir(copy)
    monkeypatch.setattr(sys, "path", [str(copy), *sys.path])  # the worst place to start from
    with pytest.raises(rl.UserError) as error:
        resume(copy, opened)
    message = f"{error.value}{capsys.readouterr().err}"
    assert named.name in message or f"frame {FRAMES}" in message
    assert not canary.exists()


def test_the_run_that_is_spoiled_can_be_resumed(run, opened, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    resume(tmp_path / "run", opened)
    frames, module, fresh = opened
    assert frames.first_frame == module.env_frames == FRAMES and len(module.writer.replay) == FRAMES
    assert any(not torch.equal(value, fresh[name]) for name, value in module.update.state_dict().items())


# --- the published actor ----------------------------------------------------------------------------------------------


def edited(actor: Path, **values: object) -> None:
    path = actor / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def tensors_changed(actor: Path, change: Callable[[dict], object]) -> None:
    tensors = load_file(actor / "model.safetensors")
    change(tensors)
    save_file(tensors, actor / "model.safetensors")


def written(name: str, content: bytes):
    return lambda actor, canary: (actor / name).write_bytes(content)


FIRST = "module.score_network.network.mlp.0.weight"
ACTORS: dict[str, Callable[[Path, Path], object]] = {
    "weights_missing": lambda actor, canary: (actor / "model.safetensors").unlink(),
    "weights_empty": written("model.safetensors", b""),
    "weights_with_a_huge_header": written("model.safetensors", struct.pack("<Q", 1 << 62) + b"{}"),
    "weights_of_brackets": written("model.safetensors", struct.pack("<Q", 50_000) + b"[" * 50_000),
    "weights_are_a_pickle": lambda actor, canary: (actor / "model.safetensors").write_bytes(
        pickle.dumps(Planted(canary))
    ),
    "weights_are_a_checkpoint": lambda actor, canary: torch.save(Planted(canary), actor / "model.safetensors"),
    "weights_cut": lambda actor, canary: cut(actor / "model.safetensors", 0.7),
    "weights_are_a_pipe": lambda actor, canary: (
        (actor / "model.safetensors").unlink(),
        os.mkfifo(actor / "model.safetensors"),
    ),
    "weights_are_a_device": lambda actor, canary: (
        (actor / "model.safetensors").unlink(),
        (actor / "model.safetensors").symlink_to("/dev/zero"),
    ),
    "weights_are_huge": lambda actor, canary: os.truncate(actor / "model.safetensors", 1 << 40),
    "weight_nan": lambda actor, canary: tensors_changed(actor, lambda t: t[FIRST][0, 0].fill_(float("nan"))),
    "weight_of_another_shape": lambda actor, canary: tensors_changed(actor, lambda t: t.update({FIRST: torch.ones(2)})),
    "weight_of_another_type": lambda actor, canary: tensors_changed(
        actor, lambda t: t.update({FIRST: t[FIRST].double()})
    ),
    "weight_missing": lambda actor, canary: tensors_changed(actor, lambda t: t.pop(FIRST)),
    "bounds_of_another_size": lambda actor, canary: tensors_changed(
        actor, lambda t: t.update({"module.box.low": torch.zeros(3)})
    ),
    "bounds_upside_down": lambda actor, canary: tensors_changed(
        actor, lambda t: t.update({"module.box.low": t["module.box.high"] + 1})
    ),
    "betas_beyond_one": lambda actor, canary: tensors_changed(
        actor, lambda t: t.update({"module.noise_schedule.betas": torch.full((3,), 2.0)})
    ),
    "config_missing": lambda actor, canary: (actor / "config.json").unlink(),
    "config_of_brackets": written("config.json", b"[" * 100_000),
    "config_no_text": written("config.json", b"\xff\xfe\x00"),
    "config_a_list": written("config.json", b"[]"),
    "config_huge": lambda actor, canary: os.truncate(actor / "config.json", 1 << 40),
    "config_of_the_future": lambda actor, canary: edited(actor, format=99, qsm_rl="7.0"),
    "config_with_a_huge_network": lambda actor, canary: edited(actor, hidden_dims=[1 << 40, 1 << 40]),
    "config_with_many_layers": lambda actor, canary: edited(actor, hidden_dims=[1] * 100_000),
    "config_with_text_for_sizes": lambda actor, canary: edited(actor, observation_dim="2"),
    "config_with_negative_sizes": lambda actor, canary: edited(actor, action_dim=-2),
    "config_with_an_unknown_sampler": lambda actor, canary: edited(actor, sampler={"name": "os.system"}),
    "config_with_more_for_the_sampler": lambda actor, canary: edited(actor, sampler={"name": "DDPMSampler", "evil": 1}),
    "config_with_a_nan_temperature": lambda actor, canary: edited(
        actor, sampler={"name": "DDPMSampler", "temperature": float("nan")}
    ),
    "config_with_too_many_steps": lambda actor, canary: edited(actor, sampler={"name": "DDIMSampler", "num_steps": 99}),
    "config_with_numbers_for_keys": lambda actor, canary: edited(actor, in_keys=[1, 2]),
    "config_that_normalises_by_nothing": lambda actor, canary: edited(actor, normalize_observation=True),
}


@pytest.mark.parametrize("name", ACTORS)
def test_a_spoiled_actor_runs_nothing_and_is_named(name, run, tmp_path):
    actor, canary = tmp_path / "actor", tmp_path / "canary"
    shutil.copytree(run / "actor", actor)
    ACTORS[name](actor, canary)
    with pytest.raises(ValueError, match="contains no readable actor: ") as error:
        DiffusionActor.from_pretrained(actor)
    assert str(actor) in str(error.value)
    with pytest.raises(rl.UserError, match="contains no readable actor: "):
        rl.load_actor(actor)
    assert not canary.exists()


def test_there_are_enough_cases():
    assert len(CASES) + len(ACTORS) >= 50
