from __future__ import annotations

from pathlib import Path

import pytest

from qsm_rl.training import OfflineQSMConfiguration, UserError


def configure(**options) -> OfflineQSMConfiguration:
    return OfflineQSMConfiguration(**{"dataset": "minari:x", **options})


@pytest.mark.parametrize(
    "options",
    [
        *({"offline_updates": 0}, {"online_frames": -1}, {"dataset": ""}, {"score_temperature": 0.0}),
        *({"bc_weight": -0.1}, {"warmup_frames": 1}, {"n_step": 2}, {"updates_per_frame": 0.5}, {"devices": 2}),
        *({"num_workers": 1}, {"normalize_observation": True}),
    ],
    ids=str,
)
def test_what_does_not_go_with_a_data_set_is_refused(options):
    with pytest.raises(UserError, match=rf"^--{next(iter(options))} must be "):
        configure(**options)


def test_a_folder_of_data_is_the_same_from_anywhere_and_a_resumed_run_s_is_left_as_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert configure(dataset="data").dataset == str(tmp_path / "data")
    assert configure(dataset="data", resume=Path("run")).dataset == "data"
    assert [configure(dataset=name).dataset for name in ("minari:a/b", "d4rl:c")] == ["minari:a/b", "d4rl:c"]


def test_frames_are_those_of_whole_batches_of_updates_and_what_follows():
    config = configure(offline_updates=21, online_frames=5, bc_weight=0.0)
    assert (config.offline_updates, config.total_frames) == (30, 35)
    assert configure(offline_updates=20, total_frames=100).total_frames == 100
