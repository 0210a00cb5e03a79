"""Score networks, which predict the noise in an action, and the layers that they share with the critics."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from qsm_rl.activations import mish

__all__ = ["FourierTimeEmbedding", "ScoreMLP", "SinusoidalTimeEmbedding", "XavierLinear", "mlp"]


class Mish(nn.Module):
    """The activation ``qsm_rl.activations.mish`` as a module."""

    def forward(self, x: Tensor) -> Tensor:
        """Applies mish elementwise."""
        return mish(x)


class XavierLinear(nn.Linear):
    """A linear layer with Xavier-uniform weights and zero biases, the QSM authors' initialisation of every dense layer.

    Also correct for stacked weights ``(num_critics, out, in)``: the bound is that of a single critic.
    """

    def reset_parameters(self) -> None:
        """Draws the weights from U(-b, b) with ``b = sqrt(6 / (in_features + out_features))`` and zeroes the biases."""
        bound = math.sqrt(6 / (self.in_features + self.out_features))
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class LazyXavierLinear(nn.LazyLinear):
    """A ``XavierLinear`` whose input size is taken from the first batch."""

    cls_to_become = XavierLinear

    def reset_parameters(self) -> None:
        """As ``XavierLinear.reset_parameters``, once the input size is known."""
        if not self.has_uninitialized_params() and self.in_features != 0:
            XavierLinear.reset_parameters(self)  # type: ignore[arg-type]


class OutputLinear(XavierLinear):
    """A ``XavierLinear`` that computes in its weights' own precision, even under ``torch.autocast``.

    Autocast to bfloat16 keeps three significant digits: a Q-value of 100 would be rounded to a multiple of 0.5, more
    than the reward of a step. The last layer is a thousandth of the work, so full precision costs nothing there.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Applies the layer."""
        if not torch.is_autocast_enabled(x.device.type):
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.to(self.weight.dtype))


class LazyOutputLinear(LazyXavierLinear):
    """An ``OutputLinear`` whose input size is taken from the first batch."""

    cls_to_become = OutputLinear


def mlp(
    in_features: int | None,
    hidden_dims: Sequence[int],
    out_features: int,
    activation: type[nn.Module],
    *,
    layer_norm: bool = False,
) -> nn.Sequential:
    """A multilayer perceptron of ``XavierLinear`` layers with a linear output, an ``OutputLinear``.

    Args:
        in_features: input size; None infers it from the first batch.
        hidden_dims: widths of the hidden layers.
        out_features: output size.
        activation: class of the activation after each hidden layer.
        layer_norm: whether to apply layer normalisation before each activation.

    Raises:
        ValueError: if a size is below 1.

    Examples:
        >>> mlp(3, (8, 8), 2, nn.ReLU)(torch.zeros(5, 3)).shape
        torch.Size([5, 2])
    """
    if isinstance(hidden_dims, int):
        raise TypeError(f"hidden_dims must be a sequence of widths such as (256, 256), got {hidden_dims!r}.")
    for name, size in (
        ("in_features", in_features),
        ("out_features", out_features),
        *(("hidden_dims", s) for s in hidden_dims),
    ):
        if size is not None and size < 1:
            raise ValueError(f"{name} must be at least 1, got {size!r}.")
    layers: list[nn.Module] = []
    for width in hidden_dims:
        layers.append(LazyXavierLinear(width) if in_features is None else XavierLinear(in_features, width))
        if layer_norm:
            layers.append(nn.LayerNorm(width))
        layers.append(activation())
        in_features = width
    layers.append(LazyOutputLinear(out_features) if in_features is None else OutputLinear(in_features, out_features))
    return nn.Sequential(*layers)


class FourierTimeEmbedding(nn.Module):
    """Learnable Fourier features ``[cos(2 pi t w), sin(2 pi t w)]`` of the raw integer timestep, the authors' choice.

    Args:
        num_features: size of the embedding, even.
        std: standard deviation of the initial frequencies w ~ N(0, std^2). Larger values separate neighbouring
            timesteps more; usual range 0.2 (raw integers) to 16 (timesteps in [0, 1]).

    Raises:
        ValueError: if ``num_features`` is odd or below 2.

    Examples:
        >>> FourierTimeEmbedding(64)(torch.zeros(5)).shape
        torch.Size([5, 64])
    """

    def __init__(self, num_features: int = 64, std: float = 0.2) -> None:
        super().__init__()
        _even(num_features)
        self.std = std
        self.frequencies = nn.Parameter(torch.empty(num_features // 2, 1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Redraws the frequencies."""
        nn.init.normal_(self.frequencies, std=self.std)

    def forward(self, t: Tensor) -> Tensor:
        """Embeds timesteps ``(*B,)`` as ``(*B, num_features)``."""
        # No matrix product: autocast to bfloat16 would round angles of 64 and more to multiples of 0.5.
        angles = 2 * math.pi * t.to(self.frequencies.dtype).unsqueeze(-1) * self.frequencies.squeeze(-1)
        return torch.cat([angles.cos(), angles.sin()], -1)


class SinusoidalTimeEmbedding(nn.Module):
    """Fixed sinusoidal features of the timestep at geometric frequencies (Vaswani et al. 2017, section 3.5).

    Args:
        num_features: size of the embedding, even.
        max_period: longest period; should exceed the number of timesteps.

    Raises:
        ValueError: if ``num_features`` is odd or below 2.

    Examples:
        >>> SinusoidalTimeEmbedding(64)(torch.zeros(5)).shape
        torch.Size([5, 64])
    """

    frequencies: Tensor

    def __init__(self, num_features: int = 64, max_period: float = 10_000.0) -> None:
        super().__init__()
        _even(num_features)
        self.max_period = max_period
        exponents = torch.arange(num_features // 2) / (num_features // 2)
        self.register_buffer("frequencies", torch.exp(-math.log(max_period) * exponents), persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        """Embeds timesteps ``(*B,)`` as ``(*B, num_features)``."""
        angles = t.to(self.frequencies.dtype).unsqueeze(-1) * self.frequencies
        return torch.cat([angles.cos(), angles.sin()], -1)

    def extra_repr(self) -> str:
        """Summary shown by ``print(embedding)``."""
        return f"num_features={2 * self.frequencies.numel()}, max_period={self.max_period:g}"


class ScoreMLP(nn.Module):
    """Noise prediction network: an MLP on ``[noisy action, observation, time embedding]``.

    The defaults are the QSM authors' (372,006 parameters at observation size 24 and action size 6): learnable Fourier
    features of the raw timestep passed through a two-layer MLP, mish activations, a linear output without squashing,
    and Xavier-uniform weights.

    Args:
        observation_dim: observation size; None infers it from the first batch.
        action_dim: action size A.
        hidden_dims: widths of the hidden layers. Wider networks fit sharper policies and cost time; usual range 256 to
            1024.
        time_embedding: ``"fourier"`` (learnable) or ``"sinusoidal"`` (fixed).
        time_features: number of Fourier or sinusoidal features of t, even.
        time_dim: size of the time embedding that the MLP sees.
        layer_norm: whether to apply layer normalisation before each activation; the authors do not use it.

    Raises:
        ValueError: if a size is below 1 or ``time_embedding`` is unknown.

    Examples:
        >>> network = ScoreMLP(24, 6)
        >>> sum(p.numel() for p in network.parameters())
        372006
        >>> network(torch.zeros(8, 6), torch.zeros(8, 24), torch.zeros(8)).shape
        torch.Size([8, 6])
    """

    def __init__(
        self,
        observation_dim: int | None,
        action_dim: int,
        hidden_dims: Sequence[int] = (512, 512),
        *,
        time_embedding: Literal["fourier", "sinusoidal"] = "fourier",
        time_features: int = 64,
        time_dim: int = 128,
        layer_norm: bool = False,
    ) -> None:
        super().__init__()
        embeddings = {"fourier": FourierTimeEmbedding, "sinusoidal": SinusoidalTimeEmbedding}
        if time_embedding not in embeddings:
            raise ValueError(f"time_embedding must be one of {sorted(embeddings)}, got {time_embedding!r}.")
        if observation_dim is not None and observation_dim < 1:
            raise ValueError(f"observation_dim must be at least 1 or None, got {observation_dim!r}.")
        for name, size in (("action_dim", action_dim), ("time_dim", time_dim)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size!r}.")
        self.time_mlp = nn.Sequential(
            embeddings[time_embedding](time_features), *mlp(time_features, (time_dim,), time_dim, Mish)
        )
        self.action_dim = action_dim
        in_features = None if observation_dim is None else action_dim + observation_dim + time_dim
        self.mlp = mlp(in_features, hidden_dims, action_dim, Mish, layer_norm=layer_norm)

    def forward(self, noisy_action: Tensor, observation: Tensor, t: Tensor) -> Tensor:
        """Predicts the noise in a noised action.

        Args:
            noisy_action: noised actions in box units, shape ``(*B, A)``.
            observation: observations, shape ``(*B, O)``.
            t: timesteps ``0 .. num_steps - 1``, of any numeric dtype, shape ``(*B,)``.

        Returns:
            Predicted noise, shape ``(*B, A)``.
        """
        time = self.time_mlp(t)
        if not observation.is_floating_point():  # integers do not show the network's precision
            noisy_action, observation = noisy_action.to(time.dtype), observation.to(time.dtype)
        inputs = torch.cat([noisy_action, observation, time], -1)
        check_input_size(self.mlp[0], inputs.shape[-1], observation.shape[-1])
        return self.mlp(inputs)

    def reverse_chain(self, observation: Tensor, timesteps: Tensor) -> Callable[[int, Tensor], Tensor]:
        """Noise prediction along a reverse chain, where only the noisy action changes from step to step.

        The first layer's terms for the observation and for each timestep are computed only once; they are a fifth of
        the chain's work at the default sizes. The result equals that of [`forward`][qsm_rl.ScoreMLP.forward] up to
        rounding.

        Args:
            observation: observations, shape ``(*B, O)``.
            timesteps: the chain's timesteps in order of use, integers ``(steps,)``.

        Returns:
            A function of the step's index and the noisy action ``(*B, A)`` that returns the predicted noise ``(*B,
            A)``.
        """
        if isinstance(self.mlp[0], LazyXavierLinear):  # uninitialised until its first batch
            noisy_action = observation.new_zeros(*observation.shape[:-1], self.action_dim)
            self(noisy_action, observation, observation.new_zeros(observation.shape[:-1]))
        first, rest = self.mlp[0], self.mlp[1:]
        hooked = any(map(_has_hooks, (self, self.mlp, self.time_mlp, first)))
        if hooked or type(first) not in (XavierLinear, OutputLinear):
            # Replaced, parametrised or hooked layers go through the ordinary forward.
            return lambda index, noisy: self(noisy, observation, timesteps[index].expand(noisy.shape[:-1]))
        assert isinstance(first, XavierLinear)
        time = self.time_mlp(timesteps.to(first.weight.dtype))
        sizes = (self.action_dim, observation.shape[-1], time.shape[-1])
        check_input_size(first, sum(sizes), observation.shape[-1])
        if not observation.is_floating_point():
            observation = observation.to(first.weight.dtype)
        action_weight, observation_weight, time_weight = first.weight.split(sizes, 1)
        of_observation = nn.functional.linear(observation, observation_weight, first.bias)
        of_time = nn.functional.linear(time, time_weight).unbind(0)

        def predict(index: int, noisy_action: Tensor) -> Tensor:
            of_action = nn.functional.linear(noisy_action.to(action_weight.dtype), action_weight)
            hidden = of_action + of_observation + of_time[index]
            return rest(hidden)

        return predict


def check_input_size(layer: nn.Module, size: int, observation_size: int) -> None:
    """Raises ValueError, which names the right observation size, if the first layer expects another input size."""
    expected = getattr(layer, "in_features", 0)
    if expected not in (0, size):
        raise ValueError(
            f"the network got observations of size {observation_size}, expected {observation_size + expected - size}: "
            "the sum of the sizes of all in_keys."
        )


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _even(num_features: int) -> None:
    if num_features < 2 or num_features % 2:
        raise ValueError(f"num_features must be even and at least 2, got {num_features!r}.")
