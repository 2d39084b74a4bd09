"""File descriptors shared by threads: a bounded number is open at a time, for any number of files."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

__all__ = ["MAX_OPEN", "Descriptors"]

K = TypeVar("K")

MAX_OPEN = 64
"""Far below the 256 descriptors that some systems allow a process. Reopening costs little next to reading."""


class Descriptors(Generic[K]):
    """A cache of file descriptors by key: opened at first use, the least recently used closed when there are too many.

    Safe to use from many threads at once.

    Args:
        max_open: The largest number that stays open between uses.
    """

    def __init__(self, max_open: int = MAX_OPEN) -> None:
        self._max_open = max_open
        self._open: OrderedDict[K, int] = OrderedDict()
        self._users: dict[K, int] = {}
        self._changed = threading.Condition()
        self._closed = False

    def __len__(self) -> int:
        return len(self._open)

    @contextlib.contextmanager
    def lend(self, key: K, open_file: Callable[[], int]) -> Iterator[int]:
        """Yield a descriptor that stays open meanwhile: the system would reuse the number of a closed one.

        Args:
            key: Identifies the file.
            open_file: Opens the file and returns its descriptor.

        Raises:
            ValueError: The cache was closed.
        """
        with self._changed:
            if self._closed:
                raise ValueError("the files are closed")
            if key not in self._open:
                self._close_surplus(self._max_open - 1)
                self._open[key] = open_file()
            self._open.move_to_end(key)
            self._users[key] = self._users.get(key, 0) + 1
            descriptor = self._open[key]
        try:
            yield descriptor
        finally:
            with self._changed:
                self._users[key] -= 1
                if not self._users[key]:
                    del self._users[key]
                self._close_surplus(self._max_open)
                self._changed.notify_all()

    def close(self) -> None:
        """Close all files, each as soon as no thread uses it."""
        with self._changed:
            self._closed = True
            self._changed.wait_for(lambda: not self._users)
            self._close_surplus(0)

    def _close_surplus(self, limit: int) -> None:
        """Close the least recently used files until `limit` are open; files in use stay open."""
        surplus = len(self._open) - limit
        if surplus > 0:
            for key in [key for key in self._open if key not in self._users][:surplus]:
                os.close(self._open.pop(key))
