from __future__ import annotations

import os

import pytest
import torch

from qsm_rl.training import UserError, choose_device, limit_threads


def test_auto_takes_a_gpu_if_there_is_one():
    assert choose_device("auto") == torch.device("cuda:0" if torch.cuda.is_available() else "cpu")


def test_a_gpu_that_is_not_there_is_named_with_how_many_there_are():
    with pytest.raises(UserError, match=rf"cuda:63.*{torch.cuda.device_count()} GPUs.*--device cpu"):
        choose_device("cuda:63")


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
