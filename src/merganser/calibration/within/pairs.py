"""Cross moments: the inputs of a matrix in the merged model against those in a model itself, token by token."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ...statistics import COUNT
from ..forward.skeleton import Skeleton
from ..output.writer import Sum
from ..sums.reducers import CrossGram, products_of
from ..sums.taps import Tapped

__all__ = ["CROSS_GRAM", "Pairs", "planned_pairs"]

CROSS_GRAM = "cross_gram"


class Pairs:
    """Sums over pairs of inputs of the matrices in a block.

    For each batch, all inputs in the merged model come first, then those in the model itself. Experts of a mixture have
    no pairs, since the two models may choose different experts for a token.
    """

    def __init__(self) -> None:
        self._merged: dict[tuple[str, int], Tensor] = {}
        self._sums: dict[str, CrossGram] = {}

    def observe_merged(self, parameter: str, call: int, rows: Tensor) -> None:
        """Keep the inputs of a use of a matrix in the merged model, shape [tokens, in]."""
        self._merged[parameter, call] = rows

    def observe_own(self, parameter: str, call: int, rows: Tensor) -> None:
        """Add the inputs of the same use of the matrix in the model itself, shape [tokens, in]."""
        self.add(parameter, self._merged.pop((parameter, call)), rows)

    def add(self, parameter: str, first: Tensor, second: Tensor) -> None:
        """Add two inputs of a matrix for the same tokens, both of shape [tokens, in]."""
        if parameter not in self._sums:
            self._sums[parameter] = CrossGram(second.shape[1])
        with products_of(torch.promote_types(first.dtype, second.dtype)):
            self._sums[parameter].add(first.float(), second.float())

    def added_to(self, skeleton: Skeleton, collected: Iterable[Tapped]) -> list[Tapped]:
        """Return the sums of the merged model that have pairs, with the cross moments."""
        found: list[Tapped] = []
        for own in collected:
            parameter = skeleton.targets[own.names[0]].parameter
            if parameter in self._sums:
                reducer = self._sums.pop(parameter)
                found.append(_with_cross(own, reducer.result))
        return found


def planned_pairs(skeleton: Skeleton, collected: Iterable[Tapped]) -> list[Tapped]:
    """Return those sums of a block, without values, that will have pairs, with the cross moments."""
    experts = {name for name, target in skeleton.targets.items() if target.index is not None}
    return [
        _with_cross(own, lambda: torch.empty(0))
        for own in collected
        if not own.sums[COUNT].shape and not experts.intersection(own.names)
    ]


def _with_cross(own: Tapped, take: Callable[[], Tensor]) -> Tapped:
    cross = Sum(CrossGram.shape_of(own.width), CrossGram.stored_as, take)
    return Tapped(own.names, own.axis, own.width, {**own.sums, CROSS_GRAM: cross})
