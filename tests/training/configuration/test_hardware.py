from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
import torch

from qsm_rl.training import QSMConfiguration, UserError, choose_arithmetic, choose_device, limit_threads
from qsm_rl.training.configuration import hardware
from qsm_rl.training.configuration.hardware import set_products


def test_auto_takes_a_gpu_if_there_is_one():
    assert choose_device("auto") == torch.device("cuda:0" if torch.cuda.is_available() else "cpu")


def test_a_gpu_that_is_not_there_is_named_with_how_many_there_are():
    with pytest.raises(UserError, match=rf"cuda:63.*{torch.cuda.device_count()} GPUs.*--device cpu"):
        choose_device("cuda:63")


def test_gpus_are_counted_from_0_and_named_with_their_index(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [str(choose_device(name)) for name in ("cuda", "cuda:1")] == ["cuda:0", "cuda:1"]
    with pytest.raises(UserError, match="--device cuda:2: PyTorch finds 2 GPUs"):
        choose_device("cuda:2")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UserError, match="cannot use MPS"):
        choose_device("mps")


@pytest.mark.parametrize(
    ("precision", "device", "products"),
    [
        *(("float32", "cuda:0", ["highest"]), ("tf32", "cuda:0", ["high"]), ("bfloat16", "cuda:0", ["high"])),
        ("float32", "cpu", []),
    ],
)
def test_a_gpu_s_products_follow_the_precision(monkeypatch, precision, device, products):
    asked = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", asked.append)
    set_products(precision, torch.device(device))
    assert asked == products


@pytest.mark.parametrize(
    ("variable", "device", "expected"), [(None, "cpu", "few"), (None, "cuda:0", 1), ("3", "cpu", None)]
)
def test_threads_are_few_unless_the_user_says_otherwise(monkeypatch, variable, device, expected):
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    limit_threads(torch.device(device))
    few = min(4, len(os.sched_getaffinity(0)))
    assert asked == [] if expected is None else asked == [few if expected == "few" else expected]


@pytest.mark.parametrize(("cores", "workers", "expected"), [(8, 0, 4), (8, 5, 3), (2, 1, 1), (2, 4, 1)])
def test_workers_have_cores_of_their_own(monkeypatch, cores, workers, expected):
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setattr(hardware, "available_cores", lambda: cores)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    limit_threads(torch.device("cpu"), workers)
    assert asked == [expected]


@pytest.mark.parametrize(
    ("given", "machine", "expected"),
    [
        ({}, {}, (True, "bfloat16")),
        # A warm-up of a fifth, 1,249 frames, leaves 4,999 updates.
        ({"total_frames": 6_248, "warmup_frames": 10_000}, {}, (False, "float32")),
        ({"total_frames": 6_249, "warmup_frames": 10_000}, {}, (True, "bfloat16")),
        ({"total_frames": 5_999}, {}, (False, "float32")),
        ({"total_frames": 6_000}, {}, (True, "bfloat16")),
        ({"total_frames": 10_999, "updates_per_frame": 0.5}, {}, (False, "float32")),
        ({}, {"bfloat16": False}, (True, "float32")),
        ({}, {"compiler": False}, (False, "float32")),
        ({"compile": True}, {"compiler": False}, (False, "float32")),
        ({"compile": False}, {}, (False, "float32")),
        ({"compile": False, "precision": "bfloat16"}, {"bfloat16": False}, (False, "bfloat16")),
        ({"compile": True, "total_frames": 100}, {}, (True, "bfloat16")),
        ({"precision": "float32"}, {}, (True, "float32")),
    ],
)
def test_arithmetic_follows_machine_and_length_of_the_run(monkeypatch, capsys, given, machine, expected):
    reason = None if machine.get("compiler", True) else "no g++"
    monkeypatch.setattr(hardware, "_cannot_compile", lambda device: reason)
    monkeypatch.setattr(hardware, "_multiplies_bfloat16", lambda device: machine.get("bfloat16", True))
    config = choose_arithmetic(QSMConfiguration(**given), torch.device("cpu"))
    assert (config.compile, config.precision) == expected
    said = capsys.readouterr().err
    assert ("not compiled" in said and "no g++" in said) == (reason is not None and given.get("compile") is not False)
    assert choose_arithmetic(config, torch.device("cpu")) == config


@pytest.mark.parametrize(("capability", "precision"), [((8, 0), "bfloat16"), ((7, 5), "float32")])
def test_on_a_gpu_auto_compiles_and_the_precision_follows_the_card(monkeypatch, capability, precision):
    monkeypatch.setattr(hardware, "_cannot_compile", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    config = choose_arithmetic(QSMConfiguration(), torch.device("cuda:0"))
    assert (config.compile, config.precision) == (True, precision)


def test_on_mps_nothing_is_compiled_unless_asked_for():
    config = choose_arithmetic(QSMConfiguration(), torch.device("mps"))
    assert (config.compile, config.precision) == (False, "float32")


def test_agents_that_share_a_gpu_are_not_compiled(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    config = choose_arithmetic(QSMConfiguration(seeds=8), torch.device("cuda:0"))
    assert (config.compile, config.precision) == (False, "tf32")


def test_tf32_on_a_cpu_is_refused():
    with pytest.raises(UserError, match=r"tf32 needs a GPU.*float32"):
        choose_arithmetic(QSMConfiguration(precision="tf32"), torch.device("cpu"))


@pytest.fixture(autouse=True)
def _products_as_they_were():
    precision = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(precision)


@pytest.mark.slow
@pytest.mark.parametrize("compiler", [None, "/bin/false"])
def test_what_keeps_the_machine_from_compiling_is_found_out(tmp_path, compiler):
    """In a process of its own: PyTorch looks for the compiler once."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    if compiler is not None:
        environment["CXX"] = compiler
    program = "from qsm_rl.training.configuration.hardware import _cannot_compile; import torch; "
    program += "print(_cannot_compile(torch.device('cpu')))"
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    works = compiler is None and shutil.which("g++") is not None
    assert (done.stdout.strip() == "None") == works, done.stdout
