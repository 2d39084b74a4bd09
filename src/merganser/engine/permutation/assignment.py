"""Assign units to each other by their scores: the best one-to-one match, and memory for the comparison."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ...anatomy.symmetry import Units
from ...errors import MemoryLimitError, UnsupportedError
from ...wording import size_text

__all__ = [
    "Order",
    "Orders",
    "Scores",
    "assign",
    "assign_groups",
    "better",
    "check_memory",
    "nothing_moved",
    "simple",
    "value",
]

Order = npt.NDArray[np.int64]
Orders = dict[str, Order]
"""For each group of units, by its name: which unit of the model each unit of the result is."""

Scores = npt.NDArray[np.float32]

_GAIN = 1e-6
"""Smallest gain of a step, relative to its value; smaller ones may be rounding."""


def nothing_moved(units: Sequence[Units]) -> Orders:
    """Return the orders that leave every unit where it is."""
    each = [one for group in units for one in (group, group.inner) if one is not None]
    return {one.name: np.arange(one.size) for one in each}


def simple(scores: Scores) -> Order | None:
    """Return the best assignment if every row has its largest score in a column of its own, else None.

    A row whose unit scores best where it is stays there, also if another scores as much.
    """
    size = len(scores)
    if (scores.diagonal() >= scores.max(axis=1)).all():
        return np.arange(size)
    columns: Order = scores.argmax(axis=1).astype(np.int64)
    return columns if len(np.unique(columns)) == size else None


def assign(scores: Scores) -> Order:
    """Return the assignment with the largest sum of scores: for each row its column, each column once.

    Raises:
        UnsupportedError: The best columns of two rows are the same, which needs SciPy, and it is not installed.
    """
    found = simple(scores)
    if found is not None:
        return found
    try:
        from scipy.optimize import linear_sum_assignment
    except ModuleNotFoundError:
        raise UnsupportedError("aligning these models needs SciPy: pip install 'merganser[align]'") from None
    assigned: Order = linear_sum_assignment(scores, maximize=True)[1].astype(np.int64)
    return assigned


def assign_groups(groups: Scores, heads: Scores) -> tuple[Order, Order]:
    """Assign groups of heads, and within each pair of groups their heads.

    Args:
        groups: Scores of what a group has once (its keys and values), shape [groups, groups].
        heads: Scores of its heads, those of one group next to each other, shape [heads, heads].

    Returns:
        The orders of the groups, and of all heads.
    """
    count, each = len(groups), len(heads) // len(groups)
    blocks = heads.reshape(count, each, count, each).transpose(0, 2, 1, 3)
    if (heads.diagonal() >= heads.max(axis=1)).all() and (groups.diagonal() >= groups.max(axis=1)).all():
        return np.arange(count), np.arange(len(heads))
    inner = {(i, j): assign(blocks[i, j]) for i in range(count) for j in range(count)}
    sums = [[float(groups[i, j]) + value(blocks[i, j], inner[i, j]) for j in range(count)] for i in range(count)]
    outer = assign(np.array(sums, np.float32))
    return outer, np.concatenate([j * each + inner[i, int(j)] for i, j in enumerate(outer)])


def check_memory(group: Units, needed: int, allowed: int) -> None:
    """Check that the units of a group can be compared.

    Args:
        group: The group.
        needed: What that takes, bytes.
        allowed: What it may take, bytes.

    Raises:
        MemoryLimitError: It takes more.
    """
    if needed > allowed:
        raise MemoryLimitError(
            f"{group.name}: comparing {group.size:,} units takes {size_text(needed)}, and {size_text(allowed)} are allowed; "
            f"raise --max-memory, or leave {group.kind!r} out of 'units'"
        )


def value(scores: Scores, order: Order) -> float:
    """Return the sum of the scores of an assignment."""
    return float(scores[np.arange(len(order)), order].sum(dtype=np.float64))


def better(before: float, after: float) -> bool:
    """Return whether a sum of scores is larger than another by more than rounding."""
    return after > before + _GAIN * abs(before)
