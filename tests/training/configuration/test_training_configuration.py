from __future__ import annotations

import math

import pytest

from qsm_rl.training import (
    QSMConfiguration,
    TrainingConfiguration,
    UserError,
    parse_configuration,
)
from qsm_rl.training.configuration.training_configuration import COUNTS


def parse(*arguments: str) -> QSMConfiguration:
    return parse_configuration(QSMConfiguration, arguments)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--total_frames", "-5"], ["total_frames", "-5", "at least 1"]),
        (["--total_frames", "many"], ["total_frames", "many", "int"]),
        (["--batch_size", "0"], ["batch_size", "0", "at least 1"]),
        (["--warmup_frames", "-1"], ["warmup_frames", "-1"]),
        (["--preset", "papr"], ["preset", "papr", "paper"]),
        (["--actor_hidden_dims", "[256,0]"], ["actor_hidden_dims", "0"]),
        (["--actor_hidden_dims", "[]"], ["actor_hidden_dims"]),
        (["--gamma", "1.5"], ["gamma", "1.5", "from 0 to 1"]),
        (["--tau", "0"], ["tau", "0"]),
        (["--actor_learning_rate", "nan"], ["actor_learning_rate", "nan"]),
        (["--updates_per_frame", "inf"], ["updates_per_frame", "inf"]),
        (["--gradient_clipping", "0"], ["gradient_clipping", "0"]),
        (["--actor_ema", "1"], ["actor_ema", "1"]),
        (["--num_envs", "0"], ["num_envs", "at least 1", "0"]),
        (["--num_workers", "-1"], ["num_workers", "-1", "0 or more"]),
        (["--num_workers", "2"], ["num_envs", "multiple of num_workers=2", "got 1"]),
        (["--worker_backend", "ray"], ["worker_backend", "--num_workers", "'ray'"]),
        (["--num_workers", "1", "--normalize_observation", "true"], ["normalize_observation", "false with workers"]),
        (["--replay_storage", "dsk"], ["replay_storage", "memory, disk, or a folder", "dsk"]),
        (["--devices", "0"], ["devices", "at least 1", "0"]),
        (["--devices", "2", "--device", "cuda:1"], ["device", "without an index", "cuda:1"]),
        (["--device", "gpu"], ["device", "gpu", "cuda"]),
        (["--score_critics", "target"], ["score_critics", "online with --critic crossq", "target"]),
        (["--score_target", "scald"], ["score_target", "scald", "scaled"]),
        (["--total-frames", "5"], ["--total-frames", "--total_frames"]),
        (["--seed", "-1"], ["seed", "-1"]),
        (["--config", "/nowhere.yaml"], ["/nowhere.yaml"]),
    ],
)
def test_bad_values_are_named_with_what_was_expected(arguments, words):
    with pytest.raises(UserError) as error:
        parse(*arguments)
    message = str(error.value)
    assert len(message.splitlines()) <= 2
    for word in words:
        assert word in message


def test_a_folder_of_the_replay_buffer_is_the_same_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert TrainingConfiguration(replay_storage="fast/disk").replay_storage == str(tmp_path / "fast" / "disk")
    assert TrainingConfiguration(replay_storage="disk").replay_storage == "disk"


@pytest.mark.parametrize(("asked", "total", "warmup"), [(10_000, 50_000, 10_000), (10_000, 49_999, 9_999), (10, 3, 0)])
def test_warmup_is_at_most_a_fifth(asked, total, warmup):
    assert TrainingConfiguration(warmup_frames=asked, total_frames=total).capped_warmup == warmup


@pytest.mark.parametrize(
    ("frames_per_batch", "num_envs", "collected"), [(10, 1, 10), (10, 4, 12), (1, 16, 16), (32, 8, 32)]
)
def test_a_batch_has_as_many_frames_of_every_environment(frames_per_batch, num_envs, collected):
    config = parse("--frames_per_batch", str(frames_per_batch), "--num_envs", str(num_envs))
    assert config.frames_per_batch == collected


@pytest.mark.parametrize(
    "options",
    [
        *({name: 0} for name in COUNTS),
        *(
            {"seed": 2**32},
            {"seed": 2**32 - 1, "seeds": 2},
            {"critic_learning_rate": 0.0},
            {"critic_hidden_dims": ()},
            {"stop_at_return": math.nan},
        ),
        *({"gamma": -0.1}, {"tau": 1.1}, {"normalize_observation": True, "devices": 2}, {"device": "cuda:"}),
        *({"device": "xcpu"}, {"num_envs": 3, "num_workers": 2}),
    ],
    ids=str,
)
def test_what_is_just_beyond_a_range_is_refused(options):
    with pytest.raises(UserError, match=rf"^--{next(iter(options))} must be "):
        TrainingConfiguration(**options)


@pytest.mark.parametrize(
    "options",
    [
        dict.fromkeys(COUNTS, 1),
        *({"seed": 2**32 - 1, "gamma": 0.0, "tau": 1.0}, {"gamma": 1.0, "stop_at_return": 0.0, "warmup_frames": 0}),
        *({"device": "cuda:12"}, {"device": "mps"}, {"device": "cuda"}, {"num_envs": 4, "num_workers": 2}),
    ],
    ids=str,
)
def test_the_ends_of_the_ranges_are_taken(options):
    config = TrainingConfiguration(**options)
    assert {name: getattr(config, name) for name in options} == options


def test_a_configuration_without_presets_has_the_default_alone():
    assert TrainingConfiguration.preset_values("default", "Hopper-v5") == {}
    assert TrainingConfiguration.preset_values("paper", "Hopper-v5") == {}  # which the checks refuse
    QSMConfiguration.preset_values("paper", "Hopper-v5").clear()
    assert QSMConfiguration.preset_values("paper", "Hopper-v5")["num_steps"] == 5, "they are a copy"
    with pytest.raises(UserError, match="--preset must be one of default, got 'paper'"):
        TrainingConfiguration(preset="paper")
