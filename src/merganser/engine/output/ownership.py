"""What in a folder is ours: nothing else is ever removed.

A folder is ours whole or not at all, and only what is regular files in folders; links are never followed. There are two
kinds:

- An output is complete. Its run record lists every file with its size and sha256; what differs from that, or is not listed,
  belongs to the user. All files are hashed, however large: a model that was trained further and saved over the merged one
  has the same names and sizes. The merge itself hashes as many bytes while it writes.
- A folder that is still being written has no hashes yet. It holds a marker, to which each name is added before the file
  is made.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ...errors import CheckpointError, OutputError
from ...record.format import PAGE_NAME, RECORD_NAME, is_page
from ...record.verification import recorded_files
from .digests import file_hash

MARKER = ".merganser"
"""Lists what we put into a folder that is being written: a line of JSON for each file, or for a folder with all in it."""

STAGE_NOTE = ".stage.json"
"""In the folder of a stage: what it was made from. It is hidden, so that it is not taken for a file of the checkpoint."""

_FIRST_LINE = b"# merganser is writing this folder, and made what is listed here\n"

_STAGE_NOTES = (STAGE_NOTE, f"{STAGE_NOTE}.new")

_State = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Owned:
    """A folder that holds nothing but what is ours.

    Args:
        folder: The folder; it need not exist.
        files: Their paths below it, with size and time of change; last what tells that they are ours.
        folders: Paths of the folders below it, inner ones first.
    """

    folder: Path
    files: Mapping[str, _State]
    folders: Sequence[str]

    def check(self) -> None:
        """Refuse to go on where a file was changed since it was found to be ours.

        Raises:
            OutputError: One was; its name is in the message.
        """
        for name in self.folders:
            if (self.folder / name).is_symlink():
                raise _foreign(self.folder, name, "became a link")
        for name, state in self.files.items():
            with contextlib.suppress(FileNotFoundError):
                if _state((self.folder / name).lstat()) != state:
                    raise _foreign(self.folder, name, "was changed meanwhile")

    def remove(self) -> None:
        """Remove the files, and the folders that are empty then.

        Raises:
            OutputError: A file was changed meanwhile; nothing was removed.
            OSError: The system refused.
        """
        self.check()
        for name in self.files:
            (self.folder / name).unlink(missing_ok=True)
        for name in [*self.folders, "."]:
            # whatever came meanwhile stays, with its folder
            with contextlib.suppress(OSError):
                (self.folder / name).rmdir()

    def within(self, parent: Path) -> Owned:
        """Return the same files as part of a folder above."""
        name = self.folder.relative_to(parent).as_posix()
        files = {f"{name}/{file}": state for file, state in self.files.items()}
        return Owned(parent, files, [*(f"{name}/{each}" for each in self.folders), name])


def survey(folder: Path, *, skip: Collection[str] = (), hashing: bool = True) -> Owned:
    """Find out whether all that is in a folder is ours.

    Args:
        folder: The folder; it need not exist.
        skip: Names directly in it that are left out.
        hashing: Whether files of an output are compared with their hashes, and not by size alone.

    Raises:
        OutputError: Something in it is not ours: the first one is named.
    """
    try:
        if not os.path.lexists(folder):
            return Owned(folder, {}, [])
        if folder.is_symlink() or not folder.is_dir():
            raise OutputError(f"{folder}: is not a folder that merganser made; move it away, or choose another target")
        files, folders = _walk(folder, skip)
        listed = _listed(folder, files)
        parents = {str(parent) for name in listed for parent in PurePosixPath(name).parents}
        for name in files:
            _refuse_unlisted(folder, name, files, listed)
            # a run that continues would write through it into a file elsewhere
            if MARKER in files and (folder / name).lstat().st_nlink > 1:
                raise _foreign(folder, name, "is a hard link")
        for name in folders:
            if name not in parents and not covers(listed, f"{name}/"):
                raise _foreign(folder, name, "is a folder that merganser did not make")
        for name in files if hashing else ():
            _refuse_changed(folder, name, listed.get(name))
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"{error.filename or folder}: cannot be read: {error.strerror or error}") from None
    proofs = sorted(files, key=lambda name: (name == RECORD_NAME) + 2 * (name == MARKER))
    return Owned(folder, {name: files[name] for name in proofs}, folders)


def survey_each(home: Path, *, known: Mapping[str, Owned] | None = None, hashing: bool = True) -> Owned:
    """Find out whether a folder holds nothing but outputs, finished or not, and their locks.

    Args:
        home: The folder; it need not exist.
        known: Folders in it that were found to be ours already, by name.
        hashing: As for `survey`.

    Raises:
        OutputError: As for `survey`.
    """
    if not os.path.lexists(home) or home.is_symlink() or not home.is_dir():
        return survey(home)
    files: dict[str, _State] = {}
    folders: list[str] = []
    for path in sorted(home.iterdir()):
        status = path.lstat()
        if stat.S_ISDIR(status.st_mode):
            own = (known or {}).get(path.name) or survey(path, hashing=hashing)
            files |= own.within(home).files
            folders += own.within(home).folders
        elif stat.S_ISREG(status.st_mode) and path.name.endswith(".merging.lock") and not status.st_size:
            files[path.name] = _state(status)
        else:
            raise _foreign(home, path.name, _kind(status) or "merganser did not write")
    return Owned(home, files, folders)


def claim(folder: Path, names: Iterable[str], *, marker: str = MARKER) -> None:
    """Note in a folder's marker that these names are ours, before what they name is made.

    Args:
        folder: A folder that is being written; it holds nothing that is not ours.
        names: Paths of files below it; of folders, with all in them, where they end with a slash.
        marker: Name of the marker, where it is made for another folder.

    Raises:
        OSError: The marker cannot be written.
    """
    known = claimed(folder, marker=marker)
    lines = "".join(f"{json.dumps(name)}\n" for name in dict.fromkeys(names) if name not in known)
    # with no names in it, it may be cut off within its first line
    begun = len(known) > 1
    flags = os.O_APPEND if begun else os.O_TRUNC
    descriptor = os.open(folder / marker, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | flags, 0o666)
    with os.fdopen(descriptor, "wb") as file:
        # the last line may be cut off, too
        file.write((b"\n" if begun else _FIRST_LINE) + lines.encode())
        file.flush()
        os.fsync(descriptor)


def claimed(folder: Path, *, marker: str = MARKER) -> set[str]:
    """Return the names in a folder's marker; none where it has no marker."""
    path = folder / marker
    if path.is_symlink() or not path.is_file():
        return set()
    data = path.read_bytes()
    if not data.startswith(_FIRST_LINE):
        # cut off, or not ours
        return {MARKER} if _FIRST_LINE.startswith(data) else set()
    found = {MARKER}
    for line in data.removeprefix(_FIRST_LINE).split(b"\n")[:-1]:
        # a run that was killed while it wrote a line had not made that file yet
        with contextlib.suppress(ValueError, RecursionError):
            name = json.loads(line)
            if isinstance(name, str):
                found.add(name)
    return found


def unfinished(folder: Path) -> bool:
    """Return whether a folder has a marker: a run writes it, or was cut off."""
    return bool(claimed(folder))


def covers(listed: Collection[str], name: str) -> bool:
    """Return whether a name is among those, or in a folder among those."""
    return name in listed or any(each.endswith("/") and name.startswith(each) for each in listed)


_Listed = Mapping[str, tuple[int, str] | None]
"""Names of files that are ours, with size and sha256 where those are known."""


def _walk(folder: Path, skip: Collection[str]) -> tuple[dict[str, _State], list[str]]:
    """Return the files below a folder, and the folders, inner ones first; refuse what is neither."""
    files: dict[str, _State] = {}
    folders: list[str] = []
    for name, status in _entries(folder, ""):
        if name.split("/")[0] in skip:
            continue
        if stat.S_ISDIR(status.st_mode):
            folders.append(name)
        elif (kind := _kind(status)) is not None:
            raise _foreign(folder, name, kind)
        else:
            files[name] = _state(status)
    return files, folders


def _entries(folder: Path, prefix: str) -> Iterator[tuple[str, os.stat_result]]:
    """Yield everything below a folder, in order, what is in a folder before it."""
    with os.scandir(folder / prefix) as found:
        entries = sorted(found, key=lambda entry: entry.name)
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            yield from _entries(folder, f"{prefix}{entry.name}/")
        yield f"{prefix}{entry.name}", entry.stat(follow_symlinks=False)


def _listed(folder: Path, files: Mapping[str, _State]) -> _Listed:
    """Return what the marker lists, else what the run record does."""
    if claims := claimed(folder):
        return dict.fromkeys(claims)
    if RECORD_NAME not in files:
        return {}
    try:
        listed: dict[str, tuple[int, str] | None] = {
            name: (size, digest) for name, size, digest in recorded_files(folder)
        }
    except CheckpointError as error:
        raise OutputError(
            f"{folder}: was not written by merganser ({error}), so it is not touched; choose another target"
        ) from None
    return listed | dict.fromkeys([RECORD_NAME, PAGE_NAME, *_STAGE_NOTES])


def _refuse_unlisted(folder: Path, name: str, files: Mapping[str, _State], listed: _Listed) -> None:
    if not covers(listed, name):
        if not listed:
            raise OutputError(
                f"{folder}: was not written by merganser (it has no {RECORD_NAME}) and holds {name!r}; move it away, or "
                "choose another target"
            )
        raise _foreign(folder, name, "merganser did not write")
    known = listed.get(name)
    if known is not None and files[name][0] != known[0]:
        raise _foreign(folder, name, f"has {files[name][0]:,} bytes, and was written with {known[0]:,}")


def _refuse_changed(folder: Path, name: str, known: tuple[int, str] | None) -> None:
    if known is not None and file_hash(folder / name) != known[1]:
        raise _foreign(folder, name, "was changed since merganser wrote it (its sha256 is another)")
    if name == PAGE_NAME and known is None and not is_page(folder / name):
        raise _foreign(folder, name, "merganser did not write")


def _kind(status: os.stat_result) -> str | None:
    """Return what a thing is that is neither a file nor a folder."""
    if stat.S_ISREG(status.st_mode):
        return None
    return "is a link" if stat.S_ISLNK(status.st_mode) else "is not a regular file"


def _state(status: os.stat_result) -> _State:
    return status.st_size, status.st_mtime_ns


def _foreign(folder: Path, name: str, why: str) -> OutputError:
    return OutputError(
        f"{folder}: holds {name!r}, which {why}; merganser removes only what it wrote: move that away, or choose another "
        "target"
    )
