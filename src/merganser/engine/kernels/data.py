"""Statistics from data as methods receive them: one tensor per model, in memory only while it is used."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import overload

from torch import Tensor

Data = Mapping[str, Sequence[Tensor]]
"""One tensor per model, by argument name of the method."""


class PerModel(Sequence[Tensor]):
    """A sequence of one tensor per model; each access creates the tensor anew.

    Args:
        count: Number of models.
        make: Returns the tensor of a model, given its index.
    """

    def __init__(self, count: int, make: Callable[[int], Tensor]) -> None:
        self._count = count
        self._make = make

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Tensor: ...

    @overload
    def __getitem__(self, index: slice) -> list[Tensor]: ...

    def __getitem__(self, index: int | slice) -> Tensor | list[Tensor]:
        """Create the tensor of one model, or of several."""
        found = range(self._count)[index]
        return self._make(found) if isinstance(found, int) else [self._make(i) for i in found]
