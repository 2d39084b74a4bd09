"""The folder beside the target in which an output grows, and the journal from which a killed run continues."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import xxhash

from ..checkpoint import Shard
from ..errors import OutputError

_JOURNAL = "journal.jsonl"


class Staging:
    """The growing output.

    Args:
        out: The target folder.
        shards: Files of the output.
        fingerprint: Identifies recipe, inputs and versions; another one never continues this journal.
        overwrite: Whether the target may exist.
        fresh: Start again even where a run could be continued.

    Raises:
        OutputError: The target exists, its parent does not, there is no room, or another run works on it.
    """

    def __init__(
        self, out: Path, shards: Sequence[Shard], fingerprint: str, *, overwrite: bool = False, fresh: bool = False
    ) -> None:
        self.out = out
        self.folder = out.with_name(f".{out.name}.merging")
        self._shards = shards
        self._lock = threading.Lock()
        self._files: list[int] = []
        self.continued = False
        check_target(out, overwrite=overwrite)
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            self.folder.mkdir(exist_ok=True)
            self._guard = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise OutputError(f"{out}: cannot be written: {error.strerror}") from None
        try:
            fcntl.flock(self._guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._guard)
            raise OutputError(f"{out}: another run is writing it; wait for it, or stop it") from None
        self.finished = {} if fresh else self._read_journal(fingerprint)
        self.continued = bool(self.finished)
        try:
            self._prepare(fingerprint)
        except OSError as error:
            (self.keep if self.continued else self.remove)()
            raise self.write_error(error) from None

    def write(self, shard: int, offset: int, data: memoryview) -> None:
        """Write bytes at their final place.

        Raises:
            OutputError: The disk is full or failed.
        """
        view = data.cast("B")
        try:
            while view:
                count = os.pwrite(self._files[shard], view, offset)
                offset += count
                view = view[count:]
        except OSError as error:
            raise self.write_error(error) from None

    def read(self, shard: int, offset: int, buffer: memoryview) -> None:
        """Read back what was written."""
        view = buffer.cast("B")
        while view:
            count = os.preadv(self._files[shard], [view], offset)
            if not count:
                raise OutputError(f"{self.folder}: {self._shards[shard].name} became shorter while it was written")
            offset += count
            view = view[count:]

    def note(self, entry: Mapping[str, Any]) -> None:
        """Add a finished task to the journal.

        Raises:
            OutputError: The disk is full or failed.
        """
        line = json.dumps(entry, separators=(",", ":"))
        try:
            with self._lock:
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
            self.close_files(sync=True)
            (self.folder / _JOURNAL).unlink()
            (self.folder / "lock").unlink()
            for path in self.folder.rglob("*"):
                _sync(path)
            _sync(self.folder)
            check_target(self.out, overwrite=overwrite)
            old = self.out.with_name(f".{self.out.name}.replaced")
            if self.out.exists():
                self.out.rename(old)
            self.folder.rename(self.out)
            if old.exists():
                shutil.rmtree(old)
            _sync(self.out.parent)
        except OSError as error:
            raise self.write_error(error) from None
        finally:
            os.close(self._guard)

    def keep(self) -> None:
        """Leave the folder for the next run to continue."""
        self.close_files(sync=False)
        os.close(self._guard)

    def remove(self) -> None:
        """Delete the folder and all in it."""
        self.close_files(sync=False)
        shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._guard)

    def close_files(self, *, sync: bool) -> None:
        """Close the shards and the journal."""
        for descriptor in self._files:
            if sync:
                os.fsync(descriptor)
            os.close(descriptor)
        self._files = []
        if hasattr(self, "_journal"):
            with contextlib.suppress(OSError):
                self._journal.close()

    def write_error(self, error: OSError) -> OutputError:
        """Turn an error of the system into one with a remedy."""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return OutputError(
                f"{self.out}: the disk is full; free some room and run the same command again, it continues"
            )
        return OutputError(f"{self.out}: cannot be written: {error.strerror or error}")

    def _prepare(self, fingerprint: str) -> None:
        """Open the shards, with their headers and full sizes, and the journal."""
        if not self.continued:
            for path in self.folder.iterdir():
                if path.name != "lock":
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        needed = sum(shard.size for shard in self._shards)
        present = sum(path.stat().st_blocks * 512 for path in self.folder.glob("*.safetensors"))
        free = shutil.disk_usage(self.folder).free
        if needed - present > free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        for shard in self._shards:
            descriptor = os.open(self.folder / shard.name, os.O_RDWR | os.O_CREAT, 0o644)
            self._files.append(descriptor)
            os.ftruncate(descriptor, shard.size)
            os.pwrite(descriptor, shard.header, 0)
        self._journal = (self.folder / _JOURNAL).open("a", encoding="utf-8")
        if not self.continued:
            self.note({"fingerprint": fingerprint})

    def _read_journal(self, fingerprint: str) -> dict[tuple[int, int], dict[str, Any]]:
        """Return the finished tasks by (group, segment); none where another merge was begun here."""
        path = self.folder / _JOURNAL
        if not path.exists():
            return {}
        found: dict[tuple[int, int], dict[str, Any]] = {}
        with path.open(encoding="utf-8", errors="replace") as lines:
            for number, line in enumerate(lines):
                try:
                    entry = json.loads(line)
                except ValueError:
                    # the last line of a killed run may be cut off
                    continue
                if number == 0 and entry.get("fingerprint") != fingerprint:
                    return {}
                if "group" in entry:
                    found[entry["group"], entry["segment"]] = entry
        return found


def check_target(out: Path, *, overwrite: bool) -> None:
    """Refuse a target that would be lost.

    Raises:
        OutputError: The target exists and may not be replaced.
    """
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise OutputError(f"{out}: is not a folder; choose another target")
    if not out.exists() or not any(out.iterdir()):
        return
    if not overwrite:
        raise OutputError(f"{out}: exists; choose another target, or allow it to be replaced with --overwrite")
    if not (out / "merge.json").exists():
        raise OutputError(
            f"{out}: exists and was not written by merganser (it has no merge.json), so --overwrite does not touch it"
        )


def digest(data: memoryview | bytes) -> bytes:
    """Return the xxh3-128 digest of some bytes."""
    return xxhash.xxh3_128_digest(data)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
