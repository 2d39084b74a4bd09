"""Spread the tasks of a run over a Ray cluster whose nodes share storage.

Ray only places the work: the tasks are those of a local run, the driver hands them out by the same schedule, and each
node reads inputs and writes its ranges of the output by itself. A task whose worker was lost is done again, by another;
as every task writes the same bytes to the same place, doing one twice does no harm.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...checkpoint import Reader, Shard
from ...checkpoint.descriptors import Descriptors
from ...errors import MergeError, OutputError, UnsupportedError
from ...process import reuse_freed_memory
from ..kernels.compiled import prepare_compiler_cache
from ..output.staging import write_all
from ..plan.plan import Plan
from .groups import Task, make_groups
from .schedule import GroupState, KernelCache, Schedule, start_group
from .worker import Context, Done, Stopped, Worker

_PATIENCE = 5


class SharedOutput:
    """The growing output as a node sees it: files that the driver made, at the same path."""

    def __init__(self, folder: Path, shards: list[Shard]) -> None:
        self._folder = folder
        self._shards = shards
        self._files: Descriptors[int] = Descriptors()

    def write(self, shard: int, offset: int, data: memoryview) -> None:
        """Write bytes at their final place."""
        with self._files.lend(shard, lambda: self._open(shard)) as descriptor:
            write_all(descriptor, offset, data)

    def _open(self, shard: int) -> int:
        try:
            return os.open(self._folder / self._shards[shard].name, os.O_RDWR)
        except OSError as error:
            raise OutputError(
                f"{self._folder}: not seen by this node of the cluster ({error.strerror}); inputs and output must lie on "
                "storage that all nodes share, at the same path"
            ) from None


class Node:
    """A worker on some node: does tasks, knows nothing of the others."""

    def __init__(self, plan: Plan, folder: Path, allow_nonfinite: bool) -> None:
        reuse_freed_memory()
        torch.set_num_threads(1)
        if plan.compiled:
            prepare_compiler_cache()
        self._groups = make_groups(plan)
        self._kernels = KernelCache(plan, torch.device("cpu"), check_finite=not allow_nonfinite)
        output = SharedOutput(folder, list(plan.shards))
        self._read = [0, 0, 0]
        context = Context(Reader(), output, torch.device("cpu"), self._advance, lambda: False, allow_nonfinite)
        self._worker = Worker(context)

    def ready(self) -> bool:
        """Answer, to show that the cluster found a place for this worker."""
        return True

    def do(self, task: Task, known: list[dict[str, Tensor]]) -> tuple[Done | MergeError, list[int]]:
        """Do a task; return what it gave, or the user's error, and the bytes read and written."""
        self._read = [0, 0, 0]
        state = start_group(self._groups[task.group], self._kernels)
        state.known = known
        try:
            return self._worker.do(state, task), self._read
        except MergeError as error:
            return error, self._read

    def _advance(self, read: int, written: int, tensors: int) -> None:
        for i, more in enumerate((read, written, tensors)):
            self._read[i] += more


class Cluster:
    """A connection to a Ray cluster for one run.

    Args:
        address: As for `ray.init`: "auto", "HOST:PORT", "ray://HOST:PORT", or "local" for a cluster on this machine.

    Raises:
        UnsupportedError: Ray is not installed.
        MergeError: The cluster does not answer.
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
        except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
            raise MergeError(f"--cluster {address}: no Ray cluster answers there: {error}") from None

    def close(self) -> None:
        """Leave the cluster."""
        self._ray.shutdown()

    def n_workers(self) -> int:
        """Return how many tasks the cluster can do at a time: one per CPU."""
        resources: dict[str, float] = self._ray.cluster_resources()  # type: ignore[no-untyped-call]
        return max(int(resources.get("CPU", 1)), 1)

    def share(self, plan: Plan) -> Any:
        """Put the plan where every node can take it."""
        return self._ray.put(plan)

    def work(
        self,
        plan: Any,
        folder: Path,
        allow_nonfinite: bool,
        schedule: Schedule,
        done: Callable[[GroupState, Task, Done, list[int]], None],
    ) -> None:
        """Hand tasks to one worker of the cluster until none is left; replace the worker when it is lost.

        Args:
            plan: From `share`.
            folder: The staging folder.
            allow_nonfinite: Merge NaN and infinity.
            schedule: Hands out tasks.
            done: Told what each task gave.
        """
        ray = self._ray
        remote = ray.remote(num_cpus=1, max_restarts=0)(Node)
        node, lost = None, 0
        while not schedule.finished:
            task = None
            try:
                if node is None:
                    node = remote.remote(plan, folder, allow_nonfinite)
                    # a task is taken only once the cluster has room for the worker
                    self._wait(node.ready.remote(), schedule)
                taken = schedule.take()
                if taken is None:
                    return
                state, task = taken
                result, amounts = self._wait(node.do.remote(task, state.known), schedule)
            except (ray.exceptions.RayActorError, ray.exceptions.RaySystemError, ray.exceptions.NodeDiedError) as error:
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

    def _wait(self, reference: Any, schedule: Schedule) -> Any:
        """Wait for a worker's answer, for the end of the run, and for Ctrl-C."""
        while True:
            ready, _ = self._ray.wait([reference], timeout=0.2)
            if ready:
                return self._ray.get(reference)
            if schedule.finished:
                raise Stopped


def _knock(address: str) -> None:
    """Find out within seconds whether anything listens at HOST:PORT; Ray itself tries for minutes.

    Raises:
        MergeError: Nothing does.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, OverflowError) as error:
        raise MergeError(f"--cluster {address}: no Ray cluster answers there: {error}") from None
