"""Read the text of a recipe from a file or from standard input."""

from __future__ import annotations

import os
import re
import stat
import sys
from pathlib import Path

from ...errors import NotFoundError, RecipeError
from ...system import NO_BLOCKING, open_binary, set_blocking
from .place import Place
from .scalar import shown

MAX_BYTES = 1_000_000

_STDIN = "-"
# descriptors that the shell opened before the command started, as in <(...): reading them cannot wait for a writer
_DESCRIPTOR = re.compile(r"/dev/(stdin|fd/[0-9]+)|/proc/self/fd/[0-9]+")
_KINDS = {stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}


def read_text(path: Path) -> str:
    """Read a recipe file.

    Args:
        path: A regular file; `-` or `/dev/stdin` for standard input; `/dev/fd/N` for a file that the shell opened.

    Raises:
        NotFoundError: There is no such file.
        RecipeError: It cannot be read, is not a regular file, is too large, or is not UTF-8.
    """
    name = shown_path(path)
    try:
        data = _read_bytes(path)
    except RecipeError:
        raise
    except FileNotFoundError:
        raise NotFoundError(f"{name}: there is no such recipe file") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise RecipeError(f"{name}: the recipe cannot be read: {reason}") from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise RecipeError(f"{Place(name, line, '')}: the file is not UTF-8 text; save it as UTF-8") from None


def shown_path(path: Path) -> str:
    """Return the name of a recipe file as shown in messages."""
    if str(path) in (_STDIN, "/dev/stdin"):
        return "<stdin>"
    return shown(str(path)) if "\0" in str(path) else str(path)


def _read_bytes(path: Path) -> bytes:
    """Return the file's bytes, at most one more than a recipe may have.

    Raises:
        RecipeError: The path is a folder, a device, or a pipe that might never be written to.
        OSError: It cannot be read.
    """
    if str(path) == _STDIN:
        if sys.stdin is None or sys.stdin.isatty():
            raise RecipeError("<stdin>: standard input is a terminal, or closed; pipe the recipe in, or give its file")
        return sys.stdin.buffer.read(MAX_BYTES + 1)
    # without O_NONBLOCK, opening a named pipe waits for a writer
    descriptor = open_binary(path, os.O_RDONLY | NO_BLOCKING)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            _check_stream(path, descriptor)
            set_blocking(descriptor)
        with open(descriptor, "rb", closefd=False) as stream:
            return stream.read(MAX_BYTES + 1)
    finally:
        os.close(descriptor)


def _check_stream(path: Path, descriptor: int) -> None:
    """Refuse an open file that is neither a regular file nor a stream that the user passed to be read.

    Raises:
        RecipeError: The file is a folder, a device, a terminal, or a pipe that might never be written to.
    """
    kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
    if kind == stat.S_IFDIR:
        raise RecipeError(f"{path}: this is a folder; give the recipe file in it")
    if not _DESCRIPTOR.fullmatch(str(path)):
        what = _KINDS.get(kind, "no regular file")
        raise RecipeError(f"{path}: this is {what}; give a file, or - to read the recipe from standard input")
    if os.isatty(descriptor):
        raise RecipeError(f"{shown_path(path)}: this is a terminal; pipe the recipe in, or give its file")
