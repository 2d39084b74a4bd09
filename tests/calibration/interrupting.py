"""A run of ours that is killed at its very end, while it removes what only its making needed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from merganser.calibration.output import target


class Stop(BaseException):
    """As a kill: no code of ours runs after it but `finally`."""


@contextmanager
def killed_after_removing(count: int) -> Iterator[None]:
    """End what runs in the context once so many folders or files were removed at the end."""
    remove, removed = target._remove, []

    def removing(path: Path) -> None:
        remove(path)
        removed.append(path.name)
        if len(removed) == count:
            raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target, "_remove", removing)
        with pytest.raises(Stop):
            yield
