"""The device and the threads of a run."""

from __future__ import annotations

import os

import torch

from qsm_rl.training.errors import UserError

__all__ = ["choose_device", "limit_threads"]

MOST_THREADS = 4


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
            f"--device {name}: this machine shows {torch.cuda.device_count()} GPUs to PyTorch; use --device cpu."
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: PyTorch has no MPS here; use --device cpu.")
    return device


def limit_threads(device: torch.device) -> int:
    """Limits PyTorch's threads to what small networks can use: one beside a GPU, at most four on the CPU.

    More only spin while they wait for each other. ``OMP_NUM_THREADS`` overrides it.

    Returns:
        The number of threads.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(1 if device.type != "cpu" else min(MOST_THREADS, available))
    return torch.get_num_threads()
