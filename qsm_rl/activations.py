"""The activation of the score networks, mish, in a form that is fast on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["mish"]


def _mish_by_sigmoid(x: Tensor) -> Tensor:
    # With q = sigmoid(-x), tanh(softplus(x)) = (1 - q^2) / (1 + q^2): one transcendental function instead of three.
    q = torch.sigmoid(-x)
    q_squared = q * q
    return torch.addcmul(x, x, q_squared, value=-1) / (q_squared + 1)


class _Mish(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return _mish_by_sigmoid(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        q = torch.sigmoid(-x)
        q_squared = q * q
        one_plus = q_squared + 1
        # d mish / dx = (1 - q^2 + 4 x q^2 (1 - q) / (1 + q^2)) / (1 + q^2)
        slope = (4 * x * q_squared * (1 - q)).div(one_plus).sub(q_squared).add(1).div(one_plus)
        return grad_output * slope

    jvp = backward  # elementwise: forward mode, as in torch.func.hessian, multiplies by the same slope


def mish(x: Tensor) -> Tensor:
    """``x tanh(softplus(x))`` (Misra 2020, arXiv 1908.08681), equal to torch's within 1e-6.

    On the CPU, float32 and compiled code use a form with a single sigmoid, which is three to four times as fast as
    torch's; torch's would take a fifth of an update. Elsewhere this is ``torch.nn.functional.mish``.

    Args:
        x: any shape.

    Returns:
        Same shape.

    Examples:
        >>> mish(torch.tensor([-1.0, 0.0, 1.0]))
        tensor([-0.3034,  0.0000,  0.8651])
    """
    if x.device.type != "cpu":
        return torch.nn.functional.mish(x)
    if torch.compiler.is_compiling():  # one fused kernel, which holds its intermediate values in float32
        half = x.dtype in (torch.bfloat16, torch.float16)
        return _mish_by_sigmoid(x.float() if half else x).to(x.dtype)
    if x.dtype != torch.float32 or x.numel() < 2048:  # few elements: one call of torch's costs less than six cheap ones
        return torch.nn.functional.mish(x)
    return _Mish.apply(x) if x.requires_grad and torch.is_grad_enabled() else _mish_by_sigmoid(x)
