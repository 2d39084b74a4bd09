"""Live progress on stderr, shown only on a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING

import typer

from ...wording import count_text, plural, printable, size_text
from .._errors import STOPPED
from .text import complain, on_terminal

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn, TaskID

    from ...engine.plan.plan import Plan


def _bar(counted: str, *beside: ProgressColumn) -> Progress:
    """Return a progress bar over bytes; `counted` formats a second count, `beside` follows the description."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    return Progress(
        TextColumn("{task.description}", markup=False),
        *beside,
        BarColumn(bar_width=None),
        DownloadColumn(),
        TextColumn(counted),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        expand=True,
    )


def _step_bar() -> Progress:
    """Return a progress bar over steps."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        expand=True,
    )


@contextmanager
def byte_progress(description: str, quiet: bool = False) -> Iterator[Callable[[int, int], None] | None]:
    """Show a bar for work that reports its bytes: those done, and the total."""
    if quiet or not on_terminal():
        yield None
        return
    with _bar("") as bar:
        task = bar.add_task(description, total=None)

        def tell(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        yield tell


@contextmanager
def step_progress(description: str, quiet: bool = False) -> Iterator[Callable[[int, int], None] | None]:
    """Show a bar for work that reports its steps: those done, and the total."""
    if quiet or not on_terminal():
        yield None
        return
    with _step_bar() as bar:
        task = bar.add_task(description, total=None)

        def tell(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        yield tell


@contextmanager
def named_progress(quiet: bool = False) -> Iterator[Callable[[str, int, int], None] | None]:
    """Show a bar for work of several kinds of steps: what is done, the steps done, and their total."""
    if quiet or not on_terminal():
        yield None
        return
    with _step_bar() as bar:
        task = bar.add_task("", total=None)
        last = ""

        def tell(what: str, done: int, total: int) -> None:
            nonlocal last
            if what != last:
                # restart the bar, so that the remaining time is estimated from these steps alone
                bar.reset(task, total=total)
                last = what
            bar.update(task, description=printable(what), completed=done, total=total)

        yield tell


class MergeProgress:
    """Prints the warnings of a plan and then the progress of its run; implements `merganser.engine.run.Progress`."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._bytes = 0
        self._tensors = 0
        self._total = 0
        self._steps: Progress | None = None
        self._told: set[str] = set()
        self.plans: list[Plan] = []

    def __enter__(self) -> MergeProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._close()

    def calibrating(self, model: str, done: int, blocks: int) -> None:
        """Show how many blocks of a model are done."""
        if self._quiet or not on_terminal():
            return
        if self._steps is None or done == 0:
            self._close()
            self._steps = _step_bar()
            self._task = self._steps.add_task("", total=blocks)
            self._steps.start()
        if self._task is not None:
            self._steps.update(self._task, description=f"calibrating {printable(model)}", completed=done)

    def start(self, plan: Plan, continued: bool) -> None:
        """Print the plan's warnings and open a bar for a run that begins or continues."""
        self._close()
        self.plans.append(plan)
        # `advance` was called for the results of an earlier run before this call
        before, self._total = self._bytes, len(plan.tensors)
        if self._quiet:
            return
        stage = f"{plan.recipe.name}: " if plan.recipe.name else ""
        for warning in plan.warnings:
            complain("warning", f"{stage}{warning}")
        for difference in plan.differences:
            # stages of one recipe often differ in the same way
            if difference not in self._told:
                complain("note", f"{stage}differs from mergekit: {difference}")
            self._told.add(difference)
        if continued:
            tensors = plural(self._tensors, "tensor")
            complain("note", f"{stage}continuing an interrupted run: {tensors}, {size_text(before)} are there already")
        if on_terminal():
            beside = plan.sidecars.bytes_read + plan.sidecars.bytes_written if plan.sidecars else 0
            self._bar = _bar("{task.fields[tensors]}")
            self._task = self._bar.add_task(
                printable(plan.recipe.name or plan.method.name),
                total=plan.bytes_read + plan.bytes_written + beside,
                completed=before,
                tensors=self._counted(),
            )
            self._bar.start()

    def advance(self, read: int, written: int, tensors: int) -> None:
        """Add bytes read and written and completed tensors to the bar."""
        self._bytes += read + written
        self._tensors += tensors
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self._bytes, tensors=self._counted())

    def _counted(self) -> str:
        return f"{count_text(self._tensors)}/{count_text(self._total)} tensors"

    def _close(self) -> None:
        if self._steps is not None:
            self._steps.stop()
            self._steps, self._task = None, None
        if self._bar is not None:
            self._bar.stop()
            self._bar, self._task = None, None
            self._bytes = self._tensors = 0


class EvalProgress:
    """Shows the progress of an evaluation; implements `merganser.evaluation.Progress`."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> EvalProgress:
        if not self._quiet and on_terminal():
            self._bar = _step_bar()
            self._task = self._bar.add_task("opening models and tasks", total=None)
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def loading(self, model: str, number: int, count: int) -> None:
        """Show that a model is being read or merged."""
        self._show(f"{model} ({number + 1} of {count}): loading", 0, None)

    def scoring(self, model: str, task: str, done: int, count: int) -> None:
        """Show how many batches of a task are done."""
        self._show(f"{model}: {task}", done, count)

    def _show(self, description: str, done: int, count: int | None) -> None:
        if self._bar is not None and self._task is not None:
            if done == 0:
                # restart the bar, so that the remaining time is estimated from this task alone
                self._bar.reset(self._task, total=count)
            self._bar.update(self._task, description=printable(description), completed=done, total=count)


@contextmanager
def merge_progress(quiet: bool) -> Iterator[MergeProgress]:
    """Show the progress of a merge; if Ctrl-C interrupts it, say how it continues and end with the exit code for that.

    Args:
        quiet: Print errors only.
    """
    from ...engine.run import Interrupted

    with MergeProgress(quiet) as progress:
        try:
            yield progress
        except Interrupted as error:
            complain("error", str(error))
            raise typer.Exit(STOPPED) from None
