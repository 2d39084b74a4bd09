"""Hide the messages and the progress of lm-eval."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout

__all__ = ["quiet"]

_LOGGERS = ("lm_eval", "lm-eval", "datasets")


@contextmanager
def quiet(*, always: bool = False) -> Iterator[None]:
    """Hide lm-eval's log messages below errors; show its progress only if stderr is a terminal.

    Args:
        always: Hide its progress there, too.
    """
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    # stdout is reserved for our results
    elsewhere = sys.stderr if sys.stderr.isatty() and not always else io.StringIO()
    try:
        with redirect_stderr(elsewhere), redirect_stdout(elsewhere):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
