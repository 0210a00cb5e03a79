"""Collection in other processes, of this machine or of a Ray cluster, which are replaced when they die."""

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

MOST_FAILURES = 3  # in a row, without a batch between them
WITHOUT_END = sys.maxsize  # RayCollector takes -1 for zero frames
# Ray restarts an actor three times and repeats what it was asked; then its call fails, and all actors are made anew.
REMOTE_CONFIGURATION = {"num_cpus": 1, "max_restarts": 3, "max_task_retries": 3}


class Order(NamedTuple):
    """What the workers collect the next batch with: weights, their number, and whether to act at random instead."""

    version: int
    random: bool
    weights: dict[str, Tensor]


class WorkerPolicy(TensorDictModuleBase):
    """What acts in a worker: the policy with the weights that were sent last, or uniformly random actions.

    It writes ``policy_version`` ``(*B, 1)``, the number of those weights, so that each frame says which ones it was
    collected with. A worker that Ray has restarted is back at version 0 and is found out by it.

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
        """Acts."""
        if self.random:
            tensordict["action"] = self._action_spec.rand(tensordict.batch_size)
        else:
            tensordict = self.policy(tensordict)
        tensordict["policy_version"] = torch.full((*tensordict.batch_size, 1), self.version)
        return tensordict

    def obey(self, order: Order) -> int:
        """Takes over an order; returns the version of the one before."""
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
    batch, the next one is collected, with the weights as they were when the batch was handed out: they are one batch
    old, never older, and every frame's ``policy_version`` says which. Given seeds and weights, batches are the same to
    the bit in every run.

    A worker that dies is replaced: the batch under way is dropped, the environments of all workers are seeded anew and
    reset, so no transition spans the gap, and a line on stderr says so. Ray restarts its actors by itself and then
    collects with the weights of the beginning; such frames are dropped too.

    Args:
        make_environment: called with ``num_envs``, makes a worker's environments; must be picklable.
        policy: acts, as in ``Collector``; read at each batch, not changed.
        environment: an environment like the workers', not stepped: for specs.
        num_workers: processes, at least 1.
        num_envs: environments of all workers together, a multiple of ``num_workers``.
        frames_per_batch: frames of a batch, a multiple of ``num_envs``. Sending weights and frames takes some
            milliseconds a batch; 16 frames and more of each environment make that small.
        warmup_frames: frames of uniformly random actions before the policy acts.
        backend: ``"process"`` starts processes on this machine, ``"ray"`` actors on a Ray cluster: the one that
            ``RAY_ADDRESS`` names or that runs on this machine, else a new one on this machine.

    Attributes:
        env: ``environment``.
        requested_frames_per_batch: ``frames_per_batch``.
        replacements: workers that died and were replaced.

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
        self._known_version: int | None = None  # what every worker should have; None behind a start
        self._ordered_frames = 0
        self._seed = 0
        self._pending: Future[TensorDictBase] | None = None
        self._closing = threading.Event()
        # Everything that speaks to the workers runs in this thread, one thing after another.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="collector")
        self._owns_ray = backend == "ray" and _connect_to_ray(num_workers)
        atexit.register(self.shutdown)  # living workers would keep the process from ending

    def __iter__(self) -> Iterator[TensorDictBase]:
        """Batches ``(num_envs, T)`` without end.

        Raises:
            TrainingError: if workers die again and again without collecting a batch.
        """
        while True:
            if self._pending is None:
                self._pending = self._thread.submit(self._collect, self._order())
            batch = self._pending.result()
            self._pending = self._thread.submit(self._collect, self._order())
            yield batch

    def set_seed(self, seed: int) -> None:
        """Seeds environments and random generators of all workers, each with a seed of its own, and resets them.

        A batch that is being collected is dropped, so the next one is collected with the weights of now.

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
        """Nothing: [`set_seed`][qsm_rl.training.WorkerCollector.set_seed] has reset the environments."""

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

    # What follows runs in the collector's thread, which alone speaks to the workers.

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
        """A batch, None if a worker was restarted behind our back."""
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
        # A factory, since given a policy TorchRL makes a weight synchronisation of its own, which hangs where the
        # process ends.
        if self._backend == "ray":
            import ray

            # Ray forgets large arguments of a constructor, and could then not restart the actor: it gets a reference.
            self._policy_reference = ray.put(policy)
            options["policy_factory"] = partial(ray.get, self._policy_reference)
            options["remote_configs"] = REMOTE_CONFIGURATION
            options["collector_kwargs"] = {"auto_register_policy_transforms": False}
        else:
            options["policy_factory"] = partial(_itself, policy)
            # Without num_threads TorchRL takes the learner's threads away.
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
                f"the {self._num_workers} workers that collect failed {failures} times in a row, at last with: "
                f"{reason[:500]}\nTry --num_workers 0, which collects in this process and shows where it fails."
            ) from error
        self._report(1, reason[:200])

    def _report(self, count: int, reason: str) -> None:
        self.replacements += count
        print(
            f"warning: {count} of {self._num_workers} workers that collect replaced ({reason}), {self.replacements} in "
            "all; the batch under way is dropped, and all environments are reset.",
            file=sys.stderr,
            flush=True,
        )

    def _ended(self) -> str:
        """Which worker processes have ended by themselves; TorchRL's error can be about those that it ends then."""
        processes = [process for process in getattr(self._workers, "procs", ()) if not process._closed]
        # Its pipe breaks a moment before its end is known.
        wait([process.sentinel for process in processes], timeout=0.5)
        codes = [process.exitcode for process in processes if process.exitcode]
        return ", ".join(f"a worker ended with exit code {code}" for code in codes)

    def _stop(self) -> None:
        workers, self._workers = self._workers, None
        if workers is None:
            return
        processes = getattr(workers, "procs", ())
        if any(process._closed or not process.is_alive() for process in processes):  # it would wait for the dead
            for process in processes:
                if not process._closed:
                    process.kill()
                    process.join()
        with contextlib.suppress(Exception):  # it raises for workers that are dead
            workers.shutdown()


def _itself(policy: WorkerPolicy) -> WorkerPolicy:
    return policy


def _make_worker_environment(make_environment: Callable[..., EnvBase], num_envs: int, own_process: bool) -> EnvBase:
    if own_process:  # the training process ends it by closing its pipe; Ctrl-C would reach it before
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
    return make_environment(num_envs=num_envs)


@contextlib.contextmanager
def _forkserver() -> Iterator[None]:
    """Processes started in the block are forks of one that has imported everything, and there in tenths of a second."""
    before = multiprocessing.get_start_method(allow_none=True)
    # They ignore Ctrl-C once they are there; on the way it would end them, with a traceback, so they are born with it
    # blocked. The first start of Python's own tracker would unblock it.
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
    """Refuses to go on where Ray is not installed.

    Raises:
        UserError: with the command that installs it.
    """
    if importlib.util.find_spec("ray") is None:
        raise UserError('--worker_backend ray needs Ray, which is not installed: pip install "qsm_rl[ray]"')


def _connect_to_ray(num_workers: int) -> bool:
    """Connects to a Ray cluster, or starts one on this machine; whether it is to be shut down behind."""
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
        raise UserError(f"--num_workers {num_workers} needs as many CPUs, and the Ray cluster has {cpus}.")
    return owned
