"""How a finished output appears under its name: by one rename, or file by file where a folder cannot be renamed."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from dataclasses import replace
from pathlib import Path

from .journal import JOURNAL
from .ownership import MARKER, Owned, claim, claimed, covers, survey, unfinished

# a folder of a lower layer of overlayfs, such as one that came with a container's image; a mount point
_NOT_RENAMED = (errno.EXDEV, errno.EBUSY)

_TARGET_MARKER = f"{MARKER}.target"


def replaced_folder(target: Path) -> Path:
    """Return where the old output lies while the new one takes its place."""
    return target.with_name(f".{target.name}.replaced")


def working_names(target: Path) -> tuple[str, str]:
    """Return the names of the folder in which an output grows, and of its lock."""
    return f".{target.name}.merging", f".{target.name}.merging.lock"


def working_parent(target: Path) -> Path:
    """Return the folder in which the growing output lies: the target's own, so that one rename finishes it.

    It is the target itself where files could not be moved there from outside: on a mount point, such as a volume of a
    container, or where its parent is read-only.
    """
    if target.is_dir() and (_is_mount(target) or not os.access(target.parent, os.W_OK | os.X_OK)):
        return target
    return target.parent


def publish(folder: Path, target: Path, old: Owned, left: Owned) -> None:
    """Put a finished output in its place.

    Args:
        folder: The output, with its marker and journal.
        target: Its place.
        old: What is there.
        left: The output before that one, left by a run that was killed before it put another in its place.

    Raises:
        OutputError: What is there was changed.
        OSError: The system refused; the output, or what was there, is still complete.
    """
    old.check()
    if target.exists():
        left.remove()
    if folder.parent == target or not _rename(folder, target, old):
        _move_files(folder, target, old)
    with contextlib.suppress(OSError):
        left.remove()


def take_back(folder: Path, target: Path, skip: tuple[str, str]) -> None:
    """Undo a publishing file by file that was cut off, so that it can be continued like any other run.

    Args:
        folder: The output.
        target: Its place.
        skip: Names in the target that are not part of it.

    Raises:
        OutputError: One of the folders holds what is not ours.
        OSError: The system refused.
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
    """Rename the folder; return False where the system cannot, and nothing was done."""
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
    with contextlib.suppress(OSError):
        replace(old, folder=aside).remove()
    return True


def _move_files(folder: Path, target: Path, old: Owned) -> None:
    """Move the files one by one, the run record last; from the first to the last moment the target has a marker.

    What cannot work fails at the marker, before anything that was there is removed.
    """
    new = [name for name in survey(folder).files if name not in (MARKER, JOURNAL, _TARGET_MARKER)]
    target.mkdir(exist_ok=True)
    claim(folder, [_TARGET_MARKER])
    claim(folder, [*old.files, *new], marker=_TARGET_MARKER)
    (folder / _TARGET_MARKER).rename(target / MARKER)
    sync(target)
    # the run record first, so that nobody takes what is left for complete
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
    """Return whether something is mounted there, even another folder of the same disk."""
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
        # as the kernel writes them; the backslash first
        name = name.replace(bytes([byte]), b"\\%03o" % byte)
    return any(line.split(b" ")[4] == name for line in lines)


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
