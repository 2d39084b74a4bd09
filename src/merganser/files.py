"""Write files atomically."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from .errors import OutputError
from .jsonfile import os_reason

__all__ = ["write_whole"]


def write_whole(path: Path, text: str) -> None:
    """Write a text file atomically: until it is complete, the old file of that name stays.

    Args:
        path: The file; its folder exists.
        text: The contents, written as UTF-8; lone surrogates, as in undecodable file names, are escaped.

    Raises:
        OutputError: The file cannot be written.
    """
    try:
        # a unique name: a fixed one might be a file of the user, or a link
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".merganser-")
        try:
            with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
            Path(name).chmod(0o644)
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {os_reason(error)}") from None
