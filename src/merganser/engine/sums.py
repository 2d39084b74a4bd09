"""Sums that come out the same whoever added what first."""

from __future__ import annotations

from typing import Any

from torch import Tensor


class Sum:
    """The sum of what tasks measured.

    Whole numbers are added when they arrive. Others, whose sum depends on the order, are kept and added in the order
    of their keys when the total is asked for.
    """

    def __init__(self) -> None:
        self._whole: Tensor | None = None
        self._parts: dict[Any, Tensor] = {}

    @property
    def empty(self) -> bool:
        """Whether nothing was added."""
        return self._whole is None and not self._parts

    def add(self, key: Any, part: Tensor) -> None:
        """Add a tensor, int64 or float64; keys of one sum can be compared with each other."""
        if part.is_floating_point():
            self._parts[key] = part
        else:
            self._whole = part if self._whole is None else self._whole + part

    def merge(self, other: Sum) -> None:
        """Add all that was added to another sum."""
        if other._whole is not None:
            self.add(None, other._whole)
        self._parts.update(other._parts)

    def total(self) -> Tensor:
        """Return the sum.

        Raises:
            ValueError: Nothing was added.
        """
        parts = [self._parts[key] for key in sorted(self._parts)]
        if self._whole is not None:
            parts.append(self._whole)
        if not parts:
            raise ValueError("nothing was added")
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total
