"""Keep the permutations that were found in a folder beside the output, from which a killed run continues."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ...files import sealed_line, unseal_line
from ...jsonfile import open_regular
from ..output.failure import failures_of
from ..output.ownership import claim
from .assignment import Order, Orders

__all__ = ["Kept"]

_LONGEST = 1 << 24
"""Read lines up to this length, bytes: more than a line of the largest group has."""


class Kept:
    """The permutations of one pair of models.

    Args:
        folder: The folder that holds them; None to keep nothing.
        key: Hash of everything that decides the permutations.
    """

    def __init__(self, folder: Path | None, key: str) -> None:
        self._file = None if folder is None else folder / f"{key}.jsonl"
        self._key = key
        self.orders: Orders = {}
        if self._file is not None and self._file.exists():
            self._read(self._file)

    def add(self, orders: Orders) -> None:
        """Keep the orders of some groups.

        Raises:
            OutputError: They cannot be written.
        """
        self.orders |= orders
        if self._file is None:
            return
        moved = {name: _stored(order) for name, order in orders.items()}
        with failures_of(self._file):
            if not self._file.exists():
                claim(self._file.parent, [self._file.name])
            with self._file.open("ab") as file:
                file.write(sealed_line({"orders": moved}, self._key))

    def _read(self, path: Path) -> None:
        """Read what an earlier run found, up to the first line that is cut off or damaged, and cut the file there."""
        length = 0
        with failures_of(path):
            with open_regular(path) as lines:
                for line in iter(lambda: lines.readline(_LONGEST), b""):
                    entry = unseal_line(line, self._key)
                    if entry is None:
                        break
                    length += len(line)
                    self.orders |= {name: _order(stored) for name, stored in entry["orders"].items()}
            with path.open("r+b") as file:
                file.truncate(length)


def _stored(order: Order) -> list[int] | int:
    """Return an order as JSON: the number of its units if none is moved."""
    return len(order) if (order == np.arange(len(order))).all() else order.tolist()


def _order(stored: list[int] | int) -> Order:
    return np.arange(stored) if isinstance(stored, int) else np.array(stored, np.int64)
