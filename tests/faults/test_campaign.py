from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.campaign import KINDS, campaign, summary


def may_mount(folder) -> bool:
    """Whether a tmpfs can be mounted, for a disk that fills up."""
    if os.name != "posix" or subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], capture_output=True).returncode:
        return False
    subprocess.run(["umount", folder], check=True)
    return True


def assert_nothing_is_lost(rows) -> None:
    assert [row["note"] for row in rows if row["recovered"] != "1" or row["unreadable"] != "0"] == []
    assert all(f"| {KINDS[row['kind']][1]} |" in summary(rows) for row in rows) and rows


def test_killed_savers_go_on_and_a_campaign_goes_on_where_it_stopped(tmp_path):
    assert_nothing_is_lost(campaign({"kills": 2}, tmp_path))
    counts = {"kills": 4, "full_disks": 1 if may_mount(tmp_path) else 0}
    rows = campaign(counts, tmp_path)
    assert [row["number"] for row in rows if row["kind"] == "kills"] == ["0", "1", "2", "3"]
    assert_nothing_is_lost(rows)


@pytest.mark.slow
def test_stopped_killed_and_spoiled_trainings_end_as_the_undisturbed_one(tmp_path):
    assert_nothing_is_lost(campaign({"stops": 2, "training_kills": 1, "nans": 2}, tmp_path))


@pytest.mark.slow
def test_a_training_whose_workers_are_killed_goes_on_to_its_end_and_leaves_no_process_behind(tmp_path):
    # A process of its own: a fork of one that has had workers could not start others.
    command = [sys.executable, Path(__file__).with_name("campaign.py"), "--worker_kills", "2", "--output", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with (tmp_path / "faults.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2
    assert_nothing_is_lost(rows)
    # Only what the workers had collected of the batch under way, 16 frames.
    assert all(0 <= int(row["reached"]) - int(row["resumed_at"]) <= 16 for row in rows)
