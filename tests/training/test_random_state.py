from __future__ import annotations

import pytest
import torch

from qsm_rl.training.random_state import derived_seed, isolated_random_state


def test_generators_are_put_back_behind_an_error_too():
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError), isolated_random_state(0):
        torch.rand(3)
        raise RuntimeError
    assert torch.equal(torch.get_rng_state(), state)


def test_the_generator_of_an_apple_gpu_is_put_back(monkeypatch):
    state = [7]
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: state[0])
    monkeypatch.setattr(torch.mps, "set_rng_state", lambda value: state.__setitem__(0, value))
    monkeypatch.setattr(torch.mps, "manual_seed", lambda seed: state.__setitem__(0, seed))
    with isolated_random_state(3):
        state[0] += 1
    assert state == [7]


def test_derived_seeds_are_apart_and_the_same_everywhere():
    seeds = {derived_seed(seed, purpose, frame) for seed in range(5) for purpose in ("a", "b") for frame in range(50)}
    assert len(seeds) == 500
    assert derived_seed(0, "training", 5000) == derived_seed(0, "training", 5000)
    assert all(0 <= seed < 2**31 for seed in seeds)
