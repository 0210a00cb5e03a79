"""The device, the threads and the arithmetic of a run."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from typing import TypeVar

import torch

from qsm_rl.training.configuration.training_configuration import TrainingConfiguration
from qsm_rl.training.errors import UserError

__all__ = ["available_cores", "choose_arithmetic", "choose_device", "limit_threads", "set_products"]

MOST_THREADS = 4
UPDATES_WORTH_COMPILING = 5_000

Configuration = TypeVar("Configuration", bound=TrainingConfiguration)


def choose_device(name: str) -> torch.device:
    """The device that a configuration names.

    Args:
        name: ``auto`` takes the first GPU if there is one; else a PyTorch device.

    Raises:
        UserError: if there is no such device.
    """
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    device = torch.device("cuda:0" if name == "cuda" else name)  # with an index, as tensors name their device
    if device.type == "cuda" and device.index >= torch.cuda.device_count():
        raise UserError(
            f"--device {name}: PyTorch finds {torch.cuda.device_count()} GPUs on this machine; use --device cpu."
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: PyTorch cannot use MPS on this machine; use --device cpu.")
    return device


def available_cores() -> int:
    """Cores that this process may use, which can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def limit_threads(device: torch.device, workers: int = 0) -> int:
    """Limits PyTorch's threads to what small networks can use: one with a GPU, at most four on the CPU.

    Further threads only spin while they wait for each other. As long as there are enough cores, each worker process is
    left one, since a spinning thread and a worker on the same core slow each other down. ``OMP_NUM_THREADS`` overrides
    the limit.

    Args:
        device: device of the networks.
        workers: processes on this machine that collect at the same time, with one thread each.

    Returns:
        The number of threads.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        free = max(1, available_cores() - workers)
        torch.set_num_threads(1 if device.type != "cpu" else min(MOST_THREADS, free))
    return torch.get_num_threads()


def choose_arithmetic(config: Configuration, device: torch.device) -> Configuration:
    """Replaces ``auto`` in ``compile`` and ``precision`` by what is fastest on this machine.

    The update is compiled if there is a compiler and enough updates follow to pay for the minute that compiling takes.
    It then multiplies matrices in bfloat16 if the processor or GPU has instructions for it. The agents of several seeds
    that share a GPU are not compiled. If compiling does not work, the reason is printed on stderr.

    Args:
        config: the run's settings.
        device: device of the networks.

    Returns:
        The settings with ``compile`` true or false and ``precision`` float32, tf32 or bfloat16, as the run folder
        records them.

    Raises:
        UserError: for tf32 on a device that is not a GPU.
    """
    compile_update = config.compile
    if compile_update == "auto":
        updates = (config.total_frames - config.capped_warmup) * config.updates_per_frame
        compile_update = config.seeds == 1 and device.type != "mps" and updates >= UPDATES_WORTH_COMPILING
    if compile_update and (reason := _cannot_compile(device)):
        print(f"the update is not compiled and takes about twice as long: {reason}", file=sys.stderr)
        compile_update = False
    precision = config.precision
    if precision == "tf32" and device.type != "cuda":
        raise UserError("--precision tf32 needs a GPU; on this device use auto, float32 or bfloat16.")
    if precision == "auto":
        precision = "float32"
        if (compile_update or device.type == "cuda") and _multiplies_bfloat16(device):
            precision = "bfloat16" if compile_update else "tf32"
    return replace(config, compile=compile_update, precision=precision)


def set_products(precision: str, device: torch.device) -> None:
    """Lets a GPU compute float32 products in tf32 unless the precision is float32, for the whole process.

    With bfloat16 nothing is lost by this: the inputs of the last layers already have fewer digits.
    """
    if device.type == "cuda":
        torch.set_float32_matmul_precision("highest" if precision == "float32" else "high")


def _cannot_compile(device: torch.device) -> str | None:
    """Why ``torch.compile`` does not work on this machine; None if it does. A compiler may lack its headers."""
    try:
        torch.compile(torch.neg)(torch.ones(8, device=device))
    except RuntimeError as error:
        return str(error).strip().splitlines()[0]
    return None


def _multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the processor (AMX, AVX-512 BF16) or GPU has bfloat16 products; others would be slower with it."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
