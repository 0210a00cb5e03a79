"""Critics: networks for the Q-value of an observation and an action."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from qsm_rl.networks import mlp

__all__ = ["QValueMLP"]


class QValueMLP(nn.Module):
    """Q-value network: an MLP on ``[observation, action]`` with relu and a linear output.

    Defaults are the QSM authors' (279,041 parameters at observation 24, action 6), Xavier-uniform weights, zero biases.
    Wrap it in a :class:`~tensordict.nn.TensorDictModule` with ``out_keys=["state_action_value"]`` for the loss.

    Args:
        observation_dim: observation size; None takes it from the first batch.
        action_dim: action size A; the critic sees actions in environment units.
        hidden_dims: widths of the hidden layers; usual range 256 to 1024.
        layer_norm: whether to normalise before each activation. Keeps Q-values and their action gradients bounded away
            from the data, which stabilises learning with few frames (Ball et al. 2023, arXiv 2302.02948); the authors
            do not.

    Raises:
        ValueError: if a size is below 1.

    Example:
        >>> critic = QValueMLP(24, 6)
        >>> sum(p.numel() for p in critic.parameters())
        279041
        >>> critic(torch.zeros(8, 24), torch.zeros(8, 6)).shape
        torch.Size([8, 1])
    """

    def __init__(
        self,
        observation_dim: int | None,
        action_dim: int,
        hidden_dims: Sequence[int] = (512, 512),
        *,
        layer_norm: bool = False,
    ) -> None:
        super().__init__()
        if observation_dim is not None and observation_dim < 1:
            raise ValueError(f"observation_dim must be at least 1 or None, got {observation_dim!r}.")
        in_features = None if observation_dim is None else observation_dim + action_dim
        self.mlp = mlp(in_features, hidden_dims, 1, nn.ReLU, layer_norm=layer_norm)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Q-values.

        Args:
            *inputs: the observation (or several, in the order of the in_keys) and the action in environment units, each
                ``(*B, size)``.

        Returns:
            Q-values, shape ``(*B, 1)``.
        """
        return self.mlp(torch.cat(inputs, -1))
