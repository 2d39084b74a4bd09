"""The folder beside the target in which an output grows, and the journal from which a killed run continues."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...checkpoint import Shard
from ...errors import OutputError
from .lock import acquire_lock, release_lock

_JOURNAL = "journal.jsonl"


class Staging:
    """The growing output; it holds the target's lock until it is published, kept or removed.

    Args:
        out: The target folder.
        shards: Files of the output.
        fingerprint: Identifies recipe, inputs and versions; another one never continues this journal.
        beside: Bytes that will be written beside the shards.
        overwrite: Whether the target may exist.
        fresh: Start again even where a run could be continued.

    Raises:
        OutputError: The target exists, its parent cannot be written, there is no room, or another run works on it.
    """

    def __init__(
        self,
        out: Path,
        shards: Sequence[Shard],
        fingerprint: str,
        *,
        beside: int = 0,
        overwrite: bool = False,
        fresh: bool = False,
    ) -> None:
        check_target(out, overwrite=overwrite)
        self.out = out
        # absolute: the current folder may change, and "a/.." has no name
        self.target = out.resolve()
        self.folder = self.target.with_name(f".{self.target.name}.merging")
        self._lock_file = self.target.with_name(f".{self.target.name}.merging.lock")
        self._shards = shards
        self._files: list[int] = []
        self._users = 0
        self._idle = threading.Condition()
        self._journal_lock = threading.Lock()
        try:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            self._guard: int | None = acquire_lock(self._lock_file)
        except OSError as error:
            raise self.write_error(error) from None
        if self._guard is None:
            raise OutputError(f"{out}: another run is writing it; wait for it, or stop it")
        self.continued = False
        try:
            self.folder.mkdir(exist_ok=True)
            self.finished, length = ({}, 0) if fresh else self._read_journal(fingerprint)
            self.continued = bool(self.finished)
            self._prepare(fingerprint, length, beside)
        except OSError as error:
            (self.keep if self.continued else self.remove)()
            raise self.write_error(error) from None

    def write(self, shard: int, offset: int, data: memoryview) -> None:
        """Write bytes at their final place.

        Raises:
            OutputError: The disk is full or failed.
        """
        try:
            with self._file(shard) as descriptor:
                write_all(descriptor, offset, data)
        except OSError as error:
            raise self.write_error(error) from None

    def read(self, shard: int, offset: int, buffer: memoryview) -> None:
        """Read back what was written.

        Raises:
            OutputError: The disk failed, or somebody cut the file.
        """
        view = buffer.cast("B")
        try:
            with self._file(shard) as descriptor:
                while view:
                    count = os.preadv(descriptor, [view], offset)
                    if not count:
                        name = self._shards[shard].name
                        raise OutputError(f"{self.folder}: {name} became shorter while it was written")
                    offset += count
                    view = view[count:]
        except OSError as error:
            raise self.write_error(error) from None

    def note(self, entry: Mapping[str, Any]) -> None:
        """Add a finished task to the journal.

        Raises:
            OutputError: The disk is full or failed.
        """
        line = json.dumps(entry, separators=(",", ":"))
        try:
            with self._journal_lock:
                self._journal.write(line + "\n")
                self._journal.flush()
        except OSError as error:
            raise self.write_error(error) from None

    def publish(self, *, overwrite: bool) -> None:
        """Make the output appear under its name, complete, on the disk.

        Raises:
            OutputError: The target appeared meanwhile, or the disk failed.
        """
        try:
            check_target(self.target, overwrite=overwrite)
            self._close_files()
            for path in self.folder.rglob("*"):
                _sync(path)
            (self.folder / _JOURNAL).unlink()
            _sync(self.folder)
            _replace(self.target, self.folder)
            _sync(self.target.parent)
        except OSError as error:
            raise self.write_error(error) from None
        self._release()

    def keep(self) -> None:
        """Leave the folder for the next run to continue."""
        self._close_files()
        self._release()

    def remove(self) -> None:
        """Delete the folder and all in it."""
        self._close_files()
        shutil.rmtree(self.folder, ignore_errors=True)
        self._release()

    def write_error(self, error: OSError) -> OutputError:
        """Turn an error of the system into one with a remedy."""
        if isinstance(error, OutputError):
            return error
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return OutputError(
                f"{self.out}: the disk is full; free some room and run the same command again, it continues"
            )
        return OutputError(f"{self.out}: cannot be written: {error.strerror or error}")

    @contextlib.contextmanager
    def _file(self, shard: int) -> Iterator[int]:
        """Lend a shard's descriptor; it is not closed meanwhile, since its number may be reused at once."""
        with self._idle:
            if not self._files:
                raise OutputError(f"{self.out}: the run has ended")
            self._users += 1
        try:
            yield self._files[shard]
        finally:
            with self._idle:
                self._users -= 1
                self._idle.notify_all()

    def _close_files(self) -> None:
        """Close the shards and the journal, when no thread uses them any more."""
        with self._idle:
            files, self._files = self._files, []
            self._idle.wait_for(lambda: not self._users)
        for descriptor in files:
            os.close(descriptor)
        if hasattr(self, "_journal"):
            with contextlib.suppress(OSError):
                self._journal.close()

    def _release(self) -> None:
        """Give the lock back."""
        if self._guard is not None:
            release_lock(self._lock_file, self._guard)
            self._guard = None

    def _prepare(self, fingerprint: str, journal_length: int, beside: int) -> None:
        """Open the shards, with their headers and full sizes, and the journal."""
        if not self.continued:
            for path in self.folder.iterdir():
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        self._check_room(beside)
        for shard in self._shards:
            path = self.folder / shard.name
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            self._files.append(descriptor)
            os.ftruncate(descriptor, shard.size)
        for index, shard in enumerate(self._shards):
            self.write(index, 0, memoryview(shard.header))
        self._journal = (self.folder / _JOURNAL).open("a", encoding="utf-8")
        self._journal.truncate(journal_length)
        if not self.continued:
            self.note({"fingerprint": fingerprint})

    def _check_room(self, beside: int) -> None:
        needed = sum(shard.size for shard in self._shards) + beside
        present = sum(path.stat().st_blocks * 512 for path in self.folder.rglob("*"))
        free = shutil.disk_usage(self.folder).free
        if needed - present > free:
            raise OutputError(
                f"{self.out}: the disk is too full: {_megabytes(needed - present)} are to be written, "
                f"{_megabytes(free)} are free; make room, or choose a target on another disk"
            )

    def _read_journal(self, fingerprint: str) -> tuple[dict[tuple[int, int], dict[str, Any]], int]:
        """Return the finished tasks by (group, segment), and the length of the journal's sound part, bytes.

        Nothing is finished where another merge was begun here.
        """
        found: dict[tuple[int, int], dict[str, Any]] = {}
        length = 0
        path = self.folder / _JOURNAL
        if not path.exists():
            return found, length
        with path.open("rb") as lines:
            for number, line in enumerate(lines):
                entry = _parse(line)
                # the last line of a killed run may be cut off; nothing behind a damaged one is trusted
                if entry is None or (entry != {"fingerprint": fingerprint} if number == 0 else "group" not in entry):
                    break
                if number:
                    found[entry["group"], entry["segment"]] = entry
                length += len(line)
        return found, length


def check_target(out: Path, *, overwrite: bool) -> None:
    """Refuse a target that would be lost.

    Raises:
        OutputError: The target exists and may not be replaced.
    """
    try:
        if out.is_symlink():
            raise OutputError(f"{out}: is a link; choose another target, or the folder that it leads to")
        if not out.exists():
            return
        if not out.is_dir():
            raise OutputError(f"{out}: is not a folder; choose another target")
        if Path.cwd().is_relative_to(out.resolve()):
            raise OutputError(f"{out}: the current folder is in it, and would be replaced; choose another target")
        if not any(out.iterdir()):
            return
        if not overwrite:
            raise OutputError(f"{out}: exists; choose another target, or allow it to be replaced with --overwrite")
        if not (out / "merge.json").exists():
            raise OutputError(
                f"{out}: exists and was not written by merganser (it has no merge.json), "
                "so --overwrite does not touch it"
            )
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"{out}: cannot be written: {error.strerror or error}") from None


def write_all(descriptor: int, offset: int, data: memoryview) -> None:
    """Write bytes at their place in a file.

    Raises:
        OSError: The disk is full or failed.
    """
    view = data.cast("B")
    while view:
        count = os.pwrite(descriptor, view, offset)
        offset += count
        view = view[count:]


def _replace(target: Path, folder: Path) -> None:
    """Put a folder in the place of another, or of none."""
    old = target.with_name(f".{target.name}.replaced")
    exists = target.exists()
    if exists:
        # one may be there: of a run that was killed right here
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
    try:
        folder.rename(target)
    except OSError:
        if exists:
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _parse(line: bytes) -> dict[str, Any] | None:
    """Read a line of the journal; None if it is damaged."""
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    if not line.endswith(b"\n") or not isinstance(entry, dict):
        return None
    return entry


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _megabytes(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.1f} MB"
