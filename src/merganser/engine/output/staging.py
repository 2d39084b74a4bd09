"""The staging folder, in which an output is written next to its target, and from which a killed run continues."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...checkpoint import Shard
from ...checkpoint.descriptors import Descriptors
from ...errors import OutputError
from ...system import NO_FOLLOW, open_binary, read_at, start_flush, sync, write_at
from ...wording import size_text
from .failure import failures_of, write_error
from .journal import JOURNAL, Finished, Journal, read_journal
from .leftovers import sweep
from .lock import Lock, lock_target
from .ownership import MARKER, Owned, claim, survey, unfinished
from .publish import publish, replaced_folder, take_back, working_names, working_parent


class Staging:
    """The staging folder of a run; it holds the target's lock until the output is published, kept or removed.

    Args:
        out: The target folder.
        shards: Weight files of the output.
        fingerprint: Hash of recipe, inputs and versions; only a run with the same one continues the journal.
        beside: Bytes of files that will be written besides the shards.
        overwrite: Whether the target may exist.
        fresh: Start again even if a run could be continued.

    Raises:
        OutputError: The target exists, its parent cannot be written, the disk is too full, or another run writes it.
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
        self._old = check_target(out, overwrite=overwrite)
        self.out = out
        # resolve the path: the current folder may change, and "a/.." has no name
        self.target = resolve_target(out)
        self._hidden = working_names(self.target)
        self.folder, lock = (working_parent(self.target) / name for name in self._hidden)
        self._shards = shards
        self._files: Descriptors[int] = Descriptors()
        self._journal: Journal | None = None
        self.continued = False
        self.warnings: list[str] = []
        self._lock: Lock | None = lock_target(out, lock)
        made = not os.path.lexists(self.folder)
        try:
            self._begin(fingerprint, beside, fresh)
        except OSError as error:
            (self.remove if made else self.keep)()
            raise self.write_error(error) from None
        except BaseException:
            self.keep()
            raise

    def write(self, shard: int, offset: int, data: memoryview) -> None:
        """Write bytes at their final position in a shard.

        Raises:
            OutputError: The disk is full or failed.
        """
        with failures_of(self.out), self._file(shard) as descriptor:
            write_at(descriptor, data, offset)

    def read(self, shard: int, offset: int, buffer: memoryview) -> None:
        """Read back bytes of a shard.

        Raises:
            OutputError: The disk failed, or the file was truncated.
        """
        view = buffer.cast("B")
        with failures_of(self.out), self._file(shard) as descriptor:
            if read_at(descriptor, view, offset) < len(view):
                name = self._shards[shard].name
                raise OutputError(f"{self.folder}: {name} became shorter while it was written")

    def start_flush(self, shard: int, offset: int, nbytes: int) -> None:
        """Let the system begin to write bytes of a shard to disk, so that `publish` has less to wait for."""
        with failures_of(self.out), self._file(shard) as descriptor:
            start_flush(descriptor, offset, nbytes)

    def claim(self, names: Iterable[str]) -> None:
        """Register other files than the shards before they are created; "name/" is a folder with all contents.

        Raises:
            OutputError: The disk is full or failed.
        """
        with failures_of(self.out):
            claim(self.folder, names)

    def note(self, entry: Mapping[str, Any]) -> None:
        """Add a finished task to the journal.

        Raises:
            OutputError: The disk is full or failed.
        """
        assert self._journal is not None
        with failures_of(self.out):
            self._journal.note(entry)

    def publish(self) -> list[str]:
        """Move the complete output to its target, flushed to disk.

        Returns:
            Warnings about what could not be removed.

        Raises:
            OutputError: The target appeared or was changed during the run, or the disk failed.
        """
        try:
            if not self._old.files and os.path.lexists(self.target) and not _is_empty(self.target):
                raise OutputError(
                    f"{self.out}: exists now, and did not when the run began; move it away and run the same command "
                    "again, it continues"
                )
            survey(self.target, skip=self._hidden, hashing=False)
            self._close_files()
            for path in self.folder.rglob("*"):
                sync(path)
            warnings = publish(self.folder, self.target, self._old, self._left)
        except OSError as error:
            raise self.write_error(error) from None
        self._release()
        return warnings

    def keep(self) -> None:
        """Close the folder and leave it for the next run to continue."""
        self._close_files()
        self._release()

    def remove(self) -> None:
        """Delete the folder, unless it holds files that are not ours."""
        self._close_files()
        with contextlib.suppress(OSError):
            survey(self.folder).remove()
        self._release()

    def write_error(self, error: OSError) -> OutputError:
        """Turn an OSError into an error with a remedy."""
        return write_error(self.out, error)

    @contextlib.contextmanager
    def _file(self, shard: int) -> Iterator[int]:
        """Yield a shard's file descriptor."""

        def open_shard() -> int:
            return open_binary(self.folder / self._shards[shard].name, os.O_RDWR | NO_FOLLOW)

        with contextlib.ExitStack() as stack:
            try:
                descriptor = stack.enter_context(self._files.lend(shard, open_shard))
            except ValueError:
                raise OutputError(f"{self.out}: the run has ended") from None
            yield descriptor

    def _close_files(self) -> None:
        """Close the shards and the journal once no thread uses them."""
        self._files.close()
        if self._journal is not None:
            with contextlib.suppress(OSError):
                self._journal.close()

    def _release(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _begin(self, fingerprint: str, beside: int, fresh: bool) -> None:
        """Read an earlier run's journal, and prepare the folder: shards with headers and full sizes, and a journal."""
        take_back(self.folder, self.target, self._hidden)
        self._left = survey(replaced_folder(self.target))
        present_files = survey(self.folder)
        finished = Finished({}, 0)
        if unfinished(self.folder) and not fresh:
            finished = read_journal(self.folder / JOURNAL, fingerprint)
        if finished.damaged is not None:
            self.warnings.append(
                f"{self.folder / JOURNAL}: line {finished.damaged} is damaged; "
                "the work of this line and of those after it is repeated"
            )
        self.finished = finished.entries
        self.continued = bool(self.finished)
        names = [shard.name for shard in self._shards]
        kept = [JOURNAL, MARKER, *names] if self.continued else []
        replace(
            present_files, files={name: state for name, state in present_files.files.items() if name not in kept}
        ).remove()
        self.folder.mkdir(exist_ok=True)
        self._check_room(beside)
        self.claim([JOURNAL, *names])
        self._journal = Journal(self.folder / JOURNAL, fingerprint, finished.length if self.continued else 0)
        for index, shard in enumerate(self._shards):
            path = self.folder / shard.name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            with self._file(index) as descriptor:
                os.ftruncate(descriptor, shard.size)
            self.write(index, 0, memoryview(shard.header))

    def _check_room(self, beside: int) -> None:
        needed = sum(shard.size for shard in self._shards) + beside
        present = sum(path.lstat().st_blocks * 512 for path in self.folder.rglob("*"))
        free = shutil.disk_usage(self.folder).free
        if needed - present > free:
            raise OutputError(
                f"{self.out}: too little disk space: {size_text(needed - present)} are to be written, "
                f"{size_text(free)} are free; make room, or choose a target on another disk"
            )


def check_target(out: Path, *, overwrite: bool) -> Owned:
    """Refuse a target that must not be replaced.

    What runs that were killed at their very end left beside it is removed.

    Returns:
        The present contents of the target, which will be replaced.

    Raises:
        OutputError: The target exists and may not be replaced.
    """
    sweep(out)
    try:
        if out.is_symlink():
            raise OutputError(f"{out}: is a link; choose another target, or the folder that it leads to")
        if not out.exists():
            return Owned(out, {}, [])
        if not out.is_dir():
            raise OutputError(f"{out}: is not a folder; choose another target")
        target = resolve_target(out)
        if lies_in(_current_folder(), target):
            raise OutputError(f"{out}: the current folder is in it, and would be replaced; choose another target")
        # a target with a marker was being replaced by a run that was killed, so the user has already agreed
        if not overwrite and not _is_empty(target) and not unfinished(target):
            raise OutputError(f"{out}: exists; choose another target, or allow it to be replaced with --overwrite")
        contents = survey(out, skip=working_names(target))
        return Owned(target, {}, []) if unfinished(target) else replace(contents, folder=target)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"{out}: cannot be written: {error.strerror or error}") from None


def resolve_target(out: Path) -> Path:
    """Return the absolute path of a target, with links resolved.

    Raises:
        OutputError: The path is too long, the current folder was deleted, or links form a cycle.
    """
    try:
        target = out.resolve()
        target.exists()
    except (OSError, RuntimeError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise OutputError(f"{out}: cannot be written: {reason}") from None
    return target


def lies_in(path: Path, folder: Path) -> bool:
    """Return whether a path is a folder or is in it, also through links or under another name.

    A folder that is mounted at two places, as volumes of containers are, or named in capitals where the file system does
    not tell those apart, has paths that differ.
    """
    place = path.resolve()
    if place.is_relative_to(folder):
        return True
    try:
        return any(each.samefile(folder) for each in (place, *place.parents))
    except OSError:
        # one of them does not exist
        return False


def _is_empty(target: Path) -> bool:
    return all(path.name in working_names(target) for path in target.iterdir())


def _current_folder() -> Path:
    """Return the current folder; the root, which is in no target, if it was deleted."""
    try:
        return Path.cwd()
    except FileNotFoundError:
        return Path("/")
