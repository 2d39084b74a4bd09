"""What was measured on every item, kept beside the results so that an interrupted evaluation continues."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from ..errors import OutputError
from ..jsonfile import os_reason

FORMAT = 1
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)


def journal_path(out: Path) -> Path:
    """Return the journal's place beside the results."""
    return out.with_name(f"{out.name}.items.jsonl")


class Journal:
    """Measurements of batches, by the key of model, task and settings; a file of JSON lines, or memory alone.

    Use it as a context manager.

    Args:
        path: The file; None keeps nothing.

    Raises:
        OutputError: It cannot be written, is something else, or another evaluation writes it.
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
        """Return what a batch gave, or None."""
        return self._found.get((key, batch))

    def add(self, key: str, batch: int, content: Mapping[str, Any], **about: str) -> None:
        """Keep what a batch gave.

        Args:
            key: Model, task and settings.
            batch: Number of the batch.
            content: What it gave, as plain data.
            **about: For whoever reads the file.

        Raises:
            OutputError: The disk is full or failed.
        """
        self._found[key, batch] = content
        self._write({"key": key, **about, "batch": batch, "content": content})

    def note(self, name: str, value: Any) -> None:
        """Keep a choice that a continued evaluation must make again."""
        if self.notes.get(name) != value:
            self.notes[name] = value
            self._write({"note": name, "value": value})

    def close(self) -> None:
        """Close the file, and let others have it."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None

    def _write(self, line: Mapping[str, Any]) -> None:
        if self._file is None:
            return
        try:
            self._file.write(json.dumps(line, separators=(",", ":")).encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise OutputError(f"{self._path}: cannot be written: {os_reason(error)}") from None

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(f"{self._path}: another evaluation is writing it; wait for it, or stop it") from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise

    def _read(self) -> None:
        """Read what an earlier run left; behind a line that is cut off or damaged nothing is trusted."""
        self._file.seek(0)
        length = 0
        for number, line in enumerate(self._file):
            entry = _parse(line)
            if number == 0 and entry != _HEADER:
                if not line.endswith(b"\n") and json.dumps(_HEADER, separators=(",", ":")).encode().startswith(line):
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


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if line.endswith(b"\n") and isinstance(entry, dict) else None
