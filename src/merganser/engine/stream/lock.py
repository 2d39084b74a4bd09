"""A lock on a target, so that two runs cannot write it at once."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from pathlib import Path

_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)


def acquire_lock(path: Path) -> int | None:
    """Lock a file that its owner deletes when he is done; None if another run holds it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(descriptor)
                raise
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_ino == os.fstat(descriptor).st_ino:
                return descriptor
        # its owner deleted it between the opening and the locking
        os.close(descriptor)


def release_lock(path: Path, descriptor: int) -> None:
    """Give a lock back; its file goes while it is still held, so that nobody holds one that has no name."""
    path.unlink(missing_ok=True)
    os.close(descriptor)
