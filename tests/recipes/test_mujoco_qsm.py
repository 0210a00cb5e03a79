"""The recipe as a user runs it: through its command line, in this process where that is enough."""

from __future__ import annotations

import contextlib
import csv
import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qsm_rl.training.random_state import derived_seed
from qsm_rl.training.runs import callbacks
from qsm_rl.training.runs.loggers import MetricsTable
from recipes.mujoco_qsm import main

RECIPE = Path(__file__).parents[2] / "recipes" / "mujoco_qsm.py"
GLOSSARY = RECIPE.parents[1] / "docs" / "recipes" / "metrics.md"
SMALL = [
    *("--env", "InvertedPendulum-v5", "--total_frames", "180", "--warmup_frames", "1000", "--checkpoint_every", "60"),
    *("--log_every", "30", "--eval_every", "60", "--eval_episodes", "2", "--batch_size", "8", "--num_steps", "2"),
    *("--actor_hidden_dims", "[8]", "--critic_hidden_dims", "[8]", "--replay_size", "100", "--device", "cpu"),
]
EVERYTHING = [
    *("--num_envs", "2", "--frames_per_batch", "4", "--n_step", "3", "--normalize_observation", "true"),
    *(
        "--actor_ema",
        "0.9",
        "--gradient_clipping",
        "1",
        "--actor_learning_rate_decay",
        "300",
        "--checkpoint_every",
        "50",
    ),
    *("--updates_per_frame", "0.7", "--sampler", "ddim", "--action_repeat", "2"),
    *("--entropy_temperature", "0.1", "--entropy_samples", "3"),
    *("--bc_weight", "0.5", "--actor_ema_acts", "true"),
    *("--critic_bins", "11", "--policy_delay", "3"),
    *("--num_critics", "3", "--target_aggregation", "0.5", "--best_of", "3", "--eval_best_of", "2"),
]


def run(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return ended.value.code


def metrics(folder: Path) -> list[dict[str, str]]:
    """Rows of metrics.csv without their times and empty cells."""
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [{name: value for name, value in row.items() if value and not name.startswith("time/")} for row in rows]


def unexplained(folder: Path) -> set[str]:
    """Columns of metrics.csv that the glossary does not know."""
    known = set(re.findall(r"^\| (`.*?`) \|", GLOSSARY.read_text(encoding="utf-8"), flags=re.M))
    known = {name for names in known for name in re.findall(r"`([^`]+)`", names)}
    with (folder / "metrics.csv").open(newline="") as file:
        columns = {re.sub(r"best_of_\d+", "best_of_N", name) for name in next(csv.reader(file))}
    # Of the other ways to choose an action the glossary names one column and says that the others are alike.
    return {re.sub(r"^(eval/\w+)/.*$", r"\1/return_mean", name) for name in columns} - known


def differences(one, other, path="") -> list[str]:
    """Where two nested structures of tensors and plain values differ, to the bit."""
    if isinstance(one, torch.Tensor):
        return [] if torch.equal(one, other) and one.dtype == other.dtype else [path]
    if isinstance(one, dict):
        if one.keys() != other.keys():
            return [f"{path}: keys"]
        return [name for key in one for name in differences(one[key], other[key], f"{path}/{key}")]
    if isinstance(one, (list, tuple)):
        if len(one) != len(other):
            return [f"{path}: length"]
        return [
            name for i, (a, b) in enumerate(zip(one, other, strict=True)) for name in differences(a, b, f"{path}/{i}")
        ]
    return [] if one == other else [path]


def checkpoint(folder: Path, frames: int) -> dict:
    """A checkpoint without its clock."""
    state = torch.load(folder / "checkpoints" / f"frames-{frames:012d}.pt", weights_only=True)
    assert state.pop("elapsed_seconds") > 0
    return state


def replay_rows(folder: Path, state: dict) -> dict[str, torch.Tensor]:
    names = [f"rows-{first:012d}-{last:012d}.safetensors" for first, last, _ in state["replay"]["segments"]]
    segments = [load_file(folder / "checkpoints" / "replay" / name) for name in names]
    return {key: torch.cat([segment[key] for segment in segments]) for key in segments[0]}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A small run to its end."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    assert run(*SMALL, "--run_dir", folder) == 0
    return folder


def test_a_run_leaves_everything_it_promises(finished, capsys):
    assert {path.name for path in finished.iterdir()} == {
        *("config.yaml", "metrics.csv", "tensorboard", "checkpoints", "actor", "learning_curve.png"),
    }
    assert {path.name for path in (finished / "actor").iterdir()} == {"model.safetensors", "config.json"}
    assert any(path.name.startswith("events.out.tfevents") for path in (finished / "tensorboard").iterdir())
    rows = metrics(finished)
    assert [int(row["frames"]) for row in rows] == list(range(30, 181, 30))
    assert [int(row["frames"]) for row in rows if "eval/return_mean" in row] == [60, 120, 180]
    assert "loss/actor" in rows[-1] and "train/q_score_norm" in rows[-1] and "loss/actor" not in rows[0]
    assert unexplained(finished) == set()


def test_same_seed_gives_the_same_run_and_evaluation_has_no_part_in_it(finished, tmp_path, capsys):
    other_ways = ["--eval_every", "90", "--eval_deterministic", "true", "--eval_best_of", "2"]
    assert run(*SMALL, "--run_dir", tmp_path / "again", *other_ways) == 0
    printed = capsys.readouterr().out
    assert "frame 180: return" in printed and "frame 180, deterministic: return" in printed
    last, other_last = metrics(finished)[-1], metrics(tmp_path / "again")[-1]
    ways = {f"eval/{way}/return_mean" for way in ("deterministic", "best_of_2")}
    assert ways <= other_last.keys() and not ways & last.keys()
    assert {name: other_last[name] for name in last} == last
    one, other = checkpoint(finished, 180), checkpoint(tmp_path / "again", 180)
    assert differences(one["training"], other["training"]) == []
    assert differences(replay_rows(finished, one), replay_rows(tmp_path / "again", other)) == []
    losses = [
        {row["frames"]: row.get("loss/actor") for row in metrics(folder)} for folder in (finished, tmp_path / "again")
    ]
    assert losses[0].items() <= losses[1].items()
    assert run(*SMALL, "--run_dir", tmp_path / "other", "--seed", "1") == 0
    assert differences(one["training"], checkpoint(tmp_path / "other", 180)["training"]) != []


def test_a_return_that_is_reached_ends_the_run_and_going_on_changes_nothing(finished, tmp_path, capsys):
    folder = tmp_path / "reached"
    assert run(*SMALL, "--run_dir", folder, "--stop_at_return", "1") == 0  # a return of InvertedPendulum is 1 at least
    assert "stopped at frame 60: the evaluation's return of" in capsys.readouterr().out
    assert (folder / "actor" / "model.safetensors").is_file()
    assert metrics(folder) == metrics(finished)[:2]
    assert run("--resume", folder) == 2
    assert "the run is finished: its evaluation at frame 60" in capsys.readouterr().err
    assert run("--resume", folder, "--stop_at_return", "null") == 0
    assert metrics(folder) == metrics(finished)
    assert differences(checkpoint(finished, 180), checkpoint(folder, 180)) == []


def test_an_averaged_actor_changes_what_is_collected_only_where_it_acts(finished, tmp_path, capsys):
    rows = [replay_rows(finished, checkpoint(finished, 180))]
    for acts in ("false", "true"):
        folder = tmp_path / acts
        assert run(*SMALL, "--run_dir", folder, "--actor_ema", "0.99", "--actor_ema_acts", acts) == 0
        rows.append(replay_rows(folder, checkpoint(folder, 180)))
    plain, averaged, acting = (row["action"] for row in rows)
    assert torch.equal(averaged, plain) and not torch.equal(acting, plain)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param([], id="plain"),
        pytest.param(["--critic", "mlp", "--score_critics", "target"], id="target critics"),
        pytest.param(EVERYTHING, id="everything"),
        pytest.param(["--compile", "true", "--precision", "bfloat16"], id="compiled", marks=pytest.mark.slow),
    ],
)
def test_resumed_run_equals_the_uninterrupted_one_to_the_bit(tmp_path, options, capsys):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run(*SMALL, *options, "--run_dir", whole) == 0
    capsys.readouterr()
    last, before = sorted(int(path.stem[7:]) for path in (whole / "checkpoints").glob("*.pt"))[::-1]
    # As a process killed just before its last checkpoint leaves it: log rows and replay rows beyond, half a file.
    shutil.copytree(whole, cut)
    (cut / "checkpoints" / f"frames-{last:012d}.pt").rename(cut / "checkpoints" / f"frames-{last:012d}.pt.incomplete")
    assert run("--resume", cut) == 0
    assert f"checkpoint at frame {before}" in capsys.readouterr().out.replace(",", "")
    one, other = checkpoint(whole, last), checkpoint(cut, last)
    assert differences(one, other) == []
    assert differences(replay_rows(whole, one), replay_rows(cut, other)) == []
    assert metrics(whole) == metrics(cut)
    assert unexplained(whole) == set()
    assert (whole / "actor" / "model.safetensors").read_bytes() == (cut / "actor" / "model.safetensors").read_bytes()


def test_frames_come_in_whole_batches_and_the_run_says_how_many(tmp_path, capsys):
    folder = tmp_path / "run"
    assert run(*SMALL, "--run_dir", folder, "--total_frames", "35", "--frames_per_batch", "20") == 0
    said = capsys.readouterr().out
    assert "frames: 35, rounded up to 40 (batches of 20);" in said
    assert "the full run, 1,000,000 frames with the preset's settings: python" in said
    assert metrics(folder)[-1]["frames"] == "40"


def test_a_run_that_lost_its_checkpoints_is_not_begun_anew(finished, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    shutil.rmtree(folder / "checkpoints")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for length in ([], ["--total_frames", "360"]):
        assert run("--resume", folder, *length) == 2
        assert "has a log up to frame 180 but no checkpoint to continue from; restore its" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_disk_that_is_full_at_a_row_of_the_log_is_told_and_the_run_goes_on(finished, tmp_path, capsys, monkeypatch):
    folder, log = tmp_path / "run", MetricsTable.log_metrics

    def full(self, metrics, step=None):
        if step == 150:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        log(self, metrics, step)

    monkeypatch.setattr(MetricsTable, "log_metrics", full)
    assert run(*SMALL, "--run_dir", folder) == 1
    message = capsys.readouterr().err
    assert f"{folder}/metrics.csv could not be written: No space left on device; free some space." in message
    assert f"--resume {folder}" in message and "Traceback" not in message
    monkeypatch.undo()
    assert run("--resume", folder) == 0
    assert metrics(folder) == metrics(finished)


def test_a_stopped_run_that_was_made_longer_says_how_long(finished, tmp_path, capsys, monkeypatch):
    folder, evaluate = tmp_path / "run", callbacks.evaluate_policy
    shutil.copytree(finished, folder)

    def stopped(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(callbacks, "evaluate_policy", stopped)
    assert run("--resume", folder, "--total_frames", "300") == 143
    assert f"--resume {folder} --total_frames 300" in capsys.readouterr().out


def test_a_run_that_was_killed_before_it_published_its_actor_does_that(finished, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    shutil.rmtree(folder / "actor")
    assert run("--resume", folder) == 0
    assert (folder / "actor" / "model.safetensors").read_bytes() == (finished / "actor/model.safetensors").read_bytes()
    assert metrics(folder) == metrics(finished)
    capsys.readouterr()
    assert run("--resume", folder) == 2
    assert "finished at frame 180" in capsys.readouterr().err


def test_the_command_to_go_on_has_what_was_changed_on_resuming(tmp_path, capsys):
    """A run that ends at its first evaluation goes on without a return to stop at, in a folder with a space."""
    folder = tmp_path / "a run"
    assert run(*SMALL, "--stop_at_return", "0", "--run_dir", folder) == 0
    assert f"--resume '{folder}' --stop_at_return null" in capsys.readouterr().out
    assert run("--resume", folder, "--stop_at_return", "null") == 0
    assert f"--resume '{folder}' --stop_at_return null --total_frames 360" in capsys.readouterr().out


def clock(folder: Path) -> list[float]:
    with (folder / "metrics.csv").open(newline="") as file:
        return [float(row["time/elapsed_seconds"]) for row in csv.DictReader(file)]


def test_a_finished_run_can_be_made_longer(finished, tmp_path, capsys):
    longer = tmp_path / "longer"
    shutil.copytree(finished, longer)
    assert run("--resume", longer) == 2
    assert "finished at frame 180" in capsys.readouterr().err
    assert run("--resume", longer, "--total_frames", "240") == 0
    assert metrics(longer)[:6] == metrics(finished)
    assert clock(longer) == sorted(clock(longer)) and clock(longer)[5] == clock(finished)[5]  # the clock goes on, too
    assert [int(row["frames"]) for row in metrics(longer)] == list(range(30, 241, 30))
    assert checkpoint(longer, 240)["training"]["grad_steps"] == 240 - 36 + 1  # the warm-up stays a fifth of 180


def test_a_folder_with_a_run_is_refused_and_left_alone(finished, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    assert run(*SMALL, "--run_dir", finished) == 2
    message = capsys.readouterr().err
    assert str(finished) in message and "--resume" in message
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--env", "HalfCheeta-v5"], ["HalfCheeta-v5", "HalfCheetah-v5"]),
        (["--env", "CartPole-v1"], ["CartPole-v1"]),
        (["--env", "dm_control/walker-wlk"], ["walker-wlk", "walker-walk"]),
        (["--batch_size", "0"], ["--batch_size"]),
        (["--device", "cuda:99"], ["cuda:99", "cpu"]),
        (["--resume", "/nowhere"], ["/nowhere"]),
    ],
)
def test_bad_input_ends_with_two_lines_at_most_and_makes_nothing(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and len(message.strip().splitlines()) <= 2
    for word in words:
        assert word in message
    assert list(tmp_path.iterdir()) == []


def test_resuming_with_a_broken_checkpoint_says_so(finished, tmp_path, capsys):
    folder = tmp_path / "broken"
    shutil.copytree(finished, folder)
    for path in (folder / "checkpoints" / "replay").iterdir():
        path.write_bytes(path.read_bytes()[:-3])
    assert run("--resume", folder, "--total_frames", "240") == 2
    assert "truncated" in capsys.readouterr().err
    text = (finished / "config.yaml").read_text().replace("actor_hidden_dims: [8]", "actor_hidden_dims: [9]")
    (folder / "config.yaml").write_text(text)
    assert run("--resume", folder, "--total_frames", "240") == 2
    assert "does not match this run" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_behind_the_step_and_leaves_a_usable_run(tmp_path, capsys, monkeypatch, number, code):
    folder = tmp_path / "stopped"
    after = callbacks.MetricRows.on_train_batch_end

    def signal_at_frame_100(self, trainer, module, outputs, batch, batch_idx):
        after(self, trainer, module, outputs, batch, batch_idx)
        if module.env_frames == 100:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(callbacks.MetricRows, "on_train_batch_end", signal_at_frame_100)
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    assert run(*SMALL, "--run_dir", folder) == code
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    out = capsys.readouterr().out
    assert "at frame 100" in out and f"--resume {folder}" in out
    assert (folder / "actor" / "model.safetensors").is_file()
    monkeypatch.undo()
    assert run("--resume", folder) == 0
    assert int(metrics(folder)[-1]["frames"]) == 180


@pytest.mark.parametrize(("hook", "presses"), [("on_train_start", 1), ("on_train_batch_end", 2)])
def test_ctrl_c_before_the_first_step_or_twice_ends_at_once(tmp_path, capsys, monkeypatch, hook, presses):
    def press(*args):
        for _ in range(presses):
            signal.raise_signal(signal.SIGINT)

    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's & has ignored
    monkeypatch.setattr(callbacks.MetricRows, hook, press)
    try:
        assert run(*SMALL, "--run_dir", tmp_path / "stopped") == 130
    finally:
        signal.signal(signal.SIGINT, handler)
    assert capsys.readouterr().err == "interrupted\n"


def test_an_exit_that_is_no_ctrl_c_keeps_its_code(tmp_path, capsys, monkeypatch):
    """An environment may call ``sys.exit`` where its window is closed."""
    monkeypatch.setattr(callbacks.MetricRows, "on_train_batch_end", lambda *args: sys.exit(3))
    assert run(*SMALL, "--run_dir", tmp_path / "closed") == 3
    assert "interrupted" not in capsys.readouterr().err


def test_a_signal_leaves_an_evaluation_at_once(tmp_path, capsys, monkeypatch):
    def endless(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        while True:
            pass

    monkeypatch.setattr("qsm_rl.training.runs.callbacks.evaluate_policy", endless)
    assert run(*SMALL, "--run_dir", tmp_path / "stopped") == 143
    assert "at frame 60" in capsys.readouterr().out


def test_an_evaluation_that_a_signal_left_is_made_up_for_by_the_run_that_goes_on(finished, tmp_path, monkeypatch):
    """The last one of the run, at the frame of its last checkpoint."""
    folder, evaluate = tmp_path / "stopped", callbacks.evaluate_policy

    def stopped_at_the_end(*args, seed, **kwargs):
        if seed == derived_seed(0, "evaluation", 180):
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*args, seed=seed, **kwargs)

    monkeypatch.setattr(callbacks, "evaluate_policy", stopped_at_the_end)
    assert run(*SMALL, "--run_dir", folder) == 143
    assert "eval/return_mean" not in metrics(folder)[-1]
    monkeypatch.undo()
    assert run("--resume", folder) == 0
    assert metrics(folder) == metrics(finished)


def test_the_command_trains_from_a_shell(tmp_path):
    """The script itself, with progress on a pipe, defaults of the preset paper, and the warm-up's cap."""
    done = subprocess.run(
        [
            *(sys.executable, RECIPE, "--preset", "paper", "--env", "InvertedPendulum-v5", "--total_frames", "60"),
            *("--eval_episodes", "1", "--actor_hidden_dims", "[16,16]", "--critic_hidden_dims", "[16,16]"),
        ],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "12 frames of random actions, a fifth of total_frames instead of 10,000" in done.stdout
    assert "60/60 frames (100%)" in done.stderr
    assert "Warning" not in done.stderr
    (folder,) = (tmp_path / "runs" / "mujoco_qsm" / "InvertedPendulum-v5").iterdir()
    assert str(folder.relative_to(tmp_path)) in done.stdout
    saved = (folder / "config.yaml").read_text()
    assert 'schedule: "vp"' in saved and "actor_hidden_dims: [16, 16]" in saved and "warmup_frames: 12" in saved


@pytest.mark.slow
def test_a_run_with_worker_processes_ends_by_itself_and_leaves_no_process_behind(tmp_path):
    process = subprocess.Popen(
        [
            *(sys.executable, RECIPE, *SMALL, "--total_frames", "480", "--checkpoint_every", "160"),
            *("--num_workers", "2", "--num_envs", "2", "--frames_per_batch", "16", "--run_dir", tmp_path / "run"),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # a process group of all that it starts
    )
    try:
        printed, _ = process.communicate(timeout=240)  # until all who write there have ended
        assert process.returncode == 0, printed
        assert "480/480 frames (100%)" in printed and (tmp_path / "run" / "actor" / "model.safetensors").is_file()
        for _ in range(100):  # the server that forks the workers ends a moment later
            try:
                os.killpg(process.pid, 0)
            except ProcessLookupError:
                break
            time.sleep(0.1)
        else:
            pytest.fail("a process was left behind")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
