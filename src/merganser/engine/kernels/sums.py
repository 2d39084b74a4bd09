"""Sums whose result does not depend on the order in which workers add to them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Sum:
    """The sum of what tasks measured, or the elementwise maximum.

    Integers are added when they arrive. A sum of floats depends on the order, so these are kept and added in the order
    of their keys when the total is computed.

    Args:
        largest: Take the elementwise maximum. An empty sum takes over the setting of the first one merged into it.
    """

    def __init__(self, *, largest: bool = False) -> None:
        self._largest = largest
        self._whole: Tensor | None = None
        self._parts: dict[Any, Tensor] = {}

    @property
    def empty(self) -> bool:
        """Whether nothing was added."""
        return self._whole is None and not self._parts

    def add(self, key: Any, part: Tensor) -> None:
        """Add a tensor, int64 or float64; keys of one sum can be compared with each other."""
        if part.is_floating_point() and not self._largest:
            self._parts[key] = part
        elif self._whole is None:
            self._whole = part
        else:
            self._whole = join(self._whole, part, largest=self._largest)

    def merge(self, other: Sum) -> None:
        """Add all that was added to another sum."""
        self._largest |= other._largest
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


def join(total: Tensor, part: Tensor, *, largest: bool) -> Tensor:
    """Return the sum of two measurements, or the larger of each entry."""
    return torch.maximum(total, part) if largest else total + part
