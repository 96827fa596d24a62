"""A group of Ray Train workers: join or start a cluster, find room, launch, wait for the answer."""

import logging
import os
import signal
import socket
import threading
import time
import uuid
from contextlib import suppress
from pathlib import PurePosixPath
from typing import Any

import ray
import ray.train
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
    get_or_create_autoscaling_coordinator,
)
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import (
    PlacementGroupCleanerCallback,
)
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from cluster.config import WorkerRange, useful_workers
from cluster.elasticity import ResizeAfterCheckpoint
from cluster.errors import WorkError
from cluster.events import EVENTS
from cluster.process_group import ProcessGroup
from cluster.restarts import ShowRestarts, cause_of
from cluster.storage import StorageConfig, pyarrow_filesystem
from cluster.trial_groups import run_in_actor

# Each starts a process, seconds of a start: for Ray Data, while ours come by `cluster.loader`, and
# to remove what a lost controller leaves, by asking a dashboard that is not everywhere. A job's
# placement group ends with the job, an actor's too if it is no trial (`cluster.trial_groups`).
UNUSED_CALLBACKS = (DatasetsCallback, PlacementGroupCleanerCallback)
CONNECT_TIMEOUT_S = 5
ABORT_TIMEOUT_S = 15
REQUEST_EXPIRES_S = 60  # of a job that was killed while it waited


def connect_ray() -> None:
    """Join the cluster this process belongs to (RAY_ADDRESS, `ray job submit`), or start one.

    Raises ValueError, in one line, where the cluster does not answer or lets us not in.
    """
    if ray.is_initialized():
        return
    # Ray would put its own handler, with an exit code of its own, in the place of a job's.
    terminate = signal.getsignal(signal.SIGTERM)
    debug = EVENTS.isEnabledFor(logging.DEBUG)
    level = "debug" if debug else "error"
    options: dict[str, Any] = {"log_to_driver": debug, "logging_level": level}
    if address := os.environ.get("RAY_ADDRESS"):
        _check_address(address)
        try:
            ray.init(**options)
        except (ConnectionError, ray.exceptions.AuthenticationError):
            raise ValueError(
                f"the Ray cluster at RAY_ADDRESS {address} lets this process not in: give its "
                "token in RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH, and use its version of Ray"
            ) from None
    else:
        # Ray counts the container's cores itself; the dashboard costs seconds and memory.
        ray.init("local", include_dashboard=False, **options)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, terminate)


def _check_address(address: str) -> None:
    """Raise ValueError where nobody listens at HOST:PORT: Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():  # "auto" and "local" are Ray's to understand
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise ValueError(
            f"no Ray cluster answers at RAY_ADDRESS {address} ({error.strerror or error}): start "
            "it, correct the address, or unset it to work on this machine alone"
        ) from None


def place(workers: WorkerRange, cpus: int = 0, timeout: float = 0, *, global_batch: int = 0) -> int:
    """CPU cores of each worker, once the cluster can hold the fewest of `workers`.

    `cpus` 0 takes the largest number that leaves room for as many as there can be, or as
    `global_batch`, if it is given, has use for. Workers get a GPU each if any node that is there
    has one: the first node of a cluster that starts empty tells what the others are asked for with.

    Waits up to `timeout` seconds for a cluster that grows, then raises ValueError that says what
    was asked and what is there.
    """
    # An actor that the first group of a cluster asks for room: its process starts meanwhile. It
    # repeats all that it is asked for to the autoscaler, and overwrites what others ask there.
    coordinator = get_or_create_autoscaling_coordinator()
    requester = f"place-{uuid.uuid4().hex}"
    deadline = time.monotonic() + timeout
    least = cpus or 1
    while (most := _room(nodes := _nodes(), least)) < workers.min:
        bundle = {"CPU": least, **({"GPU": 1} if _have_gpus(nodes) else {})}
        if time.monotonic() >= deadline:
            coordinator.cancel_request.remote(requester)
            there = ", ".join(f"{_count(n, 'CPU')} CPU {_count(n, 'GPU')} GPU" for n in nodes)
            raise ValueError(
                f"workers: {workers.min} asked for with {least} CPU"
                f"{' and 1 GPU' if 'GPU' in bundle else ''} each, but the cluster has "
                f"{len(nodes)} node(s) ({there}): lower --workers, or raise --placement_timeout "
                "for a cluster that grows"
            )
        # An autoscaler grows for what is asked for, not for who waits.
        coordinator.request_resources.remote(requester, [bundle] * workers.min, REQUEST_EXPIRES_S)
        time.sleep(1)
    coordinator.cancel_request.remote(requester)
    if cpus:
        return cpus
    largest = max(_count(node, "CPU") for node in nodes)
    wanted = min(most, workers.max)
    if global_batch:
        wanted = useful_workers(wanted, global_batch, workers.min)
    return next(count for count in range(largest, 0, -1) if _room(nodes, count) >= wanted)


def room(cpus: int) -> int:
    """Workers of so many cores, and a GPU each where there are GPUs, that the cluster holds."""
    return _room(_nodes(), cpus)


def use_gpu() -> bool:
    """Whether the cluster's workers train on GPUs."""
    return _have_gpus(_nodes())


Node = dict[str, float]  # its resources, by name


def _nodes() -> list[Node]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _count(node: Node, resource: str) -> int:
    return int(node.get(resource, 0))


def _have_gpus(nodes: list[Node]) -> bool:
    return any(_count(node, "GPU") for node in nodes)


def _room(nodes: list[Node], cpus: int) -> int:
    slots = [_count(node, "CPU") // cpus for node in nodes]
    if _have_gpus(nodes):
        slots = [min(n, _count(node, "GPU")) for n, node in zip(slots, nodes, strict=True)]
    return sum(slots)


def launch(
    worker: str,
    payload: dict[str, Any],
    *,
    workers: WorkerRange,
    cpus: int,
    storage: StorageConfig,
    folder: str,
    global_batch: int = 1,
    max_failures: int = 0,
    progress: Any = None,
) -> Any:
    """Run `worker` ("module:function", called with `payload`) on a Ray Train group.

    Ray starts as many of an elastic range as there is room for and `global_batch` has use for. It
    starts the group again when that changes, once the workers have answered the run's
    ProgressActor, `progress`, with a checkpoint; it is told why a group that failed is started
    again. Returns rank 0's return value.

    Raises WorkError with the worker's own message for bad data, RuntimeError for anything else.
    """
    filesystem, path = pyarrow_filesystem(folder, storage)
    parent, name = str(PurePosixPath(path).parent), PurePosixPath(path).name
    gpu, fixed = use_gpu(), workers.min == workers.max
    trainer = _Trainer(
        _call,
        # By reference: Ray's controller would unpickle it, and import for seconds what is in it.
        train_loop_config={"worker": worker, "payload": ray.put(payload)},
        backend_config=ProcessGroup("nccl" if gpu else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers.max if fixed else (workers.min, workers.max),
            use_gpu=gpu,
            resources_per_worker={"CPU": cpus, **({"GPU": 1} if gpu else {})},
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=parent,
            storage_filesystem=filesystem,
            failure_config=ray.train.FailureConfig(max_failures=max_failures),
            callbacks=[ShowRestarts(progress)] if progress else [],
        ),
    )
    trainer.progress, trainer.global_batch = progress, global_batch
    try:
        return trainer.fit().return_value
    except (KeyboardInterrupt, SystemExit):
        trainer.abort()
        raise
    except ray.train.TrainingFailedError as error:
        cause = cause_of(error)
        kind = WorkError if isinstance(cause, ValueError) else RuntimeError
        raise kind(str(cause)) from error


class _Trainer(DataParallelTrainer):
    """Leaves interrupts to the job, where Ray's own handler would end it with exit code 0, and
    starts no process that is not needed: where an actor, a sweep's trial, calls `fit`, that is the
    controller."""

    progress: Any = None
    global_batch = 1
    _controller: Any = None

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()
        return [each for each in callbacks if not isinstance(each, UNUSED_CALLBACKS)]

    def _initialize_and_run_controller(self, **settings: Any) -> ray.train.Result:
        if self.scaling_config.elasticity_enabled:
            policy = ResizeAfterCheckpoint(self.scaling_config, self.progress, self.global_batch)
            settings["scaling_policy"] = policy
        if ray.get_runtime_context().get_actor_id() is None:
            return super()._initialize_and_run_controller(**settings)
        return run_in_actor(**settings)

    def _register_sigint_handler(self, controller: Any) -> None:
        self._controller = controller

    def abort(self) -> None:
        """End the workers before the run's lease is given back; the actor ends with them."""
        if self._controller is not None:
            with suppress(ray.exceptions.RayError):
                ray.get(self._controller.abort.remote(), timeout=ABORT_TIMEOUT_S)


def _call(call: dict[str, Any]) -> Any:
    """Import the worker where it runs, so that the driver never imports DeepSpeed."""
    import importlib

    module, function = call["worker"].split(":")
    return getattr(importlib.import_module(module), function)(ray.get(call["payload"]))
