from __future__ import annotations

import dataclasses

import pytest

from qsm_rl.training import (
    PRESETS,
    QSMConfiguration,
    parse_configuration,
    preset_values,
)


def parse(*arguments: str) -> QSMConfiguration:
    return parse_configuration(QSMConfiguration, preset_values, arguments)


def test_without_arguments_the_dataclass_defaults_hold():
    assert parse() == QSMConfiguration()


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
