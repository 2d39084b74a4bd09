"""Decide whether merganser wrote all files in a folder ("ours"): nothing else is ever removed.

A folder is ours as a whole or not at all, and only if it holds nothing but regular files and folders; links are never
followed. There are two kinds:

- A complete output. Its run record lists every file with size and sha256; files that differ or are not listed belong to
  the user. All files are hashed, however large, because a model that was trained further and saved over the merged one
  has the same names and sizes. The merge itself hashes as many bytes while it writes.
- A folder that is still being written. Its files have no hashes yet, so a marker file lists their names; each name is
  added before the file is created.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath

from ...errors import CheckpointError, OutputError
from ...files import sha256_of_file
from ...record.format import PAGE_NAME, RECORD_NAME, is_page
from ...record.verification import recorded_files
from ...system import NO_FOLLOW, open_binary

MARKER = ".merganser"
"""Marker of a folder that is being written; one line of JSON per file, or per folder with all its contents."""

STAGE_NOTE = ".stage.json"
"""Note in a stage's folder: what the stage was made from. Hidden, so that it is not taken for a checkpoint file."""

_FIRST_LINE = b"# merganser is writing this folder, and made what is listed here\n"

_STAGE_NOTES = (STAGE_NOTE, f"{STAGE_NOTE}.new")

_State = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Owned:
    """A folder in which merganser wrote every file.

    Args:
        folder: The folder; it need not exist.
        files: Size and modification time of its files, by relative path; run record and marker come last.
        folders: Relative paths of its subfolders, inner ones first.
    """

    folder: Path
    files: Mapping[str, _State]
    folders: Sequence[str]

    def check(self) -> None:
        """Check that no file was changed since the survey.

        Raises:
            OutputError: A file was changed; the message names it.
        """
        for name in self.folders:
            if (self.folder / name).is_symlink():
                raise _foreign(self.folder, name, "became a link")
        for name, state in self.files.items():
            with contextlib.suppress(FileNotFoundError):
                if _state((self.folder / name).lstat()) != state:
                    raise _foreign(self.folder, name, "was changed during the run")

    def remove(self) -> None:
        """Remove the files, and the folders that are then empty.

        Raises:
            OutputError: A file was changed since the survey; nothing was removed.
            OSError: A file cannot be removed.
        """
        self.check()
        for name in self.files:
            (self.folder / name).unlink(missing_ok=True)
        for name in [*self.folders, "."]:
            # a folder with files that were added since the survey stays
            with contextlib.suppress(OSError):
                (self.folder / name).rmdir()

    def within(self, parent: Path) -> Owned:
        """Return the same files with paths relative to a parent folder."""
        name = self.folder.relative_to(parent).as_posix()
        files = {f"{name}/{file}": state for file, state in self.files.items()}
        return Owned(parent, files, [*(f"{name}/{each}" for each in self.folders), name])


def survey(folder: Path, *, skip: Collection[str] = (), hashing: bool = True) -> Owned:
    """List a folder's files, and check that all of them are ours.

    Args:
        folder: The folder; it need not exist.
        skip: Names directly in the folder to leave out.
        hashing: Whether to compare files of an output with their hashes, not only their sizes.

    Raises:
        OutputError: A file or folder is not ours; the message names the first one.
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
            # a continued run would write through the hard link into a file elsewhere
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
    """List the files of a folder of outputs, and check that it holds only outputs, finished or not, and their locks.

    Args:
        home: The folder; it need not exist.
        known: Earlier results of `survey` for its subfolders, by name; these are not surveyed again.
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
            output = (known or {}).get(path.name) or survey(path, hashing=hashing)
            files |= output.within(home).files
            folders += output.within(home).folders
        elif stat.S_ISREG(status.st_mode) and path.name.endswith(".merging.lock") and not status.st_size:
            files[path.name] = _state(status)
        else:
            raise _foreign(home, path.name, _kind(status) or "merganser did not write")
    return Owned(home, files, folders)


def claim(folder: Path, names: Iterable[str], *, marker: str = MARKER) -> None:
    """Add names to a folder's marker, before the files are created.

    Args:
        folder: A folder that is being written; all its files are ours.
        names: Relative paths of files; or of folders with all their contents, ending with a slash.
        marker: Name of the marker file, if it is written for another folder.

    Raises:
        OSError: The marker cannot be written.
    """
    known = claimed(folder, marker=marker)
    lines = "".join(f"{json.dumps(name)}\n" for name in dict.fromkeys(names) if name not in known)
    # a marker without names may be cut off within its first line, so write it again
    begun = len(known) > 1
    flags = os.O_APPEND if begun else os.O_TRUNC
    descriptor = open_binary(folder / marker, os.O_WRONLY | os.O_CREAT | NO_FOLLOW | flags)
    with os.fdopen(descriptor, "wb") as file:
        # start with a newline, as the last line may be cut off
        file.write((b"\n" if begun else _FIRST_LINE) + lines.encode())
        file.flush()
        os.fsync(descriptor)


def claimed(folder: Path, *, marker: str = MARKER) -> set[str]:
    """Return the names in a folder's marker; empty if it has no marker."""
    path = folder / marker
    if path.is_symlink() or not path.is_file():
        return set()
    data = path.read_bytes()
    if not data.startswith(_FIRST_LINE):
        # a first line that was cut off by a kill, or a file that is not a marker
        return {MARKER} if _FIRST_LINE.startswith(data) else set()
    names = {MARKER}
    for line in data.removeprefix(_FIRST_LINE).split(b"\n")[:-1]:
        # skip a line that was cut off by a kill: the run had not created that file yet
        with contextlib.suppress(ValueError, RecursionError):
            name = json.loads(line)
            if isinstance(name, str):
                names.add(name)
    return names


def unfinished(folder: Path) -> bool:
    """Return whether a folder has a marker: a run is writing it, or was killed."""
    return bool(claimed(folder))


def covers(listed: Collection[str], name: str) -> bool:
    """Return whether a name is listed, or is in a folder that is listed."""
    return name in listed or any(each.endswith("/") and name.startswith(each) for each in listed)


_Listed = Mapping[str, tuple[int, str] | None]
"""Size and sha256 of our files, by name; None where unknown."""


def _walk(folder: Path, skip: Collection[str]) -> tuple[dict[str, _State], list[str]]:
    """Return all files and all subfolders of a folder, inner folders first; refuse links and special files."""
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
    """Yield all files and subfolders of a folder, sorted by name; a folder comes after its contents."""
    with os.scandir(folder / prefix) as found:
        entries = sorted(found, key=lambda entry: entry.name)
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            yield from _entries(folder, f"{prefix}{entry.name}/")
        yield f"{prefix}{entry.name}", entry.stat(follow_symlinks=False)


def _listed(folder: Path, files: Mapping[str, _State]) -> _Listed:
    """Return the files that the marker lists or, without a marker, the run record."""
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
    if known is not None and _sha256(folder / name, _identity(folder / name)) != known[1]:
        raise _foreign(folder, name, "was changed since merganser wrote it (its sha256 differs)")
    if name == PAGE_NAME and known is None and not is_page(folder / name):
        raise _foreign(folder, name, "merganser did not write")


def _identity(path: Path) -> tuple[int, ...]:
    """Return what differs once a file was replaced or written to, as far as the file system notes it."""
    status = path.lstat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


@lru_cache(maxsize=4096)
def _sha256(path: Path, identity: tuple[int, ...]) -> str:
    """Return the sha256 of a file, which is read again only if its identity is another one.

    A target is surveyed before something long begins, such as calibration, and again when its replacement is begun.
    """
    return sha256_of_file(path)


def _kind(status: os.stat_result) -> str | None:
    """Describe a link or special file; return None for a regular file."""
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
