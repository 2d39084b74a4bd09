"""The journal of a run: one line per finished task, from which an interrupted run continues."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...files import sealed_line, unseal_line
from ...jsonfile import open_regular

JOURNAL = "journal.jsonl"

_LONGEST = 1 << 26
"""Read lines up to this length, bytes, more than any valid line has; a file of zeros would be one huge line."""


@dataclass(frozen=True, slots=True)
class Finished:
    """The tasks that an earlier run finished.

    Args:
        entries: Entries by group and segment; empty if the journal is of another merge.
        length: Length of the journal's valid part, bytes.
        damaged: Number of the first damaged line, counted from 1; None if there is none.
    """

    entries: Mapping[tuple[int, int], Mapping[str, Any]]
    length: int
    damaged: int | None = None


def read_journal(path: Path, fingerprint: str) -> Finished:
    """Read the tasks that an earlier run of the same merge finished, up to the first damaged line.

    Each line has a checksum; from the second line on, the checksum also covers the fingerprint of the merge.

    Args:
        path: The journal; it need not exist.
        fingerprint: Fingerprint of the merge.

    Raises:
        OSError: The journal cannot be read.
    """
    entries: dict[tuple[int, int], dict[str, Any]] = {}
    length = 0
    if not path.exists():
        return Finished(entries, length)
    with open_regular(path) as lines:
        for number, line in enumerate(iter(lambda: lines.readline(_LONGEST), b""), start=1):
            entry = unseal_line(line, "" if number == 1 else fingerprint)
            if entry is None:
                # an incomplete last line is not damage: the run was killed while it wrote
                return Finished(entries, length, number if line.endswith(b"\n") else None)
            if number > 1:
                entries[entry["group"], entry["segment"]] = entry
            elif entry["fingerprint"] != fingerprint:
                break
            length += len(line)
    return Finished(entries, length)


class Journal:
    """Records finished tasks in a file; thread-safe.

    Args:
        path: The file.
        fingerprint: Fingerprint of the merge.
        length: Length of its valid part, bytes; the rest is cut off.

    Raises:
        OSError: The file cannot be written.
    """

    def __init__(self, path: Path, fingerprint: str, length: int) -> None:
        self._fingerprint = fingerprint
        self._lock = threading.Lock()
        self._file = path.open("ab")
        self._file.truncate(length)
        if not length:
            self._write({"fingerprint": fingerprint}, "")

    def note(self, entry: Mapping[str, Any]) -> None:
        """Append the entry of a finished task.

        Raises:
            OSError: The disk is full or failed.
        """
        self._write(entry, self._fingerprint)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, entry: Mapping[str, Any], fingerprint: str) -> None:
        with self._lock:
            self._file.write(sealed_line(entry, fingerprint))
            self._file.flush()
