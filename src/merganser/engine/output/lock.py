"""A lock on a target, so that two runs cannot write it at once."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import platform
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ...errors import OutputError
from ...system import NO_FOLLOW, lock, open_binary, process_runs, unlink_locked
from .failure import failures_of


@dataclass(frozen=True, slots=True)
class Lock:
    """A lock that this process holds.

    Args:
        release: Releases it. The file is deleted while still locked, so that no other run locks a deleted file.
    """

    release: Callable[[], None]


def lock_target(out: Path, path: Path) -> Lock:
    """Lock a target.

    Args:
        out: The target as the user named it.
        path: The lock file, in a folder that is created if it does not exist.

    Raises:
        OutputError: Another run holds the lock, the folder cannot be written, or the file is not a lock.
    """
    with failures_of(out):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = acquire_lock(path)
    if lock is None:
        raise OutputError(f"{out}: another run is writing it; wait for it, or stop it")
    return lock


def acquire_lock(path: Path) -> Lock | None:
    """Lock a file, which the lock's release deletes; return None if another run holds the lock.

    Raises:
        OutputError: A file that is not a lock has this name, or it is unknown whether the lock is still held.
        OSError: The file cannot be created.
    """
    while True:
        descriptor = _open(path)
        try:
            locked = lock(descriptor)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError:
            os.close(descriptor)
            raise
        if not locked:
            os.close(descriptor)
            return _acquire_owner_file(path)
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_ino == os.fstat(descriptor).st_ino:
                return Lock(partial(unlink_locked, path, descriptor))
        # another run deleted the file after it was opened here: try again
        os.close(descriptor)


def _open(path: Path) -> int:
    """Open or create the file; refuse one that is not empty: it is not a lock, and releasing would delete it."""
    try:
        descriptor = open_binary(path, os.O_RDWR | os.O_CREAT | NO_FOLLOW)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR):
            raise _not_ours(path) from None
        raise
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_size:
        os.close(descriptor)
        raise _not_ours(path)
    return descriptor


def _acquire_owner_file(path: Path) -> Lock | None:
    """Lock by a file that names the owner, for file systems without flock; return None if the owner still runs."""
    file = path.with_name(f"{path.name}.owner")
    this_run = _Owner.of(os.getpid())
    while True:
        try:
            descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            if not _remove_stale(file):
                return None
            continue
        with os.fdopen(descriptor, "w", encoding="utf-8") as written:
            written.write(this_run.text())

        def release() -> None:
            for each in (file, path):
                each.unlink(missing_ok=True)

        return Lock(release)


@dataclass(frozen=True, slots=True)
class _Owner:
    """A process: pids are reused, so host, boot and start time of the process identify it together."""

    host: str
    boot: str
    pid: int
    started: str

    @classmethod
    def of(cls, pid: int) -> _Owner:
        """Return the identity of a process of this host."""
        return cls(platform.node(), _first("/proc/sys/kernel/random/boot_id"), pid, _started(pid))

    def text(self) -> str:
        return json.dumps([self.host, self.boot, self.pid, self.started])


def _remove_stale(file: Path) -> bool:
    """Remove an owner file if its process has ended; return False if it still runs.

    Raises:
        OutputError: The file is not an owner file, or names another host, whose processes cannot be checked.
    """
    try:
        text = _read(file)
    except FileNotFoundError:
        return True
    try:
        host, boot, pid, started = json.loads(text)
        owner = _Owner(str(host), str(boot), int(pid), str(started))
    except (ValueError, TypeError, RecursionError, OverflowError):
        raise _not_ours(file) from None
    if owner.host != platform.node():
        raise OutputError(
            f"{file}: a run on {owner.host!r} (process {owner.pid}) writes this target, or was killed; this file system "
            "has no locks, so it is not known; if it has ended, delete this file"
        )
    if owner == _Owner.of(owner.pid) and process_runs(owner.pid):
        return False
    # only the run that creates this file removes the owner file, and only if it still names the same owner
    claim = file.with_name(f"{file.name}.{hashlib.sha256(text.encode()).hexdigest()[:16]}")
    try:
        os.close(os.open(claim, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    except FileExistsError:
        return False
    try:
        with contextlib.suppress(FileNotFoundError):
            if _read(file) == text:
                file.unlink()
    finally:
        claim.unlink()
    return True


def _read(file: Path) -> str:
    """Return the text of an owner file; empty if it is not a regular file."""
    for _ in range(10):
        if not stat.S_ISREG(file.lstat().st_mode):
            return ""
        text = file.read_text(encoding="utf-8", errors="replace")
        if text:
            return text
        # its owner has just created it and not yet written it
        time.sleep(0.02)
    return ""


def _started(pid: int) -> str:
    """Return the start time of a process in clock ticks; empty if the system does not provide it."""
    # split after the process name: it is in brackets and may contain spaces and brackets
    fields = _first(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return fields[19] if len(fields) > 19 else ""


def _first(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _not_ours(path: Path) -> OutputError:
    return OutputError(f"{path}: has the name of our lock file, but merganser did not create it; move it away")
