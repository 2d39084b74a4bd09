"""The command `merganser`: one file per verb; each verb prints what one public function returns.

Nothing here imports torch until it is needed, so that help appears at once.
"""

from __future__ import annotations

import atexit
import gc
import io
import os
import sys
import threading
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from ..errors import OutputError
from ..version import __version__
from ._errors import STOPPED, Verb, Verbs
from ._options import many_values
from .auto import auto
from .calibrate import calibrate
from .diff import diff
from .eval import evaluate
from .export import export
from .extract import extract
from .fuse import fuse
from .heal import heal
from .inspect import inspect
from .merge import merge
from .methods import methods
from .mix import mix
from .plan import plan
from .printing.text import complain, writing
from .push import push
from .report import report
from .restore import restore
from .route import route
from .schema import schema
from .search import search
from .shrink import shrink
from .transplant import transplant
from .verify import verify

__all__ = ["app", "main"]

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
for verb in (merge, plan, methods, schema):
    app.command(cls=Verb)(verb)
app.command(cls=many_values("--data"))(inspect)
app.command(cls=Verb)(diff)
app.command(cls=many_values("--data"))(calibrate)
app.command(cls=Verb)(verify)
app.command(cls=Verb)(restore)
app.command(cls=many_values("--data"))(route)
app.command(cls=Verb)(transplant)
app.command(cls=Verb)(mix)
app.command(cls=many_values("--data"))(shrink)
app.command(cls=many_values("--data"))(heal)
app.command(cls=Verb)(extract)
app.command(cls=Verb)(export)
app.command("eval", cls=many_values("--tasks", "--experts"))(evaluate)
app.command(cls=many_values("--tasks", "--experts", "--objective", "--at-least", "--at-most"))(search)
app.command(cls=many_values("--tasks", "--data"))(auto)
app.add_typer(fuse, name="fuse")
app.command(cls=Verb)(report)
app.command(cls=Verb)(push)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"merganser {__version__}")
        raise typer.Exit


@app.callback()
def _options(
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
    # A plan is millions of small objects that all stay alive; scanning them repeatedly took half of a plan's time.
    gc.set_threshold(200_000, 50, 100)
    _prepare_streams()
    try:
        with writing():
            app(arguments, prog_name="merganser")
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
