"""Reading and checking what a loss is given: entries of a batch, options, the actor."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor, nn

__all__ = [
    "check_actor",
    "check_choice",
    "check_columns",
    "check_critic_outputs",
    "critic_input",
    "entry",
    "live_entries",
    "live_mask",
    "replayed_action",
]


def entry(batch: TensorDictBase, key: NestedKey) -> Tensor:
    """An entry of a batch; if it is missing, raises a KeyError that names what is there."""
    value = batch.get(key, None)
    if value is None:
        raise KeyError(
            f"the batch lacks {dotted(key)}; it has {', '.join(sorted(map(dotted, batch.keys(True, True))))}. "
            "Tell the loss the names of your entries with set_keys."
        )
    return value


def network_output(network: TensorDictModule, tensordict: TensorDictBase, key: NestedKey) -> Tensor:
    """The entry ``key`` that a network writes.

    A plain TensorDictModule is called directly on its inputs: writing its output into a tensordict first would cost 0.3
    ms, six times per update.
    """
    if is_plain(network, key):
        return network.module(*(entry(tensordict, in_key) for in_key in network.in_keys))
    if key not in network.out_keys:
        raise KeyError(
            f"a critic writes {network.out_keys}, not {key!r}; tell the loss with set_keys(state_action_value=...)."
        )
    return entry(network(tensordict), key)


def is_plain(network: TensorDictModule, key: NestedKey) -> bool:
    """Whether calling the wrapped module on the in_keys gives the entry ``key`` and nothing else."""
    return (
        type(network) is TensorDictModule
        and network.out_keys == [key]
        and network.method is None
        and getattr(network, "_kwargs", ()) is None
        and not network._forward_hooks
        and not network._forward_pre_hooks
    )


def replayed_action(batch: TensorDictBase, key: NestedKey, action_dim: int) -> Tensor:
    """The replayed action ``(*B, A)``; raises ValueError if it has another shape."""
    action = entry(batch, key)
    expected = (*batch.batch_size, action_dim)
    if action.shape != expected:
        several = action.shape[-1:] == expected[-1:] and action.shape[: len(expected) - 1] == expected[:-1]
        raise ValueError(
            f"the batch's {key!r} has shape {tuple(action.shape)}, expected {tuple(expected)}: "
            "the batch size and the size of the actor's action_spec."
            + (f" For several agents, the batch size must be {tuple(action.shape[:-1])}." if several else "")
        )
    return action


def check_columns(batch: TensorDictBase, values: Sequence[NestedKey], flags: Sequence[NestedKey], shape: Any) -> None:
    """Raises ValueError for entries of another shape, which would broadcast, and for flags that are not booleans."""
    for key in flags:
        if entry(batch, key).dtype != torch.bool:
            raise ValueError(
                f"the batch's {key!r} has dtype {batch.get(key).dtype}, expected bool; call .bool() on it."
            )
    for key in (*values, *flags):
        if (value := entry(batch, key)).shape != shape:
            raise ValueError(
                f"the batch's {key!r} has shape {tuple(value.shape)}, expected {tuple(shape)}: the batch size and a "
                "last dimension of 1, as the critics return."
            )


def check_critic_outputs(outputs: Tensor, batch_size: Sequence[int], num_outputs: int) -> None:
    """Raises ValueError if the critics' outputs are not of shape ``(num_critics, *batch_size, num_outputs)``."""
    expected = (*batch_size, num_outputs)
    if outputs.shape[1:] != expected:
        raise ValueError(
            f"a critic returned shape {tuple(outputs.shape[1:])} for batch size {tuple(batch_size)}, expected "
            f"{expected}: one Q-value for each sample, as QValueMLP returns."
        )


def critic_input(
    tensordict: TensorDictBase, in_keys: Sequence[NestedKey], action_key: NestedKey, action: Tensor
) -> TensorDictBase:
    """What critics with these ``in_keys`` read, the action replaced; raises ValueError if they read no action."""
    entries = [key for key in in_keys if unravel_key(key) != unravel_key(action_key)]
    if len(entries) == len(in_keys):
        raise ValueError(
            f"the critics read {list(in_keys)} but not the action {action_key!r}, so all actions have the same value; "
            "add it to their in_keys, or tell the loss its name with set_keys(action=...)."
        )
    return tensordict.select(*entries, strict=False).set(action_key, action)


def live_mask(tensordict: TensorDictBase, keys: Iterable[NestedKey]) -> Tensor | None:
    """Which samples are live according to every mask in the batch, ``(*B,)``; None if there is no mask."""
    mask = None
    for key in keys:
        found = tensordict.get(key, None)
        if found is not None:
            found = found.reshape(tensordict.batch_size)
            mask = found if mask is None else mask & found
    return mask


def live_entries(batch: TensorDictBase, mask: Tensor | None, done_key: NestedKey) -> TensorDictBase:
    """The batch with masked positions zeroed: their content, NaN included, reaches no loss and no gradient."""
    if mask is None:
        return batch
    batch = batch.contiguous().apply(  # a lazy stack would give its parts one by one, which the mask does not fit
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
    return batch.set(done_key, entry(batch, done_key) | end.unsqueeze(-1))


def dotted(key: NestedKey) -> str:
    key = unravel_key(key)
    return key if isinstance(key, str) else ".".join(key)


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    """Raises ValueError unless the option has one of the allowed values."""
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


def check_initialized(name: str, network: nn.Module) -> None:
    if any(nn.parameter.is_lazy(parameter) for parameter in network.parameters()):
        raise ValueError(f"{name} has uninitialised lazy parameters; call it once on a batch before building the loss.")
