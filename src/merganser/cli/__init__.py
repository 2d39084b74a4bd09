"""The command `merganser`: one file per verb; each verb prints what one public function returns.

Nothing here imports torch until it is needed, so that help appears at once.
"""

from __future__ import annotations

import atexit
import importlib
import io
import os
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand

from ..errors import OutputError
from ..version import __version__
from ._errors import STOPPED, Verb, Verbs
from ._options import many_values
from .printing.text import complain, writing

__all__ = ["main", "make_app"]

_VERBS: Mapping[str, type[TyperCommand] | None] = {
    "merge": Verb,
    "plan": Verb,
    "methods": Verb,
    "schema": Verb,
    "inspect": many_values("--data"),
    "diff": Verb,
    "calibrate": many_values("--data", "--add"),
    "verify": Verb,
    "restore": Verb,
    "route": many_values("--data"),
    "transplant": Verb,
    "mix": Verb,
    "shrink": many_values("--data"),
    "heal": many_values("--data"),
    "extract": Verb,
    "export": Verb,
    "eval": many_values("--tasks", "--experts"),
    "search": many_values("--tasks", "--experts", "--objective", "--at-least", "--at-most"),
    "auto": many_values("--tasks", "--data"),
    "report": Verb,
    "push": Verb,
    "fuse": None,
}
"""The class of every verb's command, in the order of the help; `fuse` is a group of commands. Each verb has the file of its
name, and the function or the group of its name in it."""

_FUNCTIONS = {"eval": "evaluate"}
"""Names of functions that are not those of their verbs."""


def make_app(verb: str | None = None) -> typer.Typer:
    """Return the command line with one verb, or with all.

    Typer takes a tenth of a second to describe all of them, which a command would spend before it begins.

    Args:
        verb: The verb that will run; another word, or None, adds every verb.
    """
    app = typer.Typer(
        cls=Verbs,
        name="merganser",
        help="Merge large language models on the machine you have.",
        add_completion=True,
        no_args_is_help=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["--help", "-h"]},
    )
    app.callback()(_first_options)
    for name in (verb,) if verb is not None and verb in _VERBS else _VERBS:
        found = getattr(importlib.import_module(f".{name}", __name__), _FUNCTIONS.get(name, name))
        if isinstance(found, typer.Typer):
            app.add_typer(found, name=name)
        else:
            app.command(name, cls=_VERBS[name])(found)
    return app


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"merganser {__version__}")
        raise typer.Exit


def _first_options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Merge large language models on the machine you have."""


def _prepare_streams() -> None:
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            # the shell closed this stream
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            # print a character that the terminal cannot encode as a question mark
            stream.reconfigure(errors="replace")


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run a command, by default with the arguments of this process.

    Raises:
        SystemExit: Always, with the exit code.
    """
    _prepare_streams()
    try:
        with writing():
            given = sys.argv[1:] if arguments is None else arguments
            make_app(given[0] if given else None)(arguments, prog_name="merganser")
        raise SystemExit(0)
    except OutputError as error:
        # an error while printing help or the version, which run outside any verb
        complain("error", str(error))
        raise SystemExit(2) from None
    except SystemExit as end:
        if arguments is None:
            _leave(end.code)
        raise


def _leave(code: Any) -> None:
    """End this process at once, with an exit code; return if it has to end in Python's own way.

    Python would wait for threads that are still merging a block when the command was stopped. And it would take torch apart,
    for half a second, before the system takes all memory back anyway.
    """
    if code != STOPPED:
        waited_for = [thread for thread in threading.enumerate() if not thread.daemon]
        if "torch" not in sys.modules or not isinstance(code, int) or waited_for != [threading.main_thread()]:
            return
        atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
