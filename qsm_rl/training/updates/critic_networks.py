"""The critics that the configuration of a diffusion policy chooses."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from tensordict.nn import TensorDictModule
from torch import nn

from qsm_rl.critics import QValueCrossQ, QValueMLP, QValueSimBa
from qsm_rl.training.configuration.diffusion_configuration import DiffusionConfiguration
from qsm_rl.value_heads import TwoHotHead

__all__ = ["make_critics"]


def make_critics(
    config: DiffusionConfiguration, observation_dim: int, action_dim: int, head: TwoHotHead | None = None
) -> list[TensorDictModule]:
    """Makes ``num_critics`` networks of the kind ``critic``, on ``observation`` and ``action``.

    Args:
        config: the settings ``critic``, ``critic_hidden_dims``, ``critic_layer_norm`` and ``num_critics`` are read.
        observation_dim: size of an observation.
        action_dim: size of an action.
        head: value head of critics trained by classification; None uses regression.

    Returns:
        The ``qvalue_network`` of a diffusion policy's loss.

    Examples:
        >>> from qsm_rl.training import QSMConfiguration
        >>> critics = make_critics(QSMConfiguration(critic="simba"), observation_dim=17, action_dim=6)
        >>> len(critics), type(critics[0].module).__name__
        (2, 'QValueSimBa')
    """
    widths = config.critic_hidden_dims
    networks: dict[str, Callable[..., nn.Module]] = {
        "mlp": partial(QValueMLP, hidden_dims=widths, layer_norm=config.critic_layer_norm),
        "simba": partial(QValueSimBa, width=widths[0], num_blocks=len(widths)),
        "crossq": partial(QValueCrossQ, hidden_dims=widths),
    }
    make = networks[config.critic]
    return [
        TensorDictModule(
            make(observation_dim, action_dim, head=head), ["observation", "action"], ["state_action_value"]
        )
        for _ in range(config.num_critics)
    ]
