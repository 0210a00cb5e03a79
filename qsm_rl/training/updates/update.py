"""The interface between training step and algorithm: one update on a batch. Each algorithm has its own file."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn
from torch.optim import Optimizer
from torchrl.objectives import LossModule

from qsm_rl.comparison import first_difference
from qsm_rl.training.errors import TrainingError
from qsm_rl.training.ranks import average_gradients

__all__ = [
    "NonFiniteLossError",
    "Update",
    "accelerated",
    "cosine_decay",
    "gradient_step",
    "note_failure",
    "raise_non_finite",
    "watch",
]

Precision = Literal["float32", "tf32", "bfloat16"]
LossMethod = Callable[[TensorDictBase], tuple[Tensor, dict[str, Tensor]]]


class NonFiniteLossError(TrainingError):
    """A loss or its gradient is NaN or infinite. Raised before the optimiser step on that loss.

    Earlier steps of the same update are kept: if the actor's loss failed, the critics have been updated.

    Attributes:
        updates_since: number of updates called since the failure, all of which left the weights unchanged.
    """

    updates_since = 0


class Update(nn.Module):
    """One update of an algorithm on a replay batch: every loss, every optimiser step, every target network.

    A subclass overrides [`forward`][qsm_rl.training.Update.forward] and [`actor`][qsm_rl.training.Update.actor]. The
    training module calls the update, logs what it returns, and stores its state.

    Args:
        loss: the loss module, which holds networks and target networks.
        optimizers: the optimisers by name.

    Attributes:
        cuda_graph: whether the update is recorded as a CUDA graph; the policy then also acts through one.
        agents: names of the independent agents that it trains together; empty for a single agent.
    """

    cuda_graph = False
    agents: tuple[str, ...] = ()

    def __init__(self, loss: LossModule, optimizers: dict[str, Optimizer]) -> None:
        super().__init__()
        self.loss = loss
        self.optimizers = optimizers
        self.num_updates = 0

    @property
    def actor(self) -> TensorDictModuleBase:
        """The actor to save."""
        raise NotImplementedError

    @property
    def actors(self) -> dict[str, TensorDictModuleBase]:
        """The actors to save, by the name of the agent, which is ``""`` for a single agent."""
        return {"": self.actor}

    @property
    def policies(self) -> dict[str, TensorDictModuleBase]:
        """The policies to evaluate: ``""`` is ``actor``, logged as ``eval/...``, NAME as ``eval/NAME/...``."""
        return {"": self.actor}

    def forward(self, batch: TensorDictBase) -> dict[str, Tensor]:
        """Performs one update.

        Args:
            batch: a batch from the replay buffer, batch size ``(B,)``.

        Returns:
            Detached scalar losses by name; the log shows their averages.

        Raises:
            NonFiniteLossError: naming the loss that is not finite.
        """
        raise NotImplementedError

    def begin(self, transitions: TensorDictBase) -> None:
        """Called once in a run, before its first update.

        Args:
            transitions: all transitions in the replay buffer, batch size ``(N,)``.
        """

    def check(self) -> None:
        """Raises deferred errors of the updates since the last call, which did not wait for the GPU.

        Raises:
            NonFiniteLossError: naming the first loss that was not finite.
        """

    def diagnostics(self) -> dict[str, Tensor]:
        """Detached scalars of the last update for the log, computed only when a row is written."""
        return {}

    def checkpoint_state(self) -> dict[str, Any]:
        """The state on which the next update depends, as plain data."""
        return {
            "num_updates": self.num_updates,
            "modules": self.state_dict(),
            "optimizers": {name: _optimizer_state(optimizer) for name, optimizer in self.optimizers.items()},
        }

    def restore_state(self, state: dict[str, Any]) -> None:
        """Restores what [`checkpoint_state`][qsm_rl.training.Update.checkpoint_state] returned.

        Raises:
            ValueError: naming the first network weight or optimiser state that does not fit.
        """
        difference = first_difference(state["modules"], self.state_dict(), "the networks'")
        for name, optimizer in self.optimizers.items():
            difference = difference or _optimizer_difference(state["optimizers"][name], optimizer, name)
        if difference:
            raise ValueError(difference)
        self.num_updates = state["num_updates"]
        self.load_state_dict(state["modules"])
        for name, optimizer in self.optimizers.items():
            groups = [
                {**saved, "capturable": own["capturable"], "lr": own["lr"]}
                for saved, own in zip(state["optimizers"][name]["param_groups"], optimizer.param_groups, strict=True)
            ]
            optimizer.load_state_dict({**state["optimizers"][name], "param_groups": groups})


def _optimizer_state(optimizer: Optimizer) -> dict[str, Any]:
    """The state_dict in a form for any device: with CUDA graphs the learning rate is a tensor."""
    state = optimizer.state_dict()
    groups = [{**group, "capturable": False, "lr": float(group["lr"])} for group in state["param_groups"]]
    return {**state, "param_groups": groups}


def _optimizer_difference(state: dict[str, Any], optimizer: Optimizer, name: str) -> str | None:
    """The first difference from a saved optimiser; PyTorch's own check only counts parameters."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    # Before the first step the state is empty; then each parameter has averages of its shape and a step count.
    expected = {
        index: {key: parameter if value.ndim else value for key, value in state["state"].get(index, {}).items()}
        for index, parameter in enumerate(parameters if state["state"] else [])
    }
    groups, own = (
        [{key: value for key, value in group.items() if key != "lr"} for group in saved["param_groups"]]
        for saved in (state, _optimizer_state(optimizer))
    )
    named = f"the {name} optimiser's"
    return first_difference(groups, own, named) or first_difference(state["state"], expected, named)


def gradient_step(
    name: str, loss: Tensor, optimizer: Optimizer, parameters: Iterable[Tensor], gradient_clipping: float | None = None
) -> Tensor:
    """Backward pass, averaging of the gradients over all ranks, and one optimiser step.

    Args:
        name: name of the loss, for the error.
        loss: scalar loss.
        optimizer: its optimiser.
        parameters: parameters that the optimiser trains.
        gradient_clipping: maximum norm of the gradient over all parameters; None does not clip.

    Returns:
        The loss and the norm of its gradient, shape ``(2,)``.

    Raises:
        NonFiniteLossError: if the loss or its gradient is NaN or infinite; the weights are then unchanged.
    """
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    parameters = list(parameters)
    average_gradients(parameters)
    norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    watched = torch.stack([loss.detach(), norm])
    raise_non_finite(watched.unsqueeze(0), (name,))
    if gradient_clipping is not None:
        nn.utils.clip_grads_with_norm_(parameters, gradient_clipping, norm)
    optimizer.step()
    return watched


def watch(loss: Tensor, gradients: Sequence[Tensor], failed: Tensor) -> Tensor:
    """Records whether a loss and its gradients are finite without reading anything back, as a CUDA graph requires.

    Args:
        loss: scalar loss.
        gradients: gradients of all parameters.
        failed: scalar, set to 1 if anything is not finite, and left at 1. As an optimiser's ``found_inf`` it keeps the
            weights unchanged.

    Returns:
        The loss and the norm of the gradients together, shape ``(2,)``, for ``raise_non_finite``.
    """
    squares = torch.stack([gradient.square().sum() for gradient in gradients])
    watched = torch.stack([loss.detach(), squares.sum().sqrt()])
    note_failure(watched, failed)
    return watched


def note_failure(watched: Tensor, failed: Tensor) -> None:
    """Sets the scalar ``failed`` to 1 if anything watched is not finite; reads nothing back from the GPU."""
    failed.copy_(torch.maximum(failed, (~torch.isfinite(watched)).any().to(failed.dtype)))


def raise_non_finite(report: Tensor, names: Sequence[str]) -> None:
    """Raises an error for a non-finite loss or gradient; on a GPU this waits for all earlier work.

    Args:
        report: rows of a loss and its gradient norm, ``(losses, 2)``.
        names: names of the losses.

    Raises:
        NonFiniteLossError: naming the first non-finite value.
    """
    if torch.isfinite(report.sum()):
        return
    for name, row in zip(names, report.tolist(), strict=False):
        for what, value in zip((name, f"the gradient of {name}"), row, strict=True):
            if not math.isfinite(value):
                raise NonFiniteLossError(f"{what} is {value}")


def accelerated(part: LossMethod, precision: Precision, compile: bool) -> LossMethod:
    """A loss method under autocast, compiled, both, or unchanged.

    Args:
        part: takes a batch and returns a loss and its info, such as ``QScoreMatchingLoss.actor_loss``.
        precision: ``"bfloat16"`` runs it under ``torch.autocast`` on the batch's device; tf32 is a global PyTorch
            setting, ``torch.set_float32_matmul_precision("high")``.
        compile: whether to compile it with ``torch.compile``. Random numbers then come from the compiler's generators,
            which follow PyTorch's seed but give different numbers than eager code.

    Returns:
        A function of the batch.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> layer = torch.nn.Linear(2, 1)
        >>> part = accelerated(lambda batch: (layer(batch["observation"]).mean(), {}), "bfloat16", compile=False)
        >>> loss, info = part(TensorDict({"observation": torch.ones(3, 2)}, [3]))
        >>> loss.dtype
        torch.bfloat16
    """
    compiled = torch.compile(part) if compile else part
    if precision != "bfloat16":
        return compiled

    def in_bfloat16(batch: TensorDictBase) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.autocast(batch.device.type if batch.device is not None else "cpu", torch.bfloat16):
            return compiled(batch)

    return in_bfloat16


def cosine_decay(step: int, decay_steps: int | None) -> float:
    """Factor on a learning rate, falling from 1 to 0 along half a cosine: ``0.5 (1 + cos(pi step / decay_steps))``.

    Args:
        step: steps done so far.
        decay_steps: steps until the rate is zero; None keeps it constant.

    Returns:
        The factor; 0 beyond ``decay_steps``.

    Examples:
        >>> [round(cosine_decay(step, 100), 3) for step in (0, 50, 100, 150)], cosine_decay(7, None)
        ([1.0, 0.5, 0.0, 0.0], 1.0)
    """
    return 1.0 if decay_steps is None else 0.5 * (1 + math.cos(math.pi * min(step, decay_steps) / decay_steps))
