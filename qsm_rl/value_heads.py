"""Value heads: how a critic's outputs become a Q-value, and the temporal-difference loss that trains them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

__all__ = ["ScalarHead", "TwoHotHead", "ValueHead", "symexp", "symlog", "two_hot"]


def symlog(values: Tensor) -> Tensor:
    """``sign(x) log(1 + abs(x))``: a logarithm for both signs, the identity near 0.

    Hafner et al. 2023, arXiv 2301.04104, equation 9.

    Example:
        >>> symlog(torch.tensor([-1.0, 0.0, 1.0]) * (math.e - 1))
        tensor([-1.,  0.,  1.])
    """
    return values.sign() * values.abs().log1p()


def symexp(values: Tensor) -> Tensor:
    """``sign(x) (exp(abs(x)) - 1)``, the inverse of :func:`symlog`.

    Example:
        >>> symexp(torch.tensor([-1.0, 0.0, 1.0]))
        tensor([-1.7183,  0.0000,  1.7183])
    """
    return values.sign() * values.abs().expm1()


def two_hot(values: Tensor, support: Tensor) -> Tensor:
    """The weights on the two neighbours in a support whose weighted mean is the value.

    The projection of Bellemare et al. 2017 (arXiv 1707.06887, equation 7) for a single atom, on any increasing support.

    Args:
        values: shape ``(*B,)``; outside the support they count as its nearest end.
        support: increasing points, shape ``(K,)``, K >= 2.

    Returns:
        Weights in [0, 1] that sum to 1, shape ``(*B, K)``.

    Example:
        >>> two_hot(torch.tensor([0.25, 3.0, 9.0]), torch.tensor([0.0, 1.0, 5.0]))
        tensor([[0.7500, 0.2500, 0.0000],
                [0.0000, 0.5000, 0.5000],
                [0.0000, 0.0000, 1.0000]])
    """
    assert support.ndim == 1, support.shape
    # The share of each interval that lies below the value, 1, .., 1, a fraction, 0, .., 0, drops by the weights.
    share = ((values.unsqueeze(-1) - support[:-1]) / support.diff()).clamp(0, 1)
    return nn.functional.pad(share, (1, 0), value=1.0) - nn.functional.pad(share, (0, 1))


class ValueHead:
    """Base of the value heads. A critic with one has a method ``outputs(*inputs) -> (*B, num_outputs)``."""

    @property
    def num_outputs(self) -> int:
        """Outputs of the critic that the head reads."""
        raise NotImplementedError

    def initial_outputs(self) -> Tensor:
        """What a new critic puts out for every input, shape ``(num_outputs,)``."""
        return torch.zeros(self.num_outputs)

    def value(self, outputs: Tensor) -> Tensor:
        """Q-values ``(*B,)`` of outputs ``(*B, num_outputs)``, differentiable."""
        raise NotImplementedError

    def td_loss(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Loss ``(*B,)`` of outputs ``(*B, num_outputs)`` against TD targets ``(*B,)``."""
        raise NotImplementedError


@dataclass(frozen=True)
class ScalarHead(ValueHead):
    """The output is the Q-value, and a distance to the target is its loss.

    Args:
        loss_function: ``"l2"``, ``"l1"`` or ``"smooth_l1"``.

    Example:
        >>> ScalarHead("l2").td_loss(torch.tensor([[3.0]]), torch.tensor([1.0]))
        tensor([4.])
    """

    loss_function: Literal["l2", "l1", "smooth_l1"] = "l2"
    num_outputs = 1

    def value(self, outputs: Tensor) -> Tensor:
        """See :meth:`ValueHead.value`."""
        return outputs.squeeze(-1)

    def td_loss(self, outputs: Tensor, target: Tensor) -> Tensor:
        """See :meth:`ValueHead.td_loss`."""
        distance = {
            "l2": nn.functional.mse_loss,
            "l1": nn.functional.l1_loss,
            "smooth_l1": nn.functional.smooth_l1_loss,
        }[self.loss_function]
        return distance(outputs.squeeze(-1), target, reduction="none")


@dataclass(frozen=True)
class TwoHotHead(ValueHead):
    """Regression as classification: logits over a value support, trained by cross-entropy to the two-hot target.

    The Q-value is the mean ``sum_i softmax(outputs)_i z_i`` over the support z. Two-hot targets keep their mean, so the
    Q-value that minimises the loss is the mean of the TD targets, as with squared error; but the gradient does not grow
    with the returns, which trains larger critics on noisier targets more steadily (Farebrother et al. 2024, arXiv
    2403.03950; with symlog Hafner et al. 2023, arXiv 2301.04104, equation 10).

    A critic starts at Q near 0 for every input. Targets outside the support are clipped to its ends, so choose it
    around all returns that can occur: rewards in ``[r_min, r_max]`` give ``[r_min, r_max] / (1 - gamma)``.

    Args:
        low: lower end of the support.
        high: its upper end; 0 lies between the two or is one of them.
        num_bins: points of the support, at least 2. More resolve finer and cost little; usual range 51 to 255.
        symlog: whether the points are evenly spaced in :func:`symlog` rather than in value, fine near 0 and coarse far
            out, for returns of unknown size.

    Raises:
        ValueError: if the support is empty or without 0, or ``num_bins`` is below 2.

    Example:
        >>> head = TwoHotHead(0.0, 4.0, 5)
        >>> outputs = torch.tensor([-20.0, -20.0, 0.0, 0.0, -20.0])  # half on 2, half on 3
        >>> head.value(outputs), head.td_loss(outputs, torch.tensor(2.5))
        (tensor(2.5000), tensor(0.6931))
    """

    low: float
    high: float
    num_bins: int = 101
    symlog: bool = False

    def __post_init__(self) -> None:
        if not (self.low <= 0 <= self.high and self.low < self.high and math.isfinite(self.high - self.low)):
            raise ValueError(f"the support must hold 0 and end above its beginning, got [{self.low!r}, {self.high!r}].")
        if self.num_bins < 2:
            raise ValueError(f"num_bins must be at least 2, got {self.num_bins!r}.")

    @property
    def num_outputs(self) -> int:
        """One logit for each point of the support."""
        return self.num_bins

    def support(self, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> Tensor:
        """The points z, shape ``(num_bins,)``."""
        if not self.symlog:
            return torch.linspace(self.low, self.high, self.num_bins, dtype=dtype, device=device)
        low, high = (math.copysign(math.log1p(abs(end)), end) for end in (self.low, self.high))
        return symexp(torch.linspace(low, high, self.num_bins, dtype=dtype, device=device))

    def initial_outputs(self) -> Tensor:
        """Logits of a Q-value near 0, shape ``(num_bins,)``: 99 % on the two-hot weights of 0, 1 % on all points."""
        weights = two_hot(torch.tensor(0.0), self.support())
        return (0.99 * weights + 0.01 / self.num_bins).log()

    def value(self, outputs: Tensor) -> Tensor:
        """See :meth:`ValueHead.value`; computes in float32 or more."""
        dtype = torch.promote_types(outputs.dtype, torch.float32)
        support = self.support(dtype, outputs.device)
        return (outputs.softmax(-1, dtype) * support).sum(-1).to(outputs.dtype)

    def td_loss(self, outputs: Tensor, target: Tensor) -> Tensor:
        """See :meth:`ValueHead.td_loss`; computes in float32 or more."""
        dtype = torch.promote_types(outputs.dtype, torch.float32)
        weights = two_hot(target.to(dtype), self.support(dtype, outputs.device))
        return -(weights * outputs.log_softmax(-1, dtype)).sum(-1).to(outputs.dtype)
