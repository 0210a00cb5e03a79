from __future__ import annotations

import dataclasses

import pytest

from qsm_rl.training import (
    QSMConfiguration,
    RunFolder,
    UserError,
    parse_configuration,
)


def parse(*arguments: str) -> QSMConfiguration:
    return parse_configuration(QSMConfiguration, arguments)


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
