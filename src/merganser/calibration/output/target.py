"""The working folder next to the target, in which statistics are written and a killed calibration continues."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from ...engine.output.failure import failures_of, write_error
from ...engine.output.lock import lock_target
from ...engine.output.ownership import MARKER, claim, survey
from ...errors import CheckpointError, MergeError, OutputError
from ...jsonfile import read_object
from ...statistics import STATISTICS_NAME
from .writer import write_json

__all__ = ["LEFT", "Target", "check_absent", "remove_earlier", "tidy", "working_names"]

_STATE = "state.json"
_DONE = f"{MARKER}.done"
"""Name of the marker during the last renaming, so that the finished folder never looks like one that a run is writing."""
LEFT = (_STATE, _DONE)
"""What a run that is killed at its very end may leave in a finished folder."""


class Target:
    """The output while it is being written. As a context manager it holds the target's lock.

    Finished files stay if the disk is full, memory runs out or the process ends, so that the same command continues.
    After an error that would occur again, they are removed.

    Args:
        out: The folder that appears when everything is done; it must not exist.
        fingerprint: Identifies the work; files of other work are not continued.
        about: Name of the file that describes the contents.

    Attributes:
        folder: Folder for the files.
        state: The state that an earlier run of the same work noted last; empty if there is none.
        finished: Whether that run had written everything, and was stopped within `publish`, which is all that is left.

    Raises:
        OutputError: The target exists, cannot be written, or another run works on it.
    """

    def __init__(self, out: Path, fingerprint: str, about: str = STATISTICS_NAME) -> None:
        self.out = out
        self._fingerprint = fingerprint
        check_absent(out)
        target = out.expanduser().resolve()
        self._target = target
        folder, lock = working_names(target.name)
        self.folder, self._lock_file = target.with_name(folder), target.with_name(lock)
        self._lock = lock_target(out, self._lock_file)
        try:
            if (self.folder / _DONE).is_file():
                # killed within publish
                (self.folder / _DONE).replace(self.folder / MARKER)
            left = survey(self.folder)
            self.state, self.finished = self._read_state()
            self._noted: Mapping[str, Any] = self.state
            if not self.state and not self.finished:
                left.remove()
                self.folder.mkdir(exist_ok=True)
                claim(self.folder, [_STATE, f".{_STATE}.new", about, f".{about}.new"])
        except OSError as error:
            self._lock.release()
            raise write_error(out, error) from None

    def __enter__(self) -> Target:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, MergeError) and not isinstance(error, OutputError):
            # files of others stay, and an error here must not replace the error being raised
            with contextlib.suppress(OSError):
                survey(self.folder).remove()
        self._lock.release()

    def claim(self, names: Iterable[str]) -> None:
        """Register files before they are written in the folder; "name/" stands for a folder and all its files.

        Raises:
            OutputError: The disk is full or failed.
        """
        with failures_of(self.out):
            claim(self.folder, names)

    def note(self, state: Mapping[str, Any]) -> None:
        """Store the state that a continued run needs.

        Raises:
            OutputError: The disk is full or failed.
        """
        self._noted = dict(state)
        write_json(self.folder / _STATE, {"fingerprint": self._fingerprint, "state": self._noted})

    def publish(self, working: Iterable[str] = ()) -> None:
        """Remove what only the making needed, and rename the working folder to the target.

        The state says first that everything is written: what is removed here would be missing in a run that is stopped
        meanwhile, and continues.

        Args:
            working: Names of the folders and files to remove; all were claimed.

        Raises:
            OutputError: The target appeared meanwhile, or the disk failed.
        """
        check_absent(self.out)
        if not self.finished:
            written = {"fingerprint": self._fingerprint, "state": self._noted, "finished": True}
            write_json(self.folder / _STATE, written)
            self.finished = True
        with failures_of(self.out):
            for name in working:
                _remove(self.folder / name)
            if self._target.exists():
                self._target.rmdir()
            # until it has its name, what a run that is killed meanwhile needs stays: the marker, to know its files, and the state
            (self.folder / MARKER).rename(self.folder / _DONE)
            self.folder.rename(self._target)
            tidy(self._target)

    def _read_state(self) -> tuple[dict[str, Any], bool]:
        """Return the state of an earlier run, and whether it had written everything."""
        file = self.folder / _STATE
        if not file.exists():
            return {}, False
        try:
            found = read_object(file)
        except CheckpointError:
            return {}, False
        state = found.get("state")
        if found.get("fingerprint") != self._fingerprint or not isinstance(state, dict):
            return {}, False
        return state, found.get("finished") is True


def working_names(name: str) -> tuple[str, str]:
    """Return the names of the working folder and of the lock of a target."""
    return f".{name}.calibrating", f".{name}.calibrating.lock"


def _remove(path: Path) -> None:
    """Remove a file, or a folder with its contents, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def tidy(target: Path) -> None:
    """Remove from a finished folder what a run left that was killed right after it named the folder."""
    if (target / _DONE).is_file():
        for name in LEFT:
            (target / name).unlink(missing_ok=True)


def remove_earlier(folder: Path, about: str = STATISTICS_NAME) -> None:
    """Remove a folder's files of an earlier run, so that others can be written there; the folder itself stays.

    The description goes last: what is left by a kill is removed by the next run.

    Args:
        folder: The folder, with a description.
        about: Name of the file that describes the contents.

    Raises:
        CheckpointError: The description is damaged.
        OutputError: A file cannot be removed.
    """
    tidy(folder)
    files = read_object(folder / about).get("files")
    with failures_of(folder):
        for name in files if isinstance(files, list) else ():
            # names as our files have them, and no path
            if isinstance(name, str) and Path(name).name == name:
                (folder / name).unlink(missing_ok=True)
        (folder / about).unlink()


def check_absent(out: Path) -> None:
    """Check that a target does not exist; an empty folder does not count.

    Of one that does, what a run that was killed at its very end left is removed.

    Raises:
        OutputError: The target exists.
    """
    try:
        path = out.expanduser()
        tidy(path)
        if path.is_symlink() or (path.exists() and (not path.is_dir() or any(path.iterdir()))):
            raise OutputError(f"{out}: exists; choose another folder, or remove it")
    except OSError as error:
        raise write_error(out, error) from None
    except (ValueError, RuntimeError) as error:
        raise OutputError(f"{str(out)!r}: is not the name of a folder: {error}") from None
