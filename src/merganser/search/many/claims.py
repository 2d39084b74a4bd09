"""Who works on a study, and who may do what only one may do at a time.

Every process has a file in the folder `claims`, which it locks and touches while it lives. What it works on holds its name,
so that others can tell a trial that is under way from one whose process was killed. A lock ends with its process on one machine;
of a process on another machine, whose lock may not be seen here, it counts when the file was touched last.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from ...errors import OutputError
from ...jsonfile import os_reason
from ...system import lock, lock_within, open_binary, process_runs, unlink_locked

_BEAT = 5.0
"""Seconds between two touches."""
_STALE = 60.0
"""Seconds after the last touch at which a process on another machine counts as dead."""
_NOTICE = 1.0
"""Seconds of waiting after which it is said."""
_TURN = ".turn"


class Claims:
    """The presence of this process in a study; `close` ends it.

    Args:
        folder: Folder of the files; it is made, and removed with the last process.

    Raises:
        OutputError: It cannot be written, or there are no locks and another process works here.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        host = re.sub(r"[^\w.-]", "_", socket.gethostname())[:60]
        self.name = f"{host}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._ended = threading.Event()
        try:
            with self.turn("begin"):
                others = [name for name in self._names() if self.lives(name)]
                self._descriptor = open_binary(folder / self.name, os.O_RDWR | os.O_CREAT | os.O_EXCL)
                self._locked = lock(self._descriptor)
                about = {"machine": _machine(), "process": os.getpid()}
                os.write(self._descriptor, json.dumps(about).encode())
        except OSError as error:
            if isinstance(error, OutputError):
                raise
            raise OutputError(f"{folder}: cannot be written: {os_reason(error)}") from None
        self._thread = threading.Thread(target=self._beat, name="claims", daemon=True)
        self._thread.start()
        if others and not self._locked:
            self.close()
            raise OutputError(
                f"{folder}: this file system has no locks, so one process has a study at a time, and {others[0]} works on it"
            )

    def lives(self, name: str) -> bool:
        """Return whether the process of a name is alive; the file of a dead one is removed."""
        if name == self.name:
            return True
        try:
            descriptor = open_binary(self._folder / name, os.O_RDWR)
        except OSError:
            return False
        try:
            locked = lock(descriptor)
            about = _read(descriptor)
            if about.get("machine") == _machine():
                process = about.get("process")
                alive = not locked and isinstance(process, int) and process_runs(process)
            else:
                alive = self._touched(descriptor)
        except BlockingIOError:
            alive = True
        except OSError:
            alive = False
        if alive:
            os.close(descriptor)
        else:
            unlink_locked(self._folder / name, descriptor)
        return alive

    @contextlib.contextmanager
    def turn(self, name: str, waiting: Callable[[], None] | None = None) -> Iterator[None]:
        """Wait until no other process is in this block.

        Args:
            name: Name of the block.
            waiting: Called once if it takes longer than a second.
        """
        path = self._folder / f"{name}{_TURN}"
        patience = _NOTICE
        while True:
            try:
                descriptor = open_binary(path, os.O_RDWR | os.O_CREAT)
            except FileNotFoundError:
                self._folder.mkdir(exist_ok=True)
                continue
            try:
                lock_within(descriptor, patience)
                if _is_at(path, descriptor):
                    break
            except BlockingIOError:
                if waiting is not None and patience == _NOTICE:
                    waiting()
                patience = 60.0
            except BaseException:
                os.close(descriptor)
                raise
            # held for long, or removed by the last process meanwhile
            os.close(descriptor)
        try:
            yield
        finally:
            os.close(descriptor)

    def others(self) -> list[str]:
        """Return the names of the other processes that work on the study."""
        return [name for name in self._names() if name != self.name and self.lives(name)]

    def close(self) -> None:
        """End the presence of this process."""
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(OSError), self.turn("begin"):
            unlink_locked(self._folder / self.name, self._descriptor)
            if not [name for name in self._names() if self.lives(name)]:
                for path in self._folder.glob(f"*{_TURN}"):
                    path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self._folder.rmdir()

    def _names(self) -> list[str]:
        return sorted(path.name for path in self._folder.iterdir() if path.suffix != _TURN)

    def _beat(self) -> None:
        while not self._ended.wait(_BEAT):
            with contextlib.suppress(OSError):
                os.utime(self._folder / self.name)

    def _touched(self, descriptor: int) -> bool:
        """Return whether a file was touched lately, by the clock of the file system."""
        own = self._folder / self.name
        if not own.exists():
            # the file does not exist yet: write another one to read the clock of the file system
            own = self._folder / f"begin{_TURN}"
        os.utime(own)
        return os.fstat(descriptor).st_mtime > own.stat().st_mtime - _STALE


def _machine() -> str:
    """Return what identifies this machine, even among machines with the same name."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        boot = f"{uuid.getnode():x}"
    return f"{socket.gethostname()} {boot}"


def _read(descriptor: int) -> dict[str, object]:
    os.lseek(descriptor, 0, os.SEEK_SET)
    try:
        found = json.loads(os.read(descriptor, 4096) or b"{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return path.stat().st_ino == os.fstat(descriptor).st_ino
    except OSError:
        return False
