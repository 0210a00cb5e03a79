from __future__ import annotations

import shutil
from collections import namedtuple

import pytest
import torch

from qsm_rl.training import UserError
from qsm_rl.training.data.replay import row_bytes
from qsm_rl.training.runs import preflight
from qsm_rl.training.runs.preflight import check_space

ROW = row_bytes({"observation": ["torch.float32", [17]], "action": ["torch.float32", [6]], "done": ["torch.bool", [1]]})
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def machine(monkeypatch):
    """A machine of as much free memory and disk as told."""

    def set_free(memory: int, disk: int) -> None:
        monkeypatch.setattr(preflight, "available_memory", lambda device: memory)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, disk))

    return set_free


def check(folder, **options) -> None:
    state = {"weight": torch.zeros(1_000_000)}  # 4 MB, in a checkpoint 12 MB with Adam's averages, and three of those
    options = {
        "rows": 1_000_000,
        "capacity": 1_000_000,
        "row": ROW,
        "checkpoint_every": 5_000,
        "state": state,
        "device": torch.device("cpu"),
        **options,
    }
    check_space(folder, **options)


def test_a_row_is_counted_by_hand():
    assert ROW == 17 * 4 + 6 * 4 + 1


def test_what_fits_passes_and_what_does_not_is_told_with_need_and_remedy(tmp_path, machine):
    need = 1_010_000 * 93 + 3 * 12_000_000 + (64 << 20)
    machine(93_000_000, need)
    check(tmp_path / "not" / "made" / "yet")
    machine(92_999_999, need)
    with pytest.raises(UserError, match=r"93\.0 MB of memory .* 93\.0 MB is free on cpu; .* to 749,999"):
        check(tmp_path)
    machine(93_000_000, need - 1)
    with pytest.raises(UserError, match=r"needs 197\.0 MB in .*36\.0 MB for checkpoints.*197\.0 MB is free"):
        check(tmp_path)
    machine(93_000_000, need - 93 * 400_000)
    check(tmp_path, stored=400_000)  # a resumed run has them on the disk already


@pytest.mark.parametrize("capacity", [10**14, 10**25])
def test_a_buffer_whose_addresses_cannot_be_had_is_refused_with_what_the_run_needs(tmp_path, machine, capacity):
    machine(93_000_000, 10**12)
    with pytest.raises(UserError, match=rf"{capacity:,} transitions of 93 bytes needs more .*this run needs 1,000,000"):
        check(tmp_path, capacity=capacity)


def test_this_machine_says_what_is_free():
    assert preflight.available_memory(torch.device("cpu")) > 1 << 20


def test_in_a_container_files_that_were_read_lately_give_way(tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "CGROUP", tmp_path)
    for name, content in (("max", "9000"), ("current", "7000"), ("stat", "anon 3000\ninactive_file 2500\n")):
        (tmp_path / f"memory.{name}").write_text(content)
    assert preflight.available_memory(torch.device("cpu")) == 9000 - 7000 + 2500
    (tmp_path / "memory.max").write_text("max\n")  # no limit: the machine's own memory counts
    assert preflight.available_memory(torch.device("cpu")) > 1 << 20


@pytest.mark.parametrize(
    ("meminfo", "cgroup", "free"),
    [
        ("MemTotal: 9 kB\nMemAvailable: 7 kB\n", {}, 7 << 10),
        ("MemAvailable: 7 kB\n", {"max": "99999", "current": "9", "stat": "inactive_file 5"}, 7 << 10),
        ("MemAvailable: 7 kB\n", {"max": "20", "current": "90", "stat": "inactive_file 5"}, 0),
        ("MemAvailable: 7 kB\n", {"max": "20", "current": "9", "stat": "anon 5"}, 7 << 10),
        ("MemTotal: 9 kB\n", {}, None),  # an old kernel
        (None, {}, None),
    ],
)
def test_free_memory_is_what_machine_and_container_both_give(tmp_path, monkeypatch, meminfo, cgroup, free):
    monkeypatch.setattr(preflight, "CGROUP", tmp_path)
    monkeypatch.setattr(preflight, "Path", lambda name: tmp_path / "meminfo")
    if meminfo is not None:
        (tmp_path / "meminfo").write_text(meminfo)
    for name, content in cgroup.items():
        (tmp_path / f"memory.{name}").write_text(content)
    assert preflight.available_memory(torch.device("cpu")) == free


def test_memory_is_asked_for_only_where_it_is_known_and_taken(tmp_path, machine):
    machine(None, 10**12)
    check(tmp_path)
    machine(0, 10**12)
    check(tmp_path, device=None, capacity=10**25)  # in files
    machine(93_000_000, 10**12)
    # A GPU's is taken whole, by each process on its own, and the disk holds the rows of all.
    check(tmp_path, device=torch.device("cuda:0"), capacity=1_000_000, rows=3_000_000)
    with pytest.raises(UserError, match="1,000,001 transitions of 93 bytes"):
        check(tmp_path, device=torch.device("cuda:0"), capacity=1_000_001, rows=10)


def test_rows_that_are_stored_give_no_room_to_checkpoints(tmp_path, machine):
    need = 10_000 * 93 + 3 * 12_000_000 + (64 << 20)
    machine(93_000_000, need)
    check(tmp_path, rows=10, stored=500)
    machine(93_000_000, need - 1)
    with pytest.raises(UserError, match=r"930\.0 kB for the replay buffer"):
        check(tmp_path, rows=10, stored=500)
    assert [preflight._size(count) for count in (999, 1000, 10**6, 10**9)] == [
        "999 bytes",
        "1.0 kB",
        "1.0 MB",
        "1.0 GB",
    ]
