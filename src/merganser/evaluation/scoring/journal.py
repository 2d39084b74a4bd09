"""A journal file of the measurements of every item, from which an interrupted evaluation can continue."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from ...errors import OutputError
from ...files import sealed_line, unseal_line
from ...jsonfile import os_reason
from ...system import lock, lock_within, unlock

FORMAT = 2

_PATIENCE = 30.0
"""Seconds to wait for a line that another process writes, which takes milliseconds."""


def journal_path(out: Path) -> Path:
    """Return the path of the journal, in the folder of the results."""
    return out.with_name(f"{out.name}.items.jsonl")


def read_journal(path: Path) -> list[dict[str, Any]]:
    """Return the whole lines of a journal, without changing it; damaged lines are left out.

    Raises:
        OSError: It cannot be read.
    """
    with path.open("rb") as file:
        found = (unseal_line(line) for line in file)
        return [entry for entry in found if entry is not None]


class Journal:
    """Measurements of batches, by a key of model, task and settings, in a file of JSON lines or only in memory.

    Use it as a context manager.

    Args:
        path: The file; None for memory only.

    Raises:
        OutputError: It cannot be written, is not a journal, or another evaluation is writing it.
    """

    _buffering = -1

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._found: dict[tuple[str, int], Mapping[str, Any]] = {}
        self._seconds: dict[tuple[str, int], float] = {}
        self.notes: dict[str, Any] = {}
        self._file: Any = None
        if path is None:
            return
        try:
            self._file = path.open("a+b", buffering=self._buffering)
            self._lock()
            self._read()
        except OSError as error:
            self.close()
            if isinstance(error, OutputError):
                raise
            raise OutputError(f"{path}: cannot be written: {os_reason(error)}") from None
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def get(self, key: str, batch: int) -> Mapping[str, Any] | None:
        """Return the measurements of a batch, or None."""
        return self._found.get((key, batch))

    def seconds(self, key: str, batch: int) -> float:
        """Return how long a batch took to measure, in this run or an earlier one; 0 where it is not known."""
        return self._seconds.get((key, batch), 0.0)

    @property
    def keys(self) -> list[tuple[str, int]]:
        """Key and number of every batch."""
        return [*self._found]

    def add(self, key: str, batch: int, content: Mapping[str, Any], seconds: float | None = None, **about: str) -> None:
        """Store the measurements of a batch.

        Args:
            key: Hash of model, task and settings.
            batch: Number of the batch.
            content: The measurements, as plain data.
            seconds: How long they took; None if that is not needed.
            **about: Additional text, only for human readers of the file.

        Raises:
            OutputError: The file cannot be written, such as when the disk is full.
        """
        line: dict[str, Any] = {"key": key, **about, "batch": batch, "content": content}
        if seconds is not None:
            line["seconds"] = round(seconds, 4)
        self._take(line)
        self._write(line)

    def note(self, name: str, value: Any) -> None:
        """Store a decision that a continued evaluation must take over."""
        if self.notes.get(name) != value:
            self.notes[name] = value
            self._write({"note": name, "value": value})

    def refresh(self) -> None:
        """Take over what other processes wrote: nothing, as this one has the file for itself."""

    def close(self) -> None:
        """Close the file, which releases its lock."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None

    def _write(self, line: Mapping[str, Any]) -> None:
        if self._file is None:
            return
        try:
            self._file.write(sealed_line(line))
            self._file.flush()
        except OSError as error:
            raise OutputError(f"{self._path}: cannot be written: {os_reason(error)}") from None

    def _lock(self) -> None:
        try:
            lock(self._file.fileno())
        except BlockingIOError:
            raise OutputError(f"{self._path}: another evaluation is writing it; wait for it, or stop it") from None

    def _read(self) -> None:
        """Read the measurements of an earlier run; drop everything from the first truncated or damaged line on."""
        self._file.seek(0)
        length = 0
        for number, line in enumerate(self._file):
            entry = unseal_line(line)
            if number == 0 and not self._is_header(line):
                break
            if entry is None:
                break
            self._take(entry)
            length += len(line)
        self._file.truncate(length)
        if not length:
            self._write(_HEADER)

    def _is_header(self, line: bytes) -> bool:
        """Return whether the first line is whole and right; False if it is the beginning of a right one.

        Raises:
            OutputError: It is something else.
        """
        if unseal_line(line) == _HEADER:
            return True
        if not line.endswith(b"\n") and sealed_line(_HEADER).startswith(line):
            return False
        raise OutputError(
            f"{self._path}: is not a file of measurements of this version; remove it, or choose another name"
        )

    def _take(self, entry: Mapping[str, Any]) -> None:
        if "note" in entry:
            self.notes[entry["note"]] = entry["value"]
        elif "key" in entry:
            place = entry["key"], entry["batch"]
            self._found[place] = entry["content"]
            if "seconds" in entry:
                self._seconds[place] = entry["seconds"]


class SharedJournal(Journal):
    """A journal that several processes write, each one whole lines under a short lock.

    What a process that was killed left of a line is removed by the next one that writes. Damaged lines are passed over.

    Args:
        path: The file.

    Raises:
        OutputError: It cannot be written, is not a journal, or a process has it for itself.
    """

    # a line is one call of the system, so that it is whole even where there are no locks
    _buffering = 0

    def __init__(self, path: Path) -> None:
        self._end = 0
        super().__init__(path)

    def refresh(self) -> None:
        """Take over the lines that other processes wrote since the last call.

        Raises:
            OutputError: The file cannot be read, or is not a journal any more.
        """
        try:
            self._read_on()
        except OSError as error:
            if isinstance(error, OutputError):
                raise
            raise OutputError(f"{self._path}: cannot be read: {os_reason(error)}") from None

    def _lock(self) -> None:
        """Lock nothing yet: each line is written under a lock of its own."""

    def _read(self) -> None:
        with self._turn():
            if not self._end:
                self._append(_HEADER)

    def _write(self, line: Mapping[str, Any]) -> None:
        try:
            with self._turn():
                self._append(line)
        except OSError as error:
            if isinstance(error, OutputError):
                raise
            raise OutputError(f"{self._path}: cannot be written: {os_reason(error)}") from None

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """Hold the lock, with all whole lines read and nothing behind them."""
        descriptor = self._file.fileno()
        try:
            locked = lock_within(descriptor, _PATIENCE)
        except BlockingIOError:
            raise OutputError(f"{self._path}: another evaluation is writing it; wait for it, or stop it") from None
        try:
            self._read_on()
            if os.fstat(descriptor).st_size > self._end and locked:
                self._file.truncate(self._end)
            yield
        finally:
            unlock(descriptor)

    def _append(self, line: Mapping[str, Any]) -> None:
        left = memoryview(sealed_line(line))
        while left:
            left = left[self._file.write(left) :]
        self._read_on()

    def _read_on(self) -> None:
        if os.fstat(self._file.fileno()).st_size < self._end:
            # another program shortened it: read it again, and keep what was read before
            self._end = 0
        self._file.seek(self._end)
        *whole, rest = self._file.read().split(b"\n")
        if not self._end and not whole:
            # raises if it is something else
            self._is_header(rest)
        for line in (line + b"\n" for line in whole):
            if not self._end:
                self._is_header(line)
            entry = unseal_line(line)
            if entry is not None:
                self._take(entry)
            self._end += len(line)


_HEADER = {"kind": "evaluation items", "format": FORMAT}
