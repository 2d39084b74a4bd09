"""How a method for weights treats low-rank changes: found out by trying it on small random matrices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ...errors import MergeError
from ...method import MergeMethod
from ..kernels.merge_tensor import merge_tensor
from .space import open_space

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Kind", "kind_of"]

_RANK = 2
_TOLERANCE = 1e-5


@dataclass(frozen=True, slots=True)
class Kind:
    """How a method treats changes of weights.

    Args:
        of_changes: Whether its result depends only on the changes, not on the base.
        space: Which sides of the factors may be reduced to common bases, so that the result is the same as on whole
            matrices; None if none may.
    """

    of_changes: bool
    space: tuple[bool, bool] | None


def kind_of(method: MergeMethod, parameters: Mapping[str, Any], count: int, seed: int) -> Kind:
    """Try a method on random changes of low rank.

    Args:
        method: The method.
        parameters: Its parameters of one tensor, by their names in recipes.
        count: Number of models.
        seed: Seed of the method's random draws.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    rows, columns = 3 * count * _RANK + 4, 3 * count * _RANK + 1
    pairs = [(draw(rows, _RANK), draw(_RANK, columns)) for _ in range(count)]
    changes, base = [left @ right for left, right in pairs], draw(rows, columns)

    def merged(start: Tensor, changed: list[Tensor]) -> Tensor:
        own = None if method.base == "unused" else start
        try:
            return merge_tensor(method, own, [start + each for each in changed], parameters, seed=seed) - start
        except MergeError:
            # some layers may take parameters that others do not
            return torch.full_like(start, torch.nan)

    plain = merged(torch.zeros_like(base), changes)

    def same(found: Tensor) -> bool:
        return bool((found - plain).norm() <= _TOLERANCE * plain.norm().clamp(min=1e-12))

    def lossless(left: bool, right: bool) -> bool:
        space = open_space(pairs, reduce_left=left, reduce_right=right)
        small = merged(torch.zeros_like(space.matrices[0]), space.matrices)
        if not torch.isfinite(small).all():
            return False
        found = space.expand(small, None)
        return same(found.left @ found.right)

    sides = [(True, True), (True, False), (False, True)]
    return Kind(same(merged(base, changes)), next((side for side in sides if lossless(*side)), None))
