from __future__ import annotations

import json

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qsm_rl.training import UserError
from recipes import benchmark
from recipes.peers import recipe_frames

CPU = torch.device("cpu")
SMALL = {**benchmark.SIZE, "hidden": 32, "batch": 8}


class ProductCounter(TorchDispatchMode):
    """Floating-point operations of matrix products."""

    flops = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            left, right = args[-2:]
            self.flops += 2 * left.shape[0] * left.shape[1] * right.shape[1]
        return function(*args, **(kwargs or {}))


def flops(call) -> int:
    with ProductCounter() as counter:
        call()
    return counter.flops


def products(rows: int, shapes: list[tuple[int, int]]) -> int:
    return sum(2 * rows * a * b for a, b in shapes)


def test_both_contenders_do_the_work_that_one_update_is():
    """Matrix products counted by hand, 3.1 GFLOP at the report's sizes; the kit shares a chain's first layer."""
    rows, hidden, steps = 256, 512, 5
    actor = [(64, 128), (128, 128), (158, hidden), (hidden, hidden), (hidden, 6)]
    critic = [(30, hidden), (hidden, hidden), (hidden, 1)]
    backward_of_weights = products(rows, actor + 2 * critic)
    # Of inputs: every layer but the first; for the action the first too; the time embedding's layers.
    backward_of_inputs = products(rows, [*actor[1:], (128, hidden), (64, 128)] + 2 * critic[1:] + 2 * critic)
    forward = products(rows, (steps + 1) * actor + 6 * critic)
    by_hand = forward + backward_of_weights + backward_of_inputs

    batch = benchmark.make_batch(rows, CPU)
    floor = flops(lambda: benchmark.HandWritten(benchmark.SIZE, CPU).update(batch))
    kit = flops(lambda: benchmark.make_update(benchmark.SIZE, CPU)(batch))
    assert by_hand == pytest.approx(3.1e9, rel=0.05)
    assert floor == pytest.approx(by_hand, rel=0.03)
    assert 0.85 * floor < kit <= floor


def test_turns_are_shared_by_all_contenders():
    calls = {"one": 0, "two": 0}

    def count(name: str) -> None:
        calls[name] += 1

    rates = benchmark.take_turns({name: lambda name=name: count(name) for name in calls}, 0.01, CPU)
    assert set(rates) == set(calls)
    assert all(rate > 0 for rate in rates.values())
    assert all(number > 3 for number in calls.values())


def test_growth_is_in_ratio_to_its_axis_first_value(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(benchmark, "GROWTH", {"steps": (1, 2)})
    monkeypatch.setattr(benchmark, "SIZE", SMALL)
    output = tmp_path / "deep" / "report"
    with pytest.raises(SystemExit) as ended:
        benchmark.main(["--parts", "growth", "--seconds", "0.01", "--output", str(output)])
    assert ended.value.code == 0
    report = json.loads(output.with_suffix(".json").read_text())
    one, two = report["rows"]
    assert (one["what"], two["what"], one["ratio"]) == ("steps 1", "steps 2", 1.0)
    assert two["ratio"] == pytest.approx(two["per_second"] / one["per_second"])
    assert 100 < one["peak_mib"] < 100_000  # PyTorch alone takes some hundred
    assert report["size"]["hidden"] == 32
    assert "| growth | steps 2 |" in output.with_suffix(".md").read_text()
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_a_jax_that_is_not_there_is_named(tmp_path):
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\necho 'No module named jax' >&2\nexit 1\n")
    fake.chmod(0o755)
    with pytest.raises(UserError, match="No module named jax"):
        benchmark.measure_jax(str(fake), 0.1)


def test_the_recipe_and_its_update_alone_take_turns(monkeypatch):
    monkeypatch.setattr(recipe_frames, "FIRST", 2)
    monkeypatch.setattr(recipe_frames, "TURN", 3)
    monkeypatch.setattr(benchmark.rl, "QSMUpdate", recipe_frames.InterleavedUpdate)
    update, batch = benchmark.make_update(SMALL, CPU), benchmark.make_batch(SMALL["batch"], CPU)
    for _ in range(9):  # turns alone before the third, sixth and ninth call; two of the recipe between them
        assert set(update(batch)) == {"qvalue", "actor"}
    assert {name: len(turns) for name, turns in update.seconds.items()} == {"recipe": 2, "alone": 3}
    assert update.num_updates == 9 + 3 * 3
    assert all(wall > 0 and processor > 0 for turns in update.seconds.values() for wall, processor in turns)
