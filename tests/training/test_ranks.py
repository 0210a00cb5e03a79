from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from qsm_rl.training import UserError
from qsm_rl.training.ranks import any_rank, average_gradients, from_rank_zero, gather_objects, gather_rows, rank
from qsm_rl.training.runs.resuming import restore_checkpoint
from tests.training.small_trainer import build

SCRIPT = Path(__file__).with_name("two_ranks.py")
SETTINGS = """--env InvertedPendulum-v5 --devices 2 --device cpu --compile false --num_envs 2 --frames_per_batch 8
--checkpoint_every 160 --warmup_frames 80 --eval_every 160 --eval_episodes 1 --updates_per_frame 0.25 --n_step 2
--batch_size 16""".split()  # noqa: SIM905

SLURM_JOB = {  # of one task, to which Lightning would leave the start of the processes
    **{f"SLURM_{name}": "1" for name in ("JOB_ID", "NTASKS", "NTASKS_PER_NODE")},
    **{f"SLURM_{name}": "0" for name in ("LOCALID", "NODEID", "PROCID")},
    **{"SLURM_JOB_NAME": "train", "SLURM_NODELIST": "node1"},
}


def start(*arguments: str, **environment: str) -> subprocess.Popen:
    root = str(SCRIPT.parents[2])
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root, **environment}
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def processes_of(folder: Path) -> list[str]:
    """Command lines of the running processes that name the folder."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_text().replace("\0", " ")
        except OSError:
            continue
        if str(folder) in line and "two_ranks.py" in line:
            lines.append(line)
    return lines


def test_a_process_alone_is_rank_0_and_agrees_with_itself():
    weight = torch.ones(2, requires_grad=True)
    (3 * weight).sum().backward()
    average_gradients([weight])
    assert weight.grad.tolist() == [3, 3] and rank() == 0
    assert gather_objects("a") == ["a"] and gather_rows(weight) is weight
    assert any_rank(True, torch.device("cpu")) and not any_rank(False, torch.device("cpu"))
    frames, _ = build("Slide", total=1)
    (batch,) = frames
    assert from_rank_zero(batch) is batch


def test_a_run_of_two_ranks_is_not_continued_by_one():
    frames, module = build("Slide", total=60)
    state = {"frames": 20, "training": {}, "environment": {}, "replay": {}, "replay_of_other_ranks": [{}]}
    with pytest.raises(UserError, match=r"devices: 2, .* now has devices: 1; set it back to 2"):
        restore_checkpoint(state, module, frames, None)


@pytest.mark.slow
def test_two_ranks_end_with_equal_weights_and_updates_from_replay_of_their_own_and_resume_to_the_bit(tmp_path):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    process = start(*SETTINGS, "--total_frames", "480", "--run_dir", str(whole))
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    first, second = (torch.load(whole / f"rank-{number}.pt", weights_only=True) for number in (0, 1))
    assert first["updates"] == second["updates"] == (480 - 80 + 1) // 4
    assert not torch.equal(first.pop("first_batch"), second.pop("first_batch"))
    assert len(first) > 20 and first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(second[name])), name
    rows = [path.name for path in (whole / "checkpoints" / "replay").iterdir()]
    assert sorted(rows) == sorted(path.name for path in (whole / "checkpoints" / "replay-rank-1").iterdir())
    metrics = (whole / "metrics.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in metrics[1:]] == ["160", "320", "480"]  # written once, frames of both

    shutil.copytree(whole, resumed)
    (resumed / "checkpoints" / "frames-000000000480.pt").unlink()
    process = start("--resume", str(resumed))
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert "resumed from the checkpoint at frame 320" in output
    again = torch.load(resumed / "rank-1.pt", weights_only=True)
    for name, value in second.items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(again[name])), name
    assert not processes_of(tmp_path)


@pytest.mark.slow
def test_a_signal_ends_both_ranks_and_a_rank_that_dies_ends_the_other(tmp_path):
    process = start(*SETTINGS, "--total_frames", "1000000", "--run_dir", str(tmp_path / "stopped"), **SLURM_JOB)
    begun = time.monotonic()
    while not list((tmp_path / "stopped" / "checkpoints").glob("frames-*.pt")):
        assert process.poll() is None and time.monotonic() - begun < 200
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM and "stopped by SIGTERM" in output, output

    died = tmp_path / "died"
    process = start(*SETTINGS, "--total_frames", "1000000", "--run_dir", str(died), RANK_1_DIES="1")
    output, _ = process.communicate(timeout=200)
    assert process.returncode != 0
    begun = time.monotonic()
    while processes_of(tmp_path) and time.monotonic() - begun < 30:
        time.sleep(0.2)
    assert not processes_of(tmp_path)
