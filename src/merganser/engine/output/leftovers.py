"""Working folders beside a target, once that is written: removed so that a kill meanwhile leaves nothing for good."""

from __future__ import annotations

import contextlib
import glob
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ...errors import OutputError
from .lock import lock_target
from .ownership import Owned, survey, survey_each

__all__ = ["discard", "sweep"]

_DONE = ".done"


def discard(home: Path, look: Callable[[Path], Owned] = survey) -> None:
    """Remove a working folder that nothing needs any more, unless it holds anything that merganser did not write.

    It first gets a name by which `sweep` knows it: of one that a killed run left as it was, the next run goes on.

    Args:
        home: The folder; it need not exist.
        look: Lists its files, and refuses those of others: `survey`, or `survey_each` for a folder of outputs.
    """
    with contextlib.suppress(OSError):
        found, done = look(home), home.with_name(f"{home.name}{_DONE}")
        _remove(done)
        home.rename(done)
        replace(found, folder=done).remove()
        if done.exists():
            # something of others came meanwhile, and stays where it was put
            done.rename(home)


def sweep(out: Path) -> None:
    """Remove what killed runs left of working folders that nothing needs any more.

    Args:
        out: The target beside which they are.
    """
    with contextlib.suppress(OSError, ValueError):
        for path in out.parent.glob(f".{glob.escape(out.name)}.*{_DONE}"):
            # taking the lock that the folder had removes that, too
            guard = lock_target(out, path.with_name(f"{path.name.removesuffix(_DONE)}.lock"))
            try:
                _remove(path)
            finally:
                guard.release()


def _remove(done: Path) -> None:
    """Remove a folder that a killed run left, of either kind."""
    try:
        found = survey(done)
    except OutputError:
        found = survey_each(done)
    found.remove()
