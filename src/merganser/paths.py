"""Paths as people write them, of which some cannot be looked for."""

from __future__ import annotations

from pathlib import Path

__all__ = ["exists"]


def exists(path: str | Path) -> bool:
    """Return whether something has this path, in which `~` is a home folder.

    What the system refuses to look for does not exist: names that are too long or hold a NUL character, homes of
    unknown users, folders that must not be read.
    """
    try:
        return Path(path).expanduser().exists()
    except (OSError, RuntimeError, ValueError):
        return False
