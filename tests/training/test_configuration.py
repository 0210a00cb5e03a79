from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

from qsm_rl.training import (
    PRESETS,
    QSMConfiguration,
    RunFolder,
    UserError,
    capped_warmup,
    parse_configuration,
    preset_values,
)
from qsm_rl.training.command_line import saved_text


def parse(*arguments: str) -> QSMConfiguration:
    return parse_configuration(QSMConfiguration, preset_values, arguments)


def test_without_arguments_the_dataclass_defaults_hold():
    assert parse() == QSMConfiguration()


def test_preset_fills_only_what_neither_flags_nor_yaml_give(tmp_path):
    path = tmp_path / "some.yaml"
    path.write_text("preset: paper\nnum_steps: 7\nbatch_size: 32\n")
    config = parse("--batch_size", "64", "--config", str(path))  # the flag wins although it comes first
    assert (config.batch_size, config.num_steps, config.schedule) == (64, 7, "vp")
    assert config.actor_hidden_dims == (512, 512)


def test_a_value_equal_to_the_default_still_counts_as_given():
    default = QSMConfiguration().schedule
    assert PRESETS["paper"]["schedule"] != default
    assert parse("--preset", "paper", "--schedule", default).schedule == default


@pytest.mark.parametrize(
    ("env", "scale"),
    [("dm_control/walker-walk", 50.0), ("dm_control/quadruped-walk", 120.0), ("dm_control/humanoid-walk", 120.0)],
)
def test_paper_scale_depends_on_the_task(env, scale):
    assert parse("--preset", "paper", "--env", env).score_scale == scale
    assert parse("--preset", "paper", "--env", env, "--score_scale", "7").score_scale == 7.0


def test_presets_name_only_fields_and_pass_the_checks():
    names = {field.name for field in dataclasses.fields(QSMConfiguration)}
    for preset, values in PRESETS.items():
        assert values.keys() <= names
        QSMConfiguration(**values, preset=preset)


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
        (["--num_envs", "2"], ["frames_per_batch", "multiple", "num_envs=2"]),
        (["--device", "gpu"], ["device", "gpu", "cuda"]),
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


def test_unknown_yaml_key_is_named_with_the_nearest(tmp_path):
    path = tmp_path / "some.yaml"
    path.write_text("bach_size: 3\n")
    with pytest.raises(UserError, match=r"bach_size.*--batch_size"):
        parse("--config", str(path))


def test_saved_configuration_reads_back_the_same_and_names_no_folder(tmp_path):
    config = parse("--preset", "paper", "--actor_learning_rate", "1e-5", "--run_dir", str(tmp_path))
    path = tmp_path / "config.yaml"
    path.write_text(saved_text(config))
    assert parse("--config", str(path)) == dataclasses.replace(config, run_dir=None)
    saved = {line.split(":")[0] for line in path.read_text().splitlines() if line and line[0] not in " -"}
    assert saved == {field.name for field in dataclasses.fields(config)} - {"run_dir", "resume"}


def test_resume_takes_everything_from_the_run_and_lets_only_total_frames_grow(tmp_path):
    folder = tmp_path / "run"
    config = parse("--seed", "3", "--total_frames", "1000", "--run_dir", str(folder))
    RunFolder.open(config, "some_recipe")
    resumed = parse("--resume", str(folder))
    assert resumed == dataclasses.replace(config, run_dir=None, resume=folder)
    assert parse("--resume", str(folder), "--total_frames", "2000").total_frames == 2000
    with pytest.raises(UserError, match="999"):
        parse("--resume", str(folder), "--total_frames", "999")
    with pytest.raises(UserError, match="--seed"):
        parse("--resume", str(folder), "--seed", "4")
    (folder / "config.yaml").write_text("env: Hopper-v5\n")
    with pytest.raises(UserError, match=r"lacks.*actor_ema.*another version"):
        parse("--resume", str(folder))
    with pytest.raises(UserError, match="nowhere"):
        parse("--resume", str(tmp_path / "nowhere"))


@pytest.mark.parametrize(("asked", "total", "warmup"), [(10_000, 50_000, 10_000), (10_000, 49_999, 9_999), (10, 3, 0)])
def test_warmup_is_at_most_a_fifth(asked, total, warmup):
    assert capped_warmup(asked, total) == warmup


def test_run_folder_is_made_once_and_used_by_one_process(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = parse("--env", "Hopper-v5", "--seed", "7")
    folder = RunFolder.open(config, "some_recipe")
    assert folder.path.parent.as_posix() == "runs/some_recipe/Hopper-v5"
    assert folder.path.name.endswith("-s7")
    again = dataclasses.replace(config, run_dir=folder.path)
    with pytest.raises(UserError, match=r"already holds a run.*--resume"):
        RunFolder.open(again, "some_recipe")
    with pytest.raises(UserError, match="in use by another process"):
        RunFolder.open(dataclasses.replace(config, resume=folder.path), "some_recipe")
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="not empty"):
        RunFolder.open(dataclasses.replace(config, run_dir=other), "some_recipe")
    with pytest.raises(UserError, match="cannot be made"):
        RunFolder.open(dataclasses.replace(config, run_dir=other / "thesis.tex" / "run"), "some_recipe")


def test_importing_the_kit_does_not_import_lightning():
    check = "import sys, qsm_rl; sys.exit('lightning' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
