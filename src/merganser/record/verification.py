"""Verify an output: compare its files with the hashes in the run record, and list files that were added."""

from __future__ import annotations

import os
import re
import string
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal, NoReturn

from ..checkpoint.files.links import inside, link_target
from ..checkpoint.files.sidefiles import TEMPLATE_FOLDERS, is_tokenizer_file
from ..errors import CheckpointError, NotFoundError, suggest_keywords
from ..files import sha256_of_file
from ..jsonfile import os_reason, read_object
from ..wording import brief
from .format import RECORD_NAME

__all__ = ["Verification", "VerifiedFile", "recorded_files", "verify"]

State = Literal["intact", "changed", "missing", "link"]

_SIDECARS = "sidecars"

# Folders that programs look into by name when they load a model, even if the output has no files there. transformers
# runs custom_generate/generate.py if remote code is allowed.
_LOADED_FOLDERS = (_SIDECARS, *TEMPLATE_FOLDERS, "custom_generate")

# Files that no program reads when it loads a model: documents, pictures, and names without a suffix.
_DOCUMENT = re.compile(
    r"[^.]*|.*\.(md|rst|txt|pdf|html?|log|csv|tsv|ya?ml|png|jpe?g|gif|svg|webp)", re.IGNORECASE | re.DOTALL
)
_VOCABULARY = re.compile(r".*(vocab|merges|dict|bpe|token).*\.txt", re.IGNORECASE | re.DOTALL)


@dataclass(frozen=True, slots=True)
class VerifiedFile:
    """A file that the run record names.

    Args:
        file: Its path relative to the output folder.
        bytes: Its size according to the record.
        state: "intact", "changed" (other contents, or no longer a regular file), "missing", or "link" (a symbolic link,
            whatever its contents).
        problem: What is wrong with it; None if it is intact.
    """

    file: str
    bytes: int
    state: State
    problem: str | None


@dataclass(frozen=True, slots=True)
class Verification:
    """The result of `verify`.

    Args:
        out: The output folder.
        files: Every file that the run record lists, in its order.
        extra: Files that the record does not list and that loading may read: weights, indexes, code, tokenizers,
            adapters, parts of sidecars. They may be loaded instead of the right ones. A folder ends in "/".
        beside: Other files and folders that the record does not list, such as notes.
    """

    out: Path
    files: Sequence[VerifiedFile]
    extra: Sequence[str]
    beside: Sequence[str]

    @property
    def ok(self) -> bool:
        """Whether all files are unchanged, and no file was added that loading may read."""
        return not self.extra and all(file.problem is None for file in self.files)


@suggest_keywords
def verify(
    out: str | Path, *, files: Collection[str] | None = None, progress: Callable[[int, int], None] | None = None
) -> Verification:
    """Compare the files of an output with the hashes in its run record, and look for files that it does not list.

    Args:
        out: Folder that a merge wrote.
        files: Paths of the files to check, relative to the folder; added files are then ignored. None for all files.
        progress: Called with the number of bytes hashed so far and in total.

    Raises:
        NotFoundError: There is no such folder, or no run record in it.
        CheckpointError: The run record is damaged, or does not list a file of `files`, or a file cannot be read.
    """
    out = Path(out)
    if not out.is_dir():
        raise NotFoundError(f"{out}: {'is not a folder' if out.exists() else 'no such folder'}")
    entries = recorded_files(out)
    recorded = {name for name, _, _ in entries}
    if files is not None:
        unknown = sorted(set(files) - recorded)
        if unknown:
            raise CheckpointError(
                f"{out / RECORD_NAME}: does not name {unknown[0]!r} among the files that were written"
            )
        entries = [entry for entry in entries if entry[0] in files]
    total = sum(size for _, size, _ in entries)
    checked = []
    done = 0
    for name, size, digest in entries:
        before = done

        def tell(count: int, before: int = before) -> None:
            if progress is not None:
                progress(before + count, total)

        checked.append(VerifiedFile(name, size, *_compare(out, name, size, digest, tell)))
        done += size
        tell(size)
    new = sorted(_new(out, recorded)) if files is None else []
    loaded = _loaded_folders(recorded)
    extra = [name for name in new if _may_be_loaded(name, loaded)]
    return Verification(out, checked, extra, [name for name in new if name not in extra])


def _loaded_folders(recorded: Collection[str]) -> set[str]:
    """Return the folders, relative to the output ("" for itself), in which loading may find files by their names."""
    return {"", *_LOADED_FOLDERS, *(name.rpartition("/")[0] for name in recorded)}


def _new(out: Path, recorded: Collection[str]) -> Iterator[str]:
    """Yield files and links that the record does not list; a folder unrelated to the output is yielded as a whole."""
    loaded = _loaded_folders(recorded)

    def refuse(error: OSError) -> NoReturn:
        raise CheckpointError(f"{error.filename}: cannot be read: {os_reason(error)}") from None

    for place, folders, files in os.walk(out, onerror=refuse):
        below = Path(place).relative_to(out)
        for name in list(folders):
            path = (below / name).as_posix()
            known = any(path == folder or folder.startswith(f"{path}/") for folder in loaded)
            inner = path.startswith(f"{_SIDECARS}/") or known
            # Links to folders are not followed.
            if not inner or (Path(place) / name).is_symlink():
                folders.remove(name)
                if path not in recorded:  # otherwise it is reported as a changed file
                    yield f"{path}/"
        for name in files:
            path = (below / name).as_posix()
            if path not in recorded and path != RECORD_NAME:
                yield path


def _may_be_loaded(name: str, loaded: Collection[str]) -> bool:
    """Return whether loading a model may read an added file, or look into an added folder."""
    folder, _, last = name.rstrip("/").rpartition("/")
    if name.endswith("/"):
        return name.rstrip("/") in loaded or folder.partition("/")[0] == _SIDECARS
    if folder.partition("/")[0] == _SIDECARS:
        return True
    if last.startswith(".") or folder not in loaded:
        return False
    return _DOCUMENT.fullmatch(last) is None or _VOCABULARY.fullmatch(last) is not None or is_tokenizer_file(last)


def recorded_files(out: Path) -> list[tuple[str, int, str]]:
    """Return name, size and sha256 of every output file in the run record.

    Raises:
        NotFoundError: There is no run record.
        CheckpointError: The run record is damaged.
    """
    if not (out / RECORD_NAME).exists():
        raise NotFoundError(f"{out}: has no {RECORD_NAME}; only what merganser wrote can be verified")
    record = inside(out, RECORD_NAME, str(out))
    outputs = read_object(record).get("outputs")
    if not isinstance(outputs, list) or not outputs:
        raise CheckpointError(f"{record}: must have a list 'outputs' of the files that were written")
    return [_entry(record, index, item) for index, item in enumerate(outputs)]


def _entry(record: Path, index: int, item: object) -> tuple[str, int, str]:
    where = f"{record}: outputs[{index}]"
    if not isinstance(item, dict):
        raise CheckpointError(f"{where}: must be an object with file, bytes and sha256")
    name, size, digest = item.get("file"), item.get("bytes"), item.get("sha256")
    if not isinstance(name, str) or not name or not _is_text(name):
        raise CheckpointError(f"{where}: file must be the name of a file, got {brief(name)}")
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise CheckpointError(f"{where}: file {name!r} is not inside the folder, where it must be")
    if not isinstance(size, int) or isinstance(size, bool) or size < 0:
        raise CheckpointError(f"{where}: bytes must be a whole number of at least 0, got {brief(size)}")
    if not isinstance(digest, str) or len(digest) != 64 or set(digest) - set(string.hexdigits):
        raise CheckpointError(f"{where}: sha256 must be 64 hexadecimal digits, got {brief(digest)}")
    return name, size, digest.lower()


def _is_text(name: str) -> bool:
    """Return whether a file can have this name: it contains no NUL character and no lone surrogate."""
    try:
        return b"\0" not in name.encode()
    except UnicodeEncodeError:
        return False


def _compare(out: Path, name: str, size: int, digest: str, tell: Callable[[int], None]) -> tuple[State, str | None]:
    """Compare one file with the record; the size first, which is cheap."""
    path = out / name
    try:
        target = link_target(out, name)
        if target is not None:
            return "link", f"is a link to {target}, and was written as a file"
        if not path.is_file():
            return ("changed", "is not a file") if path.exists() else ("missing", "is missing")
        present_size = path.stat().st_size
        if present_size != size:
            return "changed", f"has {present_size:,} bytes, was written with {size:,}"
        actual = sha256_of_file(path, tell)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {os_reason(error)}") from None
    return ("intact", None) if actual == digest else ("changed", f"has sha256 {actual}, was written with {digest}")
