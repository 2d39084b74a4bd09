"""Runs training jobs side by side, one process and one thread each, and says how long is left."""

import multiprocessing
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

# set in each worker by _enter; a worker serves one job at a time
_reports: Any = None
_barrier: Any = None


@dataclass(frozen=True)
class Job:
    """A call in a worker process; `work` is its size in any unit that all jobs share, here training tokens."""

    name: str
    work: int
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    silent: bool = False


class Workers:
    """A pool of fresh interpreters, so that nothing of one model's training reaches another's."""

    def __init__(self, threads: int, work: int) -> None:
        if threads < 1:
            raise ValueError(f"threads: must be at least 1, got {threads}")
        context = multiprocessing.get_context("spawn")
        self.threads = threads
        self._queue = context.Queue()
        barrier = context.Barrier(2) if threads > 1 else None
        self._stop = context.RawValue("b", 0)  # no lock that a dying worker could keep
        shared = (self._queue, barrier, self._stop)
        self._pool = ProcessPoolExecutor(threads, context, initializer=_enter, initargs=shared)
        self._meter = _Meter(work)

    def run(self, jobs: list[Job], finished: Callable[[str, dict[str, float]], None]) -> None:
        """Run the jobs, as many at once as there are workers.

        `finished(name, times)` is called here after each job, with its seconds and processor seconds.

        Raises:
            Exception: What the first failed job raised; the other jobs are dropped.
        """
        futures = {self._pool.submit(_call, job): job for job in jobs}
        pending = set(futures)
        while pending:
            self._drain()
            done, pending = wait(pending, timeout=0.5)
            for future in done:
                times = future.result()
                self._meter.finish(futures[future])
                finished(futures[future].name, times)

    def _drain(self) -> None:
        while True:
            try:
                self._meter.update(*self._queue.get_nowait())
            except queue.Empty:
                return

    def abandon(self) -> None:
        """Make the workers end at once; what they were making is lost."""
        self._stop.value = 1

    def close(self) -> None:
        """Wait for the workers to end."""
        self._pool.shutdown(cancel_futures=True)
        self._meter.close()


@contextmanager
def workers(threads: int, work: int) -> Iterator[Workers]:
    """Open a pool for jobs of `work` units in all."""
    pool = Workers(threads, work)
    try:
        yield pool
    except BaseException:
        pool.abandon()
        raise
    finally:
        pool.close()


def _enter(reports: Any, barrier: Any, stop: Any) -> None:
    global _reports, _barrier
    _reports, _barrier = reports, barrier
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the parent alone acts on it
    threading.Thread(target=_watch, args=(stop,), daemon=True).start()
    os.environ["TQDM_DISABLE"] = "1"  # progress is told by the parent, for all workers together
    import torch

    torch.set_num_threads(1)


def _watch(stop: Any) -> None:
    """End this worker when it is told to, or when the parent was killed and it would train on unseen."""
    parent = multiprocessing.parent_process()
    while not stop.value and parent.is_alive():
        time.sleep(0.3)
    os._exit(1)


def _call(job: Job) -> dict[str, float]:
    start, cpu = time.perf_counter(), time.process_time()
    job.function(lambda done, note="": report(job, done, note), *job.arguments)
    return {"seconds": round(time.perf_counter() - start, 1), "cpu_seconds": round(time.process_time() - cpu, 1)}


def report(job: Job, done: int, note: str) -> None:
    """Tell the parent how much of a job is done."""
    if _reports is not None and not job.silent:
        _reports.put((job.name, done, note))


def meet() -> None:
    """Wait until the other worker of a two-worker job arrives here; a lone worker goes on."""
    if _barrier is not None:
        # a partner that died breaks the barrier instead of leaving this one waiting
        _barrier.wait(timeout=600)


class _Meter:
    """Time left, from the work done since the start; one line on a terminal, a line every ten seconds elsewhere."""

    def __init__(self, work: int) -> None:
        self._work, self._start, self._last = work, time.monotonic(), 0.0
        self._done: dict[str, int] = {}
        self._finished: set[str] = set()
        self._notes: dict[str, str] = {}
        self._live = sys.stderr.isatty()

    def update(self, name: str, done: int, note: str) -> None:
        if name in self._finished:
            return
        self._done[name] = done
        self._notes[name] = note
        now = time.monotonic()
        if now - self._last < (0.5 if self._live else 10):
            return
        self._last = now
        total = sum(self._done.values())
        left = (now - self._start) * (self._work - total) / max(total, 1)
        running = ", ".join(f"{name} {note}" for name, note in self._notes.items())
        line = f"{total / max(self._work, 1):4.0%}  {_clock(left)} left  {running}"
        self._show(f"\r{line[:110]:<110}" if self._live else f"{line}\n")

    def finish(self, job: Job) -> None:
        if job.silent:
            return
        self._finished.add(job.name)
        self._done[job.name] = job.work
        self._notes.pop(job.name, None)
        taken = _clock(time.monotonic() - self._start)
        self._show(("\r" + " " * 110 + "\r" if self._live else "") + f"made {job.name} ({taken} since the start)\n")

    def close(self) -> None:
        if self._live:
            self._show("\r" + " " * 110 + "\r")

    def _show(self, text: str) -> None:
        sys.stderr.write(text)
        sys.stderr.flush()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
