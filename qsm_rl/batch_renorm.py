"""Batch renormalisation: batch normalisation whose outputs in training and evaluation agree."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qsm_rl.float32_buffers import Float32Buffers

__all__ = ["BatchRenorm"]


class BatchRenorm(Float32Buffers):
    r"""Normalises each feature over the batch, and ties the result to the running statistics.

    Ioffe 2017, "Batch Renormalization", arXiv 1702.03275, algorithm 1. In training,
    ``y = ((x - mean) / std r + d) weight + bias`` with the batch's mean and standard deviation,
    ``r = clip(std / running_std, 1 / r_max, r_max)`` and
    ``d = clip((mean - running_mean) / running_std, -d_max, d_max)``, both without gradient. Where nothing is clipped,
    the value is that of evaluation, which normalises by the running statistics alone, while the gradient is that of
    batch normalisation. During the first ``warmup`` batches r = 1 and d = 0, which is plain batch normalisation. The
    defaults are CrossQ's (Bhatt et al. 2024, arXiv 1902.05605 version 3).

    Statistics are computed in float32 or more, over all dimensions but the last. The running ones are buffers that each
    forward pass in training mode changes in place. They stay float32 under ``.to(torch.bfloat16)``, in which a change
    of 1 % would be rounded away.

    Args:
        num_features: size of the last dimension.
        momentum: weight of each batch in the running statistics, as in torch. Lower is smoother and lags more; usual
            range 0.001 to 0.1.
        eps: added to variances.
        r_max: largest factor between batch and running standard deviation, at least 1. With ``r_max=1`` and ``d_max=0``
            this is batch normalisation.
        d_max: largest distance between batch and running mean, in running standard deviations, at least 0.
        warmup: number of batches with plain batch normalisation at the start, while the running statistics are not yet
            reliable.

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
        """Sets weight and running variance to 1, bias and running mean to 0, and forgets the batches seen."""
        for ones in (self.weight, self.running_var):
            nn.init.ones_(ones)
        for zeros in (self.bias, self.running_mean, self.num_batches):
            nn.init.zeros_(zeros)

    def extra_repr(self) -> str:
        """Everything but the weights in which two layers can differ."""
        numbers = ("momentum", "eps", "r_max", "d_max", "warmup")
        return ", ".join([f"{self.weight.numel()}", *(f"{name}={getattr(self, name):g}" for name in numbers)])

    def forward(self, x: Tensor) -> Tensor:
        """Normalises features ``(*B, num_features)``; in training, it needs at least 2 samples."""
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
