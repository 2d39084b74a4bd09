"""Run the tasks of a schedule on threads of this process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol

import torch

from ...process import one_thread, start_thread
from .groups import Task
from .schedule import GroupState, KernelCache, Schedule, start_group
from .worker import Context, Done, Stopped, Worker


def work_on_threads(
    schedule: Schedule,
    contexts: Sequence[Context],
    kernels: Sequence[KernelCache],
    workers: int,
    done: Callable[[GroupState, Task, Done], None],
) -> None:
    """Run all tasks; errors are stored in the schedule.

    Args:
        schedule: The schedule of tasks.
        contexts: For each device, what its workers share.
        kernels: The kernels of each device.
        workers: Number of threads; each device gets at least one.
        done: Called with the result of each task, from any thread.
    """

    def work(index: int) -> None:
        worker = Worker(contexts[index])
        while (taken := schedule.take()) is not None:
            state, task = taken
            # statistics are on the CPU, so that any device can continue a group that another one measured
            own = state if index == 0 else replace(state, runs=start_group(state.group, kernels[index]).runs)
            done(state, task, worker.do(own, task))

    n = len(contexts)
    join([partial(work, i % n) for i in range(max(workers, n))], schedule)


class Stoppable(Protocol):
    """A source of work that can be stopped."""

    def fail(self, error: BaseException) -> None:
        """Stop all workers because of an error."""

    def stop(self) -> None:
        """Ask all workers to stop."""


def join(works: Sequence[Callable[[], None]], schedule: Stoppable) -> None:
    """Run each function on its own thread until all have ended; errors are stored in the schedule.

    Each uses a single torch thread whatever the environment says, as the bits of matrix products depend on that number.
    """

    def guarded(work: Callable[[], None]) -> None:
        try:
            # OpenMP sets its thread count per thread from the environment; torch's own count would apply only after the
            # first product
            torch.set_num_threads(1)
            work()
        except Stopped:
            pass
        except BaseException as error:
            schedule.fail(error)

    threads = [threading.Thread(target=guarded, args=(work,), daemon=True) for work in works]
    try:
        # set_num_threads changes the count of the whole process, so restore it afterwards
        with one_thread():
            for thread in threads:
                start_thread(thread)
            for thread in threads:
                # a timeout, so that Ctrl-C is handled
                while thread.is_alive():
                    thread.join(0.1)
    except BaseException:
        schedule.stop()
        deadline = time.monotonic() + 0.8
        for thread in threads:
            if thread.ident is not None:
                thread.join(max(deadline - time.monotonic(), 0))
        raise
