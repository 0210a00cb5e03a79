"""Batch renormalisation: batch normalisation that training and running statistics agree on."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qsm_rl.float32_buffers import Float32Buffers

__all__ = ["BatchRenorm"]


class BatchRenorm(Float32Buffers):
    r"""Normalises each feature over the batch, and ties the result to the running statistics.

    Ioffe 2017, "Batch Renormalization", arXiv 1702.03275, algorithm 1. In training ``y = ((x - mean) / std r + d)
    weight + bias`` with the batch's mean and standard deviation, ``r = clip(std / running_std, 1 / r_max, r_max)`` and
    ``d = clip((mean - running_mean) / running_std, -d_max, d_max)``, both without gradient: where nothing is clipped,
    the value is that of evaluation, which normalises by the running statistics alone, and the gradient that of batch
    normalisation. Until ``warmup`` batches have been seen r = 1 and d = 0, plain batch normalisation. The defaults are
    CrossQ's (Bhatt et al. 2024, arXiv 1902.05605 version 3).

    Statistics are computed in float32 or more, over all dimensions but the last. The running ones are buffers, changed
    in place by each forward in training; they stay float32 under ``.to(torch.bfloat16)``, which would round 1 % away.

    Args:
        num_features: size of the last dimension.
        momentum: share of a batch in the running statistics, as in torch. Lower is smoother and lags more; usual range
            0.001 to 0.1.
        eps: added to variances.
        r_max: largest factor between batch and running standard deviation, at least 1. With 1, and ``d_max`` 0, this is
            batch normalisation.
        d_max: largest distance of the means, in running standard deviations, at least 0.
        warmup: batches of plain batch normalisation at the start, for which the running statistics are not to be
            trusted.

    Raises:
        ValueError: for an argument outside its range, or in training for fewer than two samples.

    Examples:
        >>> layer = BatchRenorm(1)
        >>> layer(torch.tensor([[1.0], [3.0]]))  # mean 2, standard deviation 1
        tensor([[-0.9995],
                [ 0.9995]], grad_fn=<AddcmulBackward0>)
        >>> layer.running_mean, layer.running_var  # 1 % of the batch's 2 and, unbiased, 2
        (tensor([0.0200]), tensor([1.0100]))
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches: Tensor

    def __init__(
        self,
        num_features: int,
        momentum: float = 0.01,
        eps: float = 1e-3,
        *,
        r_max: float = 3.0,
        d_max: float = 5.0,
        warmup: int = 100_000,
    ) -> None:
        super().__init__()
        for name, value, holds, expected in (
            ("num_features", num_features, num_features >= 1, "at least 1"),
            ("momentum", momentum, 0 < momentum <= 1, "above 0 and at most 1"),
            ("eps", eps, eps > 0, "positive"),
            ("r_max", r_max, r_max >= 1, "at least 1"),
            ("d_max", d_max, d_max >= 0, "at least 0"),
            ("warmup", warmup, warmup >= 0, "at least 0"),
        ):
            if not holds:
                raise ValueError(f"{name} must be {expected}, got {value!r}.")
        self.momentum, self.eps, self.r_max, self.d_max, self.warmup = momentum, eps, r_max, d_max, warmup
        self.weight = nn.Parameter(torch.empty(num_features))
        self.bias = nn.Parameter(torch.empty(num_features))
        self.register_buffer("running_mean", torch.empty(num_features))
        self.register_buffer("running_var", torch.empty(num_features))
        self.register_buffer("num_batches", torch.empty((), dtype=torch.long))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weight and running variance 1, bias and running mean 0, no batch seen."""
        for ones in (self.weight, self.running_var):
            nn.init.ones_(ones)
        for zeros in (self.bias, self.running_mean, self.num_batches):
            nn.init.zeros_(zeros)

    def extra_repr(self) -> str:
        """Everything that two layers can differ in but for their weights."""
        numbers = ("momentum", "eps", "r_max", "d_max", "warmup")
        return ", ".join([f"{self.weight.numel()}", *(f"{name}={getattr(self, name):g}" for name in numbers)])

    def forward(self, x: Tensor) -> Tensor:
        """Normalised features, shape ``(*B, num_features)`` as the input; in training of at least 2 samples."""
        values = x.to(torch.promote_types(x.dtype, torch.float32))
        running_std = (self.running_var + self.eps).sqrt()
        if not self.training:
            return torch.addcmul(self.bias, values - self.running_mean, self.weight / running_std).to(x.dtype)
        count = x.numel() // x.shape[-1]
        if count < 2:
            raise ValueError(f"batch statistics need at least 2 samples, got shape {tuple(x.shape)}.")
        variance, mean = torch.var_mean(values, tuple(range(x.ndim - 1)), correction=0)
        std = (variance + self.eps).sqrt()
        with torch.no_grad():
            warm = self.num_batches >= self.warmup
            r = torch.where(warm, (std / running_std).clamp(1 / self.r_max, self.r_max), 1.0)
            d = torch.where(warm, ((mean - self.running_mean) / running_std).clamp(-self.d_max, self.d_max), 0.0)
            self.running_mean.add_((mean - self.running_mean).to(self.running_mean.dtype), alpha=self.momentum)
            unbiased = variance * count / (count - 1)
            self.running_var.add_((unbiased - self.running_var).to(self.running_var.dtype), alpha=self.momentum)
            self.num_batches.add_(1)
        return torch.addcmul(d * self.weight + self.bias, values - mean, r / std * self.weight).to(x.dtype)
