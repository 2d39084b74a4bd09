"""Read the parameters of items from a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ...errors import TaskError, did_you_mean
from ...jsonfile import read_object
from .irt import Items, Numbers

_KEYS = ("discrimination", "difficulty")


def read_parameters(path: Path, counts: Mapping[str, int]) -> dict[str, Items]:
    """Read the parameters of the items of tasks.

    The file is a JSON object, `{"TASK": {"discrimination": [...], "difficulty": [...]}}`, with one number per item of the task;
    each discrimination may be a list of as many numbers as there are abilities.

    Args:
        path: The file.
        counts: Number of items of each task.

    Returns:
        The parameters by task.

    Raises:
        TaskError: A task or a number is missing, unknown, or wrong.
        MergeError: The file cannot be read.
    """
    found = read_object(path)
    for task in found:
        if task not in counts:
            raise TaskError(
                f"{path}: {task!r} is not a task here.{did_you_mean(task, counts)} Tasks: {', '.join(counts)}"
            )
    items = {}
    for task, count in counts.items():
        entry = found.get(task)
        if not isinstance(entry, dict):
            raise TaskError(f"{path}: {task}: expected an object with {' and '.join(_KEYS)}, got {_kind(entry)}")
        for key in entry:
            if key not in _KEYS:
                raise TaskError(f"{path}: {task}: unknown key {key!r}.{did_you_mean(key, _KEYS)}")
        slopes, levels = (_numbers(entry.get(key), count, f"{path}: {task}: {key}") for key in _KEYS)
        if levels.ndim != 1:
            raise TaskError(f"{path}: {task}: difficulty: expected one number per item, got lists")
        items[task] = Items(slopes[:, None] if slopes.ndim == 1 else slopes, levels)
    return items


def _numbers(value: object, count: int, where: str) -> Numbers:
    if not isinstance(value, list):
        raise TaskError(f"{where}: expected a list of {count} numbers, got {_kind(value)}")
    if len(value) != count:
        raise TaskError(f"{where}: has {len(value)} entries, and the task has {count} items here")
    flat = [number for each in value for number in (each if isinstance(each, list) else [each])]
    if not all(isinstance(number, int | float) and not isinstance(number, bool) for number in flat):
        raise TaskError(f"{where}: holds something that is not a number")
    widths = {len(each) if isinstance(each, list) else -1 for each in value}
    if len(widths) > 1 or 0 in widths:
        raise TaskError(f"{where}: all entries must be numbers, or lists of as many numbers")
    numbers = np.asarray(value, np.float64)
    if not np.isfinite(numbers).all():
        raise TaskError(f"{where}: holds a number that is not finite")
    return numbers


def _kind(value: object) -> str:
    return "nothing" if value is None else type(value).__name__
