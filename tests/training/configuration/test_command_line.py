from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from qsm_rl.training import (
    PRESETS,
    DiffusionQLConfiguration,
    QSMConfiguration,
    RunFolder,
    UserError,
    parse_configuration,
)
from qsm_rl.training.configuration.command_line import _refuse_own_code, _warn, check_plain_yaml, saved_text


def parse(*arguments: str) -> QSMConfiguration:
    return parse_configuration(QSMConfiguration, arguments)


def test_a_file_of_one_preset_is_not_called_another(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text("preset: default\nnum_steps: 7\n")
    with pytest.raises(
        UserError, match=r"--preset paper: .*settings\.yaml contains the settings of the preset default"
    ):
        parse("--config", str(path), "--preset", "paper")
    assert parse("--config", str(path), "--preset", "default").num_steps == 7
    path.write_text("num_steps: 7\n")  # of no preset
    config = parse("--config", str(path), "--preset", "paper")
    assert (config.preset, config.num_steps, config.schedule) == ("paper", 7, "vp")


def test_preset_fills_only_what_neither_flags_nor_yaml_give(tmp_path):
    path = tmp_path / "some.yaml"
    path.write_text("preset: paper\nnum_steps: 7\nbatch_size: 32\n")
    config = parse("--batch_size", "64", "--config", str(path))  # the flag wins although it comes first
    assert (config.batch_size, config.num_steps, config.schedule) == (64, 7, "vp")
    assert parse("--batch_size", "64", f"--config={path}") == config
    (tmp_path / "link.yaml").symlink_to(path)
    assert parse("--config", str(tmp_path / "link.yaml")).num_steps == 7
    assert config.actor_hidden_dims == (512, 512)


def test_a_value_equal_to_the_default_still_counts_as_given():
    default = QSMConfiguration().schedule
    assert PRESETS["paper"]["schedule"] != default
    assert parse("--preset", "paper", "--schedule", default).schedule == default


def test_help_keeps_the_lines_of_the_description(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    description = "Trains a policy.\n\npython recipe.py --seed 1\npython recipe.py --seed 2\n"
    with pytest.raises(SystemExit) as stop:
        parse_configuration(QSMConfiguration, ["--help"], description=description)
    assert stop.value.code == 0
    assert f"\n\n{description}\noptions:\n" in capsys.readouterr().out


def test_print_config_prints_what_another_run_reads_back(tmp_path, capsys):
    given = ("--preset", "paper", "--env", "dm_control/cheetah-run-v0", "--num_steps", "7")
    with pytest.raises(SystemExit) as stop:
        parse("--print_config", *given)
    assert stop.value.code == 0
    path = tmp_path / "printed.yaml"
    path.write_text(capsys.readouterr().out)
    assert parse("--config", str(path)) == parse(*given)
    with pytest.raises(UserError, match="batch_size must"):  # what does not fit is said, not printed
        parse("--print_config", "--batch_size", "0")


@pytest.fixture(autouse=True)
def _warnings_anew():
    _warn.cache_clear()


@pytest.mark.parametrize(
    ("given", "warning"),
    [
        ("--score_scale 60", "--score_scale has no effect without --score_target scaled"),
        ("--score_scale=60", "--score_scale has no effect without --score_target scaled"),
        ("--score_scale=60 --score_target scaled", ""),
        ("--preset paper --critic simba --critic_layer_norm false", ""),  # as it is in the preset
        (f"--score_scale {QSMConfiguration().score_scale}", ""),  # as a grid gives all that a configuration has
        ("--score_scale 60 --preset paper", ""),
        ("--preset paper --score_target boltzmann", ""),  # the preset's scale was not asked for
        (
            "--score_temperature 1 --preset paper",
            "--score_temperature has no effect without --score_target boltzmann or normalized or posterior",
        ),
        ("--score_particles 8 --score_target posterior --score_temperature 1", ""),
        ("--score_sigma false --score_target posterior", "--score_sigma has no effect without"),
        ("--critic_symlog false", "--critic_symlog has no effect without --critic_bins"),
        ("--critic_symlog false --critic_bins 51", ""),
        ("--entropy_samples 4", "--entropy_samples has no effect without --entropy_temperature"),
        ("--critic_layer_norm false", "--critic_layer_norm has no effect without --critic mlp"),
        ("--tau 0.01", "--tau has no effect without --critic mlp or simba"),
        ("--tau 0.01 --critic simba", ""),
    ],
)
def test_a_flag_without_effect_is_named(capsys, given, warning):
    parse(*given.split())
    printed = capsys.readouterr().err
    assert warning in printed and bool(printed) == bool(warning)


def test_tau_counts_for_a_delayed_actor_and_a_file_may_hold_everything(tmp_path, capsys):
    parse_configuration(DiffusionQLConfiguration, ["--tau", "0.01", "--delay_actor", "true"])
    path = tmp_path / "all.yaml"
    path.write_text(saved_text(dataclasses.replace(QSMConfiguration(), score_scale=60.0)))
    parse("--config", str(path))
    assert capsys.readouterr().err == ""
    for _ in range(2):  # told once
        parse_configuration(DiffusionQLConfiguration, ["--tau", "0.01"])
    assert capsys.readouterr().err.count("--tau has no effect") == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("bach_size: 3\n", r"some\.yaml: there is no setting bach_size; did you mean batch_size\?"),
        (
            "# python recipes/mujoco_sac.py --x\ntarget_entropy: 1\n",
            r"some\.yaml, written by recipes/mujoco_sac\.py: there",
        ),
        ("", r"some\.yaml contains no settings; write lines such as total_frames: 30000"),
        ("- a\n", r"some\.yaml contains no settings"),
    ],
)
def test_a_file_that_does_not_fit_is_named_with_the_nearest(tmp_path, content, message):
    path = tmp_path / "some.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        parse("--config", str(path))
    with pytest.raises(UserError, match=message):
        parse(f"--config={path}")


@pytest.mark.parametrize(
    ("flag", "value", "expected"),
    [
        ("--compile", "maybe", "bool or 'auto'"),
        ("--target_aggregation", "median", "'min', 'mean' or float"),
        ("--actor_ema", "nan", "float or null"),
        ("--critic_support", "0,10", 'two numbers such as "[-10, 10]" or null'),
        ("--gamma", "high", "float"),
    ],
)
def test_what_a_flag_takes_is_said_in_words(flag, value, expected):
    with pytest.raises(UserError) as caught:
        parse(flag, value)
    assert str(caught.value) == f"{flag}: expected {expected}, got {value}"


def test_a_run_is_resumed_with_its_own_settings(tmp_path):
    (tmp_path / "config.yaml").write_text("batch_size: 3\n")
    with pytest.raises(UserError, match="--resume takes every setting from the run; remove --config"):
        parse("--resume", str(tmp_path), "--config", str(tmp_path / "config.yaml"))


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
    assert resumed == dataclasses.replace(config, run_dir=None, resume=folder, warmup_frames=200)  # as capped
    assert [parse("--resume", str(folder), "--total_frames", n).total_frames for n in ("1000", "2000")] == [1000, 2000]
    assert parse("--resume", str(folder), "--stop_at_return", "5").stop_at_return == 5
    with pytest.raises(UserError, match="999"):
        parse("--resume", str(folder), "--total_frames", "999")
    with pytest.raises(UserError, match="--seed"):
        parse("--resume", str(folder), "--seed", "4")
    (folder / "config.yaml").write_text("env: Hopper-v5\n")
    with pytest.raises(UserError, match=r"lacks.*actor_ema.*another version"):
        parse("--resume", str(folder))
    (folder / "config.yaml").write_text(f"{saved_text(config)}run_dir: null\n")
    with pytest.raises(UserError, match=r"contains settings that no run saves: run_dir; remove"):
        parse("--resume", str(folder))
    with pytest.raises(UserError, match=r"nowhere.* give the folder of a run[.]$"):
        parse("--resume", str(tmp_path / "nowhere"))
    (tmp_path / "seeds" / "seed_0").mkdir(parents=True)
    with pytest.raises(UserError, match=r"continue several seeds with the command that started them[.]$"):
        parse("--resume", str(tmp_path / "seeds"))
    (folder / "config.yaml").rename(tmp_path / "elsewhere.yaml")
    (folder / "config.yaml").symlink_to(tmp_path / "elsewhere.yaml")
    with pytest.raises(UserError, match=r"config.yaml does not exist"):
        parse("--resume", str(folder))


@pytest.mark.parametrize(
    ("values", "refused"),
    [
        *(({"env": "mine.sub:Some-v0"}, True), ({"env": "mine"}, False), ({"env": "theirs:Some-v0"}, False)),
        *(({"logger": "mine.sub.Some"}, True), ({"logger": {"class_path": "mine.Some"}}, True)),
        *(({"logger": {"class_path": "nowhere.Some"}}, False), ({"env": ".mine:Some-v0"}, False), (None, False)),
    ],
)
def test_no_module_comes_with_a_run_s_folder(tmp_path, monkeypatch, values, refused):
    for folder in ("run", "other"):
        (tmp_path / folder).mkdir()
        monkeypatch.syspath_prepend(tmp_path / folder)
    (tmp_path / "run" / "mine.py").touch()
    (tmp_path / "other" / "theirs").mkdir()  # a package without a file of its own
    monkeypatch.chdir(tmp_path)
    if refused:
        with pytest.raises(UserError, match="run contains the module mine; code in a run folder is never run"):
            _refuse_own_code(Path("run"), values)
    else:
        _refuse_own_code(Path("run"), values)


def test_a_run_of_another_recipe_is_named(tmp_path):
    (tmp_path / "config.yaml").write_text(
        "# python recipes/mujoco_sac.py --config config.yaml\n# written by qsm_rl 0.0.1\ntarget_entropy: 1.0\n"
    )
    with pytest.raises(UserError, match=r"written by recipes/mujoco_sac\.py of qsm_rl 0\.0\.1 \(this is"):
        parse("--resume", str(tmp_path))


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        *(("a: []\n" * 30, True), (20 * "[" + 20 * "]", True), (21 * "[" + 21 * "]", False)),
        *(("a: 1\n".ljust(1 << 20), True), ("a: 1\n".ljust((1 << 20) + 1), False)),
    ],
    ids=["many lists", "20 levels", "21 levels", "1 MiB", "a byte more"],
)
def test_a_file_is_neither_deep_nor_large(tmp_path, text, plain):
    (tmp_path / "some.yaml").write_text(text)
    if plain:
        check_plain_yaml(tmp_path / "some.yaml")
    else:
        with pytest.raises(UserError, match="is not a plain YAML file"):
            check_plain_yaml(tmp_path / "some.yaml")


def test_a_flag_is_written_out():
    with pytest.raises(UserError, match=r"--total_frame.*did you mean --total_frames"):
        parse("--total_frame", "5")


def test_a_width_that_is_no_list_is_explained():
    with pytest.raises(UserError, match=r'--actor_hidden_dims: expected tuple, got 8; give a list .*"\[256, 256\]"'):
        parse("--actor_hidden_dims", "8")
