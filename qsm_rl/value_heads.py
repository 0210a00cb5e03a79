"""Value heads: how a critic's outputs become a Q-value, and the temporal-difference loss that trains them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

__all__ = ["ScalarHead", "TwoHotHead", "ValueHead", "return_bound", "symexp", "two_hot"]


def symexp(values: Tensor) -> Tensor:
    """``sign(x) (exp(abs(x)) - 1)``, the inverse of symlog, ``sign(x) log(1 + abs(x))``; the identity near 0.

    Hafner et al. 2023, arXiv 2301.04104, equation 9.

    Examples:
        >>> symexp(torch.tensor([-1.0, 0.0, 1.0]))
        tensor([-1.7183,  0.0000,  1.7183])
    """
    return values.sign() * values.abs().expm1()


def two_hot(values: Tensor, support: Tensor) -> Tensor:
    """Weights on the two neighbouring points of a support whose weighted mean is the value.

    The projection of Bellemare et al. 2017 (arXiv 1707.06887, equation 7) for a single atom, on any increasing support.

    Args:
        values: shape ``(*B,)``; values outside the support count as its nearest end.
        support: increasing points, shape ``(K,)``, K >= 2.

    Returns:
        Weights in [0, 1] that sum to 1, shape ``(*B, K)``.

    Examples:
        >>> two_hot(torch.tensor([0.25, 3.0, 9.0]), torch.tensor([0.0, 1.0, 5.0]))
        tensor([[0.7500, 0.2500, 0.0000],
                [0.0000, 0.5000, 0.5000],
                [0.0000, 0.0000, 1.0000]])
    """
    assert support.ndim == 1, support.shape
    # The share of each interval below the value is 1, .., 1, a fraction, 0, .., 0; its decreases are the weights.
    share = ((values.unsqueeze(-1) - support[:-1]) / support.diff()).clamp(0, 1)
    return nn.functional.pad(share, (1, 0), value=1.0) - nn.functional.pad(share, (0, 1))


# A trained policy earns more than the random actions from which the support is chosen. With 3, a fifth of the targets
# on cartpole-swingup were clipped in the end, and the return after 30,000 frames was 527, against 650 with 10.
SUPPORT_HEADROOM = 10.0


def return_bound(rewards: Tensor, discounts: Tensor) -> float:
    """Bound on the size of a discounted return, ``max(abs(r) / (1 - discount))``, from the rewards seen.

    Args:
        rewards: rewards, or discounted sums of rewards over some steps, ``(*B,)``.
        discounts: discount of the value after each of them, gamma to the power of the number of steps, below 1,
            ``(*B,)``.

    Returns:
        The bound; if all rewards are 0, the one for rewards of size 1.

    Raises:
        ValueError: if a discount is 1, for which there is no bound.

    Examples:
        >>> return_bound(torch.tensor([0.5, -2.0]), torch.tensor(0.75)), return_bound(torch.zeros(3), torch.tensor(0.5))
        (8.0, 2.0)
    """
    if not (discounts < 1).all():
        raise ValueError("returns are unbounded with a gamma of 1; set the value support yourself.")
    sizes = rewards.abs() if rewards.any() else torch.ones_like(rewards)
    return (sizes / (1 - discounts)).max().item()


class ValueHead:
    """Base of the value heads. A critic with one has a method ``outputs(*inputs) -> (*B, num_outputs)``.

    The loss applies one head to the outputs of all critics, so a head has no trainable weights. A head that gathers
    something during training keeps it in buffers and is an ``nn.Module``, too.

    Attributes:
        bounded: whether Q-values have bounds to which TD targets are clipped.
    """

    bounded: bool = False

    @property
    def num_outputs(self) -> int:
        """Number of outputs of the critic that the head reads."""
        raise NotImplementedError

    def initial_outputs(self) -> Tensor:
        """What a new critic outputs for every input, shape ``(num_outputs,)``."""
        return torch.zeros(self.num_outputs)

    def value(self, outputs: Tensor) -> Tensor:
        """Q-values ``(*B,)`` of outputs ``(*B, num_outputs)``, differentiable."""
        raise NotImplementedError

    def td_loss(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Loss ``(*B,)`` of outputs ``(*B, num_outputs)`` against TD targets ``(*B,)``."""
        raise NotImplementedError

    def clipped(self, target: Tensor) -> Tensor:
        """Which TD targets ``(*B,)`` the loss clips, booleans of the same shape; only called on bounded heads."""
        raise NotImplementedError


@dataclass(frozen=True)
class ScalarHead(ValueHead):
    """The output is the Q-value, and the loss is its distance from the target.

    Args:
        loss_function: ``"l2"``, ``"l1"`` or ``"smooth_l1"``.

    Examples:
        >>> ScalarHead("l2").td_loss(torch.tensor([[3.0]]), torch.tensor([1.0]))
        tensor([4.])
    """

    loss_function: Literal["l2", "l1", "smooth_l1"] = "l2"
    num_outputs = 1

    def value(self, outputs: Tensor) -> Tensor:
        """See [`ValueHead.value`][qsm_rl.ValueHead.value]."""
        return outputs.squeeze(-1)

    def td_loss(self, outputs: Tensor, target: Tensor) -> Tensor:
        """See [`ValueHead.td_loss`][qsm_rl.ValueHead.td_loss]."""
        distance = {
            "l2": nn.functional.mse_loss,
            "l1": nn.functional.l1_loss,
            "smooth_l1": nn.functional.smooth_l1_loss,
        }[self.loss_function]
        return distance(outputs.squeeze(-1), target, reduction="none")


class TwoHotHead(ValueHead, nn.Module):
    """Regression as classification: logits over a value support, trained by cross-entropy to the two-hot target.

    The Q-value is the mean ``sum_i softmax(outputs)_i z_i`` over the support z. Two-hot targets preserve the mean, so
    the Q-value that minimises the loss is the mean of the TD targets, as with squared error. But the gradient does not
    grow with the returns, so larger critics train more steadily on noisier targets (Farebrother et al. 2024, arXiv
    2403.03950; with symlog, Hafner et al. 2023, arXiv 2301.04104, equation 10).

    A critic starts at Q near 0 for every input. Targets outside the support are clipped to its ends, and the losses
    report their share as ``target_clipped``. The support should therefore cover all returns that can occur: rewards in
    ``[r_min, r_max]`` give ``[r_min, r_max] / (1 - gamma)``. A head created without ends waits for them: the loss's
    ``choose_value_support`` derives them from rewards seen. The ends are part of the state_dict.

    Args:
        low: lower end of the support; if it and ``high`` are None, both are set later.
        high: its upper end; 0 must lie between the two or be one of them.
        num_bins: number of points of the support, at least 2. More resolve finer and cost little; usual range 51 to
            255.
        symlog: whether the points are evenly spaced in ``symlog`` rather than in value, fine near 0 and coarse far from
            it, for returns of unknown size.

    Attributes:
        low: lower end, -1 until it is set.
        high: upper end, 1 until it is set.
        has_support: whether the ends were given or set.

    Raises:
        ValueError: if the support is empty or without 0, or ``num_bins`` is below 2.

    Examples:
        >>> head = TwoHotHead(0.0, 4.0, 5)
        >>> outputs = torch.tensor([-20.0, -20.0, 0.0, 0.0, -20.0])  # half on 2, half on 3
        >>> head.value(outputs), head.td_loss(outputs, torch.tensor(2.5))
        (tensor(2.5000), tensor(0.6931))
    """

    bounded = True

    def __init__(
        self, low: float | None = None, high: float | None = None, num_bins: int = 101, symlog: bool = False
    ) -> None:
        super().__init__()
        if num_bins < 2:
            raise ValueError(f"num_bins must be at least 2, got {num_bins!r}.")
        self.num_bins = num_bins
        self.symlog = symlog
        self.low, self.high, self.has_support = -1.0, 1.0, False
        if low is not None or high is not None:
            self.set_support(low, high)

    def set_support(self, low: float | None, high: float | None) -> None:
        """Sets the ends of the support; what a critic has learned so far is reinterpreted on the new one.

        A new critic's Q stays near 0 only if 0 lies in the middle of the support, as ``choose_support`` has it. After
        setting any other support, call ``loss.reset_parameters_recursive()``; or pass the ends when you create the
        head.

        Raises:
            ValueError: if the support is empty or without 0.
        """
        if low is None or high is None or not (low <= 0 <= high and low < high and math.isfinite(high - low)):
            raise ValueError(
                f"the value support must contain 0, and its low end must be below its high end, got [{low!r}, "
                f"{high!r}]."
            )
        self.low, self.high, self.has_support = float(low), float(high), True

    def choose_support(self, rewards: Tensor, discounts: Tensor) -> None:
        """Sets the ends to +- ``SUPPORT_HEADROOM`` times ``return_bound``, unless there is a support already."""
        if not self.has_support:
            bound = SUPPORT_HEADROOM * return_bound(rewards, discounts)
            self.set_support(-bound, bound)

    @property
    def num_outputs(self) -> int:
        """One logit for each point of the support."""
        return self.num_bins

    def support(self, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> Tensor:
        """The points z, shape ``(num_bins,)``."""
        if not self.symlog:
            return torch.linspace(self.low, self.high, self.num_bins, dtype=dtype, device=device)
        low, high = (math.copysign(math.log1p(abs(end)), end) for end in (self.low, self.high))  # symlog
        return symexp(torch.linspace(low, high, self.num_bins, dtype=dtype, device=device))

    def initial_outputs(self) -> Tensor:
        """Logits of a Q-value near 0, shape ``(num_bins,)``: 99 % on the two-hot weights of 0, 1 % over all points."""
        weights = two_hot(torch.tensor(0.0), self.support())
        return (0.99 * weights + 0.01 / self.num_bins).log()

    def value(self, outputs: Tensor) -> Tensor:
        """See [`ValueHead.value`][qsm_rl.ValueHead.value]; computes in float32 or more."""
        dtype = torch.promote_types(outputs.dtype, torch.float32)
        support = self.support(dtype, outputs.device)
        return (outputs.softmax(-1, dtype) * support).sum(-1).to(outputs.dtype)

    def td_loss(self, outputs: Tensor, target: Tensor) -> Tensor:
        """See [`ValueHead.td_loss`][qsm_rl.ValueHead.td_loss]; computes in float32 or more.

        Raises:
            RuntimeError: if the head has no support yet.
        """
        if not self.has_support:
            raise RuntimeError(
                "the two-hot head has no value support yet: call loss.choose_value_support(transitions) before the "
                "first update, or pass low and high."
            )
        dtype = torch.promote_types(outputs.dtype, torch.float32)
        weights = two_hot(target.to(dtype), self.support(dtype, outputs.device))
        return -(weights * outputs.log_softmax(-1, dtype)).sum(-1).to(outputs.dtype)

    def clipped(self, target: Tensor) -> Tensor:
        """See [`ValueHead.clipped`][qsm_rl.ValueHead.clipped]."""
        return (target < self.low) | (target > self.high)

    def get_extra_state(self) -> Tensor:
        """The ends of the support, NaN without one, for the state_dict."""
        return torch.tensor([self.low, self.high] if self.has_support else [math.nan, math.nan], dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """Restores what [`get_extra_state`][qsm_rl.TwoHotHead.get_extra_state] returned."""
        low, high = state.tolist()
        if not math.isnan(low):
            self.set_support(low, high)

    def extra_repr(self) -> str:
        """The arguments."""
        ends = f"{self.low}, {self.high}" if self.has_support else "None, None"
        return f"{ends}, num_bins={self.num_bins}, symlog={self.symlog}"
