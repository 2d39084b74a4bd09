"""Map errors to messages and exit codes: 2 for errors that the user can fix, 130 for Ctrl-C, 1 for a bug of ours."""

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
from ._mergekit import answer, command
from .printing.text import complain, complain_at_length, discard, telling, writing

STOPPED = 130
"""Exit code after Ctrl-C."""

_LEAST_DATA = 200_000_000
"""Bytes. Within 180 MB torch 2.13 loads but can start no thread; within 100 MB loading it kills the process."""

_BROKEN_PIPE = 141  # exit code that a shell reports for a command ended by SIGPIPE


# errors of the operating system about a file name, a full disk or a limit, for which the user gets a plain message
_REFUSED = {
    getattr(errno, name, None)
    for name in ("ENAMETOOLONG", "ELOOP", "EMFILE", "ENFILE", "ENOSPC", "EDQUOT", "EROFS", "EIO")
} - {None}

_LESS = {
    "merge": "the same command continues, with fewer --threads or a lower --max-memory it takes less",
    "calibrate": "the same command continues; with fewer --batch-tokens, or without gram, it begins again and takes less",
    "cache": "the same command continues; with fewer --batch-tokens it begins again and takes less",
    "answer": "the same command continues, with less --max-tokens it takes less",
    "eval": "the same command continues, with fewer --batch-tokens it takes less",
    "train": "with more accumulate, lora or gradient_checkpointing in the recipe it begins again and takes less",
    "search": "the same command continues",
    "auto": "the same command continues",
}


def _memory_ran_out(error: BaseException) -> bool:
    """Return whether an error means that memory ran out: Python's, or torch's, which has no own type on a CPU."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


_UsageError: Any = typer.BadParameter.__mro__[1]
"""The error class for a wrong command line; older releases of typer take it from click, later ones define it."""


@contextmanager
def _wrong_usage(verb: str, arguments: list[str]) -> Iterator[None]:
    """Explain options of mergekit, and escape the user's text in the error message."""
    given = list(arguments)
    try:
        yield
    except _UsageError as error:
        answered = answer(verb, getattr(error, "option_name", None), given)
        if answered is not None:
            error.message, error.possibilities = answered, None
        if type(error).__name__ != "NoArgsIsHelpError":  # whose message is the help, in many lines
            error.message = printable(error.message)
        raise


class Verbs(TyperGroup):
    """The command `merganser` itself: the options before the verb."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments before the verb."""
        with _wrong_usage("", args):
            return super().parse_args(ctx, args)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the verb; a command of mergekit is answered by the verb that does the same.

        Raises:
            typer.BadParameter: It is a command of mergekit.
        """
        answered = command(args[0]) if self.get_command(ctx, args[0]) is None else None
        if answered is not None:
            raise _UsageError(answered, ctx)
        return super().resolve_command(ctx, args)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let Ctrl-C raise KeyboardInterrupt within the context; outside it, the handler that `__main__` set applies."""
    before = signal.getsignal(signal.SIGINT)
    if not callable(before) or threading.current_thread() is not threading.main_thread():
        # Ctrl-C is ignored, or another handler was set by the caller
        yield
        return
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _refuse_deleted_folder() -> None:
    """Refuse to run in a deleted folder, where libraries that are loaded later would end the process.

    Raises:
        NotFoundError: The current folder was deleted.
    """
    try:
        Path.cwd()
    except FileNotFoundError:
        raise NotFoundError(
            "the current folder was deleted; go to one that exists, with cd, and run the command again"
        ) from None


def _refuse_little_memory() -> None:
    """Refuse to run if the memory limit is too low to load the libraries, which would end the process silently.

    Raises:
        MemoryLimitError: The limit of this process is too low.
    """
    limit = data_limit()
    if limit is not None and limit < _LEAST_DATA:
        raise MemoryLimitError(
            f"memory: this process may hold {limit / 1e6:,.0f} MB (ulimit -d), and torch alone takes about "
            f"{_LEAST_DATA / 1e6:,.0f} MB; raise the limit"
        )


class Verb(TyperCommand):
    """A command that turns every error into a message and an exit code."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse options and arguments."""
        with _wrong_usage(str(ctx.info_name), args):
            return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the command.

        Raises:
            typer.Exit: With the exit code.
        """
        try:
            with _interruptible(), telling():
                _refuse_deleted_folder()
                _refuse_little_memory()
                result = super().invoke(ctx)
                with writing():
                    sys.stdout.flush()
                return result
        except (typer.Exit, typer.Abort):
            raise
        except BrokenPipeError:
            # the reader closed the pipe, as `head` does
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
