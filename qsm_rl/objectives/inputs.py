"""Reading and checking what a loss is given: entries of a batch, options, the actor and the critics."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictModuleBase
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor, nn
from torchrl.objectives import LossModule

from qsm_rl.value_heads import ValueHead

__all__ = [
    "check_actor",
    "check_choice",
    "critic_head",
    "critic_list",
    "critic_outputs",
    "entry",
    "live_entries",
    "stack_critics",
]


def entry(batch: TensorDictBase, key: NestedKey) -> Tensor:
    """An entry of a batch; a KeyError that names what is there if it is missing."""
    value = batch.get(key, None)
    if value is None:
        raise KeyError(
            f"the batch lacks {dotted(key)}; it has {', '.join(sorted(map(dotted, batch.keys(True, True))))}. "
            "Tell the loss your names by set_keys."
        )
    return value


def network_output(network: TensorDictModule, tensordict: TensorDictBase, key: NestedKey) -> Tensor:
    """The entry ``key`` that a network writes.

    A plain TensorDictModule is called on its inputs: writing its output into a tensordict first costs 0.3 ms, six times
    an update.
    """
    if is_plain(network, key):
        return network.module(*(entry(tensordict, in_key) for in_key in network.in_keys))
    return entry(network(tensordict), key)


def critic_outputs(critic: TensorDictModule, tensordict: TensorDictBase, key: NestedKey) -> Tensor:
    """What the value head of a critic reads: its ``outputs`` where it has a head of its own, else the entry ``key``."""
    if own_head(getattr(critic, "module", None)) is None:
        return network_output(critic, tensordict, key)
    return critic.module.outputs(*(entry(tensordict, in_key) for in_key in critic.in_keys))


def critic_head(critics: Sequence[TensorDictModule], key: NestedKey) -> ValueHead | None:
    """The value head that the critics share, None if they have none; ValueError where it could not be used."""
    for critic in critics:
        inside = [m for m in critic.modules() if own_head(m) is not None]
        if inside and not (is_plain(critic, key) and inside == [critic.module]):
            raise ValueError(
                f"a {type(inside[0]).__name__} with a value head must be the one module of a TensorDictModule with a "
                f"list of in_keys and out_keys=[{key!r}], got it inside a {type(critic).__name__}."
            )
    heads = [own_head(getattr(critic, "module", None)) for critic in critics]
    if any(head != heads[0] for head in heads):
        raise ValueError(f"the critics must have the same value head, got {heads}.")
    return heads[0]


def own_head(module: object) -> ValueHead | None:
    # A TensorDictModule passes on the attributes of the module inside.
    head = None if isinstance(module, TensorDictModuleBase) else getattr(module, "head", None)
    return head if isinstance(head, ValueHead) else None


def is_plain(network: TensorDictModule, key: NestedKey) -> bool:
    """Whether calling the module inside on the in_keys gives the entry ``key`` and nothing else."""
    return (
        type(network) is TensorDictModule
        and network.out_keys == [key]
        and network.method is None
        and getattr(network, "_kwargs", ()) is None
        and not network._forward_hooks
        and not network._forward_pre_hooks
    )


def live_entries(batch: TensorDictBase, mask: Tensor | None, done_key: NestedKey) -> TensorDictBase:
    """The batch with masked positions zeroed: what stands there, NaN included, reaches no loss and no gradient."""
    if mask is None:
        return batch
    batch = batch.apply(
        lambda x: (
            torch.where(mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim)), x, torch.zeros_like(x))
            if x.is_floating_point()
            else x
        )
    )
    # A trajectory ends before a masked position, so that multi-step estimators bootstrap there.
    end = ~mask
    if mask.ndim > 0:
        end = end | torch.cat([end[..., 1:], torch.zeros_like(end[..., :1])], -1)
    return batch.set(done_key, batch.get(done_key) | end.unsqueeze(-1))


def dotted(key: NestedKey) -> str:
    key = unravel_key(key)
    return key if isinstance(key, str) else ".".join(key)


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises ValueError unless the option has one of its values."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}.")


def check_actor(actor_network: nn.Module) -> None:
    """Raises TypeError for an actor without the methods of DiffusionActor, ValueError for a lazy one."""
    needed = ("in_keys", "out_keys", "observation", "sample", "predict_noise", "noise_schedule", "box")
    missing = [name for name in needed if not hasattr(actor_network, name)]
    if missing:
        raise TypeError(
            f"actor_network is a {type(actor_network).__module__}.{type(actor_network).__name__} "
            f"without {', '.join(missing)}; pass a qsm_rl.DiffusionActor (its score_network may be your own module)."
        )
    check_initialized("the actor", actor_network)


def critic_list(
    qvalue_network: TensorDictModule | Sequence[TensorDictModule], num_qvalue_nets: int | None
) -> list[TensorDictModule]:
    """The critics of an ensemble, each with weights of its own; ValueError where they do not fit."""
    if isinstance(qvalue_network, (list, tuple, nn.ModuleList)):
        critics = list(qvalue_network)
        if num_qvalue_nets not in (None, len(critics)):
            raise ValueError(
                f"num_qvalue_nets is {num_qvalue_nets}, but {len(critics)} critics were given; leave it out."
            )
    else:
        count = 2 if num_qvalue_nets is None else num_qvalue_nets
        if count < 1:
            raise ValueError(f"num_qvalue_nets must be at least 1, got {count!r}.")
        critics = [qvalue_network, *(deepcopy(qvalue_network) for _ in range(count - 1))]
        for critic in critics[1:]:
            critic.reset_parameters_recursive()
    if not critics:
        raise ValueError("qvalue_network is an empty list; give at least one critic.")
    for critic in critics:
        check_initialized("a critic", critic)
    parameters = [parameter for critic in critics for parameter in critic.parameters()]
    if len(set(parameters)) < len(parameters):
        raise ValueError(
            "the critics share parameters, which could not be trained once they are stacked; give each its own, or one "
            "critic and num_qvalue_nets."
        )
    return critics


def check_initialized(name: str, network: nn.Module) -> None:
    if any(nn.parameter.is_lazy(parameter) for parameter in network.parameters()):
        raise ValueError(f"{name} has uninitialised lazy parameters; call it once on a batch before building the loss.")


def stack_critics(loss: LossModule, critics: list[TensorDictModule], delay_qvalue: bool) -> None:
    """Stacks the critics' weights into a loss's parameters ``(num_critics, ...)``, each critic keeping its own.

    Args:
        loss: gets ``qvalue_network`` and ``qvalue_network_params``, and target parameters.
        critics: at least one, all alike.
        delay_qvalue: whether the target parameters are copies.
    """
    options = {"expand_dim": len(critics), "create_target_params": delay_qvalue}
    if len(critics) > 1:
        loss.convert_to_functional(critics, "qvalue_network", **options)
        return
    # TorchRL expands a list of one where it stacks a longer one, which leaves no parameter to train. A single module
    # gets parameters, but with weights drawn anew: it gets its own back.
    weights = TensorDict.from_module(critics[0]).data.clone().unsqueeze(0)
    loss.convert_to_functional(critics[0], "qvalue_network", **options)
    loss.qvalue_network_params.data.update_(weights)
    if delay_qvalue:
        loss._modules["target_qvalue_network_params"].data.update_(weights)
