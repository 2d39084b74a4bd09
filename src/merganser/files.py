"""Write files atomically, and hash them; write and read lines with checksums."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import xxhash

from .errors import OutputError
from .jsonfile import open_regular, os_reason
from .system import NO_FOLLOW, open_binary

__all__ = ["sealed_line", "sha256_of_file", "unseal_line", "write_whole"]

_PIECE = 1 << 20
_CHECK = b'{"check":"'
_CHECK_DIGITS = 32


def sha256_of_file(path: Path, tell: Callable[[int], None] | None = None) -> str:
    """Return the sha256 of a file, hexadecimal.

    Args:
        path: The file.
        tell: Gets the number of bytes read so far.

    Raises:
        OSError: It cannot be read, or is not a regular file.
    """
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_PIECE))
    done = 0
    with open_regular(path) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            done += count
            if tell is not None:
                tell(done)
    return digest.hexdigest()


def write_whole(path: Path, content: str | bytes, *, temporary: Path | None = None) -> None:
    """Write a file atomically: until it is complete, the old file of that name stays.

    Args:
        path: The file; its folder exists.
        content: The contents; text is written as UTF-8, and lone surrogates, as in undecodable file names, are escaped.
        temporary: The file to write first, in a folder that is ours; by default one with a random name.

    Raises:
        OutputError: The file cannot be written.
    """
    data = content.encode("utf-8", errors="backslashreplace") if isinstance(content, str) else content
    try:
        if temporary is None:
            # a unique name: a fixed one might be a file of the user, or a link
            handle, name = tempfile.mkstemp(dir=path.parent, prefix=".merganser-")
        else:
            name = str(temporary)
            handle = open_binary(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | NO_FOLLOW, 0o600)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            Path(name).chmod(0o644)
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {os_reason(error)}") from None


def sealed_line(entry: Mapping[str, Any], seed: str = "") -> bytes:
    """Return an object as a line of JSON that begins with a hash of the rest: `{"check":"...", ...}`.

    Args:
        entry: The object; it has at least one key.
        seed: Part of the hash, so that a line is valid only with the same seed.
    """
    body = json.dumps(entry, separators=(",", ":")).encode()[1:]
    return _CHECK + _hash(body, seed) + b'",' + body + b"\n"


def unseal_line(line: bytes, seed: str = "") -> dict[str, Any] | None:
    """Parse a line of `sealed_line`; None if the hash does not match, in which case nothing is parsed."""
    head = len(_CHECK) + _CHECK_DIGITS
    body = line[head + 2 : -1]
    if not line.endswith(b"\n") or line[: head + 2] != _CHECK + _hash(body, seed) + b'",':
        return None
    entry: dict[str, Any] = json.loads(b"{" + body)
    return entry


def _hash(body: bytes, seed: str) -> bytes:
    return xxhash.xxh3_128_hexdigest(seed.encode() + body).encode()
