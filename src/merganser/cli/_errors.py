"""From errors to messages and exit codes: 2 what the user can mend, 130 Ctrl-C, 1 a defect of ours."""

from __future__ import annotations

import errno
import os
import platform
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from ..errors import MemoryLimitError, MergeError, NotFoundError
from ..process import NO_THREADS, data_limit
from ..version import __version__
from ..wording import printable
from ._mergekit import answer
from ._text import complain, complain_at_length, discard, writing

STOPPED = 130
"""Exit code after Ctrl-C."""

_LEAST_DATA = 200_000_000
"""With 180 MB, torch 2.13 is loaded, and no thread can be started; with 100 MB it ends the process."""

_BROKEN_PIPE = 141  # what a shell reports for a command that SIGPIPE ended


# what the system refuses because of a name, a full disk or a limit, wherever we ask for it
_REFUSED = {
    getattr(errno, name, None)
    for name in ("ENAMETOOLONG", "ELOOP", "EMFILE", "ENFILE", "ENOSPC", "EDQUOT", "EROFS", "EIO")
} - {None}

_LESS = {
    "merge": "the same command continues, with fewer --threads or a lower --max-memory it takes less",
    "calibrate": "the same command continues; with fewer --batch-tokens, or without gram, it begins again and takes less",
    "eval": "the same command continues, with fewer --batch-tokens it takes less",
}


def _memory_ran_out(error: BaseException) -> bool:
    """Say whether an error is one of memory: Python's, or torch's, which has no type of its own on a CPU."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


_UsageError: Any = typer.BadParameter.__mro__[1]
"""What a command line is refused with; older releases of typer take it from click, later ones have their own."""


@contextmanager
def _wrong_usage(verb: str) -> Iterator[None]:
    """Answer options of mergekit, and make what was typed safe to print."""
    try:
        yield
    except _UsageError as error:
        answered = answer(verb, getattr(error, "option_name", None))
        if answered is not None:
            error.message, error.possibilities = answered, None
        error.message = printable(error.message)
        raise


class Verbs(TyperGroup):
    """The command itself, in front of its verbs."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read what stands before the verb."""
        with _wrong_usage(""):
            return super().parse_args(ctx, args)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let Ctrl-C raise KeyboardInterrupt meanwhile, and end the process at once before and after, as `__main__` decided."""
    before = signal.getsignal(signal.SIGINT)
    if not callable(before) or threading.current_thread() is not threading.main_thread():
        # ignored, or decided by somebody else
        yield
        return
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _refuse_deleted_folder() -> None:
    """Refuse to work in a folder that is no longer there: libraries that are loaded later would end the process.

    Raises:
        NotFoundError: It was deleted.
    """
    try:
        Path.cwd()
    except FileNotFoundError:
        raise NotFoundError(
            "the current folder was deleted; go to one that exists, with cd, and run the command again"
        ) from None


def _refuse_little_memory() -> None:
    """Refuse to begin where not even the libraries could be loaded: they would end the process without a message.

    Raises:
        MemoryLimitError: This process may hold too little.
    """
    limit = data_limit()
    if limit is not None and limit < _LEAST_DATA:
        raise MemoryLimitError(
            f"memory: this process may hold {limit / 1e6:,.0f} MB (ulimit -d), and torch alone takes about "
            f"{_LEAST_DATA / 1e6:,.0f} MB; raise the limit"
        )


class Verb(TyperCommand):
    """A command that ends every error in a message."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read options and arguments."""
        with _wrong_usage(str(ctx.info_name)):
            return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the command.

        Raises:
            typer.Exit: With the exit code.
        """
        try:
            with _interruptible():
                _refuse_deleted_folder()
                _refuse_little_memory()
                result = super().invoke(ctx)
                with writing():
                    sys.stdout.flush()
                return result
        except (typer.Exit, typer.Abort):
            raise
        except BrokenPipeError:
            # whoever read our output has enough
            discard(sys.stdout)
            raise typer.Exit(_BROKEN_PIPE) from None
        except KeyboardInterrupt:
            complain("error", "stopped")
            raise typer.Exit(STOPPED) from None
        except MergeError as error:
            if os.environ.get("MERGANSER_DEBUG"):
                complain_at_length(error)
            complain("error", str(error))
            raise typer.Exit(2) from None
        except Exception as error:
            if _memory_ran_out(error):
                complain("error", f"memory ran out; {_LESS.get(str(ctx.info_name), 'free some')}")
                raise typer.Exit(2) from None
            if isinstance(error, RuntimeError) and "start new thread" in str(error):
                complain("error", NO_THREADS)
                raise typer.Exit(2) from None
            if isinstance(error, OSError) and error.errno in _REFUSED:
                complain("error", f"{error.filename or ctx.info_name}: {error.strerror}")
                raise typer.Exit(2) from None
            complain_at_length(error)
            complain(
                "error",
                f"this is a defect of merganser {__version__} (Python {platform.python_version()}, "
                f"{platform.system()}), not of your input; please report it with the lines above",
            )
            raise typer.Exit(1) from None
