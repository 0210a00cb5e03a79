"""Records the kernels of an update once as a CUDA graph and launches them together from then on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import Tensor
from torch.utils._pytree import tree_map_only

__all__ = ["CudaGraph", "CudaGraphPolicy"]

WARMUP = 3


class CudaGraph:
    """A function of a batch whose kernels are launched together, without Python in between.

    The first ``WARMUP`` calls run normally on a separate stream, so that everything that they compile, choose or
    allocate is ready; the next call records the graph. ``tensordict.nn.CudaGraphModule`` does the same, but waits for
    the GPU before each launch and copies every output.

    Args:
        function: takes batches of one shape and returns tensors, nested in tuples and dictionaries, none of which
            requires a gradient. It must not read anything back from the GPU and may change state only in place. Random
            numbers from PyTorch's GPU generator are drawn anew by each launch.

    Raises:
        ValueError: when called with a batch that lacks an entry of the recorded batch or has another shape.
    """

    def __init__(self, function: Callable[[TensorDictBase], Any]) -> None:
        self.function = function
        self._calls = 0
        self._stream: torch.cuda.Stream | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: dict[NestedKey, Tensor] = {}
        self._outputs: Any = None

    def __call__(self, batch: TensorDictBase) -> Any:
        """The function's outputs, in memory that the next call overwrites."""
        self._calls += 1
        if self._graph is None:
            if self._calls <= WARMUP:
                return self._warm_up(batch)
            self._record(batch)
        assert self._graph is not None
        values = [batch.get(key, None) for key in self._inputs]
        for (key, expected), value in zip(self._inputs.items(), values, strict=True):
            if value is None or value.shape != expected.shape:
                found = "is missing" if value is None else f"has shape {tuple(value.shape)}"
                raise ValueError(
                    f"{key!r} {found}, but the CUDA graph was recorded with {tuple(expected.shape)}: "
                    "pass batches of the same size with the same entries, or update without cuda_graph."
                )
        torch._foreach_copy_(list(self._inputs.values()), values)
        self._graph.replay()
        return self._outputs

    def _warm_up(self, batch: TensorDictBase) -> Any:
        if self._stream is None:
            self._stream = torch.cuda.Stream(batch.device)
        here = torch.cuda.current_stream(batch.device)
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            outputs = self.function(batch)
        here.wait_stream(self._stream)
        return outputs

    def _record(self, batch: TensorDictBase) -> None:
        inputs = batch.clone()
        self._inputs = dict(inputs.items(True, True))
        graph = torch.cuda.CUDAGraph()
        # A copy, since a loss writes its priorities into the batch, and those are not inputs.
        with torch.cuda.graph(graph, stream=self._stream):
            outputs = self.function(inputs.copy())
        self._graph, self._outputs = graph, tree_map_only(torch.Tensor, torch.Tensor.detach, outputs)


class CudaGraphPolicy(TensorDictModuleBase):
    """A policy on a GPU that acts with a single launch, where a diffusion policy would need hundreds.

    A collector sees a policy on the CPU: its inputs are moved to the GPU, and the action back.

    Args:
        policy: writes the action, its last out_key, using PyTorch's GPU generator and parameters that may change in
            place between calls. The exploration type is recorded too.
        device: the GPU.
    """

    def __init__(self, policy: TensorDictModuleBase, device: torch.device) -> None:
        super().__init__()
        self._policy = (policy,)  # in a tuple: a collector would copy its parameters to the CPU
        self.device = device
        self.in_keys, self.out_keys = policy.in_keys, policy.out_keys[-1:]
        self._act = CudaGraph(self._action)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Writes the action."""
        inputs = tensordict.select(*self.in_keys).to(self.device)
        return tensordict.set(self.out_keys[0], self._act(inputs).to(tensordict.device or "cpu"))

    @torch.no_grad()
    def _action(self, tensordict: TensorDictBase) -> Tensor:
        return self._policy[0](tensordict.copy()).get(self.out_keys[0])
