"""Do the tasks of a schedule on threads of this process."""

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
    """Do all tasks; errors are left in the schedule.

    Args:
        schedule: Hands out the tasks.
        contexts: What the workers of each device share.
        kernels: The kernels of each device.
        workers: Number of threads; each device gets at least one.
        done: Told what each task gave, from any thread.
    """

    def work(index: int) -> None:
        worker = Worker(contexts[index])
        while (taken := schedule.take()) is not None:
            state, task = taken
            # statistics lie on the CPU, so that every device can go on where another measured
            own = state if index == 0 else replace(state, runs=start_group(state.group, kernels[index]).runs)
            done(state, task, worker.do(own, task))

    n = len(contexts)
    join([partial(work, i % n) for i in range(max(workers, n))], schedule)


class Stoppable(Protocol):
    """What hands out work, and hears when to stop."""

    def fail(self, error: BaseException) -> None:
        """Stop everybody because of an error."""

    def stop(self) -> None:
        """Ask everybody to stop."""


def join(works: Sequence[Callable[[], None]], schedule: Stoppable) -> None:
    """Run functions on threads of their own until all have ended; errors are left in the schedule.

    Each of them computes on one thread, whatever the environment says: products of matrices depend on it to the bit.
    """

    def guarded(work: Callable[[], None]) -> None:
        try:
            # OpenMP takes its number for each thread from the environment; torch would tell it after the first product
            torch.set_num_threads(1)
            work()
        except Stopped:
            pass
        except BaseException as error:
            schedule.fail(error)

    threads = [threading.Thread(target=guarded, args=(work,), daemon=True) for work in works]
    try:
        # torch remembers the number of the thread that set it last, for all
        with one_thread():
            for thread in threads:
                start_thread(thread)
            for thread in threads:
                # with a timeout, so that Ctrl-C is heard
                while thread.is_alive():
                    thread.join(0.1)
    except BaseException:
        schedule.stop()
        deadline = time.monotonic() + 0.8
        for thread in threads:
            if thread.ident is not None:
                thread.join(max(deadline - time.monotonic(), 0))
        raise
