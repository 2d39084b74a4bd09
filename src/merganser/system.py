"""What differs between operating systems: flags of `open`, reading and writing at an offset, locks, ending processes.

Linux and macOS have every call used here. Where one is missing, as on Windows, the function falls back to what Python has
there; tests hide the calls to exercise that.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import subprocess
import threading
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]
try:
    import msvcrt
except ImportError:  # all others
    msvcrt = None  # type: ignore[assignment]

__all__ = [
    "CLOSE_ON_EXEC",
    "NO_BLOCKING",
    "NO_FOLLOW",
    "end_session",
    "lock",
    "lock_within",
    "open_binary",
    "process_runs",
    "read_at",
    "set_blocking",
    "start_flush",
    "sync",
    "unlink_locked",
    "unlock",
    "write_at",
]

CLOSE_ON_EXEC = getattr(os, "O_CLOEXEC", 0)
"""Programs that this process starts do not inherit the file. Windows does not inherit files by default."""
NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)
"""Opening a link fails. Windows has no such flag, and creating links there needs a right that few users have."""
NO_BLOCKING = getattr(os, "O_NONBLOCK", 0)
"""Opening a named pipe does not wait for a writer. Windows has no named pipes in folders."""

# errors of file systems that have no locks
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)
# Windows locks bytes, and other processes cannot read a locked byte, so lock one beyond the end of every file
_LOCKED_BYTE = 1 << 30

# the flag of Linux's sync_file_range that starts writing and does not wait
_START_WRITING = 2

_seeking = threading.Lock()


def open_binary(path: str | os.PathLike[str], flags: int, mode: int = 0o666) -> int:
    """Open a file as `os.open` does; on Windows, bytes are not changed as those of a text file.

    Raises:
        OSError: It cannot be opened.
    """
    return os.open(path, flags | getattr(os, "O_BINARY", 0) | CLOSE_ON_EXEC, mode)


def read_at(descriptor: int, buffer: memoryview, offset: int) -> int:
    """Fill a buffer with the bytes at an offset, from any thread.

    Args:
        descriptor: The file.
        buffer: Writable and contiguous, of bytes.
        offset: The first byte.

    Returns:
        The number of bytes read: fewer than the buffer holds only where the file ends.

    Raises:
        OSError: It cannot be read.
    """
    done = 0
    while done < len(buffer):
        if hasattr(os, "preadv"):
            count = os.preadv(descriptor, [buffer[done:]], offset + done)
        else:
            with _seeking:
                os.lseek(descriptor, offset + done, os.SEEK_SET)
                data = os.read(descriptor, len(buffer) - done)
            count = len(data)
            buffer[done : done + count] = data
        if not count:
            break
        done += count
    return done


def write_at(descriptor: int, data: memoryview, offset: int) -> None:
    """Write all bytes at an offset, from any thread.

    Raises:
        OSError: The disk is full or failed.
    """
    view = data.cast("B")
    while view:
        if hasattr(os, "pwrite"):
            count = os.pwrite(descriptor, view, offset)
        else:
            with _seeking:
                os.lseek(descriptor, offset, os.SEEK_SET)
                count = os.write(descriptor, view)
        offset += count
        view = view[count:]


def start_flush(descriptor: int, offset: int, nbytes: int) -> None:
    """Let the system begin to write a range of a file to disk, without waiting, so that less is left for `sync`.

    Only Linux has a call for it. It does nothing elsewhere, nor on file systems that cannot do it: `sync` is what counts.
    """
    call = _sync_file_range()
    if call is not None:
        call(descriptor, ctypes.c_int64(offset), ctypes.c_int64(nbytes), _START_WRITING)


@cache
def _sync_file_range() -> Callable[..., int] | None:
    try:
        return ctypes.CDLL(None).sync_file_range
    except (AttributeError, OSError, TypeError):
        return None


def sync(path: str | os.PathLike[str]) -> None:
    """Flush a file or a folder to disk; Windows cannot flush folders, and keeps their entries itself.

    Raises:
        OSError: The disk failed.
    """
    if os.name == "nt" and Path(path).is_dir():
        return
    # Windows flushes only what is open for writing
    descriptor = open_binary(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def set_blocking(descriptor: int) -> None:
    """Let reads from a file that was opened with `NO_BLOCKING` wait for data."""
    if NO_BLOCKING:
        os.set_blocking(descriptor, True)


def lock(descriptor: int) -> bool:
    """Lock an open file for this process until it is closed, without waiting.

    Returns:
        False if the file system, or the system, has no locks.

    Raises:
        BlockingIOError: Another process, or another descriptor, holds the lock.
        OSError: It cannot be locked for another reason.
    """
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        elif msvcrt is not None:
            _lock_byte(descriptor)
        else:
            return False
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return False
        raise
    return True


def lock_within(descriptor: int, seconds: float) -> bool:
    """Lock an open file as `lock` does, and wait while another process holds the lock.

    Args:
        descriptor: The file.
        seconds: How long to wait.

    Returns:
        False if the file system, or the system, has no locks.

    Raises:
        BlockingIOError: The lock was held all the time.
        OSError: It cannot be locked for another reason.
    """
    end, pause = time.monotonic() + seconds, 0.001
    while True:
        try:
            return lock(descriptor)
        except BlockingIOError:
            if time.monotonic() >= end:
                raise
        time.sleep(pause)
        pause = min(2 * pause, 0.1)


def unlock(descriptor: int) -> None:
    """Release the lock of an open file; nothing happens where there is none."""
    with contextlib.suppress(OSError):
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        elif msvcrt is not None:
            _at_locked_byte(descriptor, msvcrt.LK_UNLCK)  # type: ignore[attr-defined, unused-ignore]


def _lock_byte(descriptor: int) -> None:
    try:
        _at_locked_byte(descriptor, msvcrt.LK_NBLCK)  # type: ignore[attr-defined, unused-ignore]
    except PermissionError as error:
        raise BlockingIOError(errno.EWOULDBLOCK, "is locked by another process") from error


def _at_locked_byte(descriptor: int, mode: int) -> None:
    at = os.lseek(descriptor, 0, os.SEEK_CUR)
    os.lseek(descriptor, _LOCKED_BYTE, os.SEEK_SET)
    try:
        msvcrt.locking(descriptor, mode, 1)  # type: ignore[attr-defined, unused-ignore]
    finally:
        os.lseek(descriptor, at, os.SEEK_SET)


def unlink_locked(path: str | os.PathLike[str], descriptor: int) -> None:
    """Delete a locked file and close it.

    Where the system allows it, the file is deleted while it is still locked, so that nobody locks a deleted file.
    """
    if os.name != "nt":
        with contextlib.suppress(FileNotFoundError):
            Path(path).unlink()
        os.close(descriptor)
        return
    # Windows deletes no open file; if another process has opened it meanwhile, that one deletes it
    os.close(descriptor)
    with contextlib.suppress(FileNotFoundError, PermissionError):
        Path(path).unlink()


def end_session(process: subprocess.Popen[bytes]) -> None:
    """End a process that was started with `start_new_session=True`, and all that it started; on Windows, only itself."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if hasattr(os, "killpg"):
            import signal

            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()


def process_runs(pid: int) -> bool:
    """Return whether a process of this machine runs."""
    if os.name == "nt":
        # `os.kill` with signal 0 would interrupt it there
        import psutil

        return bool(psutil.pid_exists(pid))
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
