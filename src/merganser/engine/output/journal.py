"""The journal of a run: a line for each finished task, from which a killed run continues."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...jsonfile import open_regular, sealed_line, unseal_line

JOURNAL = "journal.jsonl"

_LONGEST = 1 << 26
"""No line of ours is as long, bytes; a file of zeros would be read into memory as one line."""


@dataclass(frozen=True, slots=True)
class Finished:
    """What an earlier run finished.

    Args:
        entries: Entries by group and segment; none where another merge was begun here.
        length: Length of the journal's sound part, bytes.
        damaged: Number of the first line that is not as it was written, counted from 1; None where all are.
    """

    entries: Mapping[tuple[int, int], Mapping[str, Any]]
    length: int
    damaged: int | None = None


def read_journal(path: Path, fingerprint: str) -> Finished:
    """Read what an earlier run of the same merge finished; nothing behind a damaged line is trusted.

    Lines are sealed: the first one, which names the merge, by itself, and those behind it with the fingerprint.

    Args:
        path: The journal; it need not exist.
        fingerprint: Of the merge.

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
                # the last line of a killed run may be cut off
                return Finished(entries, length, number if line.endswith(b"\n") else None)
            if number > 1:
                entries[entry["group"], entry["segment"]] = entry
            elif entry["fingerprint"] != fingerprint:
                break
            length += len(line)
    return Finished(entries, length)


class Journal:
    """Takes down what is finished; thread-safe.

    Args:
        path: The file.
        fingerprint: Of the merge.
        length: Length of its sound part, bytes; what is behind that is cut off.

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
        """Add a finished task.

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
