"""Whether an output is still as it was written: the hashes of its run record, computed again."""

from __future__ import annotations

import hashlib
import string
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ..checkpoint.weights import is_weight_file
from ..errors import CheckpointError, NotFoundError
from ..jsonfile import open_regular, os_reason, read_object
from .format import RECORD_NAME

__all__ = ["Verification", "VerifiedFile", "recorded_files", "verify"]

_SIDECARS = "sidecars"

_PIECE = 1 << 22


@dataclass(frozen=True, slots=True)
class VerifiedFile:
    """A file that the run record names.

    Args:
        file: Its path below the output folder.
        bytes: Its size as recorded.
        problem: What is wrong with it; None where it is as it was written.
    """

    file: str
    bytes: int
    problem: str | None


@dataclass(frozen=True, slots=True)
class Verification:
    """What `verify` found.

    Args:
        out: The output folder.
        files: Every file that the run record names, in its order.
        extra: Files of weights that it does not name: they may be loaded in place of the right ones.
    """

    out: Path
    files: Sequence[VerifiedFile]
    extra: Sequence[str]

    @property
    def ok(self) -> bool:
        """Whether all files are as they were written, and no weights were added."""
        return not self.extra and all(file.problem is None for file in self.files)


def verify(
    out: str | Path, *, files: Collection[str] | None = None, progress: Callable[[int, int], None] | None = None
) -> Verification:
    """Compare the files of an output with the hashes in its run record.

    Args:
        out: Folder that a merge wrote.
        files: Their paths below the folder, where not all are wanted.
        progress: Told the bytes hashed so far, and those in all.

    Raises:
        NotFoundError: There is no such folder, or no run record in it.
        CheckpointError: The run record is damaged, or does not name a file that is wanted, or a file cannot be read.
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
    found = []
    done = 0
    for name, size, digest in entries:
        before = done

        def tell(count: int, before: int = before) -> None:
            if progress is not None:
                progress(before + count, total)

        found.append(VerifiedFile(name, size, _problem(out / name, size, digest, tell)))
        done += size
        tell(size)
    present = [*out.iterdir(), *(out / _SIDECARS).rglob("*")]
    names = (path.relative_to(out).as_posix() for path in present if is_weight_file(path.name))
    return Verification(out, found, sorted(name for name in names if name not in recorded))


def recorded_files(out: Path) -> list[tuple[str, int, str]]:
    """Read name, size and sha256 of every output from the run record.

    Raises:
        NotFoundError: There is no run record.
        CheckpointError: The run record is damaged.
    """
    record = out / RECORD_NAME
    if not record.exists():
        raise NotFoundError(f"{out}: has no {RECORD_NAME}; only what merganser wrote can be verified")
    outputs = read_object(record).get("outputs")
    if not isinstance(outputs, list) or not outputs:
        raise CheckpointError(f"{record}: must have a list 'outputs' of the files that were written")
    return [_entry(record, index, item) for index, item in enumerate(outputs)]


def _entry(record: Path, index: int, item: Any) -> tuple[str, int, str]:
    where = f"{record}: outputs[{index}]"
    if not isinstance(item, dict):
        raise CheckpointError(f"{where}: must be an object with file, bytes and sha256")
    name, size, digest = item.get("file"), item.get("bytes"), item.get("sha256")
    if not isinstance(name, str) or not name or "\0" in name:
        raise CheckpointError(f"{where}: file must be the name of a file, got {name!r}")
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise CheckpointError(f"{where}: file {name!r} is not inside the folder, where it must be")
    if not isinstance(size, int) or isinstance(size, bool) or size < 0:
        raise CheckpointError(f"{where}: bytes must be a whole number of at least 0, got {size!r}")
    if not isinstance(digest, str) or len(digest) != 64 or set(digest) - set(string.hexdigits):
        raise CheckpointError(f"{where}: sha256 must be 64 hexadecimal digits, got {digest!r}")
    return name, size, digest.lower()


def _problem(path: Path, size: int, digest: str, tell: Callable[[int], None]) -> str | None:
    """Compare one file; sizes are compared first, since that is cheap."""
    try:
        if not path.is_file():
            return "is not a file" if path.exists() else "is missing"
        found = path.stat().st_size
        if found != size:
            return f"has {found:,} bytes, was written with {size:,}"
        actual = _sha256(path, tell)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {os_reason(error)}") from None
    return None if actual == digest else f"has sha256 {actual}, was written with {digest}"


def _sha256(path: Path, tell: Callable[[int], None]) -> str:
    found = hashlib.sha256()
    buffer = memoryview(bytearray(_PIECE))
    done = 0
    with open_regular(path) as file:
        while count := file.readinto(buffer):
            found.update(buffer[:count])
            done += count
            tell(done)
    return found.hexdigest()
