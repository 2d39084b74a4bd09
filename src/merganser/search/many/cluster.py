"""Carry out the trials of a search on a Ray cluster whose nodes share storage.

Ray only places workers. Each one is a process of its own on the same study, as if the command had been started there: it asks
for a trial when it has finished one, so that none waits for others. The trial of a worker that is lost is taken over by
another one.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...engine.stream.cluster import Cluster, lost_errors
from ...errors import MergeError, OutputError
from ..folder import Folder, open_folder
from ..setup import Request, prepare
from ..trials import Progress, Silent, Trials

_THREADS = 8
"""CPUs of a worker; more are of little use for the batches of a search, and each worker holds models of its own."""
_PATIENCE = 5
_POLL = 0.5


@dataclass(frozen=True)
class Place:
    """Where a worker runs.

    Args:
        node: Id of the node.
        threads: Threads of the worker.
        gpu: Whether it has a GPU.
    """

    node: str
    threads: int
    gpu: bool


class Worker:
    """A remote process that carries out trials."""

    def __init__(self, here: str, path: Path, request: Request, threads: int) -> None:
        self._here, self._path, self._request = here, path, request
        torch.set_num_threads(threads)

    def run(self, seconds: float | None) -> MergeError | None:
        """Carry out trials until there are enough, or for some seconds; return an error that the user can fix."""
        deadline = None if seconds is None else time.monotonic() + seconds
        try:
            self._enter()
            space, start = self._request.check()
            with open_folder(self._path, shared=True) as folder:
                prepared = prepare(self._request, space, start, folder, Silent())
                prepared.trials.run(self._request.trials, deadline, Silent())
        except MergeError as error:
            return error
        return None

    def _enter(self) -> None:
        try:
            os.chdir(self._here)
            known = (self._path / "search.json").is_file()
        except OSError:
            known = False
        if not known:
            raise OutputError(
                f"{self._path}: not found on a node of the cluster, in {self._here}; the folder of the search, models and "
                "tasks must be on storage that all nodes share, at the same path"
            )


@contextlib.contextmanager
def connect(address: str | None) -> Iterator[Cluster | None]:
    """Connect to a cluster.

    Args:
        address: As for `Cluster`; None for no cluster.

    Raises:
        MergeError: It cannot be reached.
        UnsupportedError: Ray is not installed.
    """
    cluster = None if address is None else Cluster(address)
    try:
        yield cluster
    finally:
        if cluster is not None:
            cluster.close()


def spread(
    cluster: Cluster, request: Request, folder: Folder, trials: Trials, deadline: float | None, progress: Progress
) -> None:
    """Carry out trials on a cluster, until there are enough or the deadline.

    Args:
        cluster: The cluster.
        request: What was asked for.
        folder: The folder of the search.
        trials: Its trials.
        deadline: On `time.monotonic()`; None for none.
        progress: Receives the progress.

    Raises:
        MergeError: A worker cannot go on, or too many are lost.
    """
    ray, lost = cluster.ray, 0
    actor = ray.remote(max_restarts=0)(Worker)

    def start(place: Place) -> tuple[Any, Any]:
        affinity = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(place.node, soft=True)
        options = {"num_cpus": 1, "num_gpus": int(place.gpu), "scheduling_strategy": affinity}
        worker = actor.options(**options).remote(str(Path.cwd()), folder.path.resolve(), request, place.threads)
        # the handle is kept: Ray ends an actor that nobody holds
        return worker.run.remote(None if deadline is None else max(deadline - time.monotonic(), 0.0)), worker

    with cluster.errors():
        places = find_places(ray.nodes(), gpu=request.wanted.device.type == "cuda")
        running = {}
        for place in places:
            answer, worker = start(place)
            running[answer] = (place, worker)
        progress.note(f"{len(running)} workers on {len({place.node for place in places})} nodes of the cluster")
        while running:
            ready, _ = ray.wait([*running], num_returns=1, timeout=_POLL)
            for trial in trials.refresh():
                progress.over(trial, trials.best if len(trials.objectives) == 1 else None)
            for answer in ready:
                place, _ = running.pop(answer)
                try:
                    error = ray.get(answer)
                except lost_errors(ray) as caught:
                    lost += 1
                    if lost > _PATIENCE:
                        raise MergeError(f"--cluster: {lost} workers were lost: {caught}") from None
                    answer, worker = start(place)
                    running[answer] = (place, worker)
                    continue
                if error is not None:
                    raise error


def find_places(nodes: list[dict[str, Any]], *, gpu: bool) -> list[Place]:
    """Return where workers run: one for each GPU, or for each eight CPUs of a node.

    Args:
        nodes: From `ray.nodes()`.
        gpu: Whether models run on GPUs.

    Raises:
        MergeError: There is no place.
    """
    found = []
    for node in nodes:
        resources = node.get("Resources", {})
        cpus = int(resources.get("CPU", 0))
        if not node.get("Alive") or cpus < 1:
            continue
        count = int(resources.get("GPU", 0)) if gpu else max(cpus // _THREADS, 1)
        found += [Place(node["NodeID"], max(cpus // max(count, 1), 1), gpu)] * count
    if not found:
        raise MergeError(f"--cluster: no node has a {'GPU' if gpu else 'CPU'} for a worker")
    return found
