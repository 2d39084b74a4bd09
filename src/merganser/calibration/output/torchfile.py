"""Working files of tensors in the format of torch: what a run needs until its end, and what a continued run begins with."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from ...errors import OutputError
from ...jsonfile import os_reason

__all__ = ["load_working", "save_working"]


def save_working(value: object, path: Path) -> None:
    """Write tensors, and lists, tuples and mappings of them.

    Raises:
        OutputError: The disk is full or failed.
    """
    try:
        torch.save(value, path)
    except (OSError, RuntimeError) as error:
        reason = os_reason(error) if isinstance(error, OSError) else str(error)
        raise OutputError(f"{path}: cannot be written: {reason}; make room, or choose another disk") from None


def load_working(path: Path) -> Any:
    """Return what `save_working` wrote.

    Raises:
        OutputError: The file is missing or damaged.
    """
    try:
        return torch.load(path, weights_only=True)
    except OSError as error:
        raise OutputError(f"{path}: cannot be read: {os_reason(error)}; start again") from None
    # what torch raises depends on where a file is cut off, and its messages are about other things
    except (RuntimeError, EOFError, pickle.UnpicklingError):
        raise OutputError(f"{path}: is damaged; start again") from None
