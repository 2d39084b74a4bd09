"""A journal file of the measurements of every item, from which an interrupted evaluation can continue."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from ...errors import OutputError
from ...jsonfile import os_reason, sealed_line, unseal_line
from ...system import lock

FORMAT = 2


def journal_path(out: Path) -> Path:
    """Return the path of the journal, in the folder of the results."""
    return out.with_name(f"{out.name}.items.jsonl")


class Journal:
    """Measurements of batches, by a key of model, task and settings, in a file of JSON lines or only in memory.

    Use it as a context manager.

    Args:
        path: The file; None for memory only.

    Raises:
        OutputError: It cannot be written, is not a journal, or another evaluation is writing it.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._found: dict[tuple[str, int], Mapping[str, Any]] = {}
        self.notes: dict[str, Any] = {}
        self._file: Any = None
        if path is None:
            return
        try:
            self._file = path.open("a+b")
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

    @property
    def keys(self) -> list[tuple[str, int]]:
        """Key and number of every batch."""
        return [*self._found]

    def add(self, key: str, batch: int, content: Mapping[str, Any], **about: str) -> None:
        """Store the measurements of a batch.

        Args:
            key: Hash of model, task and settings.
            batch: Number of the batch.
            content: The measurements, as plain data.
            **about: Additional text, only for human readers of the file.

        Raises:
            OutputError: The file cannot be written, such as when the disk is full.
        """
        self._found[key, batch] = content
        self._write({"key": key, **about, "batch": batch, "content": content})

    def note(self, name: str, value: Any) -> None:
        """Store a decision that a continued evaluation must take over."""
        if self.notes.get(name) != value:
            self.notes[name] = value
            self._write({"note": name, "value": value})

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
            if number == 0 and entry != _HEADER:
                if not line.endswith(b"\n") and sealed_line(_HEADER).startswith(line):
                    break
                raise OutputError(
                    f"{self._path}: is not a file of measurements of this version; remove it, or choose another name"
                )
            if entry is None:
                break
            if "note" in entry:
                self.notes[entry["note"]] = entry["value"]
            elif "key" in entry:
                self._found[entry["key"], entry["batch"]] = entry["content"]
            length += len(line)
        self._file.truncate(length)
        if not length:
            self._write(_HEADER)


_HEADER = {"kind": "evaluation items", "format": FORMAT}
