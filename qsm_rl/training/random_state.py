"""Random state: seeds derived from a run's seed, and contexts that leave the generators unchanged."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

__all__ = ["derived_seed", "isolated_random_state", "seed_everything"]


def derived_seed(seed: int, *purpose: int | str) -> int:
    """A seed that depends on a run's seed and a purpose only, the same in every process and Python version.

    Args:
        seed: the run's seed.
        *purpose: what the seed is for, for example ``("training", frames)``.

    Returns:
        An integer from 0 to 2^31 - 1, a range that every library accepts.

    Examples:
        >>> derived_seed(0, "training", 5000) == derived_seed(0, "training", 5000) != derived_seed(0, "training", 10000)
        True
    """
    words = [seed]
    for part in purpose:
        words += [part] if isinstance(part, int) else list(part.encode())
    return int(np.random.SeedSequence(words).generate_state(1)[0] >> 1)


def seed_everything(seed: int) -> None:
    """Seeds the global generators of Python, NumPy and PyTorch, including those of its GPUs."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@contextmanager
def isolated_random_state(seed: int) -> Iterator[None]:
    """Seeds everything inside a block and then restores the generators as if nothing had been drawn.

    Args:
        seed: seed of the global generators inside the block.
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    apple_state = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
    with torch.random.fork_rng(devices=devices):
        seed_everything(seed)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
            if apple_state is not None:
                torch.mps.set_rng_state(apple_state)
