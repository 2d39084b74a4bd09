"""Runs that are cut off at a chosen moment."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from merganser.engine import run
from merganser.engine.kernels import merge_tensor
from merganser.engine.merge import merge
from merganser.engine.output import staging
from merganser.engine.planner import drafts, planner
from merganser.engine.run import Interrupted
from merganser.engine.sidecars import read
from merganser.engine.stream import groups

BLOCK, SEGMENT_BLOCKS = 144, 2


def shrink_blocks(patch: pytest.MonkeyPatch) -> None:
    """Make blocks so small that tiny models have large tensors."""
    for module in (planner, drafts, merge_tensor, read):
        patch.setattr(module, "BLOCK", BLOCK)
    patch.setattr(groups, "SEGMENT_BLOCKS", SEGMENT_BLOCKS)


class Counter:
    """Counts what a run tells."""

    def __init__(self) -> None:
        self.calls = 0
        self.read = 0
        self.written = 0
        self.tensors = 0
        self.written_before = 0
        self.continued: bool | None = None

    def start(self, plan: Any, continued: bool) -> None:
        self.continued = continued
        self.written_before = self.written

    def advance(self, read: int, written: int, tensors: int) -> None:
        self.calls += 1
        self.read += read
        self.written += written
        self.tensors += tensors
        self.told()

    def told(self) -> None:
        """What happens then."""


class Stopper(Counter):
    """Presses Ctrl-C, so to speak, when it was told so many things."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.after = after

    def told(self) -> None:
        if self.calls == self.after:
            raise KeyboardInterrupt


class Killer(Stopper):
    """Kills the process."""

    def told(self) -> None:
        if self.calls == self.after:
            die()


class Slow(Counter):
    """Leaves a note when it has begun, and takes its time until `NOTE.sent` is there (30 s at most) and after."""

    def __init__(self, note: Path) -> None:
        super().__init__()
        self.note = note

    def told(self) -> None:
        self.note.touch()
        end = time.monotonic() + 30
        while not self.note.with_suffix(".sent").exists() and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(0.05)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def press_ctrl_c() -> None:
    raise KeyboardInterrupt


class Killed(BaseException):
    """The end of a process, as far as the files are concerned that it has closed."""


def end() -> None:
    raise Killed


def stop(recipe: Any, out: Path, after: int, **options: Any) -> Stopper:
    """Merge until that many things were told, and say what was."""
    stopper = Stopper(after)
    with pytest.raises(Interrupted, match="run the same command again to continue"):
        merge(recipe, out, progress=stopper, **options)
    return stopper


def in_a_process(target: Any, *arguments: Any) -> multiprocessing.Process:
    """Start a function in a fresh process that has imported what a merge needs."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["merganser.engine.run", "merganser.engine.merge", "pytest"])
    process = context.Process(target=target, args=arguments)
    process.start()
    return process  # type: ignore[return-value]


def merge_and_die(recipe: Any, out: Path, after: int | str, options: dict[str, Any]) -> None:
    """Merge with small blocks and die when that many things were told, or where the name says."""
    patch = pytest.MonkeyPatch()
    shrink_blocks(patch)
    if after == "before the rename":
        patch.setattr(staging, "publish", lambda *arguments: die())
    elif after == "before the side files":
        patch.setattr(run, "write_rest", lambda *arguments, **keys: die())
    merge(recipe, out, progress=Killer(after) if isinstance(after, int) else None, **options)
    sys.exit(0)


def merge_slowly(recipe: Any, out: Path, note: Path) -> None:
    """Merge with small blocks, slowly; exit with 130 when interrupted."""
    shrink_blocks(pytest.MonkeyPatch())
    try:
        merge(recipe, out, progress=Slow(note), threads=2)
    except Interrupted as error:
        note.with_suffix(".said").write_text(str(error))
        sys.exit(130)
