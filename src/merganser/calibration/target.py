"""The working folder next to the target, in which statistics are written and a killed calibration continues."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from ..engine.output.failure import failures_of, write_error
from ..engine.output.lock import lock_target
from ..engine.output.ownership import MARKER, claim, survey
from ..errors import CheckpointError, MergeError, OutputError
from ..jsonfile import read_object
from ..statistics import STATISTICS_NAME
from .writer import write_json

__all__ = ["Target", "check_absent", "working_names"]

_STATE = "state.json"


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
            left = survey(self.folder)
            self.state = self._read_state()
            if not self.state:
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
        write_json(self.folder / _STATE, {"fingerprint": self._fingerprint, "state": dict(state)})

    def publish(self) -> None:
        """Rename the working folder to the target.

        Raises:
            OutputError: The target appeared meanwhile, or the disk failed.
        """
        check_absent(self.out)
        with failures_of(self.out):
            (self.folder / _STATE).unlink(missing_ok=True)
            if self._target.exists():
                self._target.rmdir()
            # the marker goes last: if the process ends before the renaming, the folder is still known to be ours
            self.folder.rename(self._target)
            (self._target / MARKER).unlink(missing_ok=True)

    def _read_state(self) -> dict[str, Any]:
        file = self.folder / _STATE
        if not file.exists():
            return {}
        try:
            found = read_object(file)
        except CheckpointError:
            return {}
        state = found.get("state")
        return state if found.get("fingerprint") == self._fingerprint and isinstance(state, dict) else {}


def working_names(name: str) -> tuple[str, str]:
    """Return the names of the working folder and of the lock of a target."""
    return f".{name}.calibrating", f".{name}.calibrating.lock"


def check_absent(out: Path) -> None:
    """Check that a target does not exist; an empty folder does not count.

    Raises:
        OutputError: The target exists.
    """
    try:
        path = out.expanduser()
        if path.is_symlink() or (path.exists() and (not path.is_dir() or any(path.iterdir()))):
            raise OutputError(f"{out}: exists; choose another folder, or remove it")
    except OSError as error:
        raise write_error(out, error) from None
    except (ValueError, RuntimeError) as error:
        raise OutputError(f"{str(out)!r}: is not the name of a folder: {error}") from None
