"""Progress of a merge in a notebook, where no bar of the command line is."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

from ..wording import plural, size_text

if TYPE_CHECKING:
    from .plan.plan import Plan

__all__ = ["NotebookProgress", "in_notebook"]

_EVERY = 0.5
"""Seconds between two updates; each is a message to the browser."""


def in_notebook() -> bool:
    """Return whether this code runs in a notebook: in a kernel of IPython, not in its terminal."""
    module = sys.modules.get("IPython")  # a notebook has imported it
    shell = None if module is None else module.get_ipython()
    return shell is not None and hasattr(shell, "kernel")


class NotebookProgress:
    """Shows one line that changes; implements `merganser.engine.run.Progress`."""

    def __init__(self) -> None:
        self._handle: Any = None
        self._bytes = 0
        self._tensors = 0
        self._total = 0
        self._size = 0
        self._name = ""
        self._shown = 0.0

    def calibrating(self, model: str, done: int, blocks: int) -> None:
        """Show how many blocks of a model are done."""
        self._show(f"calibrating {model}: {done} of {plural(blocks, 'block')}")

    def start(self, plan: Plan, continued: bool) -> None:
        """Show that a run starts, with the warnings of its plan."""
        self._name, self._total = plan.recipe.name or plan.method.name, len(plan.tensors)
        self._size = plan.bytes_read + plan.bytes_written
        for warning in plan.warnings:
            self._show(f"warning: {plan.shown(warning)}")
            self._handle = None
        self._show(f"{self._name}: {'continues' if continued else 'starts'}")

    def advance(self, read: int, written: int, tensors: int) -> None:
        """Add bytes read and written and completed tensors."""
        self._bytes += read + written
        self._tensors += tensors
        done = self._tensors >= self._total
        if not self._total or (time.monotonic() - self._shown < _EVERY and not done):
            return
        of = f"{size_text(self._bytes)} of at most {size_text(self._size)}"
        self._show(f"{self._name}: {self._tensors:,} of {plural(self._total, 'tensor')}, {of}")

    def _show(self, text: str) -> None:
        shell = sys.modules["IPython"]
        self._shown = time.monotonic()
        content = {"text/plain": text}
        if self._handle is None:
            self._handle = shell.display.display(content, raw=True, display_id=True)
        else:
            self._handle.update(content, raw=True)
