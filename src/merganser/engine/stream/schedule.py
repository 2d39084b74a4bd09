"""Divide a plan into tasks, and hand them out in an order that respects their dependencies.

A group is one large tensor, or a bundle of small ones. A large tensor is cut into segments of a fixed number of
blocks; each segment is a task in every pass. Measurements of a pass are added in the order of the segments, so that
results do not depend on which worker ran which task. The same tasks run on threads, processes or machines.
"""

from __future__ import annotations

import heapq
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...ops.random import keys
from ..kernels.blocks import TensorRun
from ..kernels.kernels import Kernels
from ..kernels.sums import Sum
from ..kernels.values import Values
from ..plan.plan import Plan
from ..plan.tensor import PlannedTensor
from .buffers import CachedInputs, InputCache
from .groups import Group, Task


class KernelCache:
    """The kernels of a run, one set per combination of static parameters and dtypes."""

    def __init__(self, plan: Plan, device: torch.device, *, check_finite: bool) -> None:
        self._plan = plan
        self._device = device
        self._check = check_finite
        self._kernels: dict[Any, Kernels] = {}
        self._found: dict[tuple[Any, ...], TensorRun] = {}
        self._values: dict[tuple[Any, ...], tuple[Kernels, Values]] = {}
        self._no_keys = keys(0, "", 1)
        self._lock = threading.Lock()

    def run(self, tensor: PlannedTensor) -> TensorRun:
        """Return the kernels and parameters to merge a tensor."""
        method = tensor.method
        settings = (
            id(tensor.parameters),
            tensor.compute_dtype.tag,
            tensor.result_dtype.tag,
            *tensor.located.values(),
        )
        shape = (tensor.shape, tensor.role, tensor.block_limit, tensor.turned)
        with self._lock:
            # many tensors share all of these
            alike = self._found.get((settings, shape))
            if alike is None:
                alike = self._found[settings, shape] = self._make(tensor, settings)
        random = keys(self._plan.seed, tensor.name, len(tensor.models)) if method.random else self._no_keys
        return alike.of(tensor.name, random)

    def _make(self, tensor: PlannedTensor, settings: tuple[Any, ...]) -> TensorRun:
        if settings not in self._values:
            values = Values.of(tensor.method, tensor.parameters, tensor.located)
            self._values[settings] = self._kernels_of(tensor, values), values
        kernels, values = self._values[settings]
        return TensorRun(kernels, values, tensor.working_shape, self._no_keys, tensor.block_limit, turned=tensor.turned)

    def _kernels_of(self, tensor: PlannedTensor, values: Values) -> Kernels:
        method, fused = tensor.method, self._plan.fused and tensor.method.fuse
        compute, output = (getattr(torch, dtype.name) for dtype in (tensor.compute_dtype, tensor.result_dtype))
        key = (method, tuple(values.static.items()), compute, output)
        if key not in self._kernels:
            self._kernels[key] = Kernels(
                method=method,
                static=values.static,
                compute=compute,
                output=output,
                device=self._device,
                fused=fused,
                check_finite=self._check,
            )
        return self._kernels[key]


@dataclass
class GroupState:
    """The progress of the work on a group.

    Args:
        group: The group.
        runs: The kernels and parameters of each tensor; None for copies.
        measurements: For each measuring pass: name and round of the statistic, and "row", "tensor" or "model".
        pass_number: The current pass; the one after the last measurement combines.
        known: Solved statistics of each tensor, by name.
        sums: Measurements of the current pass for each tensor.
        open_tasks: Number of unfinished tasks of the current pass.
        kept: Inputs of a large tensor, cached between passes.
    """

    group: Group
    runs: list[TensorRun | None]
    measurements: list[tuple[str, int, str]]
    pass_number: int = 0
    known: list[dict[str, Tensor]] = field(default_factory=list)
    sums: list[Sum] = field(default_factory=list)
    open_tasks: int = 0
    kept: CachedInputs | None = None


def start_group(group: Group, kernels: KernelCache, memory: InputCache | None = None) -> GroupState:
    """Prepare the work on a group.

    Args:
        group: The group.
        kernels: The kernels of a device.
        memory: Buffers to cache inputs in.
    """
    runs = [None if tensor.copy else kernels.run(tensor) for tensor in group.tensors]
    first = next((run for run in runs if run is not None), None)
    measurements = [
        (name, index, over)
        for name, statistic, over in (first.kernels.statistics if first else ())
        for index in range(len(statistic.rounds))
    ]
    kept = None if group.bundle or memory is None else memory.take(group.tensors[0])
    return GroupState(group, runs, measurements, known=[{} for _ in runs], kept=kept)


class Schedule:
    """Hands out tasks to workers; thread-safe.

    Args:
        groups: All groups.
        state: Creates the state of a group when its first task is needed.
        whole_model: Whether some statistic is measured over the whole model.
        finished: Segments that an earlier run finished, by group.
        memory: Buffers in which the groups' inputs are cached.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        state: Callable[[Group], GroupState],
        *,
        whole_model: bool,
        finished: Mapping[int, set[int]],
        memory: InputCache | None = None,
    ) -> None:
        self._groups = groups
        self._make = state
        self._whole = whole_model
        self._finished = finished
        self._memory = memory
        self._states: dict[int, GroupState] = {}
        self._ready: list[Task] = []
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self._stopped = False
        todo = [group for group in groups if len(finished.get(group.index, ())) < len(group.segments)]
        if whole_model:
            todo = list(groups)
        self._waiting: Iterator[Group] = iter(todo)
        self._left = len(todo)
        self._measuring = sum(any(t.over_model for t in group.tensors) for group in todo) if whole_model else 0
        self._arrived: list[GroupState] = []
        self._model_sum = Sum()
        self._solved: dict[str, Tensor] = {}
        self._busy = 0

    def take(self) -> tuple[GroupState, Task] | None:
        """Wait for a task and return it; None if all are done or the run is stopped.

        A worker that finds nothing to do while no other one is at work would wait for ever; this ends the run with an error.
        """
        while True:
            with self._changed:
                group = None
                while group is None:
                    if self.finished:
                        return None
                    if self._ready:
                        task = heapq.heappop(self._ready)
                        self._busy += 1
                        return self._states[task.group], task
                    group = next(self._waiting, None)
                    if group is not None:
                        self._busy += 1
                    elif self._busy:
                        self._changed.wait()
                    else:
                        self._error = RuntimeError(
                            f"{self._left} groups of tensors wait for a statistic that none measures"
                        )
            # not under the lock, as it takes a while for many small tensors
            state = self._make(group)
            with self._changed:
                self._busy -= 1
                self._states[group.index] = state
                self._open(state)
                self._changed.notify_all()

    def done(self, state: GroupState, task: Task, sums: Sequence[Sum]) -> None:
        """Report a task as done.

        Args:
            state: State of the task's group.
            task: The task.
            sums: Its measurements: one per tensor of the group, or a single one if it is over the model.
        """
        with self._changed:
            if task.pass_number not in (-1, len(state.measurements)):
                over_model = state.measurements[task.pass_number][2] == "model"
                for known, more in zip([self._model_sum] if over_model else state.sums, sums, strict=True):
                    known.merge(more)
            self._busy -= 1
            state.open_tasks -= 1
            if state.open_tasks == 0:
                self._advance(state, whole=task.pass_number == -1)
            self._changed.notify_all()

    def give_back(self, task: Task) -> None:
        """Put a task back for another worker, after its worker was lost."""
        with self._changed:
            self._busy -= 1
            heapq.heappush(self._ready, task)
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """Stop all workers because of an error."""
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()

    def stop(self) -> None:
        """Ask all workers to stop after their current block."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    @property
    def stopping(self) -> bool:
        """Whether workers should stop."""
        return self._stopped or self._error is not None

    @property
    def finished(self) -> bool:
        """Whether all tasks are done, or the run is stopped."""
        return self.stopping or not self._left

    @property
    def statistics(self) -> Mapping[str, Tensor]:
        """Solved statistics over the whole model, by name."""
        return self._solved

    @property
    def error(self) -> BaseException | None:
        """The first error, if any."""
        return self._error

    def _open(self, state: GroupState) -> None:
        """Put the tasks of the group's current pass on the heap."""
        group = state.group
        combining = state.pass_number == len(state.measurements)
        done = self._finished.get(group.index, set())
        if group.bundle and not self._whole:
            tasks = [Task(group.index, -1, 0)]
        else:
            segments = [s for s in range(len(group.segments)) if not (combining and s in done)]
            tasks = [Task(group.index, state.pass_number, s) for s in segments]
        state.open_tasks = len(tasks)
        state.sums = [] if combining else [Sum() for _ in state.runs]
        for task in tasks:
            heapq.heappush(self._ready, task)
        if not tasks:
            self._close(state)

    def _close(self, state: GroupState) -> None:
        self._left -= 1
        del self._states[state.group.index]
        if self._memory is not None and state.kept is not None:
            self._memory.give_back(state.kept)

    def _advance(self, state: GroupState, *, whole: bool) -> None:
        """Go to the next pass of a group, or of all groups if the pass was over the model."""
        if whole or state.pass_number == len(state.measurements):
            self._close(state)
            return
        name, index, over = state.measurements[state.pass_number]
        if over != "model":
            for run, known, found in zip(state.runs, state.known, state.sums, strict=True):
                if run is not None and not found.empty:
                    run.solve(name, index, found.total(), known, run.size)
            self._next(state)
            return
        self._arrived.append(state)
        if len(self._arrived) == self._measuring:
            self._solve_model(name, index)

    def _next(self, state: GroupState) -> None:
        """Go to the next pass of a group that measures something not known yet, or combines."""
        state.pass_number += 1
        while state.pass_number < len(state.measurements):
            name = state.measurements[state.pass_number][0]
            if any(run is not None and name not in known for run, known in zip(state.runs, state.known, strict=True)):
                break
            state.pass_number += 1
        self._open(state)

    def _solve_model(self, name: str, index: int) -> None:
        """Solve a round that was measured over the whole model, and go to the next pass of all groups."""
        states, self._arrived = self._arrived, []
        found, self._model_sum = self._model_sum, Sum()
        runs = [
            (run, known)
            for state in states
            for run, known in zip(state.runs, state.known, strict=True)
            if run is not None
        ]
        if not found.empty:
            first, known = runs[0]
            first.solve(name, index, found.total(), known, sum(run.size for run, _ in runs))
            solved = {key: known[key] for key in ("previous", name) if key in known}
            self._solved.update({key: value for key, value in solved.items() if key != "previous"})
            for _, other in runs[1:]:
                other.pop("previous", None)
                other.update(solved)
        for state in states:
            self._next(state)
