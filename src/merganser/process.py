"""Memory and threads of this process: peak memory, memory limits, reuse of freed memory, one-thread computation."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import MemoryLimitError

__all__ = [
    "count_peak",
    "data_limit",
    "memory_here",
    "one_thread",
    "peak_memory",
    "release_freed_memory",
    "reuse_freed_memory",
]

# option numbers of mallopt, from malloc.h
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENAS = -1, -3, -8
_LARGEST_KEPT = 32 << 20


_others: dict[str, int] = {}


def count_peak(worker: str, nbytes: int) -> None:
    """Count the peak memory of another process that works for this one.

    Args:
        worker: Its name; of processes with the same name, one after the other, the largest counts.
        nbytes: Its peak resident memory so far, bytes.
    """
    _others[worker] = max(nbytes, _others.get(worker, 0))


def peak_memory() -> int:
    """Return the peak resident memory of this process and of those that work for it (`count_peak`), in bytes."""
    return _own_peak() + sum(_others.values())


def _own_peak() -> int:
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        pass
    if os.name == "nt":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    # Only a fallback on Linux: a child inherits ru_maxrss, so it could be the peak of the parent process.
    import resource

    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return usage if sys.platform == "darwin" else usage * 1024


def memory_here(root: Path = Path("/")) -> int | None:
    """Return the memory of the machine, or a smaller limit of this process or its control group (container), in bytes.

    Args:
        root: Root of the file system; tests pass another one.

    Returns:
        The smallest limit that could be read; None if there is none.
    """
    try:
        limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    except (ValueError, OSError, AttributeError):
        limits = [] if os.name != "nt" else [_windows_memory()]
    groups = root / "sys/fs/cgroup"
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        # version 2 is "0::PATH"; version 1 has a line for each controller
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            top, name = groups / "memory", "memory.limit_in_bytes"
        elif not controllers:
            top, name = groups, "memory.max"
        else:
            continue
        place = Path(path.lstrip("/"))
        # inside a container the path may be that of the host; the limit of the container is then in `top`
        limits += [limit for own in (place, *place.parents) if (limit := _limit(top / own / name)) is not None]
    limits += [limit for limit in map(_own_limit, ("RLIMIT_DATA", "RLIMIT_AS")) if limit is not None]
    return min(limits, default=None)


def _windows_memory() -> int:
    import psutil

    return int(psutil.virtual_memory().total)


def data_limit() -> int | None:
    """Return the number of bytes of data that this process may hold (`ulimit -d`); None if it is not limited."""
    return _own_limit("RLIMIT_DATA")


def _own_limit(kind: str) -> int | None:
    try:
        import resource

        limit = resource.getrlimit(getattr(resource, kind))[0]
    except (ImportError, AttributeError, ValueError, OSError):
        return None
    return None if limit == resource.RLIM_INFINITY else limit


def _limit(file: Path) -> int | None:
    try:
        text = file.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return None
    return int(text) if text.isdigit() else None


def reuse_freed_memory() -> None:
    """Let glibc keep freed blocks of up to 32 MiB, in one heap for all threads, until this process ends.

    A merge allocates and frees megabytes thousands of times. If glibc returns freed memory to the system, the kernel
    must clear every page again at the next allocation, which costs a tenth of a merge's time. Call this only in a
    process that runs nothing else. It does nothing if the environment configures the allocator, or with other C
    libraries.
    """
    chosen = any(name.startswith(("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")) for name in os.environ)
    if chosen or not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, value in ((_ARENAS, 1), (_MMAP_THRESHOLD, _LARGEST_KEPT), (_TRIM_THRESHOLD, (1 << 31) - 1)):
            mallopt(option, value)


NO_THREADS = (
    "threads: the system starts no more of them; use fewer with --threads, or raise the limit on processes (ulimit -u) "
    "or on memory (ulimit -d)"
)


def start_thread(thread: threading.Thread) -> None:
    """Start a thread.

    Raises:
        MemoryLimitError: The system allows no more threads.
    """
    try:
        thread.start()
    except RuntimeError:
        raise MemoryLimitError(NO_THREADS) from None


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute on one thread, so that results do not depend on how it splits small products among threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def release_freed_memory() -> None:
    """Return freed memory to the system; otherwise glibc keeps freed pieces between pieces in use.

    Does nothing with other C libraries.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None
    if trim is not None:
        trim(0)
