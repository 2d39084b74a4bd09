"""Statistics from data as methods are handed them: a tensor per model, in memory only while it is used."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import overload

from torch import Tensor

Data = Mapping[str, Sequence[Tensor]]
"""By the name under which a method takes it, a tensor per model."""


class PerModel(Sequence[Tensor]):
    """A tensor per model, made each time that it is asked for.

    Args:
        count: Number of models.
        make: Returns the tensor of one of them.
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
        """Make the tensor of a model, or of several."""
        found = range(self._count)[index]
        return self._make(found) if isinstance(found, int) else [self._make(i) for i in found]
