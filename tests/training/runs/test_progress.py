from __future__ import annotations

import io
from types import SimpleNamespace

import torch
from tensordict import TensorDict

from qsm_rl.training.evaluation.evaluate import EvaluationResult
from qsm_rl.training.runs import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(stream: io.StringIO, monkeypatch, seconds_per_frame: float, scale: int = 1) -> str:
    """What a run of 100 frames prints; an episode of return 7 ends at frame 50, an evaluation has given 3 and 5.

    With a scale all counts and returns are so many times as large.
    """
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(progress.time, "perf_counter", lambda: clock.now)
    evaluation = SimpleNamespace(last=EvaluationResult((3.0 * scale, 5.0 * scale), (1, 1)))
    callback = progress.Progress(SimpleNamespace(total_frames=100 * scale), evaluation, stream)
    module = SimpleNamespace(env_frames=0, grad_steps=0)
    callback.on_train_start(None, module)
    for frame in range(1, 101):
        clock.now += seconds_per_frame
        module.env_frames, module.grad_steps = frame * scale, 2 * frame * scale
        ended = torch.tensor([[[frame == 50]]])
        following = {"episode_end": ended, "episode_reward": torch.full((1, 1, 1), 7.0 * scale)}
        callback.on_train_batch_end(None, module, None, TensorDict({"next": following}, [1, 1]), frame)
    callback.on_train_end(None, module)
    return stream.getvalue()


def test_a_log_file_gets_few_lines_with_everything_in_them(monkeypatch):
    lines = shown(io.StringIO(), monkeypatch, seconds_per_frame=1.0).splitlines()
    assert len(lines) == 7  # one every fifteen seconds, and the end
    assert lines[0] == "15/100 frames (15%), 1 frames/s, 2 updates/s, 01:25 left; return: train -, eval 4.0"
    assert lines[-1] == "100/100 frames (100%), 1 frames/s, 2 updates/s, 00:00 left; return: train 7.0, eval 4.0"


def test_a_terminal_gets_a_bar_that_ends_full(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    text = shown(Terminal(), monkeypatch, seconds_per_frame=0.25)
    last = text.replace("\n", "").split("\r")[-1]
    assert "100% ##" in last and "100/100 frames" in last and "4 frames/s, 8 updates/s" in last
    assert 40 <= text.count("\r") <= 60  # twice a second of 25


def test_a_terminal_without_a_size_gets_a_bar_too(monkeypatch):
    monkeypatch.setattr(progress.shutil, "get_terminal_size", lambda: (80, 24))  # as for a size of 0 by 0
    monkeypatch.setattr("tqdm.std._screen_shape_wrapper", lambda: lambda stream: (0, 0))
    assert "100/100" in shown(Terminal(), monkeypatch, seconds_per_frame=0.25)


def test_nothing_is_cut_off_in_a_narrow_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = shown(Terminal(), monkeypatch, seconds_per_frame=70.0, scale=10_000)
    drawn = [line.strip() for line in text.replace("\n", "").split("\r") if line.strip()]
    assert max(map(len, drawn)) < 80
    assert " 99% 990k/1.00M, 143 frames/s, 286 updates/s, 01:10, train 70000, eval 40000".strip() in drawn


def test_speed_follows_a_change_within_its_memory():
    speed, count, now = progress.Speed(0, 0.0), 0, 0.0
    for rate in (100, 10):
        for _ in range(60):
            count, now = count + rate, now + 1.0
            value = speed.update(count, now)
    assert 10 < value < 16  # a minute after the change; the plain average is 55


def test_a_line_of_a_resumed_run_without_an_evaluation_that_goes_beyond_its_frames(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(progress.time, "perf_counter", lambda: clock.now)
    stream = io.StringIO()
    callback = progress.Progress(SimpleNamespace(total_frames=100), SimpleNamespace(last=None), stream)
    module = SimpleNamespace(env_frames=70, grad_steps=500)
    callback.on_train_start(None, module)
    clock.now, module.env_frames, module.grad_steps = 15.0, 130, 530
    ended = torch.tensor([[True], [False], [True]])
    following = {"episode_end": ended, "episode_reward": torch.tensor([[1.0], [2.0], [-5000.0]])}
    callback.on_train_batch_end(None, module, None, TensorDict({"next": following}, [3]), 0)
    callback.on_train_end(None, module)  # nothing new
    line = "130/100 frames (100%), 4 frames/s, 2 updates/s, 00:00 left; return: train -5000, eval -\n"
    assert stream.getvalue() == line


def test_speeds_are_finite_where_no_time_has_passed():
    speed = progress.Speed(0, 1.0)
    assert speed.update(0, 1.0) == 0 and speed.update(1, 1.0) < float("inf")


def test_words_are_whole_from_110_columns_on(monkeypatch):
    for columns, words in ((110, True), (109, False)):
        monkeypatch.setenv("COLUMNS", str(columns))
        assert ("left; return: train" in shown(Terminal(), monkeypatch, seconds_per_frame=0.25)) == words
