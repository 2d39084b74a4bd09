"""Folders that many tests want alike: made once in a process, and copied."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

FOLDER: list[Path] = []
"""Where they are; the fixture of the session says it."""


def copied(folder: Path, key: str, make: Callable[[Path], object]) -> Path:
    """Write what `make` writes into a folder; `key` tells it from everything else that is made so."""
    made = FOLDER[0] / hashlib.sha256(key.encode()).hexdigest()[:20]
    if not made.exists():
        make(made.with_suffix(".unfinished"))
        made.with_suffix(".unfinished").rename(made)
    shutil.copytree(made, folder, dirs_exist_ok=True)
    return folder
