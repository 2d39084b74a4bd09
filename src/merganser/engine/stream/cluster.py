"""Spread the tasks of a run over a Ray cluster whose nodes share storage.

Ray only places the workers: the tasks are those of a local run, the driver assigns them by the same schedule, and each
node reads inputs and writes its ranges of the output itself. If a worker is lost, another repeats its task; this is
safe, as a task always writes the same bytes to the same position.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...checkpoint import Reader, Shard
from ...checkpoint.descriptors import Descriptors
from ...errors import MergeError, OutputError, UnsupportedError
from ...process import count_peak, peak_memory, reuse_freed_memory
from ...system import open_binary, write_at
from ..plan.plan import Plan
from .groups import Task, make_groups
from .schedule import GroupState, KernelCache, Schedule, start_group
from .worker import Context, Done, Stopped, Worker

_PATIENCE = 5


class SharedOutput:
    """The staging folder as a node sees it: files that the driver created, at the same path."""

    def __init__(self, folder: Path, shards: list[Shard]) -> None:
        self._folder = folder
        self._shards = shards
        self._files: Descriptors[int] = Descriptors()

    def write(self, shard: int, offset: int, data: memoryview) -> None:
        """Write bytes at their final position in a shard."""
        with self._files.lend(shard, lambda: self._open(shard)) as descriptor:
            write_at(descriptor, data, offset)

    def _open(self, shard: int) -> int:
        try:
            return open_binary(self._folder / self._shards[shard].name, os.O_RDWR)
        except OSError as error:
            raise OutputError(
                f"{self._folder}: not found on this node of the cluster ({error.strerror}); inputs and output must be on "
                "storage that all nodes share, at the same path"
            ) from None


class Node:
    """A remote worker: runs tasks independently of other workers."""

    def __init__(self, plan: Plan, folder: Path, allow_nonfinite: bool) -> None:
        reuse_freed_memory()
        torch.set_num_threads(1)
        self._groups = make_groups(plan)
        self._kernels = KernelCache(plan, torch.device("cpu"), check_finite=not allow_nonfinite)
        output = SharedOutput(folder, list(plan.shards))
        self._read = [0, 0, 0]
        context = Context(Reader(), output, torch.device("cpu"), self._advance, lambda: False, allow_nonfinite)
        self._worker = Worker(context)

    def ready(self) -> bool:
        """Return True: an answer shows that the cluster has started this worker."""
        return True

    def do(self, task: Task, known: list[dict[str, Tensor]]) -> tuple[Done | MergeError, list[int], int]:
        """Run a task; return its result or a MergeError, the amounts for `advance`, and the peak memory of this process."""
        self._read = [0, 0, 0]
        state = start_group(self._groups[task.group], self._kernels)
        state.known = known
        try:
            return self._worker.do(state, task), self._read, peak_memory()
        except MergeError as error:
            return error, self._read, peak_memory()

    def _advance(self, read: int, written: int, tensors: int) -> None:
        for i, more in enumerate((read, written, tensors)):
            self._read[i] += more


class Cluster:
    """A connection to a Ray cluster for one run.

    Args:
        address: As for `ray.init`: "auto", "HOST:PORT", "ray://HOST:PORT", or "local" for a cluster on this machine.

    Raises:
        UnsupportedError: Ray is not installed.
        MergeError: The cluster cannot be reached.
    """

    def __init__(self, address: str) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            import ray
        except ImportError:
            raise UnsupportedError("--cluster: Ray is not installed; pip install 'merganser[ray]'") from None
        self._ray = ray
        _knock(address)
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, ignore_reinit_error=True)
        except (OSError, RuntimeError, ValueError, ImportError, AssertionError, ray.exceptions.RayError) as error:
            raise MergeError(f"--cluster {address}: no Ray cluster answers there: {error}") from None

    @property
    def ray(self) -> Any:
        """The module, connected."""
        return self._ray

    def close(self) -> None:
        """Disconnect from the cluster."""
        self._ray.shutdown()

    def n_workers(self) -> int:
        """Return how many tasks the cluster runs at a time: one per CPU."""
        with self.errors():
            resources: dict[str, float] = self._ray.cluster_resources()  # type: ignore[no-untyped-call]
        return max(int(resources.get("CPU", 1)), 1)

    def share(self, plan: Plan) -> Any:
        """Put the plan into Ray's object store, from which every node can read it."""
        with self.errors():
            return self._ray.put(plan)

    def work(
        self,
        plan: Any,
        folder: Path,
        allow_nonfinite: bool,
        schedule: Schedule,
        done: Callable[[GroupState, Task, Done, list[int]], None],
    ) -> None:
        """Run tasks on one worker of the cluster until none is left; replace the worker if it is lost.

        Args:
            plan: From `share`.
            folder: The staging folder.
            allow_nonfinite: Merge NaN and infinity.
            schedule: The schedule of tasks.
            done: Called with the result of each task.
        """
        ray = self._ray
        remote = ray.remote(num_cpus=1, max_restarts=0)(Node)
        node, lost = None, 0
        while not schedule.finished:
            task = None
            try:
                if node is None:
                    node = remote.remote(plan, folder, allow_nonfinite)
                    # take a task only after the worker has started, so that no task waits for room in the cluster
                    self._wait(node.ready.remote(), schedule)
                taken = schedule.take()
                if taken is None:
                    return
                state, task = taken
                result, amounts, peak = self._wait(node.do.remote(task, state.known), schedule)
                # one worker at a time per thread, and its successors
                count_peak(f"cluster {threading.get_ident()}", peak)
            except lost_errors(ray) as error:
                if task is not None:
                    schedule.give_back(task)
                node, lost = None, lost + 1
                if lost > _PATIENCE:
                    raise MergeError(f"--cluster: {lost} workers were lost one after the other: {error}") from None
                time.sleep(min(0.2 * 2**lost, 5.0))
                continue
            lost = 0
            if isinstance(result, MergeError):
                raise result
            done(state, task, result, amounts)

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Tell what Ray refuses, such as a full object store; errors of our own code and lost workers stay as they are."""
        errors = self._ray.exceptions
        try:
            yield
        except (errors.RayTaskError, *lost_errors(self._ray)):
            raise
        except errors.RayError as error:
            first = str(error).strip().partition("\n")[0] or type(error).__name__
            raise MergeError(f"--cluster: Ray cannot go on: {first}") from None

    def _wait(self, reference: Any, schedule: Schedule) -> Any:
        """Wait for a worker's answer; stop waiting at the end of the run or on Ctrl-C."""
        while True:
            ready, _ = self._ray.wait([reference], timeout=0.2)
            if ready:
                with self.errors():
                    return self._ray.get(reference)
            if schedule.finished:
                raise Stopped


def lost_errors(ray: Any) -> tuple[type[BaseException], ...]:
    """Return the errors which say that a worker is lost, so that another one repeats its task."""
    return ray.exceptions.RayActorError, ray.exceptions.RaySystemError, ray.exceptions.NodeDiedError


# the opening of a connection of HTTP/2, which gRPC and thus Ray speak: a fixed text, and an empty frame of settings
_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
_SECONDS = 4


def _knock(address: str) -> None:
    """Check within seconds whether a server of gRPC listens at HOST:PORT; Ray itself would retry for minutes.

    Raises:
        MergeError: Nothing listens there, or something that is not Ray.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        with socket.create_connection((host, int(port)), timeout=_SECONDS) as connection:
            if os.environ.get("RAY_USE_TLS", "0") != "0":
                return
            connection.sendall(_GREETING)
            # the type of the first frame of the answer: settings
            answer = connection.recv(9)
    except (OSError, OverflowError) as error:
        raise MergeError(f"--cluster {address}: no Ray cluster answers there: {error}") from None
    if len(answer) < 4 or answer[3] != _GREETING[-6]:
        raise MergeError(f"--cluster {address}: no Ray cluster answers there, but another kind of server")
