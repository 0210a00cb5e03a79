"""Adam for GPUs that networks of some hundred thousand weights would leave idle."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Adam

__all__ = ["PiecewiseAdam"]

BLOCK = 65_536  # numbers per block of PyTorch's kernel
PIECES = 32  # a little below the 36 that one launch takes
ALIGNED = 64  # a piece is a multiple of this many numbers: the kernel reads four at once at addresses so aligned


class PiecewiseAdam(Adam):
    """PyTorch's fused Adam, bitwise equal, on parameters cut into pieces, for updates that use ``found_inf``.

    PyTorch's kernel gives each block 65,536 numbers, so the weights of two layers of 512 keep only six of an H100's 132
    multiprocessors busy; with pieces it is some thirty. Networks of more than two million weights are not cut. State
    and ``state_dict`` are those of whole parameters. Requires ``fused=True`` and does not support ``amsgrad``.

    Attributes:
        found_inf: scalar on the parameters' device; unless it is 0, a step changes nothing.
    """

    found_inf: Tensor

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Performs one step on all parameters that have a gradient."""
        for group in self.param_groups:
            lists: list[list[Tensor]] = [[] for _ in range(6)]
            self._init_group(group, *lists)
            if not lists[0]:
                continue
            of_each_type = self._group_tensors_by_device_and_dtype(lists).values()  # type: ignore[arg-type]
            for (parameters, gradients, means, squares, _, steps), _ in cast(Iterable[Any], of_each_type):
                total = sum(parameter.numel() for parameter in parameters)
                size = ALIGNED * math.ceil(total / PIECES / ALIGNED)
                pieces = [
                    (*piece, count)
                    for *whole, count in zip(parameters, gradients, means, squares, steps, strict=True)
                    for piece in _cut(whole, size)
                ]
                weights, gradients, means, squares, counts = map(list, zip(*pieces, strict=True))
                torch._foreach_add_(steps, 1)
                torch._fused_adam_(
                    weights,
                    gradients,
                    means,
                    squares,
                    [],
                    counts,
                    lr=group["lr"],
                    beta1=group["betas"][0],
                    beta2=group["betas"][1],
                    weight_decay=group["weight_decay"],
                    eps=group["eps"],
                    amsgrad=False,
                    maximize=group["maximize"],
                    found_inf=self.found_inf,
                )
                torch._foreach_sub_(steps, [self.found_inf] * len(steps))


def _cut(tensors: list[Tensor], size: int) -> list[tuple[Tensor, ...]]:
    """Views of equal parts of tensors of one shape; the tensors themselves if parts do not help or cannot be made."""
    if size >= BLOCK or not all(tensor.is_contiguous() for tensor in tensors):
        return [tuple(tensors)]
    return list(zip(*(tensor.detach().view(-1).split(size) for tensor in tensors), strict=True))
