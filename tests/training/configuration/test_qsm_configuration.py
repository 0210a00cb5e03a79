from __future__ import annotations

import dataclasses

import pytest

from qsm_rl.training import (
    PRESETS,
    DiffusionQLConfiguration,
    QSMConfiguration,
    UserError,
    parse_configuration,
)


def parse(*arguments: str) -> QSMConfiguration:
    return parse_configuration(QSMConfiguration, arguments)


def test_without_arguments_the_dataclass_defaults_hold():
    assert parse() == QSMConfiguration()


@pytest.mark.parametrize(
    ("env", "scale"),
    [("dm_control/walker-walk", 50.0), ("dm_control/quadruped-walk", 120.0), ("dm_control/humanoid-walk", 120.0)],
)
def test_paper_scale_depends_on_the_task(env, scale):
    assert parse("--preset", "paper", "--env", env).score_scale == scale
    assert parse("--preset", "paper", "--env", env, "--score_scale", "7").score_scale == 7.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"critic": "simba", "critic_hidden_dims": (256, 128)}, "--critic_hidden_dims must be of equal widths"),
        ({"critic_bins": 1}, "--critic_bins must be null or at least 2, got 1"),
        (
            {"critic_support": (1.0, 2.0)},
            r"--critic_support must be null, or two numbers low < high that enclose 0, got \(1.0, 2.0\)",
        ),
        ({"critic_support": (0.0, 2.0)}, r"--critic_support must be null without --critic_bins, got \(0.0, 2.0\)"),
        ({"critic_bins": 51, "gamma": 1.0}, "--critic_support must be set with --gamma 1"),
        ({"bc_weight": -1.0}, "--bc_weight must be 0 or more, got -1.0"),
        ({"entropy_temperature": 0.0}, "--entropy_temperature must be null or above 0, got 0.0"),
        ({"actor_ema_acts": True}, "--actor_ema_acts must be false without --actor_ema"),
        ({"best_of": 0}, "--best_of must be at least 1, got 0"),
        ({"sampler": "ddim", "sampler_temperature": 0.5}, "--sampler_temperature must be 1 with the ddim sampler"),
    ],
)
def test_settings_that_do_not_fit_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        QSMConfiguration(**options)


def test_settings_of_several_types_are_read_from_the_command_line():
    config = parse("--target_aggregation", "0.5", "--critic_support", "[-5, 20]", "--critic_bins", "51")
    assert (config.target_aggregation, config.critic_support, config.critic_bins) == (0.5, (-5.0, 20.0), 51)
    assert parse("--target_aggregation", "mean").target_aggregation == "mean"


def test_presets_name_only_fields_and_pass_the_checks():
    names = {field.name for field in dataclasses.fields(QSMConfiguration)}
    for preset, values in PRESETS.items():
        assert values.keys() <= names
        QSMConfiguration(**values, preset=preset)


def test_diffusion_ql_has_the_same_defaults():
    """So that a comparison compares how the policy learns."""
    qsm = {field.name: field.default for field in dataclasses.fields(QSMConfiguration)}
    shared = {field.name: field.default for field in dataclasses.fields(DiffusionQLConfiguration) if field.name in qsm}
    assert {"critic", "critic_learning_rate", "target_aggregation", "warmup_frames", "num_steps"} < set(shared)
    assert shared == {name: qsm[name] for name in shared}


@pytest.mark.parametrize(
    "options",
    [
        *({"score_particles": 1}, {"score_spread": 0.0}, {"score_spread": 1.1}, {"score_scale": 0.0}),
        *({"score_spread": 0.2, "score_target": "scaled"}, {"score_temperature": 0.0}, {"eval_best_of": 0}),
        *(
            {"critic_support": ends, "critic_bins": 51}
            for ends in ((0.0, 0.0), (-float("inf"), 0.0), (0.0, float("inf")))
        ),
        *(
            {"critic_support": (-2.0, -1.0), "critic_bins": 51},
            {"entropy_samples": 1},
            {"actor_learning_rate_decay": 0},
        ),
    ],
    ids=str,
)
def test_what_is_just_beyond_a_range_is_refused(options):
    with pytest.raises(UserError, match=rf"^--{next(iter(options))} must be "):
        QSMConfiguration(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"score_particles": 2, "entropy_samples": 2, "actor_learning_rate_decay": 1, "score_spread": 1.0},
        *({"critic_support": (-1.0, 0.0), "critic_bins": 2}, {"critic_support": (0.0, 1.0), "critic_bins": 2}),
        *({"gamma": 1.0}, {"gamma": 1.0, "critic_bins": 51, "critic_support": (-9.0, 9.0)}),
    ],
    ids=str,
)
def test_the_ends_of_the_ranges_are_taken(options):
    config = QSMConfiguration(**options)
    assert {name: getattr(config, name) for name in options} == options
