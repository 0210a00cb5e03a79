"""Several processes (ranks) that train one model: the rank of this one, and what all have to agree on."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from tensordict import TensorDictBase
from torch import Tensor, nn

__all__ = [
    "any_rank",
    "average_batch_statistics",
    "average_gradients",
    "from_rank_zero",
    "gather_objects",
    "gather_rows",
    "rank",
]


def rank() -> int:
    """Number of this process among those that train together; 0 if it is the only one.

    Lightning starts the others with the same command and ``LOCAL_RANK`` in their environment, so it is known before
    they are connected.
    """
    return int(os.environ.get("LOCAL_RANK", 0))


def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Replaces the gradients by their mean over all ranks, bitwise equal on each, in a single message.

    DistributedDataParallel's own hooks expect one backward pass per forward pass and would send the gradients of all
    networks each time. An update has one pass for the critics and one for the actor.

    Args:
        parameters: the parameters that were differentiated; the same ones must have a gradient on every rank.
    """
    if _connected():
        _average([parameter.grad for parameter in parameters if parameter.grad is not None])


def average_batch_statistics(module: nn.Module) -> None:
    """Replaces running means and variances by their mean over all ranks, each of which has seen different batches."""
    if _connected():
        statistics = ("running_mean", "running_var")
        _average([buffer for name, buffer in module.named_buffers() if name.endswith(statistics)])


def _average(tensors: Sequence[Tensor]) -> None:
    if not tensors:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(mean.view_as(tensor))


def gather_rows(tensor: Tensor, dim: int = 0) -> Tensor:
    """The tensors of all ranks, of equal shapes, concatenated along a dimension; the same on each rank."""
    if not _connected():
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts, dim)


def gather_objects(value: Any) -> list[Any]:
    """The values of all ranks, in rank order."""
    if not _connected():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def from_rank_zero(data: TensorDictBase) -> TensorDictBase:
    """The data of rank 0, on this rank's device; its size may differ from this rank's data."""
    if not _connected():
        return data
    values = [data.cpu()]
    dist.broadcast_object_list(values, 0)
    return values[0].to(data.device) if data.device is not None else values[0]


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on any rank; the same on each."""
    if not _connected():
        return flag
    flags = torch.tensor(float(flag), device=device)
    dist.all_reduce(flags)
    return bool(flags > 0)


def _connected() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
