"""Move a finished output to its target: by one rename, or file by file where a folder cannot be renamed."""

from __future__ import annotations

import errno
import os
import sys
from dataclasses import replace
from pathlib import Path

from ...errors import OutputError
from ...system import sync
from .journal import JOURNAL
from .ownership import MARKER, Owned, claim, claimed, covers, survey, unfinished

# EXDEV: a folder in a lower layer of overlayfs, as in a container's image; EBUSY: a mount point
_NOT_RENAMED = (errno.EXDEV, errno.EBUSY)

_TARGET_MARKER = f"{MARKER}.target"


def replaced_folder(target: Path) -> Path:
    """Return the path to which the old output is moved while the new one replaces it."""
    return target.with_name(f".{target.name}.replaced")


def working_names(target: Path) -> tuple[str, str]:
    """Return the names of the staging folder and of the lock file."""
    return f".{target.name}.merging", f".{target.name}.merging.lock"


def working_parent(target: Path) -> Path:
    """Return the folder for the staging folder: the target's parent, so that one rename finishes the output.

    It is the target itself if a folder cannot be renamed to it: if it is a mount point, such as a volume of a
    container, or its parent is read-only.
    """
    if target.is_dir() and (_is_mount(target) or not os.access(target.parent, os.W_OK | os.X_OK)):
        return target
    return target.parent


def publish(folder: Path, target: Path, old: Owned, left: Owned) -> list[str]:
    """Move a finished output to its target.

    Args:
        folder: The staging folder, with its marker and journal.
        target: The target.
        old: The present contents of the target.
        left: An older output that a killed run moved aside and did not delete.

    Returns:
        Warnings about what could not be removed.

    Raises:
        OutputError: The contents of the target were changed.
        OSError: A file system operation failed; the new or the old output is still complete.
    """
    old.check()
    existed = target.exists()
    if existed:
        left.remove()
    if folder.parent == target or not _rename(folder, target, old):
        _move_files(folder, target, old)
    aside = replaced_folder(target)
    why = _remove(replace(old, folder=aside) if existed else left)
    if not aside.exists():
        return []
    why = why or "it holds files that were added during the run"
    return [f"{aside}: the replaced output could not be removed ({why}); the new output is complete"]


def _remove(owned: Owned) -> str | None:
    """Remove files of ours; return why if that fails."""
    try:
        owned.remove()
    except OutputError as error:
        return str(error)
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    return None


def take_back(folder: Path, target: Path, skip: tuple[str, str]) -> None:
    """Undo an interrupted file-by-file move, so that the run can be continued like any other.

    Args:
        folder: The staging folder.
        target: The target.
        skip: Names in the target that are not part of it.

    Raises:
        OutputError: One of the folders holds files that are not ours.
        OSError: A file system operation failed.
    """
    if not unfinished(target):
        return
    survey(folder)
    wanted = claimed(folder)
    for name in survey(target, skip=skip).files:
        if name != MARKER and covers(wanted, name) and not os.path.lexists(folder / name):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).rename(folder / name)
    survey(target, skip=skip).remove()


def _rename(folder: Path, target: Path, old: Owned) -> bool:
    """Rename the folder to the target; if the system cannot rename it, undo everything and return False."""
    aside = replaced_folder(target)
    exists = target.exists()
    marks = {name: (folder / name).read_bytes() for name in (JOURNAL, MARKER)}
    try:
        if exists:
            target.rename(aside)
    except OSError as error:
        if error.errno in _NOT_RENAMED:
            return False
        raise
    try:
        for name in marks:
            (folder / name).unlink()
        sync(folder)
        folder.rename(target)
    except OSError as error:
        if exists:
            aside.rename(target)
        for name in reversed(marks):
            (folder / name).write_bytes(marks[name])
        if error.errno in _NOT_RENAMED:
            return False
        raise
    sync(target.parent)
    return True


def _move_files(folder: Path, target: Path, old: Owned) -> None:
    """Move the files one by one, the run record last. The target has a marker until all are moved.

    The marker is moved first, so that a failure shows before any old file is removed.
    """
    new = [name for name in survey(folder).files if name not in (MARKER, JOURNAL, _TARGET_MARKER)]
    target.mkdir(exist_ok=True)
    claim(folder, [_TARGET_MARKER])
    claim(folder, [*old.files, *new], marker=_TARGET_MARKER)
    (folder / _TARGET_MARKER).rename(target / MARKER)
    sync(target)
    # remove the run record first, so that the remaining files do not look like a complete output
    for name in [*old.files][::-1]:
        (target / name).unlink(missing_ok=True)
    for name in old.folders:
        (target / name).rmdir()
    for name in new:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).rename(target / name)
    for parent in {(target / name).parent for name in new}:
        sync(parent)
    (target / MARKER).unlink()
    sync(target)
    survey(folder).remove()


def _is_mount(folder: Path) -> bool:
    """Return whether a folder is a mount point, including bind mounts of the same disk."""
    if folder.is_mount():
        return True
    if not sys.platform.startswith("linux"):
        return False
    try:
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return False
    name = os.fsencode(folder)
    for byte in b"\\ \t\n":
        # escaped as in mountinfo; the backslash first
        name = name.replace(bytes([byte]), b"\\%03o" % byte)
    return any(line.split(b" ")[4] == name for line in lines)
