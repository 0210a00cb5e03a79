"""Finds where data differs from what is expected: nested dictionaries, lists, tensors and plain values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["first_difference", "first_non_finite"]


def first_difference(found: Any, expected: Any, name: str = "") -> str | None:
    """Names the first place where ``found`` differs from ``expected``.

    Tensors are compared by dtype and shape, everything else by value; NaN equals NaN.

    Args:
        found: what was read.
        expected: what is needed.
        name: name of the whole, for the message.

    Returns:
        A sentence without its full stop, or None if they agree.

    Examples:
        >>> first_difference({"weight": torch.zeros(2, 3)}, {"weight": torch.zeros(4, 3)}, "critic")
        'critic.weight is float32 (2, 3), expected float32 (4, 3)'
    """
    if isinstance(expected, Mapping) and isinstance(found, Mapping):
        if missing := [key for key in expected if key not in found]:
            return f"{_join(name, missing[0])} is missing"
        if unknown := [key for key in found if key not in expected]:
            return f"{_join(name, unknown[0])} is unknown here"
        pairs = [(found[key], expected[key], key) for key in expected]
    elif _is_list(expected) and _is_list(found) and len(found) == len(expected):
        pairs = [(*pair, index) for index, pair in enumerate(zip(found, expected, strict=True))]
    else:
        same = _kind(found) == _kind(expected) and (
            isinstance(found, Tensor) or found == expected or found != found  # NaN
        )
        return None if same else f"{name or 'it'} is {_kind(found)}, expected {_kind(expected)}"
    differences = (first_difference(one, other, _join(name, key)) for one, other, key in pairs)
    return next((difference for difference in differences if difference is not None), None)


def first_non_finite(data: Any, name: str = "") -> str | None:
    """Names the first tensor or number in nested dictionaries and lists that is NaN or infinite.

    Examples:
        >>> first_non_finite({"a": torch.ones(1), "b": [torch.tensor([1.0, float("nan")])]})
        'b.0 holds nan'
    """
    if isinstance(data, float) and not math.isfinite(data):
        return f"{name or 'it'} is {data}"
    if isinstance(data, Tensor):
        if not data.is_floating_point() or bool(torch.isfinite(data).all()):
            return None
        return f"{name or 'it'} holds {data[~torch.isfinite(data)][0].item()}"
    children = data.items() if isinstance(data, Mapping) else enumerate(data) if _is_list(data) else ()
    found = (first_non_finite(child, _join(name, key)) for key, child in children)
    return next((bad for bad in found if bad is not None), None)


def _is_list(data: Any) -> bool:
    return isinstance(data, (list, tuple))


def _join(name: str, key: Any) -> str:
    return f"{name}.{key}" if name else str(key)


def _kind(data: Any) -> str:
    if isinstance(data, Tensor):
        layout = "" if data.layout == torch.strided else f" {str(data.layout).removeprefix('torch.')}"
        return f"{str(data.dtype).removeprefix('torch.')} {tuple(data.shape)}{layout}"
    text = repr(data)
    return text if len(text) <= 80 else f"{text[:80]}..."
