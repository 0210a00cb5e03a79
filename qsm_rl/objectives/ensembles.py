"""The critics of a loss: stacked into one set of parameters, run together, with or without batch statistics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from types import BuiltinFunctionType, FunctionType, NoneType
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchrl.objectives import LossModule

from qsm_rl.batch_renorm import BatchRenorm
from qsm_rl.comparison import first_difference
from qsm_rl.objectives.inputs import check_initialized, entry, is_plain, network_output
from qsm_rl.value_heads import ValueHead

__all__ = [
    "batch_normalizers",
    "critic_head",
    "critic_list",
    "ensemble_outputs",
    "joint_outputs",
    "redrawn_weights",
    "stack_critics",
    "unstack_critics",
]

# What PyTorch itself keeps in a module: hooks, and whether it is in training.
BOOKKEEPING = vars(nn.Module()).keys()
PLAIN = (NoneType, bool, int, float, complex, str, Tensor, torch.dtype, type)


def critic_list(
    qvalue_network: TensorDictModule | Sequence[TensorDictModule], num_qvalue_nets: int | None
) -> list[TensorDictModule]:
    """The critics of an ensemble, each with its own weights; raises ValueError if they do not fit together."""
    copied = False
    several = isinstance(qvalue_network, (list, tuple, nn.ModuleList))
    for critic in qvalue_network if several else [qvalue_network]:
        if not isinstance(critic, TensorDictModuleBase):
            raise TypeError(
                f"a critic is a {type(critic).__name__}, expected a TensorDictModule: write TensorDictModule(critic, "
                '["observation", "action"], ["state_action_value"]), and pass several critics as a list.'
            )
    if not (num_qvalue_nets is None or isinstance(num_qvalue_nets, int)):
        raise TypeError(f"num_qvalue_nets must be an integer or None, got {num_qvalue_nets!r}.")
    if several:
        critics = list(qvalue_network)
        if num_qvalue_nets not in (None, len(critics)):
            raise ValueError(f"num_qvalue_nets is {num_qvalue_nets}, but {len(critics)} critics were given; omit it.")
    else:
        count = 2 if num_qvalue_nets is None else num_qvalue_nets
        if count < 1:
            raise ValueError(f"num_qvalue_nets must be at least 1, got {count!r}.")
        critics = [qvalue_network, *(deepcopy(qvalue_network) for _ in range(count - 1))]
        for critic in critics[1:]:
            critic.reset_parameters_recursive()
        copied = count > 1
    if not critics:
        raise ValueError("qvalue_network is an empty list; pass at least one critic.")
    for critic in critics:
        check_initialized("a critic", critic)
        check_untied(critic)
    weights = [list(critic.parameters()) for critic in critics]
    if copied and weights[0] and all(map(torch.equal, weights[0], weights[1])):
        raise ValueError(
            "the copies of the critic start with the same weights, since none of its layers has reset_parameters, and "
            "would remain identical; pass a list of critics."
        )
    parameters = [parameter for own in weights for parameter in own]
    if len(set(parameters)) < len(parameters):
        raise ValueError(
            "the critics share parameters, which cannot be trained once the critics are stacked; give each critic its "
            "own, or pass one critic and num_qvalue_nets."
        )
    return critics


def check_untied(critic: nn.Module) -> None:
    names: dict[nn.Parameter, str] = {}
    for prefix, layer in critic.named_modules():  # each once: a layer under two names stays one layer
        for name, parameter in layer.named_parameters(prefix, recurse=False, remove_duplicate=False):
            if parameter in names:
                raise ValueError(
                    f"a critic has one weight under two names, {names[parameter]} and {name}, which would be trained "
                    "separately once the critics are stacked; register it once and use it twice in forward."
                )
            names[parameter] = name


def stack_critics(loss: LossModule, critics: list[TensorDictModule], delay_qvalue: bool) -> None:
    """Stacks the critics' weights into parameters ``(num_critics, ...)`` of a loss; each critic keeps its own.

    Args:
        loss: gets ``qvalue_network`` and ``qvalue_network_params``, and target parameters.
        critics: at least one, all alike.
        delay_qvalue: whether the target parameters are copies.

    Raises:
        ValueError: if the critics differ in more than their weights.
    """
    first = critics[0]
    for index, critic in enumerate(critics[1:], 1):
        if difference := first_difference(structure(critic), structure(first), f"critic {index}"):
            raise ValueError(
                "the critics must be identical except for their weights, since the code of critic 0 evaluates them "
                f"all: {difference}."
            )
    options = {"expand_dim": len(critics), "create_target_params": delay_qvalue}
    if len(critics) > 1:
        loss.convert_to_functional(critics, "qvalue_network", **options)
        return
    # TorchRL expands a list of one critic instead of stacking it, which leaves no parameter to train. A single module
    # becomes parameters, but with redrawn weights, so its own weights are copied back.
    weights = TensorDict.from_module(critics[0]).data.clone().unsqueeze(0)
    frozen = [tuple(path.split(".")) for path, weight in first.named_parameters() if not weight.requires_grad]
    loss.convert_to_functional(critics[0], "qvalue_network", **options)
    loss.qvalue_network_params.data.update_(weights)
    for path in frozen:
        loss.qvalue_network_params.get(path).requires_grad_(False)
    if delay_qvalue:
        loss._modules["target_qvalue_network_params"].data.update_(weights)


def unstack_critics(critic: TensorDictModule, params: TensorDictBase, live: bool) -> list[TensorDictModule]:
    """Modules like ``critic``, each with one slice of the stacked parameters, sharing their memory or copied.

    Live modules require no gradient; in copies, exactly the parameters that the loss trains do. The value head is that
    of ``critic``, which reads the outputs of all: live modules share it, copies get a copy of its current state.
    """
    head: Any = own_head(getattr(critic, "module", None))
    critics = []
    for weights in (params.data if live else params.data.clone()).unbind(0):
        module = deepcopy(critic)
        weights.to_module(module, preserve_module_state=True)
        if isinstance(head, nn.Module):
            if live:
                module.module.head = head
            else:
                module.module.head.load_state_dict(head.state_dict())
        for path, parameter in module.named_parameters():
            parameter.requires_grad_(not live and params.get(tuple(path.split("."))).requires_grad)
        critics.append(module)
    return critics


def redrawn_weights(critics: Sequence[TensorDictModule]) -> TensorDictBase:
    """Weights redrawn by the layers' own initialisers, stacked.

    Redrawn one critic at a time: an initialiser would count the first dimension of stacked weights in the fan.
    """
    for critic in critics:
        critic.reset_parameters_recursive()
    return torch.stack([TensorDict.from_module(critic).data for critic in critics])


def critic_head(critics: Sequence[TensorDictModule]) -> ValueHead | None:
    """The value head that the critics share, None if they have none; raises ValueError if it cannot be used.

    The loss applies the first critic's head to the outputs of all critics.
    """
    for critic in critics:
        inside = [m for m in critic.modules() if own_head(m) is not None]
        if inside and not (is_plain(critic, critic.out_keys[0]) and inside == [critic.module]):
            raise ValueError(
                f"a {type(inside[0]).__name__} with a value head must be the only module of a TensorDictModule with a "
                f"list of in_keys and one out_key, found it inside a {type(critic).__name__}."
            )
    heads = [own_head(getattr(critic, "module", None)) for critic in critics]
    first: Any = heads[0]
    for head in heads[1:]:
        if first_difference(structure(head), structure(first)) or not same_tensors(head, first):
            raise ValueError(f"the critics must have the same value head, got {heads}.")
    if isinstance(first, nn.Module) and any(parameter.requires_grad for parameter in first.parameters()):
        raise ValueError(
            f"the value head {type(first).__name__} has weights, which would be trained separately from the critics'; "
            "move them into the critics, and keep in the head only the step from their outputs to a value."
        )
    return first


def same_tensors(one: object, other: object) -> bool:
    tensors = ([*x.buffers(), *x.parameters()] if isinstance(x, nn.Module) else [] for x in (one, other))
    return all(map(torch.equal, *tensors))


def structure(value: Any, seen: set[int] | None = None) -> Any:
    """All that determines what a critic computes but the numbers in its tensors, for ``first_difference``.

    Objects other than modules, heads, functions and plain values are compared by class alone.
    """
    seen = set() if seen is None else seen  # objects met before, in case of a cycle
    value = getattr(value, "_orig_mod", value)  # a compiled module carries a number of its own
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, Mapping):
        return {key: structure(x, seen) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [structure(x, seen) for x in value]
    if isinstance(value, BuiltinFunctionType):  # without the object of a method, such as a dictionary
        return value.__qualname__
    if id(value) in seen:
        return "..."
    seen.add(id(value))
    if isinstance(value, FunctionType):
        held = [cell.cell_contents for cell in value.__closure__ or ()]
        return [value.__code__, *structure([held, value.__defaults__, value.__kwdefaults__], seen)]
    kind = {"class": type(value).__qualname__}  # by name: each parametrised layer has its own class
    if isinstance(value, nn.Module):
        attributes = {name: x for name, x in vars(value).items() if name not in BOOKKEEPING}
        tensors = dict(value.named_parameters(recurse=False)) | dict(value.named_buffers(recurse=False))
        return kind | structure(attributes | tensors | dict(value.named_children()), seen)
    return kind | structure(vars(value), seen) if isinstance(value, ValueHead) else kind


def own_head(module: object) -> ValueHead | None:
    # A TensorDictModule exposes the attributes of the module inside.
    head = None if isinstance(module, TensorDictModuleBase) else getattr(module, "head", None)
    return head if isinstance(head, ValueHead) else None


def batch_normalizers(network: nn.Module, delay_qvalue: bool) -> list[BatchRenorm]:
    """The layers of a critic that normalise by batch statistics, set to evaluation mode.

    Raises:
        ValueError: if there are such layers and also target critics, whose running statistics nothing would update, or
            if there are PyTorch's own batch normalisation layers, which take the second of several batch dimensions for
            the features.
    """
    for layer in network.modules():
        if isinstance(layer, _BatchNorm):
            raise ValueError(
                f"the critics contain {type(layer).__name__} layers, which treat the second of several batch "
                "dimensions as the features; use qsm_rl.BatchRenorm, which is batch normalisation if r_max=1 and "
                "d_max=0."
            )
    layers = [layer for layer in network.modules() if isinstance(layer, BatchRenorm)]
    if layers and delay_qvalue:
        raise ValueError(
            f"the critics contain {type(layers[0]).__name__} layers, whose batch statistics replace target "
            "critics; pass delay_qvalue=False."
        )
    for layer in layers:
        layer.eval()
    return layers


def ensemble_outputs(
    critic: TensorDictModule, tensordict: TensorDictBase, params: TensorDictBase, key: NestedKey, vmap: str | None
) -> Tensor:
    """What the value head reads from every critic: ``(num_critics, *B, num_outputs)``.

    Args:
        critic: the module into which the parameters are put.
        tensordict: its input, batch size ``(*B)``.
        params: stacked parameters.
        key: the entry that critics without a head write.
        vmap: randomness of ``torch.vmap`` over the critics; None runs them one after another.
    """

    def outputs(critic_input: TensorDictBase, critic_params: TensorDictBase) -> Tensor:
        with critic_params.to_module(critic, preserve_module_state=False):
            module: Any = getattr(critic, "module", None)
            if own_head(module) is None:
                return network_output(critic, critic_input, key)
            if module._forward_hooks or module._forward_pre_hooks:
                raise ValueError(
                    f"a {type(module).__name__} with a value head has hooks, which the loss would not run, since it "
                    "calls the method outputs instead of the module; register the hooks on the layers inside it."
                )
            return module.outputs(*(entry(critic_input, in_key) for in_key in critic.in_keys))

    if vmap is None:
        return torch.stack([outputs(tensordict.copy(), one) for one in params.unbind(0)])
    return torch.vmap(outputs, (None, 0), randomness=vmap)(tensordict, params)


def joint_outputs(
    critic: TensorDictModule,
    layers: list[BatchRenorm],
    inputs: tuple[TensorDictBase, TensorDictBase],
    params: TensorDictBase,
    key: NestedKey,
    mask: Tensor | None,
    vmap: str | None,
) -> Tensor:
    """Outputs ``(num_critics, 2, *B, num_outputs)`` for two inputs in one forward, with the statistics of both.

    CrossQ's forward (Bhatt et al. 2024, arXiv 1902.05605 version 3, section 3.1): replayed and next state-action pairs
    have different distributions, so the statistics of one would be wrong for the other. The running statistics inside
    the stacked parameters are updated in place.

    Args:
        critic: as in ``ensemble_outputs``.
        layers: its batch normalisers, which are in training mode for this one forward.
        inputs: two inputs, each of batch size ``(*B)``.
        params: stacked parameters.
        key: as in ``ensemble_outputs``.
        mask: which samples count, ``(*B,)``; None for all. The others' outputs are zero.
        vmap: as in ``ensemble_outputs``.
    """
    both = torch.stack([x if mask is None else x[mask] for x in inputs])
    for layer in layers:
        layer.training = True
    try:
        outputs = ensemble_outputs(critic, both, params, key, vmap)
    finally:
        for layer in layers:
            layer.training = False
    if mask is None:
        return outputs
    every = outputs.new_zeros(outputs.shape[0], 2, *mask.shape, outputs.shape[-1])
    every[:, :, mask] = outputs
    return every
