"""Critics: networks for the Q-value of an observation and an action."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from qsm_rl.batch_renorm import BatchRenorm
from qsm_rl.networks import LazyXavierLinear, OutputLinear, XavierLinear, mlp
from qsm_rl.value_heads import ValueHead

__all__ = ["QValueCrossQ", "QValueMLP", "QValueSimBa"]


class HeadLinear(OutputLinear):
    """The last layer of a critic with a value head: starts at the head's initial outputs for every input.

    Random logits would spread the value over the whole support, far from any return.
    """

    def __init__(self, in_features: int, head: ValueHead) -> None:
        self._head = (head,)  # asked again at each reset, as its support may be set later; the critic registers it
        super().__init__(in_features, head.num_outputs)

    def reset_parameters(self) -> None:
        """Zeroes the weights and sets the biases to the head's initial outputs."""
        nn.init.zeros_(self.weight)
        with torch.no_grad():
            self.bias.copy_(self._head[0].initial_outputs())


class Critic(nn.Module):
    """Base of the critics: the network's ``outputs``, which the head, if there is one, turns into a Q-value.

    Attributes:
        head: the head, or None if the network's one output is the Q-value.
    """

    def __init__(self, observation_dim: int | None, action_dim: int, head: ValueHead | None) -> None:
        super().__init__()
        if observation_dim is not None and observation_dim < 1:
            raise ValueError(f"observation_dim must be at least 1 or None, got {observation_dim!r}.")
        if action_dim < 1:
            raise ValueError(f"action_dim must be at least 1, got {action_dim!r}.")
        self.head = head

    def outputs(self, *inputs: Tensor) -> Tensor:
        """What the head reads, shape ``(*B, num_outputs)``."""
        raise NotImplementedError

    def forward(self, *inputs: Tensor) -> Tensor:
        """Q-values.

        Args:
            *inputs: the observation (or several, in the order of the in_keys) and the action in environment units, each
                ``(*B, size)``.

        Returns:
            Q-values, shape ``(*B, 1)``.
        """
        outputs = self.outputs(*inputs)
        return outputs if self.head is None else self.head.value(outputs).unsqueeze(-1)


def joined(inputs: Sequence[Tensor], first: nn.Module) -> Tensor:
    """Concatenates a critic's inputs ``(*B, size)``; raises ValueError if its first layer expects another size."""
    together = torch.cat(tuple(inputs), -1)
    expected = getattr(first, "in_features", 0)
    if expected not in (0, together.shape[-1]):
        sizes = [x.shape[-1] for x in inputs]
        raise ValueError(
            f"the critic got inputs of sizes {sizes}, expected {expected} in total: observation and action."
        )
    return together


class QValueMLP(Critic):
    """Q-value network: an MLP on ``[observation, action]`` with relu and a linear output.

    The defaults are the QSM authors' (279,041 parameters at observation size 24 and action size 6), with Xavier-uniform
    weights and zero biases. Wrap it in a ``TensorDictModule`` with ``out_keys=["state_action_value"]`` for the loss.

    Args:
        observation_dim: observation size; None infers it from the first batch.
        action_dim: action size A; the critic sees actions in environment units.
        hidden_dims: widths of the hidden layers; usual range 256 to 1024.
        layer_norm: whether to apply layer normalisation before each activation. It bounds Q-values and their action
            gradients far from the data, which stabilises learning from few frames (Ball et al. 2023, arXiv 2302.02948);
            the authors do not use it.
        head: None for one output, the Q-value, or a distributional head such as [`TwoHotHead`][qsm_rl.TwoHotHead],
            which brings its own loss.

    Raises:
        ValueError: if a size is below 1, or there is a head without a hidden layer.

    Examples:
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
        head: ValueHead | None = None,
    ) -> None:
        super().__init__(observation_dim, action_dim, head)
        in_features = None if observation_dim is None else observation_dim + action_dim
        self.mlp = mlp(in_features, hidden_dims, 1, nn.ReLU, layer_norm=layer_norm)
        if head is not None:
            if not hidden_dims:
                raise ValueError("a critic with a head needs a hidden layer, got hidden_dims=().")
            self.mlp[-1] = HeadLinear(hidden_dims[-1], head)

    def outputs(self, *inputs: Tensor) -> Tensor:
        """What the head reads, shape ``(*B, num_outputs)``; inputs as for ``forward``."""
        return self.mlp(joined(inputs, self.mlp[0]))


class ResidualBlock(nn.Module):
    """``x + W_2 relu(W_1 layer_norm(x))``, four times as wide inside (Lee et al. 2024, arXiv 2410.09754)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.expand = XavierLinear(width, 4 * width)
        self.contract = XavierLinear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Features ``(*B, width)`` to features of the same shape."""
        return x + self.contract(self.expand(self.norm(x)).relu())


class QValueSimBa(Critic):
    """Q-value network of residual blocks followed by a layer norm, SimBa's critic.

    Lee et al. 2024, "SimBa: Simplicity Bias for Scaling Up Parameters in Deep RL", arXiv 2410.09754. A linear path runs
    from the input to the last layer, so that wide and deep critics start out simple. The paper also normalises
    observations by running statistics (the recipe's ``normalize_observation``) and uses orthogonal and He
    initialisation; here, weights are Xavier-uniform, as everywhere in the kit.

    Args:
        observation_dim: observation size; None infers it from the first batch.
        action_dim: action size A; the critic sees actions in environment units.
        width: size of the features. The paper uses 512; usual range 256 to 1024.
        num_blocks: number of residual blocks, each as costly as eight square layers of that width. The paper uses 2.
        head: as in [`QValueMLP`][qsm_rl.QValueMLP].

    Raises:
        ValueError: if a size is below 1.

    Examples:
        >>> critic = QValueSimBa(24, 6, width=128, num_blocks=1)
        >>> critic(torch.zeros(8, 24), torch.zeros(8, 6)).shape
        torch.Size([8, 1])
    """

    def __init__(
        self,
        observation_dim: int | None,
        action_dim: int,
        width: int = 512,
        num_blocks: int = 2,
        *,
        head: ValueHead | None = None,
    ) -> None:
        super().__init__(observation_dim, action_dim, head)
        for name, size in (("width", width), ("num_blocks", num_blocks)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size!r}.")
        self.body = nn.Sequential(
            LazyXavierLinear(width) if observation_dim is None else XavierLinear(observation_dim + action_dim, width),
            *(ResidualBlock(width) for _ in range(num_blocks)),
            nn.LayerNorm(width),
            OutputLinear(width, 1) if head is None else HeadLinear(width, head),
        )

    def outputs(self, *inputs: Tensor) -> Tensor:
        """What the head reads, shape ``(*B, num_outputs)``; inputs as for ``forward``."""
        return self.body(joined(inputs, self.body[0]))


class QValueCrossQ(Critic):
    """Q-value network with batch renormalisation, CrossQ's critic: it needs no target network.

    Bhatt et al. 2024, "CrossQ: Batch Normalization in Deep Reinforcement Learning for Greater Sample Efficiency and
    Simplicity", arXiv 1902.05605 version 3. An MLP with relu whose input and hidden features are normalised over the
    batch ([`BatchRenorm`][qsm_rl.BatchRenorm]). Pass it to the loss with ``delay_qvalue=False``: the loss then runs the
    replayed and the next state-action pairs through it in one forward pass, so that the batch statistics cover both,
    and takes the TD target from that same pass. Everywhere else, above all for dQ/da, the critic normalises by its
    running statistics.

    The paper's other settings are width 2048, learning rate 1e-3, beta_1 = 0.5 in Adam, and three critic updates for
    each actor update.

    Args:
        observation_dim: observation size.
        action_dim: action size A; the critic sees actions in environment units.
        hidden_dims: widths of the hidden layers. The paper uses 2048; width pays more here than in a plain critic.
            Usual range 256 to 2048.
        momentum: weight of each batch in the running statistics, as in [`BatchRenorm`][qsm_rl.BatchRenorm].
        warmup: number of batches with plain batch normalisation at the start, as in ``BatchRenorm``.
        head: as in [`QValueMLP`][qsm_rl.QValueMLP].

    Raises:
        ValueError: if a size is below 1, or there is no hidden layer.

    Examples:
        >>> critic = QValueCrossQ(24, 6, (256, 256)).eval()
        >>> critic(torch.zeros(8, 24), torch.zeros(8, 6)).shape
        torch.Size([8, 1])
    """

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        hidden_dims: Sequence[int] = (2048, 2048),
        *,
        momentum: float = 0.01,
        warmup: int = 100_000,
        head: ValueHead | None = None,
    ) -> None:
        super().__init__(observation_dim, action_dim, head)
        if observation_dim is None or not hidden_dims or min(hidden_dims) < 1:
            raise ValueError(
                "QValueCrossQ needs observation_dim and hidden_dims of at least 1, got "
                f"{observation_dim!r} and {tuple(hidden_dims)!r}."
            )
        in_features = observation_dim + action_dim
        layers: list[nn.Module] = [BatchRenorm(in_features, momentum, warmup=warmup)]
        for width in hidden_dims:
            layers += [XavierLinear(in_features, width), nn.ReLU(), BatchRenorm(width, momentum, warmup=warmup)]
            in_features = width
        layers.append(OutputLinear(in_features, 1) if head is None else HeadLinear(in_features, head))
        self.body = nn.Sequential(*layers)

    def outputs(self, *inputs: Tensor) -> Tensor:
        """What the head reads, shape ``(*B, num_outputs)``; inputs as for ``forward``."""
        return self.body(joined(inputs, self.body[1]))
