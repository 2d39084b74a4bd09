"""Errors of third-party libraries."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import MergeError

__all__ = ["explained"]


@contextmanager
def explained(kind: type[MergeError], what: str) -> Iterator[None]:
    """Turn any exception of a library into an error of type `kind` that begins with `what`; pass a MergeError on."""
    try:
        yield
    except MergeError:
        raise
    # libraries raise many types of exceptions for files and tasks that they cannot read
    except Exception as error:
        lines = str(error).strip().splitlines()
        reason = f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
        raise kind(f"{what}: {reason}") from None
