"""Error messages for outputs that cannot be written."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

from ...errors import OutputError
from ...jsonfile import os_reason

__all__ = ["failures_of", "write_error"]


def write_error(out: Path, error: OSError) -> OutputError:
    """Turn an OSError while an output is written into an error with a remedy.

    Args:
        out: The target as the user named it.
        error: The error; an OutputError is returned as it is.
    """
    if isinstance(error, OutputError):
        return error
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(f"{out}: the disk is full; free some room and run the same command again, it continues")
    return OutputError(f"{out}: cannot be written: {os_reason(error)}")


@contextlib.contextmanager
def failures_of(out: Path) -> Iterator[None]:
    """Turn an OSError in the context into an OutputError that names the target."""
    try:
        yield
    except OSError as error:
        raise write_error(out, error) from None
