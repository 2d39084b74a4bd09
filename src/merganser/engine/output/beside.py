"""Folders beside a target, for what its run works with until the target is written."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ...errors import MergeError, OutputError
from .failure import failures_of
from .leftovers import discard
from .lock import lock_target
from .ownership import claim, survey
from .staging import resolve_target

__all__ = ["continued_folder_beside", "folder_beside"]

_WORK = "work"
"""The folder within the one beside a target, in which everything is written."""


@contextmanager
def continued_folder_beside(out: Path, holds: str, names: Iterable[str] = (), *, fresh: bool) -> Iterator[Path]:
    """Lock a folder beside a target; remove it at the end, unless the run can be continued.

    It can be after a kill, Ctrl-C and a failure of the disk. After other errors the same command would fail again.

    Args:
        out: The target.
        holds: What is in the folder, for its name.
        names: Files that will be written in it; "name/" stands for a folder and all its files.
        fresh: Whether to remove what an interrupted run left.

    Raises:
        OutputError: The folder holds what merganser did not write, cannot be written, or another run uses it.
    """
    home = out.with_name(f".{out.name}.{holds}")
    guard = lock_target(out, home.with_name(f"{home.name}.lock"))
    try:
        with failures_of(home):
            found = survey(home)
            if fresh:
                found.remove()
            home.mkdir(exist_ok=True)
            claim(home, names)
        try:
            yield home
        except MergeError as error:
            if not isinstance(error, OutputError):
                discard(home)
            raise
        discard(home)
    finally:
        guard.release()


@contextmanager
def folder_beside(target: Path, doing: str) -> Iterator[Path]:
    """Make a folder beside a target, on its disk, which is removed at the end.

    If this run is killed, the next one of the same name removes the folder before it makes its own.

    Args:
        target: The target.
        doing: What is done meanwhile, for the folder's name.

    Raises:
        OutputError: It cannot be made, holds what merganser did not write, or another run uses it.
    """
    target = resolve_target(target)
    home = target.with_name(f".{target.name}.{doing}")
    guard = lock_target(target, home.with_name(f"{home.name}.lock"))
    try:
        with failures_of(target):
            survey(home).remove()
            home.mkdir()
            claim(home, [f"{_WORK}/"])
            (home / _WORK).mkdir()
        try:
            yield home / _WORK
        finally:
            discard(home)
    finally:
        guard.release()
