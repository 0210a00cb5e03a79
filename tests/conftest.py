"""What every test gets."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def fresh_compiler(request: pytest.FixtureRequest) -> Iterator[None]:
    """Slow tests start with an empty compiler.

    TorchRL wraps the methods of all losses in one function, so what is compiled of them counts together: the ninth in a
    process is beyond the compiler's limit.
    """
    if request.node.get_closest_marker("slow"):
        torch.compiler.reset()
    yield
