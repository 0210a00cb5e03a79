"""Collection in other processes, on this machine or a Ray cluster, which are replaced when they die."""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import logging
import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from copy import deepcopy
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from typing import Any, Literal, NamedTuple

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.collectors import Collector
from torchrl.data import TensorSpec
from torchrl.envs import EnvBase

from qsm_rl.training.errors import TrainingError, UserError
from qsm_rl.training.random_state import derived_seed, seed_everything

__all__ = ["WorkerCollector", "WorkerPolicy", "check_ray"]

MOST_FAILURES = 3  # in a row, without a batch in between
WITHOUT_END = sys.maxsize  # RayCollector takes -1 for zero frames
# Ray restarts an actor up to three times and repeats its task; after that the call fails, and all actors are recreated.
REMOTE_CONFIGURATION = {"num_cpus": 1, "max_restarts": 3, "max_task_retries": 3}


class Order(NamedTuple):
    """What the workers use for the next batch: weights, their version, and whether to act at random instead."""

    version: int
    random: bool
    weights: dict[str, Tensor]


class WorkerPolicy(TensorDictModuleBase):
    """The policy in a worker: it acts with the weights that were sent last, or uniformly at random.

    It writes ``policy_version`` ``(*B, 1)``, the version of those weights, so that each frame records which ones
    collected it. A worker that Ray has restarted is back at version 0, which reveals the restart.

    Args:
        policy: reads its ``in_keys``, writes ``action``.
        action_spec: the actions of one environment, shape ``(A,)``.
    """

    def __init__(self, policy: TensorDictModuleBase, action_spec: TensorSpec) -> None:
        super().__init__()
        self.policy = policy
        self.in_keys = list(policy.in_keys)
        self.out_keys = [*policy.out_keys, "policy_version"]
        self.version = 0
        self.random = False
        self._action_spec = action_spec

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Writes the action and ``policy_version``."""
        if self.random:
            tensordict["action"] = self._action_spec.rand(tensordict.batch_size)
        else:
            tensordict = self.policy(tensordict)
        tensordict["policy_version"] = torch.full((*tensordict.batch_size, 1), self.version)
        return tensordict

    def obey(self, order: Order) -> int:
        """Adopts an order; returns the version of the previous one."""
        before, self.version, self.random = self.version, order.version, order.random
        if order.weights:
            self.policy.load_state_dict(order.weights)
        return before

    def seed(self, seed: int) -> None:
        """Seeds all random generators of the process."""
        seed_everything(seed)


class WorkerCollector:
    """Batches of frames from worker processes, through TorchRL's ``Collector(backend="process" | "ray")``.

    Each worker steps its share of the environments with a copy of the policy on its CPU. While the caller works on a
    batch, the workers collect the next one with the weights from the time when the batch was handed out. Weights are
    therefore one batch old, never older, and ``policy_version`` records the version for every frame. With the same
    seeds and weights, batches are bitwise identical in every run.

    A worker that dies is replaced. The batch being collected is dropped, and the environments of all workers are
    reseeded and reset, so no transition spans the gap; a line on stderr says so. Ray restarts its actors by itself and
    then collects with the initial weights; such frames are dropped too.

    Args:
        make_environment: makes the environments of a worker; called with ``num_envs``, must be picklable.
        policy: the policy, as in ``Collector``; read at each batch, never changed.
        environment: an environment like the workers', used for its specs only and never stepped.
        num_workers: number of processes, at least 1.
        num_envs: total number of environments, a multiple of ``num_workers``.
        frames_per_batch: frames per batch, a multiple of ``num_envs``. Sending weights and frames takes some
            milliseconds per batch; with 16 frames or more per environment this is negligible.
        warmup_frames: frames of uniformly random actions before the policy acts.
        backend: ``"process"`` starts processes on this machine; ``"ray"`` starts actors on a Ray cluster: the one that
            ``RAY_ADDRESS`` names or that is running on this machine, else a new one on this machine.

    Attributes:
        env: ``environment``.
        requested_frames_per_batch: ``frames_per_batch``.
        replacements: number of workers that died and were replaced.

    Raises:
        UserError: if Ray is not installed, or has fewer free CPUs than workers.
    """

    def __init__(
        self,
        make_environment: Callable[..., EnvBase],
        policy: TensorDictModuleBase,
        environment: EnvBase,
        *,
        num_workers: int,
        num_envs: int,
        frames_per_batch: int,
        warmup_frames: int = 0,
        backend: Literal["process", "ray"] = "process",
    ) -> None:
        self.env = environment
        self.requested_frames_per_batch = frames_per_batch
        self.replacements = 0
        self._policy = policy
        self._num_workers = num_workers
        self._make_worker_environment = partial(
            _make_worker_environment, make_environment, num_envs // num_workers, backend == "process"
        )
        self._action_spec = environment.action_spec_unbatched
        self._warmup_frames = warmup_frames
        self._backend = backend
        self._workers: Any = None  # TorchRL's collector of worker processes or actors
        self._batches: Iterator[TensorDictBase] = iter(())
        self._version = 0  # of the last order
        self._known_version: int | None = None  # what every worker should have; None after a start
        self._ordered_frames = 0
        self._seed = 0
        self._pending: Future[TensorDictBase] | None = None
        self._closing = threading.Event()
        # All communication with the workers runs in this thread, one call after another.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="collector")
        self._owns_ray = backend == "ray" and _connect_to_ray(num_workers)
        atexit.register(self.shutdown)  # live workers would keep the process from ending

    def __iter__(self) -> Iterator[TensorDictBase]:
        """An endless iterator of batches ``(num_envs, T)``.

        Raises:
            TrainingError: if workers die repeatedly without collecting a batch.
        """
        while True:
            if self._pending is None:
                self._pending = self._thread.submit(self._collect, self._order())
            batch = self._pending.result()
            self._pending = self._thread.submit(self._collect, self._order())
            yield batch

    def set_seed(self, seed: int) -> None:
        """Seeds the environments and random generators of all workers, each differently, and resets the environments.

        A batch that is being collected is dropped, so the next one is collected with the current weights.

        Args:
            seed: at least 0.
        """
        if self._pending is not None:
            self._pending.result()
            self._pending = None
            self._ordered_frames -= self.requested_frames_per_batch
        self._seed = seed
        self._thread.submit(self._begin, seed).result()

    def reset(self) -> None:
        """Does nothing: [`set_seed`][qsm_rl.training.WorkerCollector.set_seed] has reset the environments."""

    def shutdown(self) -> None:
        """Ends the workers."""
        if self._closing.is_set():
            return
        self._closing.set()
        self._thread.shutdown()
        self._stop()
        self.env.close()
        if self._owns_ray:
            import ray

            ray.shutdown()
        atexit.unregister(self.shutdown)

    def _order(self) -> Order:
        random = self._ordered_frames < self._warmup_frames
        self._ordered_frames += self.requested_frames_per_batch
        self._version += 1
        state: dict[str, Tensor] = {} if random else self._policy.state_dict()
        return Order(self._version, random, {name: value.to("cpu", copy=True) for name, value in state.items()})

    # The methods below run in the collector's thread, the only one that communicates with the workers.

    def _begin(self, seed: int) -> None:
        try:
            if self._workers is None:
                self._start()
            self._seed_workers(seed)
        except Exception as error:
            self._fail(error, 1)

    def _collect(self, order: Order) -> TensorDictBase:
        failures = 0
        while True:
            try:
                if self._workers is None:
                    self._start()
                    self._seed_workers(derived_seed(self._seed, "replacement", self.replacements))
                batch = self._attempt(order)
                if batch is not None:
                    return batch
                self._seed_workers(derived_seed(self._seed, "replacement", self.replacements))
            except Exception as error:
                failures += 1
                self._fail(error, failures)

    def _attempt(self, order: Order) -> TensorDictBase | None:
        """A batch, or None if Ray has restarted a worker on its own."""
        workers, known = self._workers, self._known_version
        versions = workers.map_fn("policy.obey", [(order,)] * self._num_workers)
        self._known_version = order.version
        restarted = 0 if known is None else sum(version != known for version in versions)
        if not restarted:
            batch = next(self._batches)
            restarted = int((batch["policy_version"].flatten(1)[:, -1] != order.version).sum())
            if not restarted:
                return batch.flatten(0, 1)
        self._known_version = None
        self._report(restarted, "restarted by Ray")
        return None

    def _start(self) -> None:
        policy = WorkerPolicy(deepcopy(self._policy).to("cpu").requires_grad_(False), self._action_spec)
        options: dict[str, Any] = {"weight_sync_schemes": {}}
        options |= dict.fromkeys(("env_device", "policy_device", "storing_device"), "cpu")
        # A factory: given a policy itself, TorchRL sets up its own weight synchronisation, which hangs at process exit.
        if self._backend == "ray":
            import ray

            # Ray forgets large constructor arguments and then could not restart the actor, so it gets a reference.
            self._policy_reference = ray.put(policy)
            options["policy_factory"] = partial(ray.get, self._policy_reference)
            options["remote_configs"] = REMOTE_CONFIGURATION
            options["collector_kwargs"] = {"auto_register_policy_transforms": False}
        else:
            options["policy_factory"] = partial(_itself, policy)
            # Without num_threads TorchRL reduces the learner's threads.
            options |= {"num_threads": torch.get_num_threads(), "num_sub_threads": 1}
            options |= {"auto_register_policy_transforms": False, "cat_results": "stack"}
        with _forkserver(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._workers = Collector(
                [self._make_worker_environment] * self._num_workers,
                backend=self._backend,
                num_collectors=self._num_workers,
                sync=True,
                frames_per_batch=self.requested_frames_per_batch,
                total_frames=WITHOUT_END,
                **options,
            )
        warnings.filterwarnings("ignore", message="RayCollector iteration started before weight synchronization")
        self._batches = iter(self._workers)
        self._known_version = None

    def _seed_workers(self, seed: int) -> None:
        def seeds(purpose: str) -> list[tuple[int]]:
            return [(derived_seed(seed, purpose, worker),) for worker in range(self._num_workers)]

        self._workers.map_fn("policy.seed", seeds("policy"))
        self._workers.map_fn("set_seed", seeds("environments"))
        self._workers.map_fn("reset")

    def _fail(self, error: Exception, failures: int) -> None:
        reason = self._ended() or " ".join(str(error).split()) or type(error).__name__
        self._stop()
        if self._closing.is_set():
            raise error
        if failures == MOST_FAILURES:
            raise TrainingError(
                f"the {self._num_workers} collection workers failed {failures} times in a row; the last error: "
                f"{reason[:500]}\nTry --num_workers 0, which collects in this process and shows where it fails."
            ) from error
        self._report(1, reason[:200])

    def _report(self, count: int, reason: str) -> None:
        self.replacements += count
        print(
            f"warning: replaced {count} of {self._num_workers} collection workers ({reason}), {self.replacements} in "
            "total; the unfinished batch is dropped, and all environments are reset.",
            file=sys.stderr,
            flush=True,
        )

    def _ended(self) -> str:
        """Which worker processes ended on their own; TorchRL's error may name others, which it then ends itself."""
        processes = [process for process in getattr(self._workers, "procs", ()) if not process._closed]
        # A worker's pipe breaks a moment before its exit is known.
        wait([process.sentinel for process in processes], timeout=0.5)
        codes = [process.exitcode for process in processes if process.exitcode]
        return ", ".join(f"a worker ended with exit code {code}" for code in codes)

    def _stop(self) -> None:
        workers, self._workers = self._workers, None
        if workers is None:
            return
        processes = getattr(workers, "procs", ())
        if any(process._closed or not process.is_alive() for process in processes):  # shutdown would wait for dead ones
            for process in processes:
                if not process._closed:
                    process.kill()
                    process.join()
        with contextlib.suppress(Exception):  # it raises for dead workers
            workers.shutdown()


def _itself(policy: WorkerPolicy) -> WorkerPolicy:
    return policy


def _make_worker_environment(make_environment: Callable[..., EnvBase], num_envs: int, own_process: bool) -> EnvBase:
    if own_process:  # the training process ends it by closing its pipe; Ctrl-C would reach it earlier
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
    return make_environment(num_envs=num_envs)


@contextlib.contextmanager
def _forkserver() -> Iterator[None]:
    """Processes started in the block are forks of one that has imported everything, ready in tenths of a second."""
    before = multiprocessing.get_start_method(allow_none=True)
    # Once they run, they ignore Ctrl-C. While they start, it would end them with a traceback, so they start with it
    # blocked. Python's own tracker would unblock it at its first start, so it is started before.
    resource_tracker.ensure_running()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    if "forkserver" in multiprocessing.get_all_start_methods():
        multiprocessing.set_start_method("forkserver", force=True)
        multiprocessing.set_forkserver_preload([__name__])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        multiprocessing.set_start_method(before, force=True)


def check_ray() -> None:
    """Raises an error if Ray is not installed.

    Raises:
        UserError: with the command that installs it.
    """
    if importlib.util.find_spec("ray") is None:
        raise UserError('--worker_backend ray needs Ray, which is not installed: pip install "qsm_rl[ray]"')


def _connect_to_ray(num_workers: int) -> bool:
    """Connects to a Ray cluster or starts one on this machine; returns whether it has to be shut down afterwards."""
    check_ray()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no report to Ray's makers
    import ray

    owned = not ray.is_initialized()
    if owned:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
    cpus = int(ray.cluster_resources().get("CPU", 0))
    if cpus < num_workers:
        if owned:
            ray.shutdown()
        raise UserError(f"--num_workers {num_workers} needs {num_workers} CPUs, but the Ray cluster has {cpus}.")
    return owned
