"""Errors and messages of third-party libraries."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import MergeError

__all__ = ["explained", "quiet"]


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


@contextmanager
def quiet() -> Iterator[None]:
    """Hide the progress bars and the loading report of transformers."""
    from transformers.utils import logging as library

    logging: Any = library
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
