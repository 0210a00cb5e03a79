"""Buffers that stay in float32 when a model is converted to another precision."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["Float32Buffers"]


class Float32Buffers(nn.Module):
    """A module whose float32 buffers stay float32 under ``.to(dtype)``, ``.half()`` and the like."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Float32Buffers:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and old.dtype == torch.float32 and new.dtype != torch.float32:
                self._buffers[name] = old.to(new.device)
        return self
