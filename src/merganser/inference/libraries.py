"""Errors of the libraries that evaluation calls."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import MergeError

__all__ = ["explained"]


@contextmanager
def explained(kind: type[MergeError], what: str) -> Iterator[None]:
    """Turn whatever a library raises into an error of one kind that begins with `what`; our own errors pass."""
    try:
        yield
    except MergeError:
        raise
    # they raise anything at all for files, or tasks of many authors, that they do not like
    except Exception as error:
        lines = str(error).strip().splitlines()
        reason = f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
        raise kind(f"{what}: {reason}") from None
