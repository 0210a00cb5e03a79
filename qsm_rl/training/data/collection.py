"""Chooses the collector of a run: in this process, in worker processes, or in actors on a Ray cluster."""

from __future__ import annotations

from collections.abc import Callable

import torch
from tensordict.nn import TensorDictModuleBase
from torchrl.collectors import Collector
from torchrl.envs import EnvBase

from qsm_rl.training.configuration.training_configuration import TrainingConfiguration
from qsm_rl.training.data.worker_collector import WorkerCollector, check_ray
from qsm_rl.training.updates.cuda_graphs import CudaGraphPolicy

__all__ = ["check_workers", "make_collector"]


def make_collector(
    config: TrainingConfiguration,
    environment: EnvBase,
    make_environment: Callable[..., EnvBase],
    acting: TensorDictModuleBase,
    device: torch.device,
    *,
    warmup_frames: int,
    cuda_graph: bool = False,
) -> Collector | WorkerCollector:
    """Makes the collector that the settings choose.

    Args:
        config: the settings; ``num_workers`` and ``worker_backend`` choose the collector.
        environment: the training environments; stepped only if there are no workers.
        make_environment: makes the environments of a worker; called with ``num_envs``.
        acting: the policy that collects, exploration included.
        device: device of the policy.
        warmup_frames: frames of random actions before the policy acts.
        cuda_graph: whether the policy acts through a CUDA graph, see ``CudaGraphPolicy``.

    Returns:
        An iterable of batches ``(num_envs, T)``, with ``set_seed``, ``reset``, ``shutdown``,
        ``requested_frames_per_batch`` and ``env``.

    Raises:
        UserError: if Ray is requested and is not installed, or has too few CPUs.
    """
    if config.num_workers > 0:
        return WorkerCollector(
            make_environment,
            acting,
            environment,
            num_workers=config.num_workers,
            num_envs=config.num_envs,
            frames_per_batch=config.frames_per_batch,
            warmup_frames=warmup_frames,
            backend=config.worker_backend,
        )
    return Collector(
        environment,
        CudaGraphPolicy(acting, device) if cuda_graph else acting,
        frames_per_batch=config.frames_per_batch,
        init_random_frames=warmup_frames,
        env_device="cpu",
        policy_device=torch.device("cpu") if cuda_graph else device,
        storing_device="cpu",
        trust_policy=True if cuda_graph else None,
        track_traj_ids=False,
        auto_register_policy_transforms=False,
        # For a single observation the policy spends its time on calls, not on arithmetic. TorchRL's default runs the
        # first call of each process eagerly, which draws different random numbers: a resumed run would differ.
        compile_policy={"warmup": 0} if config.compile and device.type == "cpu" else False,
    )


def check_workers(config: TrainingConfiguration) -> None:
    """Refuses a run whose workers cannot be started, before anything is written.

    Raises:
        UserError: if Ray is requested and is not installed.
    """
    if config.num_workers > 0 and config.worker_backend == "ray":
        check_ray()
