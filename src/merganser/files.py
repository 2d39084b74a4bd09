"""Files that appear whole, or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from .errors import OutputError
from .jsonfile import os_reason

__all__ = ["write_whole"]


def write_whole(path: Path, text: str) -> None:
    """Write a text file; what had its name is there until all is written.

    Args:
        path: The file; its folder exists.
        text: Its contents, written as UTF-8; parts of names that are not text are escaped.

    Raises:
        OutputError: It cannot be written.
    """
    try:
        # a name that nobody has: a fixed one may be the user's, or a link
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
